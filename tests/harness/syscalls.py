"""Errors of single system calls, injected from outside by strace, under the verbs of the command line.

A clean round writes down every call of the main thread that concerns the trial's own directory. A trial is one of
them with one error: the command has to end in one line or as if nothing had happened, the run has to be valid, and
after the same command once more, or `resume`, there is the inventory of an undisturbed run.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from minsnr_nb.cli import main

from .faults import dies, with_fault
from .lab import CONFIG, Lab, different, fork, forked, invalid, scratch, status_of, things, visible
from .notebook import study, unreadable

READS = "openat read pread64 getdents64 newfstatat"
WRITES = "write pwrite64 fsync fdatasync rename renameat renameat2 link linkat mkdir mkdirat"
WRITES += " unlink unlinkat rmdir ftruncate"
CALLS = ",".join((READS + " " + WRITES).split())
ERRORS = {"openat": ("EIO", "EACCES", "EMFILE", "ENOSPC"), "write": ("ENOSPC", "EDQUOT", "EIO")}
ANY = ("EIO", "EACCES", "ENOSPC")
_LINE = re.compile(r"^(\w+)\((.*?)(?: = |$)")

VERBS = {  # {run}: a copy of the base, {place}: the trial's own directory
    "train": "train {place}/c.yaml --device cpu --run-root {place}/runs",
    "resume": "resume {run}",
    "eval": "eval {run} sampler.steps=3",
    "sample": "sample {run} --n 2 --save-predictions",
    "fork": "fork {run} train.steps=10 optim.lr=0.001 --run-root {place}/runs",
    "promote": "promote {run} m",
    "export": "export {run} --dest {place}/out",
}
BASES = {"resume": "half", "train": None}  # else a finished run


class Point(NamedTuple):
    "A call of a verb's clean round"

    verb: str
    call: str
    number: int  # among the calls of that name


def _prepare(verb: str, place: Path, bases: dict[str, Path]) -> list[str]:
    "A directory for one trial; the words of the command"
    place.mkdir(parents=True)
    (place / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (place / "out").mkdir()
    base = BASES.get(verb, "whole")
    run = shutil.copytree(bases[base], place / "runs/harness" / bases[base].name) if base else ""
    return [w.format(run=run, place=place) for w in VERBS[verb].split()]


def _words_of(place: Path, name: str = "stderr") -> Path:
    "Where a command's words go: not into its own directory, which may be full"
    return place.parent.with_name(f"{place.parent.name}-{place.name}.{name}")


def _command(place: Path, words: list[str], begin: Callable = lambda: None) -> None:
    "The command line in this process, with something before it"
    os.environ |= {"MINSNR_MODELS": str(place / "models"), "MINSNR_RUNS": str(place / "runs")}
    os.chdir(place)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(_words_of(place, name), os.O_WRONLY | os.O_CREAT), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    begin()
    code = 99
    try:
        code = main(words)
    except BaseException as e:
        print(f"Traceback: {type(e).__name__}: {e}", file=sys.stderr)
    with suppress(OSError):
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def _under_strace(place: Path, words: list[str], *how: str) -> tuple[int, list[str], str]:
    "Run a command in a copy of this process, with strace beside it: exit code, its trace, its words"
    read, write = os.pipe()
    pid, trace = (
        fork(lambda: _command(place, words, lambda: os.read(read, 1))),
        place.with_name(f"{place.name}.trace"),
    )
    options = ["strace", "-p", str(pid), "-y", "-s", "256", "-o", str(trace), *how]
    beside = subprocess.Popen(options, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if "attached" not in beside.stderr.readline():
        os.kill(pid, 9), os.waitpid(pid, 0)
        raise RuntimeError("strace cannot attach to a process here")
    os.write(write, b".")
    code = status_of(pid)
    beside.communicate()
    os.close(read), os.close(write)
    said = _words_of(place).read_text(errors="replace")
    return code, trace.read_text(errors="replace").splitlines(), said


def _concerns(arguments: str, place: Path) -> bool:
    "Whether a call is about a file of a trial, as a descriptor or by its path; a text may name one, too"
    return f"<{place}/" in arguments or f'"{place}/' in arguments.split("write(")[0]


def _points(verb: str, place: Path, trace: list[str]) -> list[Point]:
    "The calls of a clean round that concern its own directory"
    seen: Counter[str] = Counter()
    out = []
    for line in trace:
        if match := _LINE.match(line):
            seen[match[1]] += 1
            if _concerns(match[2], place):
                out.append(Point(verb, match[1], seen[match[1]]))
    return out


def _again(verb: str, place: Path, words: list[str]) -> Callable[[], None]:
    "What a person does after an error"
    runs = visible(place / "runs")
    if verb == "train":
        words = ["resume", str(runs[0].path)] if runs else words
    elif verb == "fork" and len(runs) > 1:
        words = ["resume", str(max(r.path for r in runs))]
    return lambda: _command(place, words)


def _problems(verb: str, place: Path, words: list[str], code: int, said: str) -> list[str]:
    "What is wrong with the end of one trial, before anything else is done"
    lines = said.strip().splitlines()
    found = [] if code in (0, 1, 2) and "Traceback" not in said else [f"exit {code}: {said[-300:]}"]
    if code and (not lines or not all(line.startswith("minsnr: ") for line in lines)):
        found.append(f"not told: {said[-300:]!r}")
    for run in visible(place / "runs"):
        found += [str(problem) for problem in invalid(run)]
    return found


def _mended(verb: str, place: Path, words: list[str], want: dict[str, dict]) -> list[str]:
    "What is wrong when the command, or a resume, is given once more"
    for name in ("stderr", "stdout"):
        _words_of(place, name).unlink(missing_ok=True)
    code = forked(_again(verb, place, words))
    said = _words_of(place).read_text(errors="replace")
    orphan = verb == "fork" and "fork the parent again" in said
    taken = verb == "export" and "exists" in said
    found = [] if code == 0 or orphan or taken else [f"again: exit {code}: {said[-300:]}"]
    runs = visible(place / "runs")
    for run in runs:
        found += [str(p) for p in invalid(run, "L2" if orphan else "L3")]
    if verb in want and runs and not orphan:
        found += different(max(runs, key=lambda r: r.path), want[verb])
    left = [p for p in place.rglob(".*") if p.name.startswith((".desk-publish", ".new-", ".gone-"))]
    return found + [f"left behind: {p.name}" for p in left if verb in ("promote", "export")]


def _bases(lab: Lab, root: Path) -> dict[str, Path]:
    whole = lab.whole(root / "whole").path
    forked(with_fault(lab, root / "half", 260, dies))
    (half,) = visible(root / "half")
    return {"whole": whole, "half": half.path}


def _clean(root: Path, bases: dict[str, Path], verbs) -> tuple[list[Point], dict[str, dict]]:
    "Every verb without an error: its calls, and what it leaves"
    points, want = [], {}
    for verb in verbs:
        place = root / f"clean-{verb}"
        words = _prepare(verb, place, bases)
        code, trace, said = _under_strace(place, words, "-e", f"trace={CALLS}")
        if code:
            raise RuntimeError(f"{verb}: {said}")
        points += _points(verb, place, trace)
        if verb in ("train", "resume", "fork"):
            want[verb] = things(max(visible(place / "runs"), key=lambda r: r.path))
    return points, want


def _tried(n: int, point: Point, error: str, root: Path, bases, want) -> tuple[bool, list[str]]:
    "Whether the error met the trial's directory, and what was wrong"
    place = root / f"t{n}" / "t"
    words = _prepare(point.verb, place, bases)
    inject = f"inject={point.call}:error={error}:when={point.number}"
    how = ("-e", f"trace={point.call}", "-e", inject)
    code, trace, said = _under_strace(place, words, *how)
    hit = any("INJECTED" in line and _concerns(line, place) for line in trace)
    found = _problems(point.verb, place, words, code, said) if hit else []
    found += _mended(point.verb, place, words, want) if hit and not found else []
    if point.call in (
        "rmdir",
        "unlink",
        "unlinkat",
    ):  # what cannot be removed stays for the next one
        found = [f for f in found if not f.startswith("left behind")]
    for left in (*root.glob(f"t{n}"), *root.glob(f"t{n}-*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return hit, found


def _papermill(root: Path, rng: random.Random, n: int) -> tuple[int, list[str]]:
    "The same under Papermill: what is on the disk can be read, and the error is told"
    import nbformat

    def execute(place: Path, *how: str) -> tuple[int, list[str], str]:
        place.mkdir()
        nbformat.write(study(), place / "in.ipynb")
        words = [sys.executable, "-m", "papermill", "in.ipynb", str(place / "out.ipynb")]
        trace = place.with_name(f"{place.name}.trace")
        strace = ["strace", "-y", "-s", "256", "-o", str(trace), *how]
        done = subprocess.run(
            [*strace, *words, "--no-progress-bar"], cwd=place, capture_output=True, text=True
        )
        return done.returncode, trace.read_text(errors="replace").splitlines(), done.stderr

    if not n:
        return 0, []
    code, trace, said = execute(root / "p", "-e", f"trace={CALLS}")
    every = _points("papermill", root / "p", trace)
    every = [
        p for p in every if p.call in WRITES.split()
    ]  # reading its input is papermill's own affair
    wrong, hits = [f"papermill: {said[-200:]}"] if code else [], 0
    for i, point in enumerate(rng.sample(every, min(n, len(every)))):
        error, place = rng.choice(ERRORS.get(point.call, ANY)), root / f"p{i}"
        inject = f"inject={point.call}:error={error}:when={point.number}"
        code, trace, said = execute(place, "-e", f"trace={point.call}", "-e", inject)
        if any("INJECTED" in line and _concerns(line, place) for line in trace):
            hits += 1
            found = unreadable(place)
            found += [said[-300:]] if "Traceback" in said else []
            wrong += [f"{point} {error}: {f}" for f in found]
    return hits, wrong


def syscalls(lab: Lab, most: int, papermill: int, verbs=tuple(VERBS)) -> tuple[bool, str]:
    "One system call fails, whichever: one line, a valid run, and the same inventory after a resume"
    if not shutil.which("strace"):
        return True, "not tried: strace is not installed (Debian: apt-get install strace)"
    rng, wrong, hits = random.Random(11), [], Counter()
    with scratch() as root:
        bases = _bases(lab, root / "bases")
        try:
            points, want = _clean(root, bases, verbs)
        except RuntimeError as e:
            return "attach" in str(e), f"not tried: {e}"
        kinds: dict[str, dict[str, list[Point]]] = {v: {} for v in verbs}
        for p in points:
            kinds[p.verb].setdefault(p.call, []).append(p)
        for n in range(most):  # each kind of call as often: most of them only look
            of = kinds[verbs[n % len(verbs)]]
            point = rng.choice(of[rng.choice(list(of))])
            error = rng.choice(ERRORS.get(point.call, ANY))
            hit, found = _tried(n, point, error, root, bases, want)
            hits[point.verb] += hit
            wrong += [(*point, error, f) for f in found[:1]]
        hits["papermill"], failed = _papermill(root, rng, papermill)
    listed = ", ".join(f"{v} {k}" for v, k in hits.items())
    text = f"{sum(hits.values())} errors at {len(points)} calls ({listed}); "
    return not wrong + failed, text + f"{len(wrong + failed)} wrong {(wrong + failed)[:2] or ''}"
