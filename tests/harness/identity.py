"""Other images, another codec, a spoilt cache, other code: who notices before a step is taken, and by what name.

Each trial changes one thing between two commands on one run, and calls one verb. A verb that trains or judges with
images has to refuse other images and write nothing; `allow` lets it pass; and without a change nothing is refused.
"""

import os
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

from minsnr_nb import api, runner
from minsnr_nb import lab as laboratory
from minsnr_nb.images import files, mapped
from minsnr_nb.record import provenance
from minsnr_nb.record.directory import Run
from minsnr_nb.record.state import attempts_of
from minsnr_nb.requests import Requests, Stopped

from .lab import Lab, invalid, scratch, told

CONFIG = {
    "data": {"name": "image_folder", "path": "pictures", "size": 8},
    "model": {"name": "mlp", "width": 8, "depth": 1},
    "train": {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 2},
    "callbacks": [{"name": "log_events"}, {"name": "checkpoint"}],
    "eval": {"samples": 4, "probe_images": 4, "probe_draws": 1},
    "metrics": [],
    "sampler": {"name": "ddim", "steps": 1},
}


class _StopAtFour(Requests):
    def commit(self, loop, result):
        if result.step == 4:
            self._stop(loop, "the harness")


VERBS: dict[str, Callable] = {
    "resume": lambda run, **how: api.resume_run(run.path, device="cpu", **how),
    "eval": lambda run, **how: api.eval_run(run.path, device="cpu", **how),
    "fork": lambda run, **how: api.fork_run(
        run.path, overrides=("train.steps=9",), device="cpu", **how
    ),
    "continue": lambda run, **how: api.continue_run(run.path, 9, device="cpu", **how),
    "repro": lambda run, **how: api.verify_run(run.path, device="cpu", **how),
}


def _picture(path: Path, rng: random.Random) -> None:
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def _one(data: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(data.rglob("*.png")))


def _moved(data: Path, rng: random.Random) -> None:
    other = data / "pictures/b" / _one(data / "pictures/a", rng).name
    _one(data / "pictures/a", rng).rename(other.with_name("moved.png"))


def _touched(path: Path, rng: random.Random) -> None:
    "One pixel by one, with the size and the time of the file as they were"
    before, image = path.stat(), np.array(Image.open(path))
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(path)
    with open(path, "ab") as f:
        f.truncate(max(path.stat().st_size, before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# name -> (what it does to the data, what has to be named: "data", "code", "torch", "num_threads" or nothing)
CHANGES: dict[str, tuple[Callable[[Path, random.Random], object], str]] = {
    "nothing": (lambda data, rng: None, ""),
    "replaced": (lambda data, rng: _picture(_one(data, rng), rng), "data"),
    "one pixel": (lambda data, rng: _touched(_one(data, rng), rng), "data"),
    "added": (lambda data, rng: _picture(data / f"pictures/a/{rng.random()}.png", rng), "data"),
    "removed": (lambda data, rng: _one(data, rng).unlink(), "data"),
    "another class": (_moved, "data"),
    "codec": (lambda data, rng: None, "data"),
    "cache": (lambda data, rng: None, "data"),
    "code": (lambda data, rng: None, "code"),
    "torch": (lambda data, rng: None, "torch"),
}


def _elsewhere(what: str) -> ExitStack:
    "The same machine with another decoder, a spoilt cache, other code, another torch"
    stack, read, digest = ExitStack(), files.read_image, runner.source_digest
    if what == "codec":
        other = lambda *a, **k: read(*a, **k) ^ np.uint8(1)  # noqa: E731
        stack.enter_context(patch.object(files, "read_image", other))
    elif what == "code":
        changed = lambda: digest() | {"digest": "0" * 64}  # noqa: E731
        for module in (runner, provenance):
            stack.enter_context(patch.object(module, "source_digest", changed))
    elif what == "torch":
        stack.enter_context(patch.object(runner.torch, "__version__", "0.0"))
    elif what == "cache":
        api.build(api.load(CONFIG).cfg, "cpu")  # puts the pictures, which lie elsewhere now, there
        laboratory._images.cache_clear()
        for path in (files.cache_dir() / "images").glob("*/pixels.u8"):
            pixels = bytearray(path.read_bytes())
            pixels[0] ^= 1
            path.write_bytes(pixels)
    return stack


def _base(root: Path, stop: bool) -> Run:
    "A data set and a run that was trained with it, whole or stopped"
    for kind in "ab":
        (root / "data/pictures" / kind).mkdir(parents=True)
        for i in range(8):
            _picture(root / f"data/pictures/{kind}/{i}.png", random.Random(i))
    with _here(root), ExitStack() as stack:
        if stop:
            stack.enter_context(patch.object(runner, "Requests", _StopAtFour))
        try:
            return api.train_run(CONFIG, run_root=root / "runs", device="cpu")
        except Stopped:
            return Run(next((root / "runs").glob("*/[!.]*")))


def _here(root: Path) -> ExitStack:
    "The data, and a cache that takes even small sets, below `root`"
    stack = ExitStack()
    places = {"MINSNR_DATA": str(root / "data"), "MINSNR_CACHE": str(root / "cache")}
    stack.enter_context(patch.dict("os.environ", places))
    stack.enter_context(patch.object(mapped, "CACHE_FROM", 0))
    laboratory._images.cache_clear()
    return stack


def _wrong(verb: str, what: str, root: Path, rng: random.Random) -> list[str]:
    "What was wrong with one verb after one change"
    change, names = CHANGES[what]
    run = Run(next((root / "runs").glob("*/[!.]*")))
    strict = names == "data" or (verb == "resume" and names)  # other code makes another record
    change(root / "data", rng)
    count = len(attempts_of(run)), sorted(p.name for p in run.path.parent.iterdir())

    def act(**how):
        with _here(root), _elsewhere(what):
            VERBS[verb](run, **how)

    status, words = told(act)
    found = []
    if strict:
        if not status or f"--allow {names}" not in words or "\n" in words:
            found.append(f"not refused by name: {status} {words[-200:]}")
        now = len(attempts_of(run)), sorted(p.name for p in run.path.parent.iterdir())
        found += ["something was written"] if now != count else []
        status, words = told(lambda: act(allow=(names,)))
    differs = "repro" in verb and "differ" in words  # it was allowed, and it does differ
    if status and not differs:
        found.append(f"refused: {words[-300:]}")
    return found + [str(problem) for problem in invalid(run)]


def identity(lab: Lab, n: int) -> tuple[bool, str]:
    "One thing differs between two commands: it is named before a step is taken, or it is nothing"
    every = [(v, w) for v in VERBS for w in CHANGES]
    rng, wrong, tried = random.Random(13), [], 0
    with scratch() as root:
        bases = {stop: _base(root / f"base{stop}", stop).path.parents[2] for stop in (True, False)}
        for i in range(n):
            verb, what = every[i] if n >= len(every) and i < len(every) else rng.choice(every)
            place = shutil.copytree(bases[verb == "resume"], root / str(i))
            found = _wrong(verb, what, place, rng)
            wrong += [(verb, what, f) for f in found[:1]]
            tried += 1
            shutil.rmtree(place)
    return not wrong, f"{tried} trials of {len(every)} pairs, {len(wrong)} wrong {wrong[:2] or ''}"
