"*Completed* means that every product of every step is there, whatever died when."

import dataclasses
import json
import os
import shutil

import pytest

from minsnr_nb import api, checkpoint, runner
from minsnr_nb.errors import MinsnrError
from minsnr_nb.guard import weights_facts
from minsnr_nb.record.checks import check_run, is_sealed
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.seal import unseal
from minsnr_nb.record.state import read_status
from minsnr_nb.train_loop import Callback
from tests.harness.lab import Lab, different, forked, invalid, things


@pytest.fixture(scope="module")
def lab():
    return Lab()


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    return lab.whole(tmp_path_factory.mktemp("whole"))


def died(lab, root, monkeypatch, at: int):
    "A run whose process died right after it announced the checkpoint of a step"
    real = checkpoint.settle

    def settle(run, folder, attempt):
        if folder.name == f"step_{at:09d}":
            os._exit(9)
        real(run, folder, attempt)

    run = lab.create(root)
    monkeypatch.setattr(checkpoint, "settle", settle)
    assert forked(lambda: lab.train(run)) == 9
    monkeypatch.setattr(checkpoint, "settle", real)
    return run


@pytest.mark.parametrize("at", [2, 3, 6, 8])
def test_completion_is_made_up_for_after_a_death_at_the_announcement(
    lab, whole, tmp_path, monkeypatch, at
):
    run = died(lab, tmp_path, monkeypatch, at)
    weights = run.checkpoints_dir / "last.safetensors"
    assert not weights.is_file() or weights_facts(weights)["step"] != str(at)
    lab.train(run)
    assert (different(run, things(whole)), invalid(run, "L3")) == ([], [])


class Late(Callback):
    "Writes a picture after everybody else, and may die first"

    order = 97

    def __init__(self, dies: bool):
        self.dies = dies

    def after_step(self, loop, result):
        if self.dies and loop.done:
            os._exit(9)
        (loop.run.plots / f"late_{result.step}.svg").write_text("<svg/>")


def test_completion_waits_for_callbacks_of_any_order(lab, tmp_path, monkeypatch):
    run, shipped = lab.create(tmp_path), lab.lab

    def train(dies):
        callbacks = [*shipped.callbacks, lambda: Late(dies)]
        monkeypatch.setattr(lab, "lab", dataclasses.replace(shipped, callbacks=callbacks))
        lab.train(run)

    assert forked(lambda: train(True)) == 9
    assert not (run.plots / "late_8.svg").exists()
    train(False)
    assert (run.plots / "late_8.svg").exists() and is_sealed(run)


def test_completion_after_a_full_disk_at_the_announcement(lab, whole, tmp_path, monkeypatch):
    run = lab.create(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "_write_weights", _full)
        with pytest.raises(MinsnrError, match="ENOSPC"):
            lab.train(run)
    assert read_status(run)["state"] == "failed"
    lab.train(run)
    assert different(run, things(whole)) == []


def _full(*_):
    raise MinsnrError("cannot write: no space left (ENOSPC)")


def _without(pattern):
    def damage(run):
        for path in list(run.path.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _older_weights(run):
    shutil.copy(run.checkpoints_dir / "best.safetensors", run.checkpoints_dir / "last.safetensors")


def _other_best(run):
    pointer = run.ckpts_best / "CURRENT.json"
    pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"dir": "step_000000003"}))


def _other_pointer(run):
    before = json.loads((run.ckpts_last / "CURRENT.json").read_text())["previous"]
    (run.ckpts_last / "CURRENT.json").write_text(json.dumps(before | {"previous": None}))


DAMAGE = {
    "a grid": _without("artifacts/grids/step_000000008.png"),
    "a set": _without("artifacts/predictions/step000000006_*"),
    "an evaluation": lambda run: next(run.evaluations.iterdir()).unlink(),
    "the portable weights": _without("artifacts/checkpoints/last.safetensors"),
    "other portable weights": _older_weights,
    "another best": _other_best,
    "an older checkpoint": _other_pointer,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_completion_is_checked_against_the_config(whole, tmp_path, what):
    run = open_run(shutil.copytree(whole.path, tmp_path / "harness" / whole.id))
    unseal(run)
    assert check_run(run.path) and not invalid(run)
    DAMAGE[what](run)
    assert "AB.completed" in [c[0] for c in invalid(run)]


def test_completion_asks_nothing_of_a_forks_parents_steps(whole, tmp_path):
    parent = open_run(shutil.copytree(whole.path, tmp_path / "harness" / whole.id))
    child = api.fork_run(parent.path, overrides=("train.steps=10",), device="cpu")
    assert not invalid(child, "L3") and is_sealed(child)
    assert not (child.grids / "step_000000003.png").exists()


def test_completion_resume_of_a_completed_run_that_is_not_sound_fails(whole, tmp_path):
    run = open_run(shutil.copytree(whole.path, tmp_path / "harness" / whole.id))
    unseal(run)
    _without("artifacts/grids/step_000000008.png")(run)
    with pytest.raises(runner.RunFailed, match=r"not sealed.*step_000000008\.png"):
        api.resume_run(run.path)


def test_completion_keeps_the_best_of_a_step_that_comes_again(lab, tmp_path):
    "The newest checkpoint is damaged, and the best belongs to it"
    run = lab.whole(tmp_path)
    best = json.loads((run.ckpts_best / "CURRENT.json").read_text())["dir"]
    older = run.ckpts_last / "step_000000006"
    state = json.loads((older / "state.json").read_text())
    (older / "state.json").write_text(json.dumps(state | {"best": state["best"] | {"step": 3}}))
    checkpoint.settle(run, older, 1)
    assert (run.ckpts_best / best).is_dir()
    assert json.loads((run.ckpts_best / "CURRENT.json").read_text())["dir"] == best
