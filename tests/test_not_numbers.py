"Numbers that are none end a run as diverged, with one line, and are never saved."

import pytest

from minsnr_nb import api, runner
from minsnr_nb.metrics import METRICS
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.evaluations import read_evaluation
from minsnr_nb.record.events import read_events
from minsnr_nb.record.state import derive_state

SMALL = {
    "model": {"name": "mlp", "width": 8, "depth": 1},
    "train": {"steps": 2, "batch_size": 8, "log_every": 1, "checkpoint_every": 1},
    "callbacks": [{"name": "log_events"}, {"name": "evaluate"}, {"name": "checkpoint"}],
    "metrics": [],
    "eval": {"every": 1, "samples": 4, "probe_images": 4, "probe_draws": 1},
    "sampler": {"name": "ddim", "steps": 1},
}


def diverged(root, *overrides):
    with pytest.raises(runner.RunFailed) as said:
        api.train_run(SMALL, overrides=overrides, run_root=root, device="cpu")
    (path,) = root.glob("*/[!.]*")
    run = open_run(path)
    assert derive_state(run) == "diverged" and "\n" not in str(said.value)
    assert [c for c in check_run(run.path) if not c.ok] == []
    return run, str(said.value)


def test_not_numbers_in_a_large_batch_end_in_a_short_line(tmp_path, monkeypatch):
    from minsnr_nb.objective import Objective

    real = Objective.loss
    monkeypatch.setattr(Objective, "loss", lambda *a: tuple(x * float("nan") for x in real(*a)))
    run, said = diverged(tmp_path, "train.batch_size=16384")
    assert "16368 more" in said and len(said) < 1000
    events = [e for e in read_events(run.events_path) if e["event"] == "nonfinite_loss"]
    assert len(events[0]["images"]) == 16


def test_not_numbers_among_the_weights_are_not_saved(tmp_path):
    run, said = diverged(tmp_path, "optim.lr=1e38", "optim.warmup_steps=0", "train.steps=1")
    assert "weight" in said and "is not finite after step 1" in said
    assert not list(run.checkpoints_dir.iterdir()) and not list(run.ckpts_last.glob("step_*"))


def test_not_numbers_as_a_metric_are_logged_and_are_no_best(tmp_path, monkeypatch):
    name = "nothing_at_all"
    METRICS.register(name)(lambda samples, reference: {name: float("nan")})
    try:
        run = api.train_run(SMALL | {"metrics": [{"name": name}]}, run_root=tmp_path, device="cpu")
    finally:
        METRICS._entries.pop(name)
    key = f"eval/{name}"
    assert all(key in e["nonfinite"] for e in read_events(run) if e["kind"] == "eval")
    assert read_evaluation(run)["values"][key] is None
    assert derive_state(run) == "completed"
    assert not list(run.ckpts_best.iterdir()) if run.ckpts_best.is_dir() else True
