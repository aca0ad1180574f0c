"Kills, torn writes and errors of the system, at random and at every operation."

import errno
import random
import time

from minsnr_nb import api, durable
from minsnr_nb.record.generations import find_checkpoint
from tests.faulty_os import FaultyOS, fails_with, half_then_dies

from .lab import (
    Lab,
    different,
    durable_os,
    forked,
    invalid,
    killed_after,
    scratch,
    things,
    told,
    visible,
)

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EMFILE")


def dies(name, real, args):
    "Killed before the call"
    import os

    os._exit(9)


def half(name, real, args):
    "A short write is no error; the rest has to follow"
    if name == "write":
        return real(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)])
    return real(*args)


class Quiet:
    "No fault: counts the operations"

    def __new__(cls):
        return FaultyOS(-1, None)


def with_fault(lab: Lab, root, at, fault):
    def action():
        durable.os = FaultyOS(at, fault)
        lab.whole(root)

    return action


def kills(lab: Lab, n: int) -> tuple[bool, str]:
    "SIGKILL at random instants from creation to seal: no visible run is invalid"
    rng, bad, seen = random.Random(1), [], 0
    with scratch() as root:
        start = time.perf_counter()
        forked(lambda: lab.whole(root / "warm"))
        each = time.perf_counter() - start
        for i in range(n):
            place = root / str(i)
            killed_after(lambda place=place: lab.whole(place), rng.uniform(0, 1.1 * each))
            for run in visible(place):
                seen += 1
                bad += invalid(run)
            _drop(place)
    return (
        not bad and seen > n // 4,
        f"{n} kills, {seen} visible runs, {len(bad)} invalid {bad[:1] or ''}",
    )


def _drop(place):
    import shutil

    shutil.rmtree(place, ignore_errors=True)


def inventory(lab: Lab, most: int | None = None, sabotage=None) -> tuple[bool, str]:
    "Die before, or tear, every durable operation; one resume makes the whole inventory equal"
    rng, wrong, trials = random.Random(2), [], 0
    with scratch() as root:
        with durable_os(Quiet()) as counter:
            want = things(lab.whole(root / "whole"))
        total = counter.count
        points = [(at, f) for at in range(1, total + 1) for f in (dies, half_then_dies)]
        for at, fault in rng.sample(points, most) if most else points:
            place = root / f"{at}-{fault.__name__}"
            if sabotage:
                sabotage(place)
            if forked(with_fault(lab, place, at, fault)) != 9:
                wrong.append((at, "did not die"))
            trials += 1
            for run in visible(place):
                if problem := invalid(run):
                    wrong.append((at, counter.calls[at - 1], problem[0]))
                    continue
                status, words = told(lambda run=run: lab.train(run))
                if (unlike := different(run, want)) or status:
                    wrong.append((at, counter.calls[at - 1], "not the same", unlike, words[:200]))
                if problem := invalid(run, "L3"):
                    wrong.append((at, counter.calls[at - 1], problem[0]))
            _drop(place)
    return (
        not wrong,
        f"{trials} trials at {total} operations, {trials - len(wrong)} equal {wrong[:1] or ''}",
    )


def twice(lab: Lab, n: int) -> tuple[bool, str]:
    "Die at one operation, and at another of the resume: the run is valid, and ends with the same inventory"
    rng, wrong = random.Random(8), []
    with scratch() as root:
        with durable_os(Quiet()) as counter:
            want = things(lab.whole(root / "whole"))
        for i in range(n):
            place, at = root / str(i), rng.randint(1, counter.count)
            forked(with_fault(lab, place, at, dies))
            for run in visible(place):
                again = rng.randint(1, counter.count)

                def resume(run=run, again=again):
                    durable.os = FaultyOS(again, dies)
                    lab.train(run)

                forked(resume)
                found = invalid(run)
                status, words = told(lambda run=run: api.resume_run(run.path))
                unlike = different(run, want)
                found += [f"not the same: {unlike} {words}"] if unlike or status else []
                wrong += [(at, again, f) for f in found[:1]]
            _drop(place)
    return not wrong, f"{n} pairs of deaths, {len(wrong)} wrong {wrong[:1] or ''}"


def until_done(lab: Lab, n: int) -> tuple[bool, str]:
    "Kill at random until the run is complete: the inventory is that of a run left alone"
    rng, wrong, kills = random.Random(3), [], 0
    with scratch() as root:
        forked(lambda: lab.whole(root / "warm"))
        start = time.perf_counter()
        forked(lambda: lab.whole(root / "whole"))
        each = time.perf_counter() - start
        (whole,) = visible(root / "whole")
        want = things(whole)
        for i in range(n):
            run = lab.create(root / str(i))
            while True:
                code = killed_after(lambda run=run: lab.train(run), rng.uniform(0.3, 1.0) * each)
                if code == 0:
                    break
                kills += 1
                if problem := invalid(run):
                    wrong.append(problem[0])
            if unlike := different(run, want):
                wrong.append((i, "not the same", unlike))
            wrong += invalid(run, "L3")
            _drop(root / str(i))
    return not wrong, f"{n} runs, {kills} kills, {n - len(wrong)} equal {wrong[:1] or ''}"


def errors(lab: Lab, most: int | None = None) -> tuple[bool, str]:
    "Every operation fails once with every error: one line, and the last checkpoint is there"
    rng, wrong, told_of, absorbed = random.Random(4), [], 0, 0
    with scratch() as root:
        with durable_os(Quiet()) as counter:
            want = things(lab.whole(root / "whole"))
        faults = [(code, fails_with(getattr(errno, code))) for code in ERRORS] + [("short", half)]
        points = [(at, *f) for at in range(1, counter.count + 1) for f in faults]
        for at, code, fault in rng.sample(points, most) if most else points:
            place = root / f"{at}-{code}"
            status, words = told(with_fault(lab, place, at, fault))
            call = counter.calls[at - 1]
            for run in visible(place):
                if problem := invalid(run):
                    wrong.append((at, call, code, problem[0]))
                announced = run.ckpts_last / "CURRENT.json"
                if announced.exists() and find_checkpoint(run)[0] is None:
                    wrong.append((at, call, code, "no checkpoint left"))
                if status == 0 and (unlike := different(run, want)):
                    wrong.append((at, call, code, "not the same", unlike))
            absorbed += status == 0
            told_of += status != 0
            if status and not (code in words and str(root)[:8] in words and "\n" not in words):
                wrong.append((at, call, code, words[:200]))
            _drop(place)
    text = f"{told_of + absorbed} injections: {told_of} told in one line, {absorbed} absorbed, {len(wrong)} wrong"
    return not wrong, f"{text} {wrong[:12] if len(wrong) else str()}"
