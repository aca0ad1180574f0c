"What is done to a finished run, stopped at every operation: evaluations, samples, forks."

import errno
import random
import shutil
from pathlib import Path
from unittest.mock import patch

from minsnr_nb import api, durable
from minsnr_nb.record.directory import Run
from tests.faulty_os import FaultyOS, fails_with, half_then_dies

from .faults import Quiet, dies
from .lab import Lab, different, durable_os, invalid, scratch, things, told, visible

FAULTS = (dies, half_then_dies, fails_with(errno.ENOSPC))
FORK = ("train.steps=10", "optim.lr=0.001")


OTHER = ("sampler.steps=3", "callbacks=[{name: sample_grid, n: 2}]")  # its own picture, too

VERBS = {
    "eval": lambda run: _own(run),
    "other": lambda run: api.eval_run(run.path, overrides=OTHER),
    "sample": lambda run: api.sample_run(run.path, n=2, save_predictions=True),
    "fork": lambda run: api.fork_run(run.path, overrides=FORK),
}


def _own(run: Run) -> None:
    "The run's own evaluation, as if training had left it out: a line of the log, and the summary"
    with patch.object(api, "read_events", lambda run: []):
        api.eval_run(run.path)


def _copy(run: Run, place: Path) -> Run:
    return Run(Path(shutil.copytree(run.path, place / "harness" / run.path.name)))


def _wrong(run: Run, whole: str) -> list:
    "What was whole stays whole; what was begun can be ended, or says why not"
    found = []
    for each in visible(run.path.parents[1]):
        found += invalid(each)
        status, words = told(lambda each=each: api.resume_run(each.path))
        if each.path.name == run.path.name:
            found += [*invalid(each, "L3"), *([words] if status else [])]
        elif "fork the parent again" not in words and (unlike := different(each, whole)):
            found.append(f"a fork that became another run: {unlike}")
    return found


def _points(run: Run, place: Path) -> tuple[list, str]:
    "Every operation of every verb with every fault, and the bits of the fork"
    points = []
    for verb, action in VERBS.items():
        with durable_os(Quiet()) as counter:
            action(_copy(run, place / verb))
        points += [(verb, at, f) for at in range(1, counter.count + 1) for f in FAULTS]
    (child,) = (r for r in visible(place / "fork") if r.path.name != run.path.name)
    return points, things(child)


def afterwards(lab: Lab, most: int | None = None, verbs=tuple(VERBS)) -> tuple[bool, str]:
    "Die before, tear or fail every operation: the run stays valid, and `resume` seals it again"
    rng, wrong = random.Random(7), []
    with scratch() as root:
        run = lab.whole(root / "whole")
        _, values = api.eval_run(_copy(run, root / "evaluated").path, overrides=OTHER)
        with patch.object(api, "report", lambda *_: values):  # worked out once
            points, whole = _points(run, root / "counted")
            points = [p for p in points if p[0] in verbs]
            trials = rng.sample(points, most) if most else points
            for n, (verb, at, fault) in enumerate(trials):
                copy = _copy(run, root / str(n))

                def act(verb=verb, at=at, fault=fault, copy=copy):
                    durable.os = FaultyOS(at, fault)
                    VERBS[verb](copy)

                status, words = told(act)
                ended = status in (0, 9) or (status == 1 and "(ENOSPC)" in words)
                found = [*([] if ended else [words]), *_wrong(copy, whole)]
                wrong += [(verb, at, f) for f in found[:1]]
                shutil.rmtree(root / str(n))
    return (
        not wrong,
        f"{len(trials)} trials at {len(points) // len(FAULTS)} operations of {', '.join(verbs)}; "
        f"{len(wrong)} wrong {wrong[:2] or ''}",
    )
