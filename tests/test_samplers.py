"The samplers against diffusers', step by step, where it is installed."

import pytest
import torch

from minsnr_nb.diffusion import x0_from
from minsnr_nb.samplers import SAMPLERS
from minsnr_nb.schedule import SCHEDULES
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
def test_ddim_goes_the_way_of_diffusers(steps, prediction, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        **COMMON, prediction_type=NAMES[prediction], timestep_spacing="trailing"
    )
    way = theirs(scheduler, steps, eta=lambda z: eta, variance_noise=lambda z: z if eta else None)
    assert_same_way(ours("ddim", steps, prediction, eta=eta), way, 2e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [1000, 100])
def test_ddpm_goes_the_way_of_diffusers(steps, variance, monkeypatch):
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
    assert_same_way(mine, way, 2e-4)
