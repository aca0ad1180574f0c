"""One mini-batch, trained on over every loss, prediction and network; and what watches it changes nothing."""

import time
from types import SimpleNamespace

import pytest
import torch

from minsnr_nb.callbacks import CALLBACKS
from minsnr_nb.config import Config
from minsnr_nb.data import DATASETS
from minsnr_nb.diffusion import PREDICTIONS
from minsnr_nb.ema import EMA
from minsnr_nb.errors import ConfigError
from minsnr_nb.minsnr_loss import WEIGHTINGS
from minsnr_nb.objective import make_objective
from minsnr_nb.schedule import SCHEDULES, zero_terminal_snr
from minsnr_nb.seeds import fixed_torch
from minsnr_nb.train_loop import Loop, TrainState, draw_batch, make_optimizer, train, train_step
from minsnr_nb.unet import MODELS

SMALL = {"mlp": {"width": 16}, "unet": {"ch": 8, "mult": (1, 1)}}
CFG = Config.model_validate({"train": {"steps": 2, "batch_size": 4}})
ORDINARY = SCHEDULES["linear"](50)
ENDING = zero_terminal_snr(ORDINARY)
# the weight is infinite where nothing but noise is left, on the loss of an image
GROWS_AT_NOISE = {"inv_snr"}


@pytest.fixture(scope="module")
def digits():
    return DATASETS.bind("digits")(None, "train")


def state_of(name, shape):
    with fixed_torch(0, "init"):
        model = MODELS.bind(name, SMALL.get(name, {}))(shape)
    return TrainState(model, EMA(model), make_optimizer(model, CFG.optim))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", WEIGHTINGS)
def test_training_choices_training_steps_of_every_choice(loss, prediction, model, digits):
    "Finite losses, a gradient, and weights that moved; the same twice"
    objective = make_objective(ORDINARY, prediction, loss)
    ends = []
    for _ in range(2):
        state = state_of(model, digits.shape)
        before = [p.detach().clone() for p in state.model.parameters()]
        for step in range(2):
            batch = draw_batch(step, digits, objective, CFG, torch.device("cpu"))
            result = train_step(state, objective, batch, CFG)
            assert result.weighted.isfinite().all() and (result.mse > 0).all()
            assert 0 < result.grad_norm < float("inf")
        after = [p.detach() for p in state.model.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        ends.append(after)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", WEIGHTINGS)
def test_training_choices_with_zero_terminal_snr_a_choice_trains_or_is_refused_by_rule(
    loss, prediction, digits
):
    refused = None
    try:
        objective = make_objective(ENDING, prediction, loss)
    except ConfigError as e:
        refused = str(e)
    if prediction == "eps":
        assert "cannot be used with zero terminal SNR" in refused
    elif loss in GROWS_AT_NOISE:
        assert "inf" in refused and loss in refused
    else:
        assert refused is None
        state = state_of("mlp", digits.shape)
        batch = draw_batch(0, digits, objective, CFG, torch.device("cpu"))
        batch = batch._replace(t=torch.full_like(batch.t, 49))  # the level of pure noise
        assert train_step(state, objective, batch, CFG).weighted.isfinite().all()


class Log:
    "A log that only remembers"

    def __init__(self):
        self.rows = []

    def log(self, step, kind, values):
        self.rows.append(values)


@pytest.mark.parametrize("watching", [["timing"], ["grad_share"], ["timing", "grad_share"]])
def test_training_choices_training_is_bit_equal_whoever_watches(watching, digits):
    cfg = Config.model_validate({"train": {"steps": 6, "batch_size": 8, "log_every": 2}})
    objective = make_objective(ORDINARY, "v", "min_snr")

    def run(names):
        loop = Loop(cfg, state_of("mlp", digits.shape), objective, digits, log=Log())
        loop.callbacks = [CALLBACKS.bind(name)() for name in (*names, "log_events")]
        train(loop)
        return loop

    plain, watched = run([]), run(watching)
    for a, b in zip(plain.log.rows, watched.log.rows, strict=True):
        assert a.items() <= b.items() and len(b) > len(a)
        shares = [v for k, v in b.items() if k.startswith("train/grad_share/")]
        assert bool(shares) == ("grad_share" in watching)
        assert not shares or sum(shares) == pytest.approx(1)
        parts = [v for k, v in b.items() if k.startswith("time/share/")]
        assert bool(parts) == ("timing" in watching)
        assert not parts or 0.3 < sum(parts) <= 1 + 1e-9
    for a, b in zip(plain.state.model.parameters(), watched.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_choices_training_time_of_a_wait_belongs_to_its_interval(digits, monkeypatch):
    "What `Timing` waits for the device is time of the line that it writes, not of the next one"
    waits = iter([0.05, 0.001])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(next(waits)))
    cfg = Config.model_validate({"train": {"steps": 2, "log_every": 1}})
    loop = Loop(
        cfg, state_of("mlp", digits.shape), make_objective(ORDINARY, "v", "min_snr"), digits
    )
    loop.device, timing = SimpleNamespace(type="cuda"), CALLBACKS.bind("timing")()
    timing.before_train(loop)
    for loop.state.step in (1, 2):
        with loop.spending(timing.takes):
            timing.after_step(loop, SimpleNamespace(step=loop.state.step))
        assert 0.3 < loop.scalars["time/share/watching"] <= 1 + 1e-9
