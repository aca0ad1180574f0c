"The samplers against diffusers', step by step, where it is installed."

import math

import pytest
import torch

from minsnr_nb.diffusion import x0_from
from minsnr_nb.errors import ConfigError
from minsnr_nb.samplers import SAMPLERS, denoiser, sample
from minsnr_nb.schedule import SCHEDULES, NoiseSchedule, zero_terminal_snr
from minsnr_nb.seeds import stream

RNG = stream(0, "z")
NAMES = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
COMMON = {"num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": False}


def network(x_t, t):
    return torch.sin(2 * x_t) * (0.5 + t / 2000)


def ours(name, steps, prediction, **keys):
    schedule = SCHEDULES["linear"](1000)

    def denoise(x_t, t):
        return x0_from(prediction, network(x_t, t), x_t, t, schedule)

    x_T = RNG.normal(3, (1, 4, 4))
    sampler = SAMPLERS.bind(name, {"steps": steps, "clip": False, **keys})
    return list(sampler(denoise, schedule, x_T, RNG))


def theirs(scheduler, steps, **keys):
    scheduler.set_timesteps(steps)
    x, seen = RNG.normal(3, (1, 4, 4)), []
    for t in scheduler.timesteps.tolist():
        noise = RNG.normal(3, (1, 4, 4), step=1 + t)
        x = scheduler.step(
            network(x, t), t, x, **{k: f(noise) for k, f in keys.items()}
        ).prev_sample
        seen.append(x)
    return seen


def assert_same_way(a, b, tolerance):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= tolerance * max(1, y.abs().max().item())


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [20, 50])  # divisors: else its DDIM misses the next level
def test_samplers_ddim_goes_the_way_of_diffusers(steps, prediction, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        **COMMON, prediction_type=NAMES[prediction], timestep_spacing="trailing"
    )
    way = theirs(scheduler, steps, eta=lambda z: eta, variance_noise=lambda z: z if eta else None)
    assert_same_way(ours("ddim", steps, prediction, eta=eta), way, 1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [1000, 100])
def test_samplers_ddpm_goes_the_way_of_diffusers(steps, variance, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    scheduler = diffusers.DDPMScheduler(
        **COMMON, prediction_type="sample", variance_type=variance, timestep_spacing="trailing"
    )
    drawn = {}
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: drawn["z"])
    way = theirs(scheduler, steps, generator=lambda z: drawn.update(z=z))
    mine = ours("ddpm", steps, "x0", variance=variance)
    if variance == "fixed_large" and steps < 1000:  # diffusers adds noise after its last answer
        mine, way = mine[:-1], way[:-1]
    assert_same_way(mine, way, 1e-4)


def ticking(x_t, t):
    "A network with a hand that turns one radian per timestep, as a real one's clock does"
    return torch.sin(2 * x_t) * (0.5 + 0.2 * math.sin(float(t)))


def solved_by_ours(scheduler, name, steps, prediction, **keys):
    "On their levels: float32 costs them 1e-4 of the smallest sigma, which a ticking network sees"
    schedule = NoiseSchedule("theirs", scheduler.alphas_cumprod.double())
    model = denoiser(lambda x, t: ticking(x, t[0]), schedule, prediction)
    sampler = SAMPLERS.bind(name, {"steps": steps, **keys})
    return list(sampler(model, schedule, RNG.normal(3, (1, 4, 4)), RNG))


def solved_by_theirs(scheduler, steps):
    "Theirs lives in x / signal, scales what the network sees, and starts with signal 1 / sigma"
    scheduler.set_timesteps(steps)
    x, seen = RNG.normal(3, (1, 4, 4)) * (1 + scheduler.sigmas[0] ** 2).sqrt(), []
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t)
        x = scheduler.step(ticking(shown, t), t, x).prev_sample
        if (
            getattr(scheduler, "state_in_first_order", True)
            or scheduler.sigmas[scheduler.step_index] == 0
        ):
            seen.append(x / (1 + scheduler.sigmas[scheduler.step_index] ** 2).sqrt())
    return seen


@pytest.mark.parametrize("karras", [True, False], ids=["karras", "trailing"])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("name, peer", [("euler", "Euler"), ("heun", "Heun")])
def test_samplers_euler_and_heun_go_the_way_of_diffusers(name, peer, prediction, karras):
    "Settings that coincide: rho 7 between the schedule's own ends, or whole timesteps; no churn"
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, f"{peer}DiscreteScheduler")(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=NAMES[prediction],
        timestep_spacing="linspace" if karras else "trailing",
        use_karras_sigmas=karras,
    )
    keys = {"sigma_max": 1e6} if karras else {"spacing": "trailing"}
    for steps in (10, 20):
        way = solved_by_theirs(scheduler, steps)
        assert_same_way(solved_by_ours(scheduler, name, steps, prediction, **keys), way, 1e-4)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_samplers_dpm_solver_goes_the_way_of_diffusers(steps, prediction):
    "Settings that coincide: order 2, midpoint, whole trailing timesteps, down to sigma 0"
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type=NAMES[prediction],
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    x, way = RNG.normal(3, (1, 4, 4)), []
    for t in scheduler.timesteps:
        x = scheduler.step(ticking(x, t), t, x).prev_sample
        way.append(x)
    mine = solved_by_ours(scheduler, "dpmpp_2m", steps, prediction, spacing="trailing")
    assert_same_way(mine, way, 1e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("make", SCHEDULES)
def test_samplers_every_schedule_can_be_sampled_between_its_timesteps(name, make):
    "x0, v, u and F; plain and ending in pure noise; from one step on"
    for schedule in (SCHEDULES[make](60), zero_terminal_snr(SCHEDULES[make](60))):
        for prediction in ("x0", "v", "u", "F"):
            model = denoiser(ticking_batch, schedule, prediction)
            for steps, spacing in ((1, "karras"), (7, "karras"), (7, "log_snr"), (7, "uniform")):
                sampler = SAMPLERS.bind(name, {"steps": steps, "spacing": spacing})
                way = list(sampler(model, schedule, RNG.normal(2, (1, 2, 2)), RNG))
                assert len(way) == steps and torch.stack(way).isfinite().all(), prediction


def ticking_batch(x_t, t):
    assert t.shape == (len(x_t),) and 0 <= t[0] <= 59
    return ticking(x_t, t[0])


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_samplers_churned_noise_belongs_to_the_image(name):
    schedule, sampler = SCHEDULES["linear"](1000), SAMPLERS.bind(name, {"steps": 6, "churn": 3.0})
    model = denoiser(lambda x, t: ticking(x, t[0]), schedule, "v")
    drawn = [sample(sampler, model, schedule, (1, 2, 2), 9, RNG, batch_size=b) for b in (9, 4)]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)
    late = sample(sampler, model, schedule, (1, 2, 2), 2, RNG, first=7)
    torch.testing.assert_close(late, drawn[0][7:], rtol=0, atol=1e-5)
    calm = sample(SAMPLERS.bind(name, {"steps": 6}), model, schedule, (1, 2, 2), 9, RNG)
    assert (calm - drawn[0]).abs().max() > 0.05


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"churn": -1.0}, "greater than or equal to 0"),
        ({"rho": 0.0}, "greater than 0"),
        ({"spacing": "karas"}, "karras"),
        ({"step": 5}, "steps"),
    ],
)
def test_samplers_wrong_keywords_are_refused_in_one_line(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SAMPLERS.bind("heun", keys)
    assert "\n" not in str(caught.value)


def test_samplers_a_range_of_noise_that_is_empty_is_refused():
    sampler = SAMPLERS.bind("euler", {"sigma_min": 5.0, "sigma_max": 2.0})
    with pytest.raises(ConfigError, match="sigma_max: 2 must be greater than sigma_min, 5"):
        next(sampler(lambda x, t: x, SCHEDULES["linear"](100), torch.zeros(1, 1, 2, 2), RNG))
