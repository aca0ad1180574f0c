"""Check that the site will say what the pages say: process every notebook as the site does, and look for each
paragraph of its source in the result.

usage: python tools/check_site.py [ROOT]
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from _report import main, pages

CODE = "from nbdev.serve import proc_nbs; proc_nbs(force=True)"


def words(text: str) -> str:
    "The words of a text, without links, marks and front matter's own syntax"
    text = re.sub(r"!?\[([^\]]*)\]\((?:[^()]|\([^()]*\))*\)", r"\1", text)
    text = re.sub(r"\{[#.][^}]*\}", " ", text)
    return " ".join(re.findall(r"\w+", text))


def prose(path: Path) -> list[str]:
    "The markdown cells of a notebook"
    cells = json.loads(path.read_text("utf-8"))["cells"]
    texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    front = ["".join(c["source"]).strip("-\n") for c in cells if c["cell_type"] == "raw"]
    return [str(value) for text in front for value in yaml.safe_load(text).values()] + texts


def lost(source: Path, processed: Path) -> Iterator[str]:
    "Paragraphs of the source that the processed page does not have"
    there = words("\n".join(prose(processed)))
    for cell in prose(source):
        for paragraph in re.split(r"\n\s*\n", cell):
            if words(paragraph) not in there:
                yield f"the site loses {paragraph.strip()[:60]!r}…"


def process(root: Path, place: Path) -> Path:
    "Process a copy of the pages, so that nothing is left behind in the repository"
    for name in ("nbs", "minsnr_nb"):
        shutil.copytree(root / name, place / name, symlinks=True)
    for name in ("pyproject.toml", "_quarto.yml", "README.md"):
        shutil.copy(root / name, place)
    kept = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    stub = place / "bin"  # without it nbdev would try to install Quarto by itself
    stub.mkdir()
    (stub / "quarto").write_text("#!/bin/sh\necho 99.0.0\n")
    (stub / "quarto").chmod(0o755)
    env = kept | {"PYTHONPATH": str(place), "PATH": f"{stub}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nbs: cannot be processed: {done.stderr.strip().splitlines()[-1]}")
    return place / "_proc"


def findings(root: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        made = process(root, Path(folder).resolve())
        for page in pages(root):
            if not (made / page).is_file():
                yield f"nbs/{page}: is not on the site"
                continue
            yield from (f"nbs/{page}: {line}" for line in lost(root / "nbs" / page, made / page))


if __name__ == "__main__":
    main(findings)
