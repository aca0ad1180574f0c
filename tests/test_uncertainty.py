"Learned weights in a whole run: saved, resumed to the bit, and refused in one line"

import hashlib
import json

import pytest
from safetensors.torch import load

from minsnr_nb.api import resume_run, train_run
from minsnr_nb.callbacks import CALLBACKS
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.directory import open_run
from minsnr_nb.train_loop import Callback

SMALL = {
    "project": "tests",
    "model": {"name": "mlp", "width": 32},
    "loss": {"name": "min_snr"},
    "uncertainty": {"name": "fourier", "channels": 16},
    "density": {"name": "loss_second_moment", "history": 1},
    "schedule": {"name": "linear", "timesteps": 40},
    "train": {"steps": 12, "batch_size": 32, "log_every": 4, "checkpoint_every": 4},
    "sampler": {"name": "ddim", "steps": 4},
    "callbacks": [{"name": "log_events"}, {"name": "checkpoint"}],
}


class Stop(Exception):
    "Raised once, in the middle"


def files(run) -> dict[str, bytes]:
    folder = run.path / "ckpts/last"
    last = folder / json.loads((folder / "CURRENT.json").read_text())["dir"]
    return {p.name: p.read_bytes() for p in last.glob("*.safetensors")}


def test_uncertainty_resume_repeats_the_curve(tmp_path):
    @CALLBACKS.register("stop_at_9")
    class StopAt9(Callback):
        armed = True

        def after_step(self, loop, result):
            if result.step == 9 and StopAt9.armed:
                StopAt9.armed = False
                raise Stop

    whole, broken = train_run(SMALL, run_root=tmp_path / "a"), []
    more = {"callbacks": [*SMALL["callbacks"], {"name": "stop_at_9"}]}
    try:
        with pytest.raises(Stop):
            train_run(SMALL, more, run_root=tmp_path / "b", announce=broken.append)
        resumed = resume_run(broken[0].path)
    finally:
        CALLBACKS.remove("stop_at_9")
    digests = [
        {k: hashlib.sha256(v).hexdigest() for k, v in files(r).items()} for r in (whole, resumed)
    ]
    assert digests[0] == digests[1] and "uncertainty.safetensors" in digests[0]
    curve = load(files(whole)["uncertainty.safetensors"])
    assert int(curve["steps"]) == 12 and curve["u"].abs().min() > 0
    assert [c for c in check_run(open_run(whole.path).path) if not c.ok] == []


def test_uncertainty_the_network_is_trained_with_it(tmp_path):
    "The same run without the curve ends with another network; `none` keeps no file"
    with_it = files(train_run(SMALL, run_root=tmp_path / "a"))
    plain = files(train_run(SMALL | {"uncertainty": {"name": "none"}}, run_root=tmp_path / "b"))
    assert "uncertainty.safetensors" not in plain
    assert with_it["model.safetensors"] != plain["model.safetensors"]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"name": "fourrier"}, "did you mean 'fourier'"),
        ({"name": "bins", "n_bins": 0}, "uncertainty.n_bins"),
        ({"name": "fourier", "lr": -1.0}, "uncertainty.lr"),
    ],
)
def test_uncertainty_wrong_requests(section, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        train_run(SMALL | {"uncertainty": section}, run_root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_uncertainty_a_weight_of_zero_is_refused(tmp_path):
    ending = {"schedule": {"name": "linear", "timesteps": 40, "zero_terminal_snr": True}}
    with pytest.raises(ConfigError, match="is 0 at t = 39, where a learned weight would divide"):
        train_run(SMALL | ending, run_root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
