"""Statements about the weighting laboratory as a whole: every weighting, density, schedule and prediction together."""

import math

import pytest
import torch

from minsnr_nb.density import DENSITIES, make_density
from minsnr_nb.diffusion import PREDICTIONS, add_noise, convert, target
from minsnr_nb.errors import ConfigError
from minsnr_nb.minsnr_loss import WEIGHTINGS, contains_density, loss_weight
from minsnr_nb.objective import effective_weighting, make_objective
from minsnr_nb.schedule import SCHEDULES, from_curve, zero_terminal_snr
from minsnr_nb.seeds import stream

LEVELS = {name: make(200) for name, make in SCHEDULES.items()}
LEVELS |= {f"{name}, zero": zero_terminal_snr(s) for name, s in LEVELS.items()}


@pytest.mark.parametrize("name", LEVELS)
def test_laboratory_every_combination_is_finite_or_refused_by_name(name):
    schedule = LEVELS[name]
    for prediction in PREDICTIONS:
        for weighting in WEIGHTINGS:
            try:
                objective = make_objective(schedule, prediction, weighting)
            except ConfigError as e:
                refusal = str(e)
                eps_at_zero = prediction == "eps" and schedule.snr[-1] == 0
                assert "\n" not in refusal and (eps_at_zero or repr(weighting) in refusal)
                continue
            assert objective.weight.isfinite().all() and (objective.weight >= 0).all()
            assert not effective_weighting(objective).isnan().any(), (prediction, weighting)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_laboratory_extreme_levels(weighting):
    "SNR from infinity to zero: never NaN; infinite only where the formula truly is"
    extreme = torch.tensor([math.inf, 1e12, 1e6, 1.0, 1e-6, 1e-12, 0.0], dtype=torch.float64)
    for prediction in PREDICTIONS:
        weight = loss_weight(weighting, extreme, prediction=prediction)
        assert not weight.isnan().any() and (weight >= 0).all()
        assert weight[1:-1].isfinite().all()


@pytest.mark.parametrize("name", LEVELS)
def test_laboratory_conversions_are_exact_between_all_predictions(name):
    schedule, rng = LEVELS[name], stream(0, "conversions")
    t = torch.arange(schedule.timesteps)[: -1 if schedule.snr[-1] == 0 else None]
    x0, eps = (rng.normal(len(t), (8,), step=k).double() for k in (0, 1))
    x_t = add_noise(x0, eps, t, schedule)
    truth = {p: target(p, x0, eps, t, schedule, sigma_data=0.3) for p in PREDICTIONS}
    for source in PREDICTIONS:
        for to in PREDICTIONS:
            got = convert(truth[source], x_t, t, schedule, source=source, to=to, sigma_data=0.3)
            torch.testing.assert_close(got, truth[to], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", LEVELS)
def test_laboratory_levels_lie_on_the_curve_and_its_slope_is_the_difference_quotient(name):
    schedule = LEVELS[name]
    finite = schedule.log_snr.isfinite()
    on_curve = schedule.log_snr_at(schedule.u)
    torch.testing.assert_close(on_curve[finite], schedule.log_snr[finite], rtol=1e-9, atol=1e-9)
    assert (on_curve[~finite] == -math.inf).all()
    u, h = torch.linspace(0.0123, 0.9876, 333, dtype=torch.float64), 1e-7
    difference = (schedule.log_snr_at(u + h) - schedule.log_snr_at(u - h)) / (2 * h)
    torch.testing.assert_close(difference, schedule.log_snr_slope(u), rtol=1e-4, atol=1e-4)


CLOSED = {  # λ(u)
    "flow_linear": lambda u: 2 * torch.log((1 - u) / u),
    "vp_continuous": lambda u: -torch.log(torch.expm1(19.9 / 2 * u**2 + 0.1 * u)),
    "laplace": lambda u: -0.5 * torch.sign(0.5 - u) * torch.log(1 - 2 * (0.5 - u).abs()),
    "cosine": lambda u: -2 * torch.log(torch.tan(math.pi / 2 * (u + 0.008) / 1.008)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_laboratory_closed_forms(name):
    schedule = SCHEDULES[name](1000)
    u = schedule.u[10:-1]
    want = CLOSED[name](u)
    if (
        name == "cosine"
    ):  # discrete: its first level is relative to u = 0, which shifts the SNR by ᾱ(0)
        kept = torch.sigmoid(want) / math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
        want = torch.log(kept / (1 - kept))
    torch.testing.assert_close(schedule.log_snr_at(u), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("density", DENSITIES)
def test_laboratory_a_density_is_a_distribution_on_every_schedule_or_refused_by_name(density):
    for name, schedule in LEVELS.items():
        try:
            made = make_density(density, schedule)
        except ConfigError as e:
            assert density == "log_snr_uniform" and schedule.snr[-1] == 0 and density in str(e)
            continue
        assert made.probs.sum().item() == pytest.approx(1, abs=1e-12), name
        assert (made.probs >= 0).all() and made.probs.isfinite().all()


def test_laboratory_a_density_as_a_weighting_and_as_draws_is_the_same_objective():
    "weight × uniform draws = no weight × draws: for each density that exists in both forms"
    schedule = SCHEDULES["linear"](1000)
    pairs = {  # weighting -> what is left when its density is drawn
        "uniform_logsnr": ("eps", "constant", "log_snr_uniform"),
        "laplace": ("eps", "constant", "laplace"),
        "logit_normal": ("u", "constant", "logit_normal"),
        "edm_lognormal": ("F", "constant", "edm_lognormal"),
        "cosmap": ("u", "constant", "cosmap"),
    }
    for weighting, (prediction, rest, density) in pairs.items():
        assert contains_density(weighting)
        weighted = effective_weighting(make_objective(schedule, prediction, weighting))
        drawn = make_objective(schedule, prediction, rest, density=make_density(density, schedule))
        ratio = (weighted / effective_weighting(drawn))[1:-1]
        torch.testing.assert_close(ratio / ratio[500], torch.ones_like(ratio), rtol=1e-5, atol=0)


def test_laboratory_importance_sampling_resumes_exactly():
    schedule, rng = SCHEDULES["linear"](50), stream(3, "timestep")
    loss = torch.logspace(0, -2, 50, dtype=torch.float64)

    def run(density, steps, first=0):
        drawn = []
        for step in range(first, steps):
            t = density.draw(rng, 64, 64 * step)
            density.observe(t, loss[t])
            drawn.append(t)
        return torch.cat(drawn)

    whole = run(make_density("loss_second_moment", schedule), 60)
    half = make_density("loss_second_moment", schedule)
    run(half, 30)
    resumed = make_density("loss_second_moment", schedule)
    resumed.load({name: part.clone() for name, part in half.state().items()})
    assert torch.equal(run(resumed, 60, first=30), whole[30 * 64 :])
    assert not torch.equal(
        run(make_density("loss_second_moment", schedule), 60, 30), whole[30 * 64 :]
    )


def test_laboratory_the_vp_schedule_of_a_curve_is_one_cell():
    straight = from_curve(lambda u: 8 - 16 * u, 100, "straight")
    bound = effective_weighting(make_objective(straight, "v", "elbo"))
    torch.testing.assert_close(bound[1:-1] / bound[50], torch.ones(98, dtype=torch.float64))
