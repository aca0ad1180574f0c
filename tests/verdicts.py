"""How often the verdict is wrong: `python -m tests.verdicts [--short]`.

Studies are made up, with scores that are equal in truth, and judged by the code that judges real ones. Scores are
positive and share the noise of their seed with the baseline, as runs do that are trained in pairs.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import numpy as np

from minsnr_nb.sweep.plan import Primary, Rule, Sweep
from minsnr_nb.sweep.statistics import seeds_needed, simultaneous
from minsnr_nb.sweep.verdict import Score, judge

SPREAD, SHARED = 0.1, 0.2  # of one run, and of what the runs of one seed have in common


def study(arms: int, seeds: int, smallest: float = 0.001, sequential: bool = False) -> Sweep:
    names = ["base", *(f"arm{i}" for i in range(arms))]
    return Sweep(
        seeds=tuple(range(seeds)),
        baseline="base",
        arms={name: {} for name in names},
        primary=Primary(metric="m", smallest=smallest),
        rule=Rule(sequential=sequential),
    )


def scores(sweep: Sweep, rng: np.random.Generator, effect: float = 0.0, spread: float = SPREAD):
    "Scores of a study in which every arm differs from the baseline by `effect`, on the logarithm"
    n = len(sweep.all_seeds)
    common = SHARED * rng.standard_normal(n)
    out = {}
    for name in sweep.arms:
        shift = effect if name != sweep.baseline else 0.0
        value = np.exp(1 + shift + common + spread * rng.standard_normal(n))
        out[name] = {s: Score(float(v), None, None, float(v)) for s, v in enumerate(value)}
    return out


def outcomes(sweep: Sweep, table) -> list[str]:
    found, _ = judge(sweep, table)
    return [f.outcome for f in found.values() if f is not None]


def false_findings(arms: int, studies: int, seeds: int = 8) -> float:
    "Share of studies of equal arms with any better or worse"
    rng, sweep = np.random.default_rng(arms), study(arms, seeds)
    wrong = [{"better", "worse"} & {*outcomes(sweep, scores(sweep, rng))} for _ in range(studies)]
    return sum(map(bool, wrong)) / studies


def false_at_any_time(studies: int, most: int = 20) -> float:
    "The same for one arm, looked at after every seed until something is found"
    rng, wrong = np.random.default_rng(99), 0
    sweep = study(1, most, sequential=True)
    for _ in range(studies):
        table = scores(sweep, rng)
        for n in range(2, most + 1):
            some = {arm: {s: of[s] for s in range(n)} for arm, of in table.items()}
            if {"better", "worse"} & {*outcomes(sweep, some)}:
                wrong += 1
                break
    return wrong / studies


def found_equal(studies: int, smallest: float = 0.1) -> tuple[float, int]:
    "Share of equal pairs that are found equivalent at the number of seeds that is asked for"
    n = seeds_needed(2**0.5 * SPREAD, float(np.log1p(smallest)))
    rng, sweep = np.random.default_rng(7), study(1, n, smallest)
    found = [outcomes(sweep, scores(sweep, rng)) == ["equivalent"] for _ in range(studies)]
    return sum(found) / studies, n


def power(effect: float, studies: int, seeds: int = 8) -> float:
    "Share of studies that find a difference which is there"
    rng, sweep = np.random.default_rng(5), study(1, seeds)
    return (
        sum(outcomes(sweep, scores(sweep, rng, effect)) == ["worse"] for _ in range(studies))
        / studies
    )


def false_dents(bins: int, studies: int, seeds: int = 8) -> float:
    "Share of curves over noise levels, equal in truth, with any band that leaves zero out"
    rng, wrong = np.random.default_rng(3), 0
    near = np.exp(-np.abs(np.subtract.outer(range(bins), range(bins))) / 2)  # neighbours agree
    root = np.linalg.cholesky(near)
    for _ in range(studies):
        found = simultaneous(root @ rng.standard_normal((bins, seeds)))
        wrong += any(d.low > 0 or d.high < 0 for d in found)
    return wrong / studies


def rows(studies: int) -> Iterator[tuple[str, float, float, float]]:
    "What is measured, the share, and between which ends it should lie"
    slack = 2 * (0.05 * 0.95 / studies) ** 0.5  # two standard errors of the simulation itself
    for arms in (1, 3, 8):
        yield f"false findings, {arms} arms, n = 8", false_findings(arms, studies), 0.04, 0.06
    yield "false findings, 1 arm, n = 5", false_findings(1, studies, 5), 0.04, 0.06
    yield "false findings at any of 19 looks", false_at_any_time(studies // 4), 0.0, 0.05 + slack
    share, n = found_equal(studies // 2)
    yield f"equal pairs found equivalent, n = {n}", share, 0.78, 1.0
    yield "curves of 10 bins with a false dent", false_dents(10, studies), 0.03, 0.065
    yield "a difference of 2 spreads found, n = 8", power(2 * SPREAD, studies // 2), 0.8, 1.0


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verdicts", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a hundred studies of each kind")
    studies, failed = 120 if parser.parse_args(words).short else 2000, 0
    for what, share, low, high in rows(studies):
        wide = 3 * (max(share, 0.05) * 0.95 / studies) ** 0.5 if studies < 2000 else 0.0
        good = low - wide <= share <= high + wide
        failed += not good
        print(
            f"{'ok ' if good else 'BAD'} {what:42} {share:.3f}  [{low:.3f}, {high:.3f}]", flush=True
        )
    return 1 if failed else 0


if __name__ == "__main__":
    start = time.perf_counter()
    status = main(sys.argv[1:])
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(status)
