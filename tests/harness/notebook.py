"The executed notebook of a study, killed at the moment it is saved."

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output
from papermill.iorw import papermill_io, write_ipynb

from minsnr_nb import durable, pm_engine
from tests.faulty_os import FaultyOS, half_then_dies

from .faults import Quiet, dies
from .lab import Lab, durable_os, forked, killed_after, scratch

CELLS = 6
TEXT = "a line of output\n" * 2000  # longer than one write of a buffered file


def study(papermill: dict | None = None) -> nbformat.NotebookNode:
    "A notebook whose cells print for a while"
    source = f"print({TEXT[:17]!r} * 2000)"
    cells = [new_code_cell(source, metadata={"tags": [], "papermill": {}}) for _ in range(CELLS)]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    facts = {"minsnr": {"study": "harness"}, "kernelspec": kernel, "papermill": papermill or {}}
    return new_notebook(cells=cells, metadata=facts)


def saves(place: Path) -> None:
    "What happens to the file while a study is executed: each cell, the copies, papermill's own last write"
    out = place / "out.ipynb"
    papermill_io.get_handler(str(out)).__class__ = pm_engine.WholeFiles
    nb = study()
    manager = pm_engine.StudyManager(nb, output_path=str(out), progress_bar=False)
    manager.runs_list = place / "runs"
    manager.notebook_start()
    for i, cell in enumerate(nb.cells):
        manager.cell_start(cell, i)
        cell.outputs = [new_output("stream", text=TEXT)]
        manager.cell_complete(cell, i)
    manager.notebook_complete()
    manager.keep()
    write_ipynb(nb, str(out))


def prepare(place: Path) -> Path:
    "A folder with two runs that the notebook has made"
    for name in ("a", "b"):
        (place / name).mkdir(parents=True)
    (place / "runs").write_text(f"{place / 'a'}\n{place / 'b'}\n")
    return place


def unreadable(place: Path) -> list[str]:
    "Every notebook in sight that is not whole"
    wrong = []
    for path in place.rglob("[!.]*.ipynb"):
        try:
            nb = nbformat.read(path, 4)
            nbformat.validate(nb)
            if len(nb.cells) < CELLS:
                wrong.append(f"{path.name}: {len(nb.cells)} cells")
        except Exception as e:
            wrong.append(f"{path.name}: {type(e).__name__}")
    return wrong


def _executed(place: Path, wait: float | None) -> int:
    "Papermill as a user runs it, killed with its kernel after a while"
    nbformat.write(study(), place / "in.ipynb")
    words = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(words, cwd=place, start_new_session=True, **quiet)
    with suppress(subprocess.TimeoutExpired):
        return child.wait(wait)
    os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _really(place: Path, rng: random.Random, n: int) -> tuple[int, list[str]]:
    "How many notebooks papermill left when it was killed, and what is wrong with them"
    place.mkdir()
    start = time.perf_counter()
    wrong = ["papermill failed"] if n and _executed(place, 120) else []
    each, seen = time.perf_counter() - start, 0
    for _ in range(n):
        (place / "out.ipynb").unlink(missing_ok=True)
        _executed(place, rng.uniform(0.3, 1.0) * each)
        seen += (place / "out.ipynb").exists()
        wrong += unreadable(place)
    return seen, wrong


def notebook(lab: Lab, n: int, real: int) -> tuple[bool, str]:
    "Killed at each operation, at random, and for real: a notebook that is there can be read"
    rng, wrong, seen = random.Random(8), [], 0
    with scratch() as root:
        with durable_os(Quiet()) as counter:
            start = time.perf_counter()
            saves(prepare(root / "whole"))
        each = time.perf_counter() - start
        points = [(at, f) for at in range(1, counter.count + 1) for f in (dies, half_then_dies)]
        points = rng.sample(points, min(n, len(points)))
        for i, (at, fault) in enumerate([*points, *[(0, None)] * n]):
            place = prepare(root / str(i))

            def action(place=place, at=at, fault=fault):
                if fault:
                    durable.os = FaultyOS(at, fault)
                saves(place)

            if fault:
                if forked(action) != 9:
                    wrong.append(f"operation {at}: did not die")
            else:
                killed_after(action, rng.uniform(0, 1.1 * each))
            seen += (place / "out.ipynb").exists()
            wrong += unreadable(place)
            shutil.rmtree(place)
        found, failed = _really(root / "real", rng, real)
    wrong += failed
    seen += found
    good = not wrong and seen > (len(points) + n) // 2
    text = f"{len(points)} deaths at {counter.count} operations, {n} kills of a saver, {real} of papermill"
    return good, f"{text}: {seen} notebooks, {len(wrong)} unreadable {sorted({*wrong})[:3] or ''}"
