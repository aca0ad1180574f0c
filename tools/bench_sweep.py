"""What a sweep costs beside its runs: a plan of 1,000 trials, and one trial's process.

usage: python tools/bench_sweep.py [TRIALS]
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import yaml

from minsnr_nb.record.directory import list_runs
from minsnr_nb.sweep.engine import run_sweep, run_trial
from minsnr_nb.sweep.plan import Plan, declared, read_plan
from minsnr_nb.sweep.verdict import made

STUDY = {
    "study": "bench",
    "model": {"name": "mlp", "width": 8, "depth": 1},
    "train": {"steps": 2, "batch_size": 8, "log_every": 1, "checkpoint_every": 2},
    "callbacks": [{"name": "log_events"}, {"name": "checkpoint"}],
    "metrics": [],
    "eval": {"samples": 4, "probe_images": 4, "probe_draws": 1},
    "sampler": {"name": "ddim", "steps": 1},
}


def written(place: Path, count: int) -> Path:
    "A study of two arms with so many seeds"
    arms = {"a": {}, "b": {"loss": {"name": "min_snr", "gamma": 5.0}}}
    sweep = {"seeds": {"count": count}, "baseline": "a", "arms": arms}
    path = place / "bench.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"sweep": sweep}))
    return path


def timed(action) -> tuple[float, object]:
    start = time.perf_counter()
    value = action()
    return time.perf_counter() - start, value


def filled(home: Path, plan: Plan, run: Path) -> None:
    "A sealed run for each trial: copies of one, claimed as if each had been made"
    for trial in plan.trials:
        copy = shutil.copytree(run, run.with_name(f"{run.name}_{trial.id}"))
        (home / trial.id).mkdir()
        (home / trial.id / "run").write_text(copy.relative_to(home.parents[1]).as_posix())


def main(trials: int) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        path = written(place, trials // 2)
        plan_s, plan = timed(lambda: read_plan(path))
        home_s, home = timed(lambda: declared(plan, place / "runs"))
        list_s, _ = timed(lambda: made(plan, home))
        print(
            f"{len(plan.trials)} trials: read {plan_s:.2f} s, declare {home_s:.2f} s, look up {list_s:.2f} s"
        )
        run_trial(plan, home, plan.trials[0])
        (run,) = list_runs(place / "runs")
        shutil.rmtree(home / plan.trials[0].id)
        filled(home, plan, run.path)
        again_s, _ = timed(lambda: run_sweep(path, 1, place / "runs"))
        print(f"the same command when all of them are sealed: {again_s:.2f} s")
        few = written(place, 8)
        plan = read_plan(few)
        run_trial(plan, declared(plan, place / "here"), plan.trials[0])  # imports, data
        here_s, _ = timed(
            lambda: [run_trial(plan, place / "here/sweeps/bench", t) for t in plan.trials[1:]]
        )
        pool_s, _ = timed(lambda: run_sweep(few, 1, place / "there"))
        here, there = here_s / (len(plan.trials) - 1), pool_s / len(plan.trials)
        print(f"one trial: {here:.2f} s in this process, {there:.2f} s in one of its own")
        print(f"overhead: {there - here:.2f} s, {(there - here) / 60:.1%} of a minute")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
