"""Put the outputs of an executed notebook into its source, cell by cell; nothing else changes.

usage: python tools/store_outputs.py out.ipynb nbs/study_e02.ipynb
"""

import sys
from pathlib import Path

from fastcore.nbio import read_nb, write_nb


def kept(output: dict) -> bool:
    "Whether an output says something when nobody watches: no warnings, no bars"
    bar = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return output.get("name") != "stderr" and not bar


def store(executed: Path, source: Path) -> None:
    "Copy outputs; the cells have to be the same, but for the parameters that Papermill adds"
    there, here = read_nb(executed), read_nb(source)
    cells = [c for c in there.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    if [c.source for c in cells] != [c.source for c in here.cells]:
        raise SystemExit(f"{executed}: is not an execution of {source} as it is now")
    for cell, done in zip(here.cells, cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = [o for o in done.outputs if kept(o)]
    write_nb(here, source)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    store(*map(Path, sys.argv[1:]))
