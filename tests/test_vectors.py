"""The kit's schedules and weightings against independently computed float64 vectors.

`data/weight_vectors.json` lists every weighting at a few timesteps, as the factor on the x0, eps, v and
rectified-flow loss. Rows `BUG_*` and `DEV_*` are what known public code computes instead: the kit must not.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from minsnr_nb.diffusion import error_ratio
from minsnr_nb.minsnr_loss import WEIGHTINGS, loss_weight
from minsnr_nb.schedule import SCHEDULES
from minsnr_nb.toy import Gaussian, GaussianMixture

VECTORS = json.loads((Path(__file__).parent / "data" / "weight_vectors.json").read_text())
RTOL = 1e-6

# name in the vectors -> entry of the lane; numbers in the name become keywords (bare parts are literal)
ROWS = {
    r"eps_uniform": ("uniform_eps", {}),
    r"x0_uniform": ("uniform_x0", {}),
    r"v_uniform": ("uniform_v", {}),
    r"rf_u_uniform": ("uniform_u", {}),
    r"score_uniform": ("uniform_score", {}),
    r"trunc_snr_max\(snr,1\)": ("trunc_snr", {}),
    r"min_snr_(?P<gamma>N)": ("min_snr", {}),
    r"max_snr_(?P<gamma>N)": ("max_snr", {}),
    r"soft_min_snr_(?P<gamma>N)": ("soft_min_snr", {}),
    r"inv_snr_x0\(official\)": ("inv_snr", {}),
    r"gamma_over_snr_unclipped_(?P<scale>N)": ("uniform_x0", {}),  # a global factor on x0-uniform
    r"debiased_1/sqrt\(snr\)": ("debiased", {}),
    r"p2_g(?P<gamma>N)_k(?P<k>N)": ("p2", {}),
    r"edm_sd(?P<sigma_data>N)": ("edm", {}),
    r"edm_incl_density": ("edm_lognormal", {}),
    r"elbo_discrete_fixed_small": ("elbo", {"form": "fixed_small"}),
    r"elbo_discrete_fixed_large": ("elbo", {"form": "fixed_large"}),
    r"elbo_continuous_0\.5\*\|dlam\|": ("elbo", {}),
    r"sigmoid_b(?P<bias>N)_on_eps_no_jac": ("sigmoid", {"jacobian": False}),
    r"sigmoid_b(?P<bias>N)_elbo_jac": ("sigmoid", {}),
    r"logsnr_uniform": ("uniform_logsnr", {}),
    r"laplace_mu(?P<mu>N)_b(?P<b>N)": ("laplace", {}),
    r"sd3_logit_normal_m(?P<mean>N)_s(?P<std>N)": ("logit_normal", {}),
}
DENSITY_ALONE = {"cosmap_factor_on_u"}  # p(τ) without |dτ/du|: a weighting on flow_linear only
SCHEDULE_NAMES = {"linear_1e-4_0.02_T1000": "linear"}


def entry_of(row: str) -> tuple[str, dict, float]:
    "Find the weighting, its keywords and a global factor for one row"
    for pattern, (name, fixed) in ROWS.items():
        if found := re.fullmatch(pattern.replace("N", r"-?\d+(?:\.\d+)?"), row):
            keywords = {key: float(value) for key, value in found.groupdict().items()}
            scale = keywords.pop("scale", 1.0)
            return name, {**fixed, **keywords}, scale
    raise LookupError(f"no weighting is named for the row {row!r}")


def schedule_of(name: str):
    return SCHEDULES[SCHEDULE_NAMES[name]](VECTORS["schedules"][name]["T"])


def numbers(values: list) -> torch.Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def correct(rows) -> list[str]:
    return [
        row for row in rows if not row.startswith(("BUG_", "DEV_")) and row not in DENSITY_ALONE
    ]


def close(got, wanted, rtol=RTOL):
    torch.testing.assert_close(got, numbers(wanted), rtol=rtol, atol=0)


CASES = [(s, row) for s, v in VECTORS["schedules"].items() for row in correct(v["weights"])]


def test_vectors_the_vectors_are_all_there():
    assert len(CASES) + len(DENSITY_ALONE) >= 37


@pytest.mark.parametrize("name", VECTORS["schedules"])
def test_vectors_schedule(name):
    want, schedule = VECTORS["schedules"][name], schedule_of(name)
    t = torch.tensor(want["t"])
    close(schedule.betas[t], want["beta"], rtol=1e-9)
    close(schedule.alphas_cumprod[t], want["alphas_cumprod"], rtol=1e-9)
    close(schedule.snr[t], want["snr"], rtol=1e-9)
    close(schedule.log_snr[t], want["log_snr"], rtol=1e-9)


@pytest.mark.parametrize(("name", "row"), CASES, ids=[row for _, row in CASES])
def test_vectors_row(name, row):
    schedule, want = schedule_of(name), VECTORS["schedules"][name]["weights"][row]
    entry, keywords, scale = entry_of(row)
    t, snr = torch.tensor(VECTORS["schedules"][name]["t"]), schedule.snr
    on = {p: scale * loss_weight(entry, snr, prediction=p, **keywords) for p in ("x0", "eps", "v")}
    for prediction, weight in on.items():
        close(weight[t], want[f"w_{prediction}"])
    close(scale * loss_weight(entry, snr, prediction="u", **keywords)[t], want["w_flow_u"])
    unit = {"sigma_data": keywords.get("sigma_data", 0.5)}
    on_f = scale * loss_weight(entry, snr, prediction="F", **{**keywords, **unit})
    close(on_f[t] * (snr[t] + unit["sigma_data"] ** -2), want["w_x0"])
    for prediction in ("eps", "v"):
        finite = on[prediction][on[prediction].isfinite()]
        mean = want[f"mean_over_t_of_w_{prediction}(finite)"]
        assert finite.mean().item() == pytest.approx(mean, rel=RTOL)
    finite = on["eps"][on["eps"].isfinite()]
    fraction = (finite.sum() ** 2 / (len(finite) * finite.square().sum())).item()
    assert fraction == pytest.approx(want["ess_fraction_w_eps"], rel=RTOL)


def test_vectors_cosmap_contains_the_speed_of_flow_time():
    "The published numbers are p(τ); as a weighting each level also stands for its stretch of τ"
    for name, vectors in VECTORS["schedules"].items():
        snr, t = schedule_of(name).snr, torch.tensor(vectors["t"])[1:-1]
        tau = 1 / (1 + snr.sqrt())
        speed = (tau[t + 1] - tau[t - 1]) / 2 * len(snr)
        density = numbers(vectors["weights"]["cosmap_factor_on_u"]["w_flow_u"])[1:-1]
        torch.testing.assert_close(loss_weight("cosmap", snr, prediction="u")[t], density * speed)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_vectors_min_snr_is_none_of_the_known_deviations(prediction):
    for name, vectors in VECTORS["schedules"].items():
        mine = loss_weight("min_snr", schedule_of(name).snr, prediction=prediction, gamma=5.0)
        for row, want in vectors["weights"].items():
            if row.startswith("BUG_"):
                theirs = numbers(want[f"w_{prediction}"])
                assert not torch.allclose(mine[torch.tensor(vectors["t"])], theirs, rtol=1e-2), row


def test_vectors_float32_is_the_rounded_float64():
    for name in VECTORS["schedules"]:
        snr = schedule_of(name).snr.float()
        for prediction in ("x0", "eps", "v"):
            single = loss_weight("min_snr", snr, prediction=prediction)
            double = loss_weight("min_snr", snr.double(), prediction=prediction)
            assert single.dtype == torch.float32 and torch.equal(single, double.float())


INF = float("inf")
# (entry, keywords): for x0, eps and v the factor at SNR 0 and at SNR infinity
LIMITS = {
    ("uniform_eps", ()): ((0, INF), (1, 1), (0, 1)),
    ("uniform_x0", ()): ((1, 1), (INF, 0), (1, 0)),
    ("measured", (("log_snr", (-2.0, 3.0)), ("weight", (0.5, 4.0)))): (
        (0.5, 4),
        (INF, 0),
        (0.5, 0),
    ),
    ("uniform_v", ()): ((1, INF), (INF, 1), (1, 1)),
    ("uniform_u", ()): ((1, INF), (INF, 1), (1, 1)),
    ("uniform_score", ()): ((0, INF), (1, INF), (0, INF)),
    ("constant", ()): ((1, 1), (1, 1), (1, 1)),
    ("min_snr", (("gamma", 5.0),)): ((0, 5), (1, 0), (0, 0)),
    ("soft_min_snr", (("gamma", 5.0),)): ((0, 5), (1, 0), (0, 0)),
    ("max_snr", (("gamma", 5.0),)): ((5, INF), (INF, 1), (5, 1)),
    ("trunc_snr", ()): ((1, INF), (INF, 1), (1, 1)),
    ("p2", (("k", 2.0), ("gamma", 1.0))): ((0, 1), (0.5, 0), (0, 0)),
    ("p2", (("k", 4.0), ("gamma", 0.5))): ((0, INF), (0.5, 0), (0, 0)),
    ("debiased", ()): ((0, INF), (INF, 0), (0, 0)),
    ("inv_snr", ()): ((INF, 0), (INF, 0), (INF, 0)),
    ("edm", (("sigma_data", 0.5),)): ((4, INF), (INF, 1), (4, 1)),
    ("sigmoid", (("bias", 0.0), ("jacobian", False))): ((0, 1), (1, 0), (0, 0)),
}


@pytest.mark.parametrize("case", LIMITS, ids=lambda case: f"{case[0]}-{dict(case[1])}")
def test_vectors_limits(case):
    name, keywords = case
    ends = torch.tensor([0.0, INF], dtype=torch.float64)
    for prediction, want in zip(("x0", "eps", "v"), LIMITS[case], strict=True):
        got = loss_weight(name, ends, prediction=prediction, **dict(keywords))
        torch.testing.assert_close(got, numbers(want), rtol=1e-12, atol=0)


def test_vectors_every_pointwise_weighting_has_its_limits_stated():
    needs_the_curve = {
        "elbo", "uniform_logsnr", "laplace", "logit_normal", "edm_lognormal", "cosmap",
    }  # fmt: skip
    assert {name for name, _ in LIMITS} | needs_the_curve == set(WEIGHTINGS)


def test_vectors_closed_forms_in_log_snr():
    "Forms that contain no 0/0 and no overflow, from SNR 1e-12 to 1e12"
    log_snr = torch.linspace(-27.631, 27.631, 101, dtype=torch.float64)
    s, n = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
    forms = {
        ("min_snr", "eps"): torch.exp((math.log(5) - log_snr).clamp(max=0)),
        ("min_snr", "v"): torch.minimum(s, 5 * n),
        ("soft_min_snr", "eps"): torch.sigmoid(math.log(5) - log_snr),
        ("soft_min_snr", "v"): 5 * s * n / (5 * n + s),
        ("trunc_snr", "v"): torch.maximum(s, n),
        ("p2", "eps"): n,
        ("debiased", "v"): 0.5 / torch.cosh(log_snr / 2),
        ("uniform_x0", "v"): n,
        ("uniform_eps", "v"): s,
        ("edm", "v"): s + 4 * n,
        ("uniform_u", "v"): (s.sqrt() + n.sqrt()) ** 2,
    }
    for (name, prediction), want in forms.items():
        got = loss_weight(name, log_snr.exp(), prediction=prediction)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0, msg=f"{name} on {prediction}")


ORACLES = {
    "gauss_s1": Gaussian(0.0, 1.0),
    "gauss_s0.5": Gaussian(0.0, 0.5),
    "gmm_pm1_sd0.1": GaussianMixture([-1.0, 1.0], [0.1, 0.1], [0.5, 0.5]),
    "rademacher_pm1": GaussianMixture([-1.0, 1.0], [0.0, 0.0], [0.5, 0.5]),
    "gmm_3comp(-1,0.2,1.5;sd .2,.1,.4;pi .3,.5,.2)": GaussianMixture(
        [-1.0, 0.2, 1.5], [0.2, 0.1, 0.4], [0.3, 0.5, 0.2]
    ),
}


@pytest.mark.parametrize("data", VECTORS["oracle_min_losses_linear"])
def test_vectors_smallest_possible_loss(data):
    want, schedule = (
        VECTORS["oracle_min_losses_linear"][data],
        schedule_of("linear_1e-4_0.02_T1000"),
    )
    floor, t = ORACLES[data].min_x0_mse(schedule), torch.tensor(want["t"])
    for prediction in ("x0", "eps", "v"):
        got = (floor * error_ratio(prediction, schedule.snr))[t]
        wanted = numbers(want[f"min_{prediction}_mse"])
        torch.testing.assert_close(got, wanted, rtol=RTOL, atol=1e-12)
