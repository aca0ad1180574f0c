"A training without a network, for tests of the queue: real runs, real attempts, steps that take a moment, and no torch."

import fcntl
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from minsnr_nb import durable
from minsnr_nb.jobs import worker
from minsnr_nb.jobs.queue import note_run
from minsnr_nb.record.directory import Run, create_run
from minsnr_nb.record.state import is_sealed, set_status, start_attempt

STEPS = 6
STAMP = {"command": {"argv": ["short"], "cwd": "."}}
STAMP |= {"git": {"available": False, "repo_sha": "nogit", "is_dirty": False}}
CODE = worker._HEAD + "from tests.short_job import main; finished(place, main)"


def _options(words: list[str]) -> dict[str, str]:
    pairs = (w.split("=", 1) for w in words if "=" in w and not w.startswith("-"))
    return dict(pairs)


def _new(asked: dict) -> Run:
    env = {"python": "3", "platform": "any", "torch": "2"}
    env |= {"vars": {"MINSNR_JOB": os.environ["MINSNR_JOB"]}}
    texts = {"config_text": json.dumps(asked) + "\n", "resolved_text": json.dumps(asked) + "\n"}
    run = create_run(Path("runs"), "short", **texts, provenance=STAMP | {"env": env})
    note_run(run.path)
    print(f"RUN_DIR: {run.path}", flush=True)
    return run


def main() -> int:
    verb, *words = sys.argv[1:]
    run = Run(Path(words[0])) if verb == "resume" else _new(_options(words))
    asked = run.config() or {}
    if is_sealed(run):
        return 0
    alone = os.open(run.path, os.O_RDONLY)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path("TWICE").touch()  # two processes train one run: what must never be
    attempt = start_attempt(run, {"step": 0} if any(run.attempts.iterdir()) else None)
    return _train(run, attempt, int(asked.get("steps", STEPS)), float(asked.get("pause", 0.02)))


def _train(run: Run, attempt: int, steps: int, pause: float) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _: asked.append(signum))
    saved = run.path / "ckpts/last/step"
    done = int(saved.read_text()) if saved.exists() else 0
    log = [json.loads(x) for x in run.metrics_path.read_text().splitlines() if x.endswith("}")]
    kept = "".join(json.dumps(x) + "\n" for x in log if x["step"] <= done)
    durable.replace(run.metrics_path, kept)
    with durable.Appender(run.metrics_path) as out:
        for step in range(done + 1, steps + 1):
            time.sleep(pause)
            out.line(json.dumps({"step": step, "time": 0.0, "kind": "train", "attempt": attempt}))
            durable.replace(saved, str(step))
            stop = run.requests / "stop.json"
            if (asked or stop.exists()) and step < steps:
                with suppress(FileNotFoundError):
                    stop.unlink()
                set_status(run, "interrupted", step, steps, "asked", attempt=attempt)
                return 128 + asked[0] if asked else 0
    set_status(run, "completed", steps, steps, attempt=attempt)
    durable.replace(run.path / "meta/seal.json", "{}\n")
    return 0
