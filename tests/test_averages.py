"Averages of other lengths, made from the snapshots of a finished run."

import pytest
import torch

from minsnr_nb.api import load_network, train_run
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.checks import check_run

SMALL = {
    "project": "averages",
    "model": {"name": "mlp", "width": 16, "depth": 1},
    "train": {"steps": 320, "batch_size": 16, "log_every": 160, "checkpoint_every": 160},
    "eval": {"every": 320, "samples": 20, "probe_images": 16, "probe_draws": 1},
    "sampler": {"name": "ddim", "steps": 3},
    "callbacks": [{"name": "checkpoint"}, {"name": "snapshots"}],
}


def trained(root, length: float, **change):
    return train_run(
        SMALL | {"ema": {"name": "power_ema", "length": length}} | change, run_root=root
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"), 0.1)


def flat(network) -> torch.Tensor:
    return torch.cat([p.flatten() for p in network.parameters()])


@pytest.mark.parametrize("length", [0.06, 0.2])
def test_averages_made_afterwards_are_those_of_a_run_that_averaged_so(run, tmp_path, length):
    there, own, made = (
        flat(load_network(*which)[0])
        for which in (
            (trained(tmp_path, length),),
            (run,),
            (run, f"ema_{length}"),
        )
    )
    assert (made - there).norm() < 0.1 * (own - there).norm()


def test_averages_of_the_own_length_are_the_saved_ones(run):
    torch.testing.assert_close(
        flat(load_network(run, "ema_0.1")[0]), flat(load_network(run)[0]), atol=1e-6, rtol=1e-5
    )


def test_averages_need_enough_snapshots(tmp_path):
    few = [{"name": "checkpoint"}, {"name": "snapshots", "every": 160}]
    with pytest.raises(ConfigError, match="2 snapshots give ema_0.2 with an error of"):
        load_network(trained(tmp_path, 0.1, callbacks=few), "ema_0.2")


@pytest.mark.parametrize(
    "change", [{"ema": {"name": "ema"}}, {"callbacks": [{"name": "checkpoint"}]}]
)
def test_averages_need_a_run_that_kept_some(tmp_path, change):
    with pytest.raises(ConfigError, match="no snapshots to make an average from"):
        load_network(trained(tmp_path, 0.1, **change), "ema_0.2")


def test_averages_that_are_lost_are_missed(tmp_path):
    run = trained(tmp_path, 0.1)
    (run.checkpoints_dir / "snapshot_000000200.safetensors").unlink()
    assert any("snapshot_000000200" in str(c) for c in check_run(run.path) if not c.ok)
