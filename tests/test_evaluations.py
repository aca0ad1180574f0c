"Every evaluation leaves a record under a name of its own, and nothing that was written before changes."

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from minsnr_nb.api import eval_run, sample_run, train_run
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.checks import CHECKS, check_run, is_sealed
from minsnr_nb.record.directory import Run, open_run
from minsnr_nb.record.evaluations import list_evaluations, read_evaluation
from minsnr_nb.strict_yaml import read_yaml

from .runs import SMALL, typed


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    return train_run(read_yaml(SMALL)[0], run_root=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(trained, tmp_path) -> Run:
    return open_run(shutil.copytree(trained.path, tmp_path / "tests" / trained.id))


def everything(run: Run) -> dict[str, str]:
    "Digest and moment of every file of a run, hidden ones included"
    files = [p for p in run.path.rglob("*") if p.is_file()]
    return {
        p.relative_to(run.path).as_posix(): f"{hashlib.sha256(p.read_bytes()).hexdigest()} "
        f"{p.stat().st_mtime_ns}"
        for p in files
    }


def broken(run: Run) -> list:
    return [c for c in check_run(run.path) if not c.ok]


EVALS = [
    ("sampler.steps=2",),
    ("sampler.steps=3",),
    ("sampler.eta=1",),
    ("sampler.steps=3", "sampler.eta=1"),
    ("eval.samples=30",),
    ("eval.probe_images=8",),
    ("eval.probe_draws=2",),
    ("metrics=[{name: fd}]",),
    ("metrics=[{name: kid}]",),
    ("callbacks=[{name: sample_grid, n: 4}]",),
    ("callbacks=[{name: predictions, n: 4}]",),
]
SAMPLES = [
    {"n": 4},
    {"n": 9},
    {"n": 4, "seed": 1},
    {"n": 4, "overrides": ("sampler.eta=1",)},
    {"n": 4, "overrides": ("sampler.steps=2",)},
    {"n": 4, "weights": "best"},
    {"n": 4, "save_predictions": True},
    {"n": 4, "save_predictions": True, "overrides": ("sampler.eta=1",)},
]
CALLS = [lambda run, o=o: eval_run(run.path, overrides=o) for o in EVALS]
CALLS += [lambda run: eval_run(run.path, overrides=EVALS[0], weights="best")]
CALLS += [lambda run, how=how: sample_run(run.path, **how) for how in SAMPLES]


def test_evaluations_twenty_calls_leave_twenty_records_and_a_repeated_one_nothing(run):
    assert len(CALLS) == 20
    summary, log = run.summary_path.read_bytes(), run.metrics_path.read_bytes()
    before = {p.name for p in run.evaluations.iterdir()}
    for call in CALLS:
        call(run)
    assert len({p.name for p in run.evaluations.iterdir()} - before) == 20
    assert (run.summary_path.read_bytes(), run.metrics_path.read_bytes()) == (summary, log)
    assert is_sealed(run) and broken(run) == []
    after = everything(run)
    for call in CALLS:
        call(run)
        assert everything(run) == after


def test_evaluations_pictures_and_sets_never_replace_each_other(run):
    for call in CALLS:
        call(run)
    assert len(list(run.grids.glob("sample_*.png"))) == 6
    assert len(list(run.grids.glob("eval_*.png"))) == 1
    assert len([p for p in run.predictions.iterdir()]) == 3


def test_evaluations_of_training_are_records_that_eval_finds(run):
    assert [r["kind"] for r in list_evaluations(run.evaluations)] == ["train", "train"]
    before, said = everything(run), []
    _, values = eval_run(run.path, warn=said.append)
    assert everything(run) == before and "with the same values" in said[0]
    assert read_evaluation(run)["values"] == values


def test_evaluations_with_other_settings_are_not_what_the_summary_shows(run):
    own = json.loads(run.summary_path.read_text())["final"]["eval/fd@digits_cnn"]
    _, values = eval_run(run.path, overrides=("sampler.steps=2",))
    assert values["eval/fd@digits_cnn"] != own
    assert read_evaluation(run)["values"]["eval/fd@digits_cnn"] == own
    assert json.loads(run.summary_path.read_text())["final"]["eval/fd@digits_cnn"] == own
    other = list_evaluations(run.evaluations)[-1]["id"]
    assert read_evaluation(run, other[:8])["values"] == values
    with pytest.raises(ConfigError, match="no evaluation 'ffff"):
        read_evaluation(run, "ffff0000")


def test_evaluations_that_differ_when_repeated_say_so_and_change_nothing(run, monkeypatch):
    from minsnr_nb import api

    _, values = eval_run(run.path, overrides=EVALS[0])
    before, said = everything(run), []
    odd = values | {"eval/fd@digits_cnn": 77.0}
    monkeypatch.setattr(api, "report", lambda *_: odd)
    eval_run(run.path, overrides=EVALS[0], warn=said.append)
    assert everything(run) == before and "77.0 now; the record stays" in said[0]


def test_evaluations_of_a_run_without_them_enter_its_log_once(tmp_path):
    listed = {"callbacks": [{"name": "log_events"}, {"name": "checkpoint"}]}
    run = train_run(read_yaml(SMALL)[0], listed, run_root=tmp_path)
    eval_run(run.path, overrides=("sampler.steps=2",))
    assert "eval/" not in run.summary_path.read_text()
    _, values = eval_run(run.path)
    final = json.loads(run.summary_path.read_text())["final"]
    assert final["eval/fd@digits_cnn"] == values["eval/fd@digits_cnn"]
    after = everything(run)
    eval_run(run.path)
    assert everything(run) == after and broken(run) == [] and is_sealed(run)


def test_evaluations_are_checked(run):
    path = next(run.evaluations.iterdir())
    for wrong in (path.read_text().replace('"step": ', '"step": 1'), "{", "[]"):
        path.write_text(wrong)
        assert "AB.evaluations" in [c.id for c in broken(run)]
    assert CHECKS["AB.evaluations"][0] == "L2"


def test_evaluations_are_not_asked_of_older_runs(run):
    shutil.rmtree(run.evaluations)
    (run.path / "meta/seal.json").unlink()
    (run.path / "logs/stdout.log").unlink(missing_ok=True)
    assert broken(run) == []
    assert read_evaluation(run)["decides"]["weights"]["step"] == 12
    eval_run(run.path, overrides=("sampler.steps=2",))
    assert len(list_evaluations(run.evaluations)) == 1


def test_evaluations_from_the_command_line(run, capsys):
    before = run.summary_path.read_bytes()
    done = typed(capsys, "eval", run.path, "sampler.steps=2")
    assert done.returncode == 0 and "kept in artifacts/evaluations/" in done.stderr
    argv = list_evaluations(run.evaluations)[-1]["argv"]
    assert not any(Path(w).is_absolute() for w in argv)
    assert run.summary_path.read_bytes() == before
