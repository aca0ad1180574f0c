"Outputs move from an executed notebook to its source, and only to the source it was made from"

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from store_outputs import store  # noqa: E402

STREAM = {"output_type": "stream", "text": ["x\n"]}


def cell(source: str, outputs=(), tags=()) -> dict:
    out = {"cell_type": "code", "execution_count": None, "id": source, "metadata": {}}
    return out | {"metadata": {"tags": [*tags]}, "outputs": [*outputs], "source": [source]}


@pytest.fixture
def pair(tmp_path):
    source = {"cells": [cell("a"), cell("b")], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    done = deepcopy(source)
    done["cells"].insert(1, cell("gamma = 1", tags=["injected-parameters"]))
    done["cells"][0]["outputs"] = [STREAM | {"name": n} for n in ("stdout", "stderr")]
    for name, nb in {"source": source, "done": done}.items():
        (tmp_path / name).write_text(json.dumps(nb))
    return tmp_path / "done", tmp_path / "source"


def test_store_outputs_outputs_are_stored_but_warnings(pair):
    store(*pair)
    first, second = json.loads(pair[1].read_text())["cells"]
    assert [o["name"] for o in first["outputs"]] == ["stdout"] and second["outputs"] == []


def test_store_outputs_another_notebook_is_refused(pair):
    pair[1].write_text(pair[1].read_text().replace('["b"]', '["c"]'))
    before = pair[1].read_bytes()
    with pytest.raises(SystemExit, match="is not an execution of"):
        store(*pair)
    assert pair[1].read_bytes() == before
