"""Check what a module may know: imports point to lower places, heavy libraries load late, one module writes,
no text that was read is run, a public name occurs once, and what is imported is declared.

The table of folders is in tools/_report.py.

usage: python tools/check_layers.py [ROOT]
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

from _report import FOLDERS, HEART, RESOLVES, main, modules, pages, places, twice

LIGHT = ("config", "registry", "settings", "guard", "run_layout", "cli")  # behind every command
RUNS = {"eval", "exec", "compile", "__import__"}
MAY_RUN = {"own_code"}  # what somebody has trusted, by its hash
YAML_LOADERS = {"unsafe_load", "full_load", "load_all", "unsafe_load_all", "full_load_all"}
LATE = {"matplotlib", "sklearn", "torchvision", "scipy", "pandas", "PIL", "tqdm", "ipywidgets"}
VENDORED = {"IPython"}  # there whenever a notebook runs; looked for, never imported first
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
WRITES = {"write_text", "write_bytes", "unlink", "rmdir", "rename", "mkdir", "touch", "rmtree"}
OS_WRITES = {"replace", "remove", "makedirs", "truncate", "ftruncate", "link", "symlink", "write"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    "Line and dotted name of everything imported, at any depth"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["minsnr_nb" if node.level else "", node.module]))
            names = [f"{base}.{a.name}" for a in node.names] if base == "minsnr_nb" else [base]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and _called(node)[1] == "import_module" and node.args:
            if isinstance(name := getattr(node.args[0], "value", None), str):
                yield node.lineno, f"minsnr_nb{name}" if name.startswith(".") else name


def _called(node: ast.Call) -> tuple[str, str]:
    "Owner and name of what is called: `os.replace(...)` is ('os', 'replace')"
    if isinstance(node.func, ast.Attribute):
        return getattr(node.func.value, "id", ""), node.func.attr
    return "", getattr(node.func, "id", "")


def targets(tree: ast.AST, known: dict) -> Iterator[tuple[int, str]]:
    "Line and name of the modules of this package that are imported"
    for line, name in imports(tree):
        inner = name.removeprefix("minsnr_nb.")
        if name.startswith("minsnr_nb.") and (found := _longest(inner, known)):
            yield line, found


def _longest(dotted: str, known: dict) -> str | None:
    "The module in `record.git.git_state`"
    parts = dotted.split(".")
    tries = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((t for t in tries if t in known), None)


def upward(name: str, tree: ast.AST, place: dict[str, tuple]) -> Iterator[str]:
    "Imports of a module that stands higher, or beside"
    for line, other in targets(tree, place):
        if other != name and place[other] >= place[name]:
            here, there = (" in ".join(f"{n:g}" for n in reversed(place[m])) for m in (name, other))
            yield f"{line}: imports {other} ({there}), which is not below {here}"


def forbidden(name: str, tree: ast.AST, place: dict[str, tuple]) -> Iterator[str]:
    "Imports of a folder or library that this part of the package never imports"
    folder = name.rpartition(".")[0]
    without = FOLDERS[folder].without if folder else ()
    if not folder and any(low <= place[name][0] <= high for low, high in HEART):
        without = ("record",)
    for line, target in imports(tree):
        first = target.removeprefix("minsnr_nb.").split(".")[0]
        if first in without or (without and first == "run_layout" and "record" in without):
            yield f"{line}: imports {target}; {folder or 'the heart'} never imports {first}"
        if target == "minsnr_nb.cli":
            yield f"{line}: imports cli; nothing does"


def resolved(name: str, tree: ast.AST) -> Iterator[str]:
    "Entries that are looked up by a name from a config, outside the module that may"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "bind" and node.args:
            if isinstance(node.args[0], ast.Attribute) and name not in RESOLVES:
                yield f"{node.lineno}: resolves a name of the config; {', '.join(RESOLVES)} does that"


def exported(tree: ast.Module) -> list[str] | None:
    "`__all__`, None when there is none"
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return None


def unexported(tree: ast.Module) -> Iterator[str]:
    "Public functions and classes that `__all__` leaves out, and names in it that do not exist"
    listed, defined, given = exported(tree), set(), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            patch = any("patch" in ast.dump(d) for d in node.decorator_list)
            (given if patch else defined).add(node.name)
        for target in node.targets if isinstance(node, ast.Assign) else ():
            given |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        if isinstance(node, ast.AnnAssign):
            given.add(node.target.id)
    if listed is None:
        yield "1: no __all__"
        return
    public = {n for n in defined if not n.startswith("_")}
    yield from (f"1: __all__ lacks {n}" for n in sorted(public - set(listed)))
    yield from (
        f"1: __all__ lists {n}: no such name" for n in sorted(set(listed) - defined - given)
    )


def undeclared(root: Path, trees: dict[str, ast.Module]) -> Iterator[str]:
    "Libraries that are imported and not asked for in pyproject.toml"
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *chain(*project.get("optional-dependencies", {}).values())]
    declared = {re.match(r"[\w.-]+", a)[0].lower().replace("_", "-") for a in asked}
    owner = metadata.packages_distributions()
    for name, tree in trees.items():
        for line, target in imports(tree):
            top = target.split(".")[0]
            if top in sys.stdlib_module_names or top == "minsnr_nb":
                continue
            homes = {d.lower().replace("_", "-") for d in owner.get(top, [top])}
            if not homes & declared and top not in VENDORED:
                yield f"minsnr_nb/{name.replace('.', '/')}.py:{line}: {top} is not in pyproject.toml"


def early(tree: ast.Module) -> Iterator[str]:
    "Heavy libraries imported before anyone asked for them, and pickles at any time"
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for line, target in imports(statement):
                if target.split(".")[0] in LATE:
                    yield f"{line}: imports {target} at the top; do it in the function that needs it"
    for line, target in imports(tree):
        if target.split(".")[0] in PICKLES:
            yield f"{line}: imports {target}: no pickle anywhere"


def writes(tree: ast.AST) -> Iterator[str]:
    "Calls that change files"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, name = _called(node)
        values = [*node.args, *(k.value for k in node.keywords)]
        texts = [v.value for v in values if isinstance(getattr(v, "value", None), str)]
        opens = name in ("open", "fdopen") and any(
            re.fullmatch("[rbt]*[wax+][rbt+]*", t) for t in texts
        )
        if opens or name in WRITES or (owner == "os" and name in OS_WRITES):
            yield f"{node.lineno}: {owner + '.' if owner else ''}{name}: only durable changes files"
        if owner == "torch" and name in ("save", "load"):
            yield f"{node.lineno}: torch.{name} is a pickle; use safetensors"


def unsafe(tree: ast.AST) -> Iterator[str]:
    "Calls that turn text from a file into code"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, name = _called(node)
        constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
        if (isinstance(node.func, ast.Name) and name in RUNS and not constant) or (
            name == "import_module" and not constant
        ):
            yield f"{node.lineno}: {name}: nothing is run or imported by a name that was read"
        if owner == "yaml" and name in YAML_LOADERS:
            yield f"{node.lineno}: yaml.{name}: read_yaml is the strict reader"
        for word in node.keywords:
            if (
                word.arg in ("allow_pickle", "shell")
                and getattr(word.value, "value", None) is not False
            ):
                yield f"{node.lineno}: {word.arg}: must stay False"
        if owner == "os" and name in ("system", "popen"):
            yield f"{node.lineno}: os.{name}: hand subprocess a list of words"


def heavy(root: Path, known: dict) -> Iterator[str]:
    "Modules behind every command, and whole folders, that bring torch with them"
    light = [m for m in LIGHT if m in known]
    light += [m for m in known if "torch" in FOLDERS.get(m.rpartition(".")[0], ((), ()))[1]]
    if _loaded(root, light):  # one process for all, and one for each only when there is trouble
        for module in light:
            if trouble := _loaded(root, [module]):
                yield f"minsnr_nb/{module.replace('.', '/')}.py: {trouble}"


def _loaded(root: Path, names: list[str]) -> str:
    "Import in a fresh process and say what is wrong with that"
    code = "import minsnr_nb\n" + "".join(f"import minsnr_nb.{m}\n" for m in names)
    code += "import sys; sys.exit(3 if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        return f"cannot be imported: {done.stderr.splitlines()[-1]}"
    return "importing it imports torch" if done.returncode else ""


def numbers(root: Path) -> Iterator[str]:
    "Numbers that occur twice in a folder, and folders that the table does not know"
    numbered = [p for p in pages(root) if re.match(r"\d\d_", p.stem)]
    for key, first, again in twice((f"{p.parent}/{p.stem[:2]}", p.name) for p in numbered):
        yield f"nbs/{Path(key).parent / again}: the number of {first}; a number occurs once in a folder"
    for folder in {p.parent.as_posix() for p in numbered} - FOLDERS.keys() - {"."}:
        yield f"nbs/{folder}: not in the table of folders (tools/_report.py)"


def findings(root: Path) -> Iterator[str]:
    place, known = places(root), modules(root)
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in known.items()}
    yield from numbers(root)
    for name, tree in trees.items():
        file = f"minsnr_nb/{name.replace('.', '/')}.py"
        if name not in place:
            yield f"{file}: no notebook of that name, and not in tools/_report.py"
            continue
        found = [*upward(name, tree, place), *forbidden(name, tree, place), *early(tree)]
        found += [*(unsafe(tree) if name not in MAY_RUN else ()), *resolved(name, tree)]
        found += unexported(tree) if name != "all" else []
        found += writes(tree) if name != "durable" else []
        yield from (f"{file}:{line}" for line in found)
    public = ((n, m) for m, t in trees.items() if m != "all" for n in exported(t) or ())
    for name, first, again in twice(public):
        yield f"minsnr_nb/{again.replace('.', '/')}.py: {name} is a public name of {first} already"
    yield from undeclared(root, trees)
    yield from heavy(root, known)


if __name__ == "__main__":
    main(findings)
