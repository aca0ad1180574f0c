"""Statements about sources with a known best denoiser, on schedules and predictions the pages do not visit."""

import pytest
import torch

from minsnr_nb.analysis.excess import exact_model, excess_loss
from minsnr_nb.analysis.gradient_noise import optimal_probs, redraw, shares
from minsnr_nb.diffusion import PREDICTIONS
from minsnr_nb.minsnr_loss import WEIGHTINGS
from minsnr_nb.objective import counts, effective_weighting, make_objective
from minsnr_nb.schedule import SCHEDULES, linear, zero_terminal_snr
from minsnr_nb.seeds import stream
from minsnr_nb.toy import Empirical, Gaussian, GaussianMixture, estimate, loss_floor, min_loss

LEVELS = {name: make(40) for name, make in SCHEDULES.items()}
LEVELS |= {f"{name}, zero": zero_terminal_snr(s) for name, s in LEVELS.items()}
SOURCES = {
    "gaussian": Gaussian(torch.full((1, 2, 2), 0.3), 0.5),
    "mixture": GaussianMixture(
        stream(0, "means").normal(3, (1, 2, 2)), torch.tensor([0.0, 0.1, 1.0]), torch.ones(3) / 3
    ),
    "empirical": Empirical(stream(0, "images").normal(25, (1, 2, 2))),
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("source", SOURCES)
def test_excess_the_exact_denoiser_has_no_excess_at_any_level(name, source):
    schedule, every = LEVELS[name], torch.arange(40)
    for prediction in PREDICTIONS:
        best = exact_model(SOURCES[source], schedule, prediction)
        how = {"levels": every, "draws": 20}
        got = excess_loss(best, SOURCES[source], schedule, prediction, stream(1, "x"), **how)
        assert got.excess.mean.eq(0).all() and got.difference.mean.eq(0).all()
        assert got.loss.mean.isfinite().all()


@pytest.mark.parametrize("source", SOURCES)
def test_excess_the_measured_floor_is_the_minimum_loss(source):
    schedule, every = LEVELS["cosine"], torch.arange(40)
    floor = min_loss(SOURCES[source], schedule, "v", stream(2, "floor"), draws=4000)
    best = exact_model(SOURCES[source], schedule, "v")
    how = {"levels": every, "draws": 4000}
    got = excess_loss(best, SOURCES[source], schedule, "v", stream(3, "x"), **how).floor
    # two independent averages of 4,000 draws; at clean levels both hang on a few rare confusions
    spread = got.se * 2**0.5 + 5e-4
    assert ((got.mean - floor) / spread).abs().max() < 5


@pytest.mark.parametrize("source", ["mixture", "empirical"])
def test_excess_a_drawn_floor_states_its_error(source):
    "Twenty independent floors scatter as much as each says; and an exact floor says 0"
    schedule = LEVELS["linear"]
    floors = [
        loss_floor(SOURCES[source], schedule, "x0", stream(s, "floor"), draws=400)
        for s in range(20)
    ]
    means, said = (torch.stack(part, 1) for part in zip(*floors, strict=True))
    noisy = schedule.log_snr < 0  # there the floor does not hang on rare confusions
    scatter = means.std(1)[noisy] / said.mean(1)[noisy]
    assert ((scatter > 0.5) & (scatter < 1.7)).all()
    assert (loss_floor(SOURCES["gaussian"], schedule).se == 0).all()
    grand, one = estimate(means), floors[0]
    assert torch.equal(one.minus(grand).se, (one.se**2 + grand.se**2).sqrt())


def test_excess_data_are_distinguished_up_to_any_snr():
    "At SNR 1e12 the probability is on one image, and logits neither overflow nor round it away"
    images = torch.linspace(-1, 1, 200).double().view(200, 1)
    sharp = LEVELS["linear"].__class__("sharp", torch.tensor([1.0, 0.5]), torch.tensor([1e12, 1.0]))
    guess = Empirical(images).denoise(images, 0, sharp)
    torch.testing.assert_close(guess, images, rtol=0, atol=1e-12)


def test_excess_shares_of_a_gaussian():
    schedule = linear(1000)
    floor = min_loss(Gaussian(torch.zeros(1), 0.5), schedule, "eps")
    wanted = {
        "uniform_eps": (0.61, 0.61),
        "min_snr": (0.31, 0.20),
        "p2": (0.16, 0.03),
        "uniform_x0": (0.03, 2e-6),
    }
    for name, (loss, noise) in wanted.items():
        got = shares(make_objective(schedule, "eps", name), floor)
        assert got.loss[:130].sum().item() == pytest.approx(loss, abs=0.005)
        assert got.noise[:130].sum().item() == pytest.approx(noise, abs=0.005, rel=0.01)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_excess_redrawing_keeps_what_is_optimised(weighting):
    schedule = LEVELS["linear"]
    objective = make_objective(schedule, "v", weighting)
    size = torch.linspace(1, 3, 40).double()
    best = redraw(objective, optimal_probs(objective, size))
    torch.testing.assert_close(
        effective_weighting(best), effective_weighting(objective), rtol=1e-6, atol=0
    )
    probs, weight = counts(best)
    part = probs * weight**2 * size  # at the best density: in proportion to how often it is drawn
    torch.testing.assert_close(part / part.sum(), probs, rtol=1e-5, atol=1e-12)
