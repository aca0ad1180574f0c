"""`identify` against the published vectors: each row, right or wrong, is named from its numbers alone.

The rows list six timesteps. Here the formula of each is evaluated on the whole schedule, checked against the row at
those six, and handed to `identify`, as the weight on the x0, eps and v loss in turn.
"""

import math

import pytest
import torch

from minsnr_nb.analysis.identify import KNOWN_WRONG, SAME, families, identify
from minsnr_nb.minsnr_loss import WEIGHTINGS, loss_weight
from minsnr_nb.schedule import SCHEDULES
from tests.test_vectors import (
    DENSITY_ALONE,
    SCHEDULE_NAMES,
    VECTORS,
    entry_of,
    numbers,
    schedule_of,
)

ROWS = [(s, row) for s, vectors in VECTORS["schedules"].items() for row in vectors["weights"]]
WRONG = {  # name in the vectors -> entry, where they differ
    "DEV_onetrainer_p2_v_g1": "DEV_onetrainer_p2_v",
    "cosmap_factor_on_u": "DEV_cosmap_without_speed",
}


def formula(schedule_name: str, row: str) -> tuple[str, torch.Tensor]:
    "The entry that a row is about, and its weight on the x0 error for every timestep"
    snr = schedule_of(schedule_name).snr
    if row.startswith(("BUG_", "DEV_")) or row in DENSITY_ALONE:
        name = WRONG.get(row, row.removesuffix("(g5)"))
        return name, KNOWN_WRONG[name](snr)
    name, keywords, scale = entry_of(row)
    return name, scale * loss_weight(name, snr, prediction="x0", **keywords)


@pytest.mark.parametrize(("schedule_name", "row"), ROWS, ids=[row for _, row in ROWS])
def test_identify_every_row_is_named(schedule_name, row):
    schedule, want = schedule_of(schedule_name), VECTORS["schedules"][schedule_name]
    name, weight = formula(schedule_name, row)
    on_v = weight / (schedule.snr + 1)
    theirs = numbers(want["weights"][row]["w_v"])
    torch.testing.assert_close(on_v[torch.tensor(want["t"])], theirs, rtol=1e-6, atol=0)
    found = identify(on_v, schedule, "v")
    assert found.distance < SAME
    names = {found.name: found.best, **{match.name: match for match in found.also}}
    assert name in names, str(found)
    if not row.startswith(("BUG_", "DEV_")) and row not in DENSITY_ALONE:
        keywords = {k: v for k, v in entry_of(row)[1].items() if isinstance(v, float)}
        said = {k: names[name].keywords[k] for k in keywords}
        assert said == pytest.approx(keywords, rel=1e-4)


def test_identify_a_deviation_is_called_one_unless_it_is_a_right_scheme_by_another_name():
    same_as = {
        "DEV_lucidrains_pred_v_default": "uniform_eps",
        "DEV_aitoolkit_snr_gamma": "uniform_x0",
    }
    schedule = SCHEDULES["linear"](1000)
    for name in set(KNOWN_WRONG) - {"BUG_official_zero_terminal"}:
        found = identify(KNOWN_WRONG[name](schedule.snr) / 3, schedule, "x0")
        assert (
            (found.name == name and found.best.wrong)
            or found.name == same_as.get(name)
            or (name == "BUG_speed_min_snr_eps" and found.name == "p2")
        ), str(found)


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid", "flow_linear"])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "u", "F"])
def test_identify_on_other_schedules_and_losses(schedule, prediction):
    s = SCHEDULES[schedule](200)
    for name, keywords in {"min_snr": {"gamma": 2.5}, "p2": {"k": 3.0, "gamma": 0.5}}.items():
        found = identify(
            0.1 * loss_weight(name, s.snr, prediction=prediction, **keywords), s, prediction
        )
        assert (found.name, found.best.keywords) == (name, pytest.approx(keywords, rel=1e-6))
        assert found.factor == pytest.approx(0.1, rel=1e-6)


def test_identify_six_levels_are_enough_for_the_rows_with_no_free_number():
    vectors = VECTORS["schedules"][next(iter(SCHEDULE_NAMES))]
    schedule = schedule_of(next(iter(SCHEDULE_NAMES)))
    for row in (
        "x0_uniform",
        "min_snr_5",
        "BUG_diffusers_pixart_v(g5)",
        "DEV_onetrainer_debiased_v",
    ):
        found = identify(numbers(vectors["weights"][row]["w_v"]), schedule, "v", t=vectors["t"])
        name = row.removesuffix("(g5)").removesuffix("_5").replace("x0_uniform", "uniform_x0")
        assert name in {found.name, *(match.name for match in found.also)}, str(found)


def test_identify_a_user_defined_weighting_is_known_at_once():
    def cubic_root(snr: torch.Tensor) -> torch.Tensor:
        "SNR to the third"
        return snr ** (1 / 3)

    WEIGHTINGS.register(cubic_root)
    try:
        schedule = SCHEDULES["linear"](1000)
        assert identify(schedule.snr ** (1 / 3), schedule, "x0").name == "cubic_root"
        assert any(family.name == "cubic_root" for family in families())
    finally:
        del WEIGHTINGS._entries["cubic_root"]


def test_identify_infinite_and_missing_values_are_told_apart():
    schedule = SCHEDULES["linear"](1000)
    weight = loss_weight("elbo", schedule.snr, prediction="eps", form="fixed_small")
    assert weight[0] == math.inf
    assert identify(weight, schedule, "eps").best.keywords == {"form": "fixed_small"}
    weight[500] = math.nan
    found = identify(weight, schedule, "eps")
    assert (found.left_out, found.best.keywords) == (1, {"form": "fixed_small"})


@pytest.mark.parametrize(("size", "tables"), [(3, 20), (4, 10), (6, 10), (12, 5)])
def test_identify_random_tables_have_no_name(size, tables):
    schedule, rng = SCHEDULES["linear"](1000), torch.Generator().manual_seed(size)
    for _ in range(tables):
        t = torch.randperm(1000, generator=rng)[:size].sort().values
        found = identify(torch.randn(size, generator=rng).double().exp(), schedule, "eps", t=t)
        assert found.name == "unknown" and str(found).startswith("unknown"), str(found)


@pytest.mark.parametrize("levels", [[600, 700, 900], [200, 500, 700, 900, 950]])
def test_identify_a_constant_has_the_plain_name(levels):
    "Below SNR 5 it is Min-SNR-5 as well, which says more than is known"
    schedule = SCHEDULES["linear"](1000)
    found = identify([3.0] * len(levels), schedule, "eps", t=levels)
    assert (found.name, found.distance < SAME) == ("uniform_eps", True)


@pytest.mark.parametrize("meant", ["cosine", "scaled_linear", "flow_linear"])
def test_identify_the_schedule_is_doubted_before_the_weighting(meant):
    true, said = SCHEDULES[meant](1000), SCHEDULES["linear"](1000)
    found = identify(loss_weight("min_snr", true.snr, prediction="v", gamma=5.0), said, "v")
    name, match = found.elsewhere[0]
    assert (name, match.name, match.keywords["gamma"]) == (meant, "min_snr", pytest.approx(5))
    assert f"on the {meant} schedule" in str(found)
