"""Check the notebooks: one module each, clean, of a readable size, and in step with the package.

usage: python tools/check_nbs.py [ROOT]
"""

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

from _report import PLAIN, main

KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
MAX_BYTES, MAX_CELLS, MIN_PROSE = 300_000, 120, 0.3  # of a page; prose = markdown per code cell


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
    if kinds.count("markdown") < MIN_PROSE * kinds.count("code"):
        yield f"{kinds.count('markdown')} markdown cells for {kinds.count('code')} of code"
    for cell in nb["cells"]:
        for out in cell.get("outputs", []):
            if out["output_type"] == "error" or out.get("name") == "stderr":
                yield f"cell {cell.get('id')}: a stored {out.get('name', 'error')} output"


def module(path: Path, exp: str | None) -> Iterator[str]:
    "One notebook = one module with the same stem"
    numbered = re.fullmatch(r"\d\d_(\w+)", path.stem)
    if exp and (not numbered or exp != numbered[1]):
        yield f"exports to {exp!r}; a module has the stem of its notebook, NN_{exp}.ipynb"
    if not numbered and not path.stem.startswith("study_"):
        yield "named neither NN_module nor study_name"


def cleaned(text: str, root: Path) -> str:
    "The same notebook as nbdev_clean would leave it"
    from fastcore.nbio import loads, nb2str
    from nbdev.clean import _nbdev_clean

    nb = loads(text)
    with chdir(root):  # the rules for metadata are in this root's pyproject.toml
        _nbdev_clean(nb)
    return nb2str(nb)


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
            {p.name: p.read_text("utf-8") for p in (r / "minsnr_nb").glob("*.py")}
            for r in (copy, root)
        )
    for name in sorted(want.keys() | have.keys()):
        if name not in want:
            yield f"minsnr_nb/{name}: no notebook exports it"
        elif want[name] != have.get(name):
            yield f"minsnr_nb/{name}: not what its notebook exports; run nbdev_export"


def findings(root: Path) -> Iterator[str]:
    paths, seen = sorted((root / "nbs").glob("**/*.ipynb")), {}
    paths = [p for p in paths if not any(part.startswith((".", "_")) for part in p.parts)]
    if not paths:
        yield "nbs: no notebooks"
    for path in paths:
        text = path.read_text("utf-8")
        nb = json.loads(text)
        exp = default_exp(nb)
        if exp in seen:
            yield f"nbs/{path.name}: exports to {exp!r}, as {seen[exp]} does"
        if exp:
            seen[exp] = path.name
        found = [*page(path, text, nb), *module(path, exp)]
        if cleaned(text, root) != text:
            found.append("not clean; run nbdev_clean")
        yield from (f"nbs/{path.name}: {line}" for line in found)
    yield from exported(root)


if __name__ == "__main__":
    main(findings)
