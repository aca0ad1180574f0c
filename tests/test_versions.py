"Documents of a run have versions: what one of them holds does not change without its version changing."

import json
import re
import shutil

import pytest

from minsnr_nb import api
from minsnr_nb.durable import digest
from minsnr_nb.errors import ConfigError, MinsnrError
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.directory import LAYOUT, LAYOUT_VERSION, Run, open_run
from minsnr_nb.record.generations import find_checkpoint
from tests.runs import ROOT

KNOWN = ROOT / "tests/data/documents.json"
SMALL = {
    "model": {"name": "mlp", "width": 16},
    "train": {"steps": 4, "batch_size": 16, "checkpoint_every": 2},
    "sampler": {"name": "ddim", "steps": 2},
    "metrics": [],
    "callbacks": [{"name": n} for n in ("log_events", "evaluate", "checkpoint", "predictions")],
    "eval": {"every": 4, "samples": 8, "probe_images": 8, "probe_draws": 1},
}
VERSIONS = ("layout_version", "schema_version", "format_version", "contract_version")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return api.train_run(SMALL, run_root=tmp_path_factory.mktemp("runs"), device="cpu")


def documents(run) -> dict:
    "Kind of document -> its version and the keys at its top"
    found = {}
    for path in sorted(run.path.rglob("*.json")):
        name = path.relative_to(run.path).as_posix()
        kind = re.sub(r"[0-9a-f]{16}|\d{4,}|step_\d+|(?<=predictions/)[^/]+", "*", name)
        facts = json.loads(path.read_text())
        version = next((facts[v] for v in VERSIONS if v in facts), None)
        found.setdefault(kind, {"version": version, "keys": sorted(facts)})
    return found


def layout() -> dict:
    "The table of the layout, as far as a reader relies on it"
    rows = [[e.path, e.kind, e.contract] for e in LAYOUT if e.needed]
    return {"version": LAYOUT_VERSION, "digest": digest(json.dumps(rows))}


def test_versions_of_the_layout():
    "An entry that runs need was added, renamed or removed: raise LAYOUT_VERSION, and keep the old one readable"
    known = json.loads(KNOWN.read_text())["layout"]
    assert layout()["version"] > known["version"] or layout() == known


def test_versions_of_documents(run):
    "Keys may be added; one that is gone or renamed needs a new version of its document"
    known = json.loads(KNOWN.read_text())["documents"]
    now = documents(run)
    for kind, then in known.items():
        gone = set(then["keys"]) - set(now[kind]["keys"])
        assert not gone or now[kind]["version"] != then["version"], f"{kind}: lost {gone}"
    assert known.keys() == now.keys(), "a kind of document came or went: write it down here"


def test_versions_of_later_runs_are_refused_in_one_line(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / run.id)
    stamp = copy / "meta/provenance.json"
    stamp.chmod(0o644)
    stamp.write_text(stamp.read_text().replace('"layout_version": 1', '"layout_version": 99'))
    with pytest.raises(ConfigError, match="layout_version 99; this version of minsnr_nb reads"):
        open_run(copy)
    assert any("layout_version 99" in c.message for c in check_run(copy))


def later(run, kind: str, place):
    "A copy of a run, one kind of whose documents says that it is of version 99"
    copy = Run(shutil.copytree(run.path, place / run.id))
    for name in ("meta/seal.json", "meta/manifest.json") if kind != "meta/manifest.json" else ():
        (copy.path / name).unlink()
    for path in copy.path.glob(kind):
        facts = json.loads(path.read_text())
        key = next(v for v in VERSIONS if v in facts)
        path.chmod(0o644)
        path.write_text(json.dumps(facts | {key: 99}, indent=1))
    return copy, f"{key} 99; this version of minsnr_nb reads up to 1"


KINDS = {k for k, v in json.loads(KNOWN.read_text())["documents"].items() if v["version"]}


@pytest.mark.parametrize("kind", sorted(KINDS - {"meta/provenance.json"}))
def test_versions_of_later_documents_are_named(kind, run, tmp_path):
    copy, says = later(run, kind, tmp_path)
    said = {c.message for c in check_run(copy.path) if c.id == "AB.versions" and not c.ok}
    assert said == {says}


def test_versions_of_later_checkpoints_are_refused_by_resume(run, tmp_path):
    copy, says = later(run, "ckpts/last/*/MANIFEST.json", tmp_path)
    (copy.ckpts_last / "CURRENT.json").unlink()  # its digest would speak first
    with pytest.raises(MinsnrError, match=f"no intact checkpoint: .*{says}") as e:
        find_checkpoint(copy)
    assert "\n" not in str(e.value)


if __name__ == "__main__":  # after a version was raised: python -m tests.test_versions
    import tempfile

    made = api.train_run(SMALL, run_root=tempfile.mkdtemp(), device="cpu")
    facts = {"layout": layout(), "documents": documents(made)}
    KNOWN.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
