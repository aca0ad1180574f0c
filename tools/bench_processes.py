"""What cutting a step into shards costs, and what sharing it among processes gains.

uv run python tools/bench_processes.py --rounds 15 --steps 4 --json bench.json

The digits U-Net (32 channels, batches of 128), one thread per process. A round times every arm once, in rotating
order: 1 shard, 4 shards, both by this process alone, and 4 shards by this one with a second one. Ratios are taken
within a round; their median and range are over rounds. `wall` is what a clock shows and depends on what else the
machine does; `cpu` is the time that this process computed, so for two processes it is what a free second core leaves to
wait for. A second process that is not asked for its part waits without computing.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

import torch

from minsnr_nb.lab import build, load
from minsnr_nb.processes.shards import SOLO
from minsnr_nb.processes.team import Hired, Linked, gate, lead
from minsnr_nb.runner import make_loop
from minsnr_nb.train_loop import Loop, draw_batch, train, train_step

CONFIG = {
    "model": {"name": "unet", "ch": 32, "mult": [1, 2], "blocks": 1, "attention": [4]},
    "train": {"steps": 1_000_000, "batch_size": 128},
    "callbacks": [],
    "metrics": [],
}
ARMS = {"1 shard": (1, 1), "4 shards": (4, 1), "4 shards, 2 processes": (4, 2)}
RATIOS = [("4 shards", "1 shard"), ("4 shards, 2 processes", "4 shards")]
RATIOS += [("4 shards, 2 processes", "1 shard")]


def made(shards: int) -> Loop:
    torch.set_num_threads(1)
    loop = make_loop(build(load(CONFIG, {"train": {"shards": shards}}).cfg, "cpu"))
    loop.state.model.train()
    return loop


def beside() -> None:
    "Be the second process"

    def work(place, order, answer) -> None:
        loop = made(4)
        answer(ready=True)
        loop.team = Linked(place)
        train(loop)

    gate(work)


def seconds(loop: Loop, steps: int) -> tuple[float, float]:
    "One step, on average: on the clock, and of this processor"
    time.sleep(0.2)  # what the other process had begun is done
    start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        batch = draw_batch(loop.state.step, loop.images, loop.objective, loop.cfg)
        train_step(loop.state, loop.objective, batch, loop.cfg, loop.team)
    end = time.perf_counter(), time.process_time()
    return (end[0] - start[0]) / steps, (end[1] - start[1]) / steps


def measure(rounds: int, steps: int) -> dict:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_processes as b; b.beside()"
    with Hired(2, code, {}) as hired:
        team = lead(hired)
        loops = {name: made(shards) for name, (shards, _) in ARMS.items()}
        for name, (_, processes) in ARMS.items():
            loops[name].team = team if processes == 2 else SOLO
            seconds(loops[name], 1)
        names, times = list(ARMS), []
        for i in range(rounds):
            turn = names[i % 3 :] + names[: i % 3]
            times.append({name: seconds(loops[name], steps) for name in turn})
    report: dict = {
        "rounds": rounds,
        "steps": steps,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    for i, kind in enumerate(("wall", "cpu")):
        ms = {name: round(1e3 * median(t[name][i] for t in times), 1) for name in names}
        report[kind] = {"step_ms": ms}
        for a, b in RATIOS:
            found = sorted(t[a][i] / t[b][i] for t in times)
            report[kind][f"{a} / {b}"] = [round(x, 2) for x in (median(found), found[0], found[-1])]
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = json.dumps(measure(args.rounds, args.steps), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)
