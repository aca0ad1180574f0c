"Kill workers and jobs of a queue at any moment, and let workers race for one job."

import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from minsnr_nb import durable
from minsnr_nb.jobs import worker
from minsnr_nb.jobs.queue import add_job, events_of, list_jobs, read_job
from minsnr_nb.record.directory import list_runs
from minsnr_nb.record.state import attempts_of, is_sealed
from tests import short_job

from .lab import fork, scratch, status_of
from .races import Gate

ROOT = Path(__file__).parents[2]
OURS = re.compile(
    r"jobs|order\.json|jobs/\d{4}(/(job\.json|lease|run|\d{4}\.json|out-\d{4}\.log))?"
)
MINE = {"notes.txt": b"mine\n", "jobs/keep me.yaml": b"project: [", ".hidden": b"\0\1"}


@contextmanager
def short_jobs():
    "Jobs are trainings without a network, through the same code"
    before, path = worker._CODE["minsnr"], os.environ.get("PYTHONPATH")
    worker._CODE["minsnr"] = short_job.CODE
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), path]))
    try:
        yield
    finally:
        worker._CODE["minsnr"] = before
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


def asked(root: Path, *words: str, name: str = "short") -> dict:
    "What `job_of` makes of a config, without reading one"
    return {
        "verb": "train",
        "words": ["a.yaml", *words],
        "cwd": str(root),
        "name": name,
        "environ": {},
    }


def processes(place: Path, id: str = "") -> list[int]:
    "Living processes, and zombies, of the jobs below a directory"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if f"{place}/jobs/{id}".encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def inventory(queue: Path) -> list[str]:
    "Everything below a queue that neither the queue nor its user has put there"
    names = [p.relative_to(queue).as_posix() for p in queue.rglob("*")]
    return [n for n in names if not OURS.fullmatch(n) and n not in MINE]


def _begin(queue: Path, waits: worker.Waits) -> int:
    "A worker in a copy of this process; what it says about its end is of no interest"

    def action() -> None:
        with suppress(worker.WorkerStopped):
            worker.work(queue, waits=waits)
        os._exit(7)

    return fork(action)


def _strike(rng: random.Random, queue: Path, workers: list[int], done: Counter) -> tuple:
    "Kill something; the workers that are to be replaced, and the jobs that have to begin once more"
    running = _running(queue)
    jobs = processes(queue)
    what = rng.choice(["worker", "worker", "job", "job", "both", "all"])
    if what == "job" and not jobs:
        what = "worker"
    killed = workers if what == "all" else [rng.choice(workers)] if what != "job" else []
    shot = jobs if what == "all" else [rng.choice(jobs)] if jobs and what != "worker" else []
    for pid in [*killed, *shot]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in killed:
        status_of(pid)
    done[what] += 1
    hit = {k: n for k, (n, boss, pids) in running.items() if boss in killed or {*shot} & {*pids}}
    return killed, hit


def _running(queue: Path) -> dict[str, tuple[int, int, list[int]]]:
    "Jobs at work: how often they were started, the worker, and their processes"
    found = {}
    for r in list_jobs(queue):
        if r.job and r.state.name == "running":
            start = [e for _, e in events_of(r.job) if e["what"] == "start"][-1]
            found[r.id] = r.state.phase.attempts, start["worker"]["pid"], processes(queue, r.id)
    return found


def _waited(queue: Path, hit: dict[str, int]) -> float:
    "Seconds until every job that was hit has begun once more, or is done"
    since = time.monotonic()
    while (passed := time.monotonic() - since) < 20:
        now = _starts(queue)
        if all(now.get(k, n + 1) > n for k, n in hit.items()):
            break
        time.sleep(0.01)
    return passed


def _wrong_job(job, runs: dict) -> list[str]:
    "What is wrong with a job that should have been done exactly once"
    events, mine = [e for _, e in events_of(job)], runs.get(job.token, [])
    numbers = [n for n, _ in events_of(job)]
    wrong = [] if len(mine) == 1 else [f"{job.id}: {len(mine)} runs"]
    if numbers != list(range(1, len(numbers) + 1)):
        wrong.append(f"{job.id}: events {numbers}")
    for run in mine[:1]:
        log = [json.loads(x) for x in run.metrics_path.read_text().splitlines()]
        steps = [x["step"] for x in log]
        wrong += [] if is_sealed(run) else [f"{job.id}: not sealed"]
        if steps != list(range(1, int((run.config() or {}).get("steps", short_job.STEPS)) + 1)):
            wrong.append(f"{job.id}: steps {steps}")
        tries, starts = attempts_of(run), [e for e in events if e["what"] == "start"]
        if not 1 <= len(tries) <= len(starts):
            wrong.append(f"{job.id}: {len(tries)} attempts, {len(starts)} starts")
    return wrong


def wrong_after(root: Path, queue: Path, n: int) -> list[str]:
    "Everything that is wrong with a queue whose jobs should all be done"
    rows, runs = [r for r in list_jobs(queue) if r.job], {}
    for run in list_runs(root / "runs"):
        runs.setdefault(run.provenance()["env"]["vars"]["MINSNR_JOB"], []).append(run)
    wrong = [
        f"{r.id}: {r.state.name}: {r.state.reason}" for r in rows if r.state.name != "completed"
    ]
    wrong += [w for r in rows for w in _wrong_job(r.job, runs)]
    wrong += (
        [] if len(rows) == n == len(runs) else [f"{n} jobs, {len(rows)} listed, {len(runs)} runs"]
    )
    wrong += [f"left behind: {name}" for name in inventory(queue)]
    wrong += [f"changed: {k}" for k, v in MINE.items() if (queue / k).read_bytes() != v]
    wrong += ["two processes trained one run"] * (root / "TWICE").exists()
    return wrong


def _starts(queue: Path) -> dict[str, int]:
    "How often each job that is not done was started"
    rows = list_jobs(queue)
    return {r.id: r.state.phase.attempts for r in rows if r.job and r.state.name != "completed"}


def queue_kills(lab, n: int, workers: int = 2, seed: int = 0) -> tuple[bool, str]:
    "Workers and jobs are killed at any moment; every job is done exactly once, and soon goes on"
    rng, done, slowest = random.Random(seed), Counter(), 0.0
    waits, made, hits = worker.Waits(1.0, 1.0), 0, 0
    with scratch() as root, short_jobs():
        queue = root / "queue"
        (root / "settings.ini").write_text("[minsnr]\nruns = runs\n")
        durable.make_dir(queue / "jobs")
        for name, data in MINE.items():
            (queue / name).write_bytes(data)
        crew = [_begin(queue, waits) for _ in range(workers)]
        while sum(done.values()) < n:
            while len(_starts(queue)) < 3 * workers:
                add_job(queue, asked(root), deaths=10**6)
                made += 1
            time.sleep(rng.random() * 0.5)
            killed, hit = _strike(rng, queue, crew, done)
            crew = [p for p in crew if p not in killed] + [_begin(queue, waits) for _ in killed]
            slowest, hits = max(slowest, _waited(queue, hit)), hits + len(hit)
        for pid in crew:
            os.kill(pid, signal.SIGTERM)
        ends = [status_of(pid) for pid in crew]
        left = worker.work(queue, once=True, waits=waits) and processes(queue)
        wrong = wrong_after(root, queue, made) + [f"{len(left)} processes left"] * bool(left)
        wrong += [f"a worker ended with {ends}"] * any(e != 7 for e in ends)
    told = ", ".join(f"{v} {k}" for k, v in sorted(done.items()))
    text = f"{n} kills ({told}) over {made} jobs; {hits} were hit and began again within {slowest:.1f} s"
    return not wrong and slowest < 5, f"{text}, {len(wrong)} wrong {wrong[:3] or ''}"


def queue_races(lab, n: int, rivals: int = 2) -> tuple[bool, str]:
    "Of several workers that want one job, exactly one begins it"
    wrong = []
    with scratch() as root:
        for i in range(n):
            queue = root / f"q{i}"
            job, gate = add_job(queue, asked(root)), Gate()

            def action(job=job, gate=gate, queue=queue):
                worker._popen = lambda *_: subprocess.Popen(["true"], start_new_session=True)
                with durable.shared_desk(queue):
                    gate.wait()
                    working = worker.start_job(job, worker.Slot("any", ""))
                    while working and not worker.look_after(working, worker.Waits()):
                        time.sleep(0.002)
                os._exit(7 if working else 8)

            pids = [fork(action) for _ in range(rivals)]
            gate.open()
            codes = sorted(status_of(pid) for pid in pids)
            found = [e["what"] for _, e in events_of(read_job(job.path))]
            if codes != [7] + [8] * (rivals - 1) or found != ["start", "end"]:
                wrong.append((codes, found))
            wrong += inventory(queue)
    return (
        not wrong,
        f"{n} races of {rivals}, {len(wrong)} without exactly one winner {wrong[:2] or ''}",
    )
