"""Check that the pages name only what exists: commands, files, links, config keys, modules and their names, pages of
the site. And that whatever a user can type or open is named on a page: every verb, key, registry and entry of a run
directory; whatever a module exports says in a line what it is.

usage: python tools/docs_sync_check.py [ROOT]
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import _report
import yaml

TOP = "nbs minsnr_nb configs tests tools .ci .github".split()  # where a named path must exist
SPAN = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
TEST = re.compile(r"^def (test_\w+)", re.M)
SHARED = re.compile(r"<!-- shared: (\w+) -->\n(.*?)<!-- end -->", re.S)


def pages(root: Path) -> dict[str, str]:
    "The prose of the repository: pages, and the markdown cells of notebooks"
    texts = [*root.glob("*.md"), *root.glob("nbs/*.qmd"), *root.glob("nbs/docs/*.qmd")]
    found = {p.relative_to(root).as_posix(): p.read_text("utf-8") for p in sorted(texts)}
    for path in _report.pages(root):
        cells = json.loads((root / "nbs" / path).read_text("utf-8"))["cells"]
        prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        found[f"nbs/{path.as_posix()}"] = "\n\n".join(prose)
    return found


def code(text: str) -> Iterator[str]:
    "Every inline code span and every line of a code block, without its comment"
    blocks = FENCE.findall(text)
    lines = [line for block in blocks for line in block.splitlines()]
    for snippet in [*SPAN.findall(FENCE.sub("", text)), *lines]:
        yield re.sub(r"(^|\s+)#\s.*$", "", snippet).strip()


@cache
def verbs(root: Path) -> frozenset[str]:
    "What `minsnr` can do"
    code = "from minsnr_nb.cli import VERBS; print(*VERBS, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    return frozenset(done.stdout.splitlines())


def scripts(root: Path) -> set[str]:
    "Commands that pyproject.toml installs"
    return set(tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["scripts"])


def commands(root: Path, snippet: str) -> Iterator[str]:
    "Commands that do not exist"
    for name in re.findall(r"\buv run (?:--?[\w-]+ )*([\w.-]+)", snippet):
        if name not in scripts(root) and not shutil.which(name, path=Path(sys.executable).parent):
            yield f"`uv run {name}`: no such command"
    for verb, second in re.findall(
        r"(?:^|uv run |&& )minsnr (?!-)([A-Za-z]+)\b(?: ([a-z-]+))?", snippet
    ):
        if not {verb, f"{verb} {second}"} & verbs(root):
            yield f"`minsnr {verb}`: no such verb; known: {', '.join(sorted(verbs(root)))}"


def paths(root: Path, snippet: str) -> Iterator[str]:
    "Files of this repository that do not exist"
    for word in re.findall(rf"(?<![\w/.*])(?:{'|'.join(map(re.escape, TOP))})/[\w./-]+", snippet):
        if not (root / word.rstrip(".")).exists() and not re.search(r"NN|[<*{…]", snippet):
            yield f"`{word}`: no such file"
    page = re.fullmatch(r"(\w+/)?\d\d_\w+", snippet)
    if page and not (root / f"nbs/{snippet}.ipynb").exists():
        yield f"`{snippet}`: no such notebook"


def constants(root: Path, snippet: str) -> Iterator[str]:
    "Registries and tables in capitals that no module has"
    if re.fullmatch(r"[A-Z]{4,}S", snippet):
        if not re.search(rf"^{snippet}\b.*=", _sources(root), re.M):
            yield f"`{snippet}`: no module defines it"


@cache
def modules(root: Path) -> dict[str, ast.Module]:
    "Every module of the package, parsed"
    package = root / "minsnr_nb"
    inits = {".".join(p.parent.relative_to(root).parts): p for p in package.rglob("__init__.py")}
    named = {f"minsnr_nb.{name}": p for name, p in _report.modules(root).items()}
    return {name: ast.parse(p.read_text("utf-8")) for name, p in (inits | named).items()}


@cache
def _sources(root: Path) -> str:
    "The text of the whole package"
    return "".join(p.read_text("utf-8") for p in sorted((root / "minsnr_nb").rglob("*.py")))


@cache
def inside(tree: ast.Module) -> frozenset[str]:
    "What can be imported from a module"
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return frozenset(found)


def imported(text: str) -> Iterator[str]:
    "Dotted names in the code of a page: `minsnr_nb.x.y` for both ways to write it"
    said = "\n".join(code(text))
    for home, many, few in re.findall(
        r"\bfrom (minsnr_nb[\w.]*) import (?:\(([^)]*)\)|([\w ,]+))", said
    ):
        for name in filter(None, re.split(r"[\s,]+", re.sub(r" as \w+", "", many or few))):
            yield f"{home}.{name}"
    yield from re.findall(r"(?<![\w./-])minsnr_nb(?:\.\w+)+", said)


def names(root: Path, text: str) -> Iterator[str]:
    "Modules of the package, and names in them, that do not exist"
    known = modules(root)
    for dotted in imported(text):
        parts = dotted.split(".")
        if f'"{dotted}"' in _sources(root) or dotted in known:  # a group of plug-ins, a module
            continue
        n = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known)
        home, name = ".".join(parts[:n]), parts[n]
        if name not in inside(known[home]):
            kind = "no such name" if home not in _folders(known) else "no such module"
            yield f"`{dotted}`: {home} has {kind}"


def _folders(known: dict) -> set[str]:
    "The package and its wings"
    return {name.rpartition(".")[0] for name in known} & known.keys()


def _one_name(statement: ast.stmt) -> bool:
    "Whether a statement is `name = …`"
    return isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)


def unexplained(root: Path) -> Iterator[str]:
    "Functions and classes that a module exports without a line on what they are"
    for module, tree in modules(root).items():
        assigned = {s.targets[0].id: s.value for s in tree.body if _one_name(s)}
        exported = ast.literal_eval(assigned["__all__"]) if "__all__" in assigned else ()
        for node in (n for n in tree.body if getattr(n, "name", None) in exported):
            if len((ast.get_docstring(node) or "").splitlines()) != 1:
                where = f"{module.replace('.', '/')}.py:{node.lineno}"
                yield f"{where}: {node.name}: say in one line what it is"


@cache
def schema() -> dict[str, set[str] | None]:
    "Sections of the config with their keys; None where a lane decides"
    from pydantic import BaseModel

    from minsnr_nb.config import Config, Lane

    found: dict[str, set[str] | None] = {}
    for name, field in Config.model_fields.items():
        kind = field.annotation
        fixed = (
            isinstance(kind, type) and issubclass(kind, BaseModel) and not issubclass(kind, Lane)
        )
        found[name] = set(kind.model_fields) if fixed else None
    return found


def keys(snippet: str) -> Iterator[str]:
    "Config keys that no section has"
    sections = "|".join(schema())
    for section, key in re.findall(rf"(?:^|\s)({sections})\.([a-z_0-9]+)(?:$|\s|=)", snippet):
        known = schema()[section]
        if known is not None and key not in known:
            yield f"`{section}.{key}`: no such key; known: {', '.join(sorted(known))}"


@cache
def public(root: Path) -> tuple[tuple[str, str], ...]:
    "Everything that a user meets by name: (what it is, how a page writes it)"
    code = """
import re
from pathlib import Path
from minsnr_nb.config import Config
for name, field in Config.model_fields.items():
    keys = getattr(field.annotation, "model_fields", {}).keys() - {"name"}
    print(*(f"key {name}.{k}" for k in sorted(keys)) if keys else [f"key {name}"], sep="\\n")
for path in sorted(Path("minsnr_nb").rglob("*.py")):
    for name in re.findall(r"^([A-Z_]+) = Registry\\(", path.read_text("utf-8"), re.M):
        print("registry", name)
if Path("minsnr_nb/record/directory.py").exists():
    from minsnr_nb.record.directory import LAYOUT
    print(*(f"entry {e.path}" for e in LAYOUT), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    found = [tuple(line.split(" ", 1)) for line in done.stdout.splitlines()]
    return (*(("verb", f"minsnr {verb}") for verb in sorted(verbs(root))), *found)


def unnamed(root: Path, texts: dict[str, str]) -> Iterator[str]:
    "Public things that no page names"
    said = "\n".join(snippet for text in texts.values() for snippet in code(text))
    for kind, name in public(root):
        if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w-])", said):
            yield f"the {kind} `{name}` is on no page; nbs/docs/reference.qmd lists them"


def links(root: Path, page: str, text: str) -> Iterator[str]:
    "Relative links that lead nowhere, and pictures that say nothing to who cannot see them"
    bare = FENCE.sub("", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", bare):
        file, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (root / page).parent / file if file else root / page
        if file and not path.exists():
            yield f"link to {target}: no such file"
        elif anchor and path.suffix in (".ipynb", ".qmd", ".md") and anchor not in anchors(path):
            yield f"link to {target}: that page has no heading of this name"
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", bare):
        if not alt.strip():
            yield f"picture {target}: say in its alternative text what it shows"


@cache
def anchors(path: Path) -> frozenset[str]:
    "What the headings of a page can be linked by"
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = (c for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
        text = "\n\n".join("".join(c["source"]) for c in cells)
    heads = re.findall(r"^#+ +(.+?)(?: \{#([\w-]+)[^}]*\})?$", FENCE.sub("", text), re.M)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"[`*$]", "", h)).strip().lower() for h, _ in heads)
    return frozenset([re.sub(r"\s+", "-", p) for p in plain] + [own for _, own in heads if own])


def formulas(text: str) -> Iterator[str]:
    "Formulas that a page would show as text: unbalanced, doubly escaped, or with a stray blank"
    bare = SPAN.sub("", FENCE.sub("", text))
    if len(re.findall(r"(?<!\\)\$\$", bare)) % 2:
        yield "a $$ without its other half"
    blocks = re.findall(r"\$\$(.+?)\$\$", bare, re.S)
    inline = re.findall(
        r"(?<![\\$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\d$])",
        re.sub(r"\$\$.+?\$\$", "", bare, flags=re.S),
    )
    for formula in [*blocks, *inline]:
        if formula.count("{") - formula.count(r"\{") != formula.count("}") - formula.count(r"\}"):
            yield f"formula {formula.strip()[:40]!r}: braces do not match"
        if re.search(r"\\\\[,;a-zA-Z]", formula):
            yield f"formula {formula.strip()[:40]!r}: escaped twice"


def shared(texts: dict[str, str]) -> Iterator[str]:
    "What README and the home page both say, said differently"
    front, home = (dict(SHARED.findall(texts.get(p, ""))) for p in ("README.md", "nbs/index.qmd"))
    if not front:
        yield "README.md: shares nothing with nbs/index.qmd"
    for name in sorted(front.keys() | home.keys()):
        if front.get(name) != home.get(name):
            yield f"README.md: the part {name!r} is not the same in nbs/index.qmd"


def sidebar(root: Path) -> Iterator[str]:
    "Pages that the site cannot reach, or names in vain"

    def files(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from (f for sub in entry["contents"] for f in files(sub))

    site = yaml.safe_load((root / "_quarto.yml").read_text("utf-8"))
    named = set(files(site["website"]["sidebar"]))
    there = {p.relative_to(root / "nbs").as_posix() for p in (root / "nbs").rglob("*.ipynb")}
    there |= {p.relative_to(root / "nbs").as_posix() for p in (root / "nbs").rglob("*.qmd")}
    there = {p for p in there if not any(part.startswith((".", "_")) for part in p.split("/"))}
    yield from (f"_quarto.yml: {p} is not there" for p in sorted(named - there))
    yield from (f"_quarto.yml: {p} is missing from the sidebar" for p in sorted(there - named))
    if (root / "nbs/_quarto.yml").read_bytes() != (root / "_quarto.yml").read_bytes():
        yield "nbs/_quarto.yml: is not _quarto.yml"


def named_tests(root: Path, text: str) -> Iterator[str]:
    "Tests that a page names and nobody wrote"
    known = {m for p in (root / "tests").rglob("*.py") for m in TEST.findall(p.read_text("utf-8"))}
    for name in re.findall(r"`(test_\w+)`", text):
        if name not in known and not (root / f"tests/{name}.py").exists():
            yield f"`{name}`: no such test"


def findings(root: Path) -> Iterator[str]:
    texts = pages(root)
    for page, text in texts.items():
        found = [*links(root, page, text), *formulas(text)]
        found += named_tests(root, text) if page == "nbs/docs/problems.qmd" else []
        for snippet in code(text):
            found += [*commands(root, snippet), *paths(root, snippet), *keys(snippet)]
            found += constants(root, snippet)
        found += names(root, text)
        yield from (f"{page}: {line}" for line in dict.fromkeys(found))
    yield from unnamed(root, texts)
    yield from unexplained(root)
    yield from shared(texts)
    yield from sidebar(root)


if __name__ == "__main__":
    _report.main(findings)
