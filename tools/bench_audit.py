"""What the care for a run costs while it trains: requests, heartbeat, log and digests as a share of step time.

usage: python tools/bench_audit.py [STEPS]
"""

import sys
import tempfile
import time
from pathlib import Path

from minsnr_nb import api, checkpoint, runner
from minsnr_nb.record import events
from minsnr_nb.requests import Requests

spent: dict[str, float] = {}


def timed(owner, name: str, label: str) -> None:
    "Add up the time inside one function"
    inner = getattr(owner, name)

    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - start

    setattr(owner, name, call)


def main(steps: int) -> int:
    "Train with default settings and print each share"
    timed(Requests, "after_step", "requests")
    timed(runner.Heartbeat, "after_step", "heartbeat")
    timed(events.EventLog, "log", "log lines")
    timed(checkpoint, "make_manifest", "digests of checkpoints")
    train = runner.train
    total = []

    def whole(loop):
        start = time.perf_counter()
        train(loop)
        total.append(time.perf_counter() - start)

    runner.train = whole
    with tempfile.TemporaryDirectory() as root:
        api.train_run({"project": "bench", "train": {"steps": steps}}, run_root=Path(root))
    for label, seconds in spent.items():
        print(
            f"{label:24} {100 * seconds / total[0]:6.3f} %  {1e6 * seconds / steps:8.1f} us a step"
        )
    share = sum(spent.values()) / total[0]
    print(f"{'together':24} {100 * share:6.3f} %  of {1e3 * total[0] / steps:.2f} ms a step")
    return 0 if share <= 0.01 else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
