"""Histories: several processes train, resume, evaluate and fork one run, are stopped before chosen calls, and wake or die.

Each schedule is a seed. Every process has a host, a boot, a process number and a clock of its own, which lie; whether the
file system's locks can be believed is part of the schedule. Afterwards the run must have one linear history: sealed and
sound, with the whole inventory of a run that was left alone, and no attempt of a process began while the one before lived.
"""

import os
import random
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from minsnr_nb import api, durable, runner
from minsnr_nb.errors import MinsnrError
from minsnr_nb.record import process, state
from minsnr_nb.record.directory import Run
from minsnr_nb.record.evaluations import decided_by, keep_evaluation, new_evaluation
from minsnr_nb.record.seal import reopened
from minsnr_nb.record.state import attempts_of, derive_state, refuse_owner

from .lab import LIGHT, Lab, different, fork, invalid, scratch, things, told, visible

ROLES = ("resume", "resume", "force", "evaluate", "fork")


class Actor(NamedTuple):
    "A process of a schedule"

    role: str
    stops: frozenset[int]  # changing calls before which it stops
    dies: int  # the call before which it dies; 0 for none
    seed: int

    @property
    def token(self) -> str:
        return f"{self.seed:016x}"


class _Stopping:
    "The `os` module that stops or kills its process before chosen changing calls of the main thread"

    CHANGING = set("open write fsync replace rename link unlink mkdir rmdir truncate".split())

    def __init__(self, actor: Actor):
        self.actor, self.count = actor, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CHANGING:
            return real

        def call(*args, **kwargs):
            if threading.current_thread() is threading.main_thread():
                self.count += 1
                if self.count == self.actor.dies:
                    os._exit(9)
                if self.count in self.actor.stops:
                    os.kill(os.getpid(), signal.SIGSTOP)
            return real(*args, **kwargs)

        return call


def _disguise(actor: Actor, local: bool) -> None:
    "Give this process names and a clock that may be anybody's"
    rng = random.Random(actor.seed)
    host = {"host": rng.choice("ab"), "boot_id": rng.choice(("", "x"))}
    me = {"pid": rng.randint(1, 3), "pid_start": rng.choice("12"), "token": actor.token}
    skew, now = rng.uniform(-3600, 3600), process.time.time
    process._machine, process._self = lambda: host, lambda pid: me
    process.time = _Clock(lambda: now() + skew)
    state.is_local = lambda path: local
    state.PATIENCE, runner.Heartbeat.interval = 0.04, 0.005
    durable.alone.__wrapped__.__defaults__ = (0.1,)


class _Clock:
    def __init__(self, now):
        self.time = now


def _visit(run: Run, seed: int) -> None:
    "Leave an evaluation in a run that nobody writes to"
    refuse_owner(run)
    with reopened(run):
        decides = decided_by(
            {}, "0", {"slot": "last", "step": 0, "sha256": "0"}, {}, {"seed": seed}
        )
        keep_evaluation(run.evaluations, new_evaluation("sample", decides, {}))


def _act(lab: Lab, run: Run, actor: Actor, local: bool) -> None:
    _disguise(actor, local)
    durable.os = _Stopping(actor)
    roles: dict[str, Callable] = {
        "resume": lambda: _resume(lab, run, False),
        "force": lambda: _resume(lab, run, True),
        "evaluate": lambda: _visit(run, actor.seed),
        "fork": lambda: api.fork_run(run.path, overrides=("train.steps=4",)),
    }
    roles[actor.role]()


def _resume(lab: Lab, run: Run, force: bool) -> None:
    if derive_state(run) == "completed":
        runner.close(run)
    else:
        lab.train(run, force)


def _actors(rng: random.Random) -> list[Actor]:
    "Who takes part in a schedule"
    found = [Actor("resume", *_points(rng), rng.getrandbits(60))]
    for _ in range(rng.randint(1, 3)):
        found.append(Actor(rng.choice(ROLES), *_points(rng), rng.getrandbits(60)))
    return found


def _points(rng: random.Random) -> tuple[frozenset[int], int]:
    stops = frozenset(rng.randint(1, 230) for _ in range(rng.choice((0, 1, 1, 2))))
    return stops, rng.choice((0, 0, rng.randint(1, 230)))


class Schedule:
    "One history: processes take turns; a turn ends when its process stops, ends or dies"

    def __init__(self, lab: Lab, run: Run, rng: random.Random):
        self.lab, self.run, self.rng = lab, run, rng
        self.local, self.actors = rng.random() < 0.5, _actors(rng)
        self.stopped: dict[int, Actor] = {}
        self.wrong: list[str] = []

    def play(self) -> list[str]:
        "Play all turns, and judge the end"
        waiting = list(self.actors)
        while waiting or self.stopped:
            if waiting and (not self.stopped or self.rng.random() < 0.6):
                actor = waiting.pop(0)
                self._turn(fork(partial(self._quiet, actor)), actor)
                continue
            pid = self.rng.choice(sorted(self.stopped))
            actor = self.stopped.pop(pid)
            os.kill(pid, signal.SIGKILL if self.rng.random() < 0.2 else signal.SIGCONT)
            self._turn(pid, actor)
        return self.wrong

    def _quiet(self, actor: Actor) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _act(self.lab, self.run, actor, self.local)

    def _turn(self, pid: int, actor: Actor) -> None:
        before = len(self._owners())
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            self.stopped[pid] = actor
        taken = self._owners()[before:]
        alive = {a.token for a in self.stopped.values()} - {actor.token}
        former = self._owners()[:before][-1:]
        if taken and self.local and actor.role != "force" and former and former[0] in alive:
            self.wrong.append(f"{actor.role} took a run from a living process")

    def _owners(self) -> list[str | None]:
        "The processes that own the run, or did, unless they have said that they ended"
        try:
            found = attempts_of(self.run)
        except MinsnrError:
            return []
        return [None if a["ended"] else a["token"] for a in found]


def _judge(lab: Lab, run: Run, want: dict[str, str]) -> list[str]:
    "Whether a run has one history, and nothing but it"
    last = Actor("resume", frozenset(), 0, 1)
    status, words = told(lambda: (_disguise(last, True), _resume(lab, run, False)))
    found = [f"cannot be resumed: {words[:300]}"] if status else []
    found += [str(problem) for problem in invalid(run, "L3")]
    visits = {f"artifacts/evaluations/{p.name}" for p in run.evaluations.glob("[!.]*.json")}
    if unlike := set(different(run, want)) - visits:
        found.append(f"not the same: {sorted(unlike)}")
    numbers = [a["attempt"] for a in attempts_of(run)]
    if numbers != list(range(1, len(numbers) + 1)):
        found.append(f"attempts {numbers}")
    for other in visible(run.path.parents[1]):
        found += [f"{other.id}: {problem}" for problem in invalid(other)]
    return found


def history(lab: Lab, n: int, first: int = 0) -> tuple[bool, str]:
    "Processes that stop, die, wake and lie about themselves leave one linear history"
    light, wrong = Lab(LIGHT), []
    with scratch() as root:
        want = things(light.whole(root / "whole"))
        for seed in range(first, first + n):
            run = light.create(root / str(seed))
            schedule = Schedule(light, run, random.Random(seed))
            found = [*schedule.play(), *_judge(light, run, want)]
            wrong += [
                (seed, schedule.local, [a.role for a in schedule.actors], f) for f in found[:1]
            ]
            durable.shutil.rmtree(root / str(seed), ignore_errors=True)
    return not wrong, f"{n} schedules, {len(wrong)} wrong {wrong[:3] or ''}"
