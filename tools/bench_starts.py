"""How many of many notebooks that start at the same time get a kernel: papermill with our engine.

usage: python tools/bench_starts.py [STARTS] [AT_ONCE] [--tcp]
"""

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill

from minsnr_nb import pm_engine


def notebook(place: Path) -> Path:
    "The smallest study"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    nb.metadata |= {"minsnr": {"study": "starts"}}
    nb.metadata |= {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
    }
    path = place / "starts.ipynb"
    nbformat.write(nb, path)
    return path


def start(task: tuple[Path, int, bool]) -> str:
    "Execute it once; what went wrong"
    path, number, tcp = task
    if tcp:
        pm_engine._sockets = lambda scratch: {}
    try:
        out = path.with_name(f"{number}.ipynb")
        papermill.execute_notebook(path, out, progress_bar=False, cwd=str(path.parent))
    except BaseException as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return ""


def main(starts: int, at_once: int, tcp: bool) -> int:
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    with tempfile.TemporaryDirectory() as place:
        path, began = notebook(Path(place)), time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(at_once) as pool:
            said = pool.map(start, [(path, i, tcp) for i in range(starts)], chunksize=1)
        took, failed = time.perf_counter() - began, [s for s in said if s]
        left = sorted(p.name for p in Path(place).iterdir() if p.suffix != ".ipynb")
    print(
        f"{starts} starts, {at_once} at once, {'tcp' if tcp else 'ipc'}: {len(failed)} failed, {took:.0f} s"
    )
    for line in sorted(set(failed)):
        print(f"  {failed.count(line)} x {line}")
    print(f"files left: {left or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    numbers = [int(w) for w in sys.argv[1:] if w.isdigit()]
    sys.exit(main(*([*numbers, *[200, 8][len(numbers) :]]), "--tcp" in sys.argv))
