"A training run small enough to be killed a thousand times, in forked copies of one process."

import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch

from minsnr_nb import api, durable, runner
from minsnr_nb.config import config_sha256
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.directory import Run, create_run
from minsnr_nb.record.provenance import collect

CONFIG = {  # every shipped callback, evaluation included
    "project": "harness",
    "model": {"name": "mlp", "width": 8, "depth": 1},
    "train": {"steps": 8, "batch_size": 8, "log_every": 1, "checkpoint_every": 2},
    "callbacks": [
        *({"name": n} for n in ("timing", "grad_norm", "log_events", "evaluate", "progress")),
        *({"name": n} for n in ("checkpoint", "grad_share")),
        {"name": "sample_grid", "n": 4},
        {"name": "predictions", "n": 2},
        {"name": "snapshots", "every": 3},
    ],
    "metrics": [{"name": "fd"}],
    "sampler": {"name": "ddim", "steps": 1},
    "eval": {"every": 3, "samples": 4, "probe_images": 4, "probe_draws": 1, "probe_bins": 2},
}
LIGHT = CONFIG | {  # as few operations as a training run has
    "train": {"steps": 3, "batch_size": 8, "log_every": 1, "checkpoint_every": 1},
    "callbacks": [{"name": "log_events"}, {"name": "checkpoint"}],
}
MOMENT = datetime(2026, 1, 1)


class Lab:
    "Builds everything once; each run afterwards costs a few dozen milliseconds"

    def __init__(self, config: dict = CONFIG):
        torch.set_num_threads(1)
        self.loaded = api.load(config)
        self.lab = api.build(self.loaded.cfg, "cpu")
        data = [runner._identity(x) for x in (self.lab.train, self.lab.test)]
        facts = {"data": data, "seed": 0, "threads": 1, "mode": "strict"}
        stamp, files = collect(config_sha256=config_sha256(self.loaded.cfg), **facts)
        texts = {"config_text": self.loaded.composed, "resolved_text": self.loaded.resolved}
        self.parts = texts | {"provenance": stamp, "files": files}

    def create(self, root, moment: datetime | None = MOMENT) -> Run:
        return create_run(root, "harness", **self.parts, stamp=moment)

    def train(self, run: Run, force: bool = False) -> Run:
        return runner.run_to_end(run, self.lab, force=force)

    def whole(self, root) -> Run:
        return self.train(self.create(root))


def fork(action) -> int:
    "Start `action` in a copy of this process; its pid"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        action()
        code = 0
    except BaseException as e:
        with suppress(OSError):
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
    finally:
        os._exit(code)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forked(action) -> int:
    "Run `action` in a copy of this process; its exit status"
    return status_of(fork(action))


def told(action) -> tuple[int, str]:
    "Run `action` in a copy; its exit status and its last words"
    read, write = os.pipe()

    def speak():
        os.close(read)
        os.dup2(write, 2)
        action()

    pid = fork(speak)
    os.close(write)
    with open(read, "rb") as f:
        words = f.read().decode(errors="replace").strip()
    return status_of(pid), words


def killed_after(action, delay: float) -> int:
    pid = fork(action)
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return status_of(pid)


def visible(root) -> list[Run]:
    "Every run that a reader may meet"
    return [Run(p) for p in Path(root).glob("*/*") if not p.name.startswith(".")]


def invalid(run: Run, level: str = "L2") -> list:
    return [(c.id, c.path, c.message) for c in check_run(run.path, level) if not c.ok]


# What differs between two runs that are equal: moments, attempts, what was printed, and digests over these.
ONCE = ("meta/attempts/", "logs/discarded/", "meta/provenance.json", "run_manifest.json")
ONCE += ("meta/status.json", "meta/heartbeat.json", "meta/seal.json", "meta/manifest.json")
ONCE += ("logs/events.jsonl", "logs/stdout.log", "metrics.json")
MOMENTS = {"time", "attempt", "created_at_utc", "timestamp", "made_at_utc", "argv", "metrics"}
MOMENTS |= {"manifest_sha256"}


def _lasting(value):
    "A document without its moments"
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in MOMENTS and not k.startswith("time/")}
        return {k: _lasting(v) for k, v in kept.items()}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


def _content(path: Path, id: str) -> str:
    data = path.read_bytes().replace(id.encode(), b"")
    if path.suffix in (".json", ".jsonl"):
        lines = [data] if path.suffix == ".json" else data.splitlines()
        data = b"\n".join(json.dumps(_lasting(json.loads(line))).encode() for line in lines)
    return hashlib.sha256(data).hexdigest()


def things(run: Run) -> dict[str, str]:
    "Every file of a run, hidden ones included, with what must be equal in it"
    found = {}
    for path in sorted(p for p in run.path.rglob("*") if not p.is_dir()):
        name = path.relative_to(run.path).as_posix()
        if not name.startswith(("meta/attempts/", "logs/discarded/")):
            found[name] = "" if name.startswith(ONCE) else _content(path, run.id)
    return found


def different(run: Run, want: dict[str, str]) -> list[str]:
    "Names of the files that are not as in another run"
    have = things(run)
    return sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))


@contextmanager
def scratch():
    "A directory in memory where there is one: the harness measures logic, not the disk"
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="minsnr-harness-", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def durable_os(fake):
    "Let `durable` talk to another `os`"
    real, durable.os = durable.os, fake
    try:
        yield fake
    finally:
        durable.os = real
