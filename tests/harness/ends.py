"""Ends of resources: memory, the size of a file, open files, blocks and inodes of a small disk, a dead engine.

What can be limited on this machine is: the command has to end in one line or go on, leave a valid run, and give an
undisturbed inventory once there is room again.
"""

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nbformat

from .lab import Lab, fork, scratch, status_of, things, visible
from .notebook import study
from .syscalls import _bases, _command, _mended, _prepare, _problems, _words_of

VERBS = ("train", "resume", "eval", "sample", "fork")
M_MMAP_THRESHOLD = -3
LARGE = "train.batch_size=20000"  # so that the memory of a step is worth a limit


def _memory(rng: random.Random) -> None:
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = now + rng.randrange(1 << 16, 48 << 20)
    with suppress(AttributeError):  # glibc's: large tensors come from the system, never from a heap
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _file_size(rng: random.Random) -> None:
    most = rng.randrange(1, 60_000)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def _open_files(rng: random.Random) -> None:
    most = max(map(int, os.listdir("/proc/self/fd"))) + rng.randrange(0, 12)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, 4096))


LIMITS: dict[str, Callable[[random.Random], None]] = {
    "memory": _memory,
    "file size": _file_size,
    "open files": _open_files,
}
DISKS = {"blocks": "size={}k", "inodes": "nr_inodes={},size=64m"}


def _mounted(place: Path, options: str) -> bool:
    "A small file system at a place, where this process may make one"
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(words, capture_output=True).returncode == 0


def _limited(what: str, seed: int, place: Path, words: list[str]) -> int:
    "The command under a limit"

    begin = lambda: LIMITS[what](random.Random(seed))  # noqa: E731
    return status_of(fork(lambda: _command(place, words, begin)))


def _trial(what: str, verb: str, seed: int, root: Path, bases, want) -> list[str] | None:
    "What was wrong with one command under one limit; None where the limit cannot be set"
    disk, place = root / f"d{seed}", root / f"d{seed}/t"
    rng = random.Random(seed)
    kept = {"blocks": rng.randrange(8, 900, 4), "inodes": rng.randrange(8, 260)}
    if what in DISKS and not _mounted(disk, "size=64m"):
        return None
    try:
        words = _prepare(verb, place, bases) + [LARGE] * (what == "memory")
        if what in DISKS:
            full = sum(p.stat().st_blocks // 2 for p in disk.rglob("*"))  # 1 KiB
            room = {"blocks": full + kept["blocks"], "inodes": 2 + len(list(disk.rglob("*")))}
            room["inodes"] += kept["inodes"]
            remount = ["mount", "-o", f"remount,{DISKS[what].format(room[what])}", str(disk)]
            subprocess.run(remount, check=True, capture_output=True)
            code = status_of(fork(lambda: _command(place, words)))
            again = ["mount", "-o", "remount,size=64m,nr_inodes=100000", str(disk)]
            subprocess.run(again, check=True, capture_output=True)
        else:
            code = _limited(what, seed, place, words)
        found = _problems(verb, place, words, code, _words_of(place).read_text(errors="replace"))
        return found or _mended(verb, place, words, want)
    finally:
        if what in DISKS:
            subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(disk)


def _orphans(root: Path, n: int) -> list[str]:
    "Papermill is killed alone: its kernel ends by itself"
    wrong = []
    for i in range(n):
        place = root / f"k{i}"
        place.mkdir(parents=True)
        slow = study()
        slow.cells[
            1
        ].source = "open('pid', 'w').write(str(__import__('os').getpid()))\nwhile True: pass"
        nbformat.write(slow, place / "in.ipynb")
        words = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        child, end = subprocess.Popen(words, cwd=place, **quiet), time.monotonic() + 60
        while not (place / "pid").is_file() or not (place / "pid").read_text():
            if child.poll() is not None or time.monotonic() > end:
                return [f"papermill ended with {child.poll()}"]
            time.sleep(0.05)
        child.kill(), child.wait()
        kernel, end = Path("/proc", (place / "pid").read_text()), time.monotonic() + 20
        while kernel.exists() and time.monotonic() < end:
            time.sleep(0.1)
        wrong += ["a kernel lives on without its engine"] * kernel.exists()
    return wrong


def ends(lab: Lab, n: int, kernels: int) -> tuple[bool, str]:
    "Too little of something: one line, a valid run, and the rest when there is enough"
    if not Path("/proc/self/statm").exists():
        return True, "not tried: limits are set as Linux knows them"
    rng, wrong, done = random.Random(12), [], Counter()
    with scratch() as root:
        bases = _bases(lab, root / "bases")
        want = {}
        for verb in ("train", "resume", "fork", "memory"):
            place = root / f"clean-{verb}"
            large = [LARGE] * (verb == "memory")
            words = _prepare("train" if large else verb, place, bases) + large
            if status_of(fork(lambda p=place, w=words: _command(p, w))):
                return False, f"{verb}: {_words_of(place).read_text(errors='replace')}"
            want[verb] = things(max(visible(place / "runs"), key=lambda r: r.path))
        kinds = (*LIMITS, *DISKS)
        for seed in range(n):
            what, verb = kinds[seed % len(kinds)], rng.choice(VERBS)
            verb, wanted = (
                ("train", want | {"train": want["memory"]}) if what == "memory" else (verb, want)
            )
            found = _trial(what, verb, seed, root, bases, wanted)
            done[what] += found is not None
            wrong += [(what, verb, seed, f) for f in (found or ())[:1]]
        wrong += _orphans(root, kernels)
    listed = ", ".join(f"{what} {done[what]}" for what in kinds)
    text = f"{sum(done.values())} limits ({listed}), {kernels} engines killed alone"
    return not wrong, f"{text}; {len(wrong)} wrong {wrong[:2] or ''}"
