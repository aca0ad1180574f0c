"""Check the notebooks: one module each, clean, of a readable size, and in step with the package.

usage: python tools/check_nbs.py [ROOT]
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

from _report import FOLDERS, PLAIN, main, module_of, pages

KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
MAX_BYTES, MAX_CELLS, MAX_TOP = 300_000, 120, 32
MIN_PROSE = (
    0.3  # markdown cells for each cell of code; a cell that holds only a heading does not count
)
MAX_EXPORT, MAX_CLASS = 25, 60  # lines of code in an exported cell; in one that is a single class


def default_exp(nb: dict) -> str | None:
    "The module that a notebook is exported to"
    found = [
        re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(c["source"]), re.M) for c in nb["cells"]
    ]
    return next((m[1] for m in found if m), None)


def page(path: Path, text: str, nb: dict) -> Iterator[str]:
    "What can be wrong with one notebook on its own"
    kinds = [c["cell_type"] for c in nb["cells"]]
    if nb["metadata"].get("kernelspec") != KERNEL:
        yield f"kernelspec is {nb['metadata'].get('kernelspec')}; wanted {KERNEL}"
    if len(text.encode()) > MAX_BYTES:
        yield f"{len(text.encode())} bytes; at most {MAX_BYTES}"
    if len(kinds) > MAX_CELLS:
        yield f"{len(kinds)} cells; at most {MAX_CELLS}"
    for cell in nb["cells"]:
        for out in cell.get("outputs", []):
            if out["output_type"] == "error" or out.get("name") == "stderr":
                yield f"cell {cell.get('id')}: a stored {out.get('name', 'error')} output"


def module(path: Path, exp: str | None) -> Iterator[str]:
    "One notebook = one module; the stem is the last part of its name, the folder the part before"
    wanted, folder = module_of(path), path.parent.as_posix()
    if exp and exp != wanted:
        yield f"exports to {exp!r}; a module has the folder and the stem of its notebook: {wanted}"
    if wanted is None and not (path.stem.startswith("study_") or folder == "docs"):
        yield "named neither NN_module nor study_name"
    if folder not in (".", "docs", *FOLDERS):
        yield f"{folder} is no wing (tools/_report.py)"


def shape(nb: dict) -> Iterator[str]:
    "Exported cells that are too long, and pages with too little prose"
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    texts = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"]
    prose = [t for t in texts if re.sub(r"(?m)^#.*$", "", t).strip()]
    if len(prose) < MIN_PROSE * len(code):
        yield f"{len(prose)} markdown cells with prose for {len(code)} of code"
    for cell in code:
        source = "".join(cell["source"])
        most = MAX_CLASS if one_class(source) else MAX_EXPORT
        if re.match(r"#\|\s*export", source) and (n := lines(source)) > most:
            yield f"cell {cell.get('id')}: exports {n} lines; at most {most}, split it"


def one_class(source: str) -> bool:
    "Whether a cell is one class, whose methods cannot stand apart"
    try:
        return [type(node) for node in ast.parse(source).body] == [ast.ClassDef]
    except SyntaxError:
        return False


def lines(source: str) -> int:
    "Lines of code in a cell: no blanks, comments, imports, parameters or docstrings of their own"
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return 0
    counted: set[int] = set()
    tables = [node for node in body if isinstance(node, ast.Assign | ast.AnnAssign)]
    counted |= {node.lineno for node in tables}  # a table of data is read like one line
    for node in ast.walk(ast.Module([node for node in body if node not in tables], [])):
        if isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom):
            first = node.body[0].lineno if isinstance(node, ast.FunctionDef) else node.lineno
            counted |= set(range(first, (node.end_lineno or first) + 1))
            counted.add(node.lineno)
    rows = source.splitlines()
    return sum(
        bool(rows[i - 1].strip()) and not rows[i - 1].lstrip().startswith("#") for i in counted
    )


def opening(nb: dict) -> Iterator[str]:
    "Prose in the first markdown cell, which the site turns into front matter and loses"
    first = next(("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"), "")
    rest = re.sub(r"\A# [^\n]+\n+(> [^\n]+\n?)*", "", first).strip()
    if rest:
        yield f"the first markdown cell holds more than title and description: {rest[:40]!r}…"


def cleaned(text: str, root: Path) -> str:
    "The same notebook as nbdev_clean would leave it"
    from fastcore.nbio import loads, nb2str
    from nbdev.clean import _nbdev_clean

    nb = loads(text)
    with chdir(root):  # the rules for metadata are in this root's pyproject.toml
        _nbdev_clean(nb)
    return nb2str(nb)


def files(root: Path) -> list[Path]:
    "Every module of the package, private ones too"
    return sorted((root / "minsnr_nb").rglob("*.py"))


def exported(root: Path) -> Iterator[str]:
    "Modules that differ from a fresh export"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        shutil.copy(root / "pyproject.toml", copy)
        shutil.copytree(root / "nbs", copy / "nbs", symlinks=True)
        (copy / "minsnr_nb").mkdir()
        plain = [*PLAIN, "__init__"]
        for path in (root / "minsnr_nb").glob("*.py"):
            if path.stem in plain:
                shutil.copy(path, copy / "minsnr_nb")
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": ""}
        code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        if done.returncode:
            yield f"nbs: the export fails: {done.stderr.splitlines()[-1][:200]}"
            return
        want, have = (
            {p.relative_to(r / "minsnr_nb").as_posix(): p.read_text("utf-8") for p in files(r)}
            for r in (copy, root)
        )
    for name in sorted(want.keys() | have.keys()):
        if name not in want:
            yield f"minsnr_nb/{name}: no notebook exports it"
        elif want[name] != have.get(name):
            yield f"minsnr_nb/{name}: not what its notebook exports; run nbdev_export"


def findings(root: Path) -> Iterator[str]:
    paths, seen = pages(root), {}
    top = [p for p in paths if p.parent == Path(".") and not p.name.startswith("study_")]
    if len(top) > MAX_TOP:
        yield f"nbs: {len(top)} pages at the top; at most {MAX_TOP}, the rest belongs into a wing"
    if not paths:
        yield "nbs: no notebooks"
    for path in paths:
        text = (root / "nbs" / path).read_text("utf-8")
        nb = json.loads(text)
        exp = default_exp(nb)
        if exp in seen:
            yield f"nbs/{path}: exports to {exp!r}, as {seen[exp]} does"
        if exp:
            seen[exp] = path
        found = [*page(path, text, nb), *module(path, exp), *opening(nb), *shape(nb)]
        if cleaned(text, root) != text:
            found.append("not clean; run nbdev_clean")
        yield from (f"nbs/{path}: {line}" for line in found)
    yield from exported(root)


if __name__ == "__main__":
    main(findings)
