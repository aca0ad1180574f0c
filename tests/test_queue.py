"The queue: jobs that nothing can make wrong, workers that may die, and what lies in the directory that is not ours."

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from minsnr_nb import durable
from minsnr_nb.errors import ConfigError, MinsnrError
from minsnr_nb.jobs import queue as jobs
from minsnr_nb.jobs import worker
from minsnr_nb.jobs.queue import (
    add_job,
    events_of,
    find_job,
    job_of,
    list_jobs,
    move_job,
    note_event,
    remove_job,
    retry_job,
    run_of,
    stop_job,
    typed_command,
)
from minsnr_nb.record.state import attempts_of, is_sealed

from .faulty_os import FaultyOS, fails_with
from .harness import queue as harness
from .runs import SMALL, environment, log_lines, minsnr, typed

SOON = worker.Waits(ask=0.5, term=1.0)


@pytest.fixture
def place(tmp_path):
    "A directory to work in, with a queue of jobs that are short"
    (tmp_path / "settings.ini").write_text("[minsnr]\nruns = runs\nqueue = queue\n")
    with harness.short_jobs():
        yield SimpleNamespace(
            root=tmp_path,
            queue=tmp_path / "queue",
            add=lambda *words, **kw: add_job(
                tmp_path / "queue",
                harness.asked(tmp_path, *words, name=kw.pop("name", "short")),
                **kw,
            ),
            states=lambda: [r.state.name for r in list_jobs(tmp_path / "queue")],
        )


def until(ask, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := ask()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


# --- jobs are files -------------------------------------------------------------------------------


def test_queue_a_file_names_its_verb(tmp_path):
    (tmp_path / "a.yaml").write_text("project: a\n")
    (tmp_path / "s.yaml").write_text("sweep: {seeds: [0]}\n")
    (tmp_path / "n.ipynb").write_text("{}")
    (tmp_path / "v.yaml").write_text("job: vae train\nconfig: a.yaml\nargs: [seed=3]\nname: mine\n")
    found = {n: job_of(tmp_path / n) for n in ("a.yaml", "s.yaml", "n.ipynb", "v.yaml")}
    assert [f["verb"] for f in found.values()] == ["train", "sweep", "study", "vae train"]
    assert found["v.yaml"]["words"] == [str(tmp_path / "a.yaml"), "seed=3"]
    assert found["v.yaml"]["name"] == "mine"


@pytest.mark.parametrize(
    "text, part",
    [
        ("job: trian\nconfig: a.yaml\n", "did you mean 'train'"),
        ("job: train\nconfig: nowhere.yaml\n", "no file 'nowhere.yaml'"),
        ("job: train\nconfg: a.yaml\n", "did you mean 'config'"),
        ("job: train\nconfig: 3\n", "3 is not a str"),
        ("- a\n- b\n", "a mapping is expected"),
        ("a: [", "job.yaml"),
        ("job: vae train\nconfig: job.yaml\nargs: [--promote, x]\n", "--promote: not in a queue"),
    ],
)
def test_queue_a_wrong_job_is_refused_before_anything_is_written(text, part, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(text)
    done = typed(capsys, "queue", "add", tmp_path / "job.yaml", "--queue", tmp_path / "queue")
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "queue").exists()


def test_queue_settings_of_the_moment_go_with_the_job(place, monkeypatch):
    monkeypatch.setenv("MINSNR_RUNS", "/some where")
    (place.root / "a.yaml").write_text("project: a\n")
    job = add_job(place.queue, job_of(place.root / "a.yaml"))
    assert typed_command(job).startswith("MINSNR_RUNS='/some where' minsnr train ")


def test_queue_lists_without_torch_or_arrays():
    code = "import sys, minsnr_nb.jobs.worker; sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_queue_of_a_thousand_is_listed_soon(place):
    with durable.shared_desk(durable.make_dir(place.queue)[-1]):
        for n in range(1000):
            job = place.add()
            if n < 900:
                assert note_event(job, "start", 0) and note_event(job, "end", 1, code=0)
    best = min(_seconds(lambda: list_jobs(place.queue)) for _ in range(3))
    assert best < 0.3, best


def _seconds(do) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


# --- what lies there and is not a job -------------------------------------------------------------

GOOD = {"verb": "train", "words": [], "cwd": "/", "name": "x", "token": "0" * 16}
GOOD |= {"environ": {}, "deaths": 3}
HOSTILE = {
    "half": b'{"verb": "train", "wor',
    "empty": b"",
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "verb": json.dumps(GOOD | {"verb": "rm"}).encode(),
    "words": json.dumps(GOOD | {"words": [["-rf"]]}).encode(),
    "nul": json.dumps(GOOD | {"words": ["a\0b"]}).encode(),
    "cwd": json.dumps(GOOD | {"cwd": "../.."}).encode(),
    "environ": json.dumps(GOOD | {"environ": {"LD_PRELOAD": "evil.so"}}).encode(),
    "token": json.dumps(GOOD | {"token": "../../../../etc"}).encode(),
    "twice": b'{"verb": "train", "verb": "eval"}',
    "escape": b'{"\x1b[31m',
    "large": b" " * (5 << 20),
}


def _bytes_of(root):
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink())
    return {p: p.read_bytes() for p in files}


@pytest.mark.parametrize(
    "kind", [*HOSTILE, "link", "fifo", "gone", "folder", "events", "link to a job"]
)
def test_queue_goes_on_past_a_hostile_job(kind, place, capsys):
    odd = place.queue / "jobs/0001"
    odd.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(odd / "job.json")
    elif kind == "link":
        os.symlink("/etc/passwd", odd / "job.json")
    elif kind == "folder":
        (odd / "job.json").mkdir()
    elif kind == "link to a job":
        odd.rmdir(), odd.symlink_to(place.root)
    elif kind == "events":
        (odd / "job.json").write_text(json.dumps(GOOD | {"cwd": str(place.root / "nowhere")}))
        (odd / "0001.json").write_text('{"what": ["end"], "code"')
    elif kind != "gone":
        (odd / "job.json").write_bytes(HOSTILE[kind])
    (place.queue / "jobs/notes.txt").write_text("mine")
    job, before = place.add(), _bytes_of(place.queue)
    worker.work(place.queue, once=True)
    assert find_job(place.queue, job.id).state.name == "completed"
    done = typed(capsys, "queue", "ls", "--queue", place.queue)
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("0001 ")]
    assert ("failed" if kind == "events" else "unreadable") in line and line.isprintable()
    after = _bytes_of(place.queue)
    assert {k: v for k, v in after.items() if k in before} == before


def test_queue_files_of_the_user_are_left_alone(place):
    place.add()
    for name, data in harness.MINE.items():
        (place.queue / name).write_bytes(data)
    (place.queue / "mine/deep").mkdir(parents=True)
    worker.work(place.queue, once=True)
    remove_job(place.queue, "1")
    for name in ("keep me.yaml", "../notes.txt", ".hidden", "mine"):
        with pytest.raises(ConfigError, match="no job"):
            remove_job(place.queue, name)
    names = {p.relative_to(place.queue).as_posix() for p in place.queue.rglob("*")}
    assert names == {*harness.MINE, "jobs", "mine", "mine/deep"}
    assert all((place.queue / k).read_bytes() == v for k, v in harness.MINE.items())


# --- order, stop, retry ---------------------------------------------------------------------------


def test_queue_order_changes_while_it_runs(place):
    order = []
    for n in range(4):
        place.add(name=f"n{n}")

    def tell(job, state):
        if state.name == "running":
            order.append(job.name)
            if len(order) == 1:
                move_job(place.queue, "n3", before="n2")

    worker.work(place.queue, once=True, tell=tell)
    assert order == ["n0", "n1", "n3", "n2"]


def test_queue_a_damaged_order_is_no_order(place):
    for _ in range(3):
        place.add()
    move_job(place.queue, "3", first=True)
    assert [r.id for r in list_jobs(place.queue)] == ["0003", "0001", "0002"]
    (place.queue / "order.json").write_text('{"order": [3, ')
    assert [r.id for r in list_jobs(place.queue)] == ["0001", "0002", "0003"]


def test_queue_slots_take_one_job_each(place):
    for _ in range(3):
        place.add("pause=0.1")
    most = []
    tell = lambda job, state: most.append(place.states().count("running"))  # noqa: E731
    worker.work(place.queue, worker.slots_of("cpu:2"), once=True, tell=tell)
    assert max(most) == 2 and place.states() == ["completed"] * 3


def test_queue_a_job_for_another_device_is_left_for_another_worker(place):
    place.add("--device", "cuda"), place.add()
    worker.work(place.queue, worker.slots_of("cpu:1"), once=True)
    assert place.states() == ["waiting", "completed"]


def _worker(place) -> subprocess.Popen:
    code = "from tests import short_job; from minsnr_nb.jobs import worker\n"
    code += "worker._CODE['minsnr'] = short_job.CODE\n"
    code += f"worker.work({str(place.queue)!r}, waits=worker.Waits(0.5, 1.0))"
    env = environment(PYTHONPATH=os.environ["PYTHONPATH"])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", code], env=env, **quiet)


def test_queue_stop_goes_through_the_run_and_retry_goes_on(place):
    job = place.add("pause=0.2")
    child = _worker(place)
    assert until(lambda: run_of(job) and any(log_lines(run_of(job).path)))
    stop_job(place.queue, job.id)
    assert until(lambda: place.states() == ["stopped"])
    done = len(log_lines(run_of(job).path))
    assert 0 < done < 6
    retry_job(place.queue, job.id)
    assert until(lambda: place.states() == ["completed"])
    child.terminate()
    assert child.wait() == 1  # an error of ours, unhandled by this bare call
    assert [x["step"] for x in log_lines(run_of(job).path)] == [1, 2, 3, 4, 5, 6]
    assert len(attempts_of(run_of(job))) == 2


def test_queue_a_worker_that_is_ended_counts_nothing(place):
    job = place.add("pause=0.2", deaths=0)
    child = _worker(place)
    assert until(lambda: run_of(job) and any(log_lines(run_of(job).path)))
    child.send_signal(signal.SIGTERM)
    child.wait()
    assert place.states() == ["waiting"] and find_job(place.queue, "1").state.phase.died == 0
    worker.work(place.queue, once=True)
    assert place.states() == ["completed"] and len(attempts_of(run_of(job))) == 2


def test_queue_a_job_that_dies_too_often_is_failed(place):
    job = place.add("pause=0.2", deaths=1)
    child = _worker(place)
    for n in (1, 2):
        assert until(
            lambda n=n: (
                len(harness.processes(place.queue)) == 1
                and find_job(place.queue, "1").state.phase.attempts == n
            )
        )
        os.kill(harness.processes(place.queue)[0], signal.SIGKILL)
    assert until(lambda: place.states() == ["failed"])
    assert (
        find_job(place.queue, "1").state.reason
        == "its process died 2 times (the last one: signal 9)"
    )
    child.kill(), child.wait()
    retry_job(place.queue, "1")
    worker.work(place.queue, once=True)
    assert place.states() == ["completed"] and is_sealed(run_of(job))


def test_queue_a_run_whose_maker_died_before_noting_it_is_found(place):
    job = place.add()
    worker.work(place.queue, once=True)
    run = run_of(job)
    os.unlink(job.path / "run"), os.unlink(job.path / "0002.json")
    worker.work(place.queue, once=True)
    assert run_of(job) == run and place.states() == ["completed"]
    assert len(list((place.root / "runs/short").iterdir())) == 1


# --- an unkind world ------------------------------------------------------------------------------


def test_queue_does_not_look_at_clocks(place, monkeypatch):
    "A clock that is set back an hour, and files that were made in the future"
    first = place.add("pause=0.2")
    child = _worker(place)
    assert until(lambda: place.states() == ["running"])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    for file in first.path.iterdir():
        os.utime(file, (real() + 7200, real() + 7200))
    place.add()
    assert place.states() == ["running", "waiting"]
    child.kill(), child.wait()
    assert until(lambda: place.states() == ["waiting", "waiting"])
    worker.work(place.queue, once=True)
    assert place.states() == ["completed", "completed"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_queue_that_cannot_be_written_is_one_line(code, place, monkeypatch, capsys):
    place.add()
    before = _bytes_of(place.queue)

    class Unwritable(FaultyOS):
        CHANGING = FaultyOS.CHANGING - {"open"}

        def _wrap(self, name, real):
            return lambda *args, **kwargs: fails_with(code)(name, real, args)

    monkeypatch.setattr(durable, "os", Unwritable(0, None))
    for words in (["work", "--once"], ["stop", "1"], ["rm", "1"], ["mv", "1", "--first"]):
        done = typed(capsys, "queue", *words, "--queue", place.queue)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert errno.errorcode[code] in done.stderr
    done = typed(capsys, "queue", "ls", "--queue", place.queue)
    assert done.returncode == 0 and "waiting" in done.stdout
    monkeypatch.undo()
    assert _bytes_of(place.queue) == before


def test_queue_a_full_disk_at_any_moment_loses_nothing(place, monkeypatch):
    "One changing call of the worker fails, whichever it is; the next worker finishes"
    at, wrong = 0, True
    while wrong:
        at += 1 if os.environ.get("RUN_SLOW") else 7
        job = place.add("steps=1", "pause=0")
        faulty = FaultyOS(at, fails_with(errno.ENOSPC))
        with monkeypatch.context() as m, pytest.MonkeyPatch.context():
            m.setattr(durable, "os", faulty)
            m.setattr(worker, "RETRY_S", 0.0)
            try:
                worker.work(place.queue, once=True)
            except MinsnrError as e:
                assert "ENOSPC" in str(e)
        wrong = faulty.count >= at
        worker.work(place.queue, once=True)
        assert find_job(place.queue, job.id).state.name == "completed", at
        assert not harness.inventory(place.queue), at
    assert at > 8


def test_queue_where_there_are_no_locks_nothing_is_done_twice(place, monkeypatch):
    monkeypatch.setattr(durable, "is_held", lambda path: None)
    job = place.add()
    note_event(job, "start", 0)
    assert place.states() == ["running"] and "no locks" in list_jobs(place.queue)[0].state.reason


# --- processes ------------------------------------------------------------------------------------


def test_queue_a_job_that_does_not_listen_is_killed_with_all_it_started(place, monkeypatch):
    code = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "subprocess.Popen(['sleep', '987'])\nprint('deaf', flush=True)\ntime.sleep(987)"
    monkeypatch.setitem(worker._CODE, "minsnr", worker._HEAD + code.replace("\n", "; "))
    place.add(deaths=0)
    with durable.shared_desk(place.queue):
        at_work = worker.start_job(find_job(place.queue, "1").job, worker.Slot("any", ""))
        assert until(lambda: jobs.last_line(at_work.job) == "deaf")
        stop_job(place.queue, "1")
        assert until(lambda: worker.look_after(at_work, SOON))
    assert place.states() == ["stopped"] and at_work.process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        until(lambda: os.killpg(at_work.process.pid, 0), 2)


def test_queue_harness_finds_a_job_that_is_taken_twice(place, monkeypatch):
    "Without the lease two workers take one job, and the harness says so"
    monkeypatch.setattr(worker, "note_event", lambda job, what, after, **facts: True)
    monkeypatch.setattr(durable, "hold", lambda path: os.open(path, os.O_RDWR))
    ok, text = harness.queue_races(None, 3)
    assert not ok, text


# --- in earnest -----------------------------------------------------------------------------------


def test_queue_trains_in_earnest_and_what_was_killed_is_equal_to_the_bit(tmp_path):
    from .runs import digests

    (tmp_path / "settings.ini").write_text("[minsnr]\nruns = runs\n")
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "bad.yaml").write_text("trian: {steps: 3}\n")
    for words in (["small.yaml"], ["small.yaml"], ["bad.yaml"]):
        assert minsnr("queue", "add", *words, cwd=tmp_path).returncode == 0
    queue = tmp_path / "queue"
    work = [sys.executable, "-c", "import sys; from minsnr_nb.cli import main; sys.exit(main())"]
    first = subprocess.Popen([*work, "queue", "work"], cwd=tmp_path, env=environment())
    job = find_job(queue, "1").job
    assert until(lambda: run_of(job) and any(log_lines(run_of(job).path)), 120)
    first.kill(), first.wait()
    done = minsnr("queue", "work", "--once", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "2 completed, 1 failed\n", done.stderr
    rows = json.loads(minsnr("queue", "ls", "--json", cwd=tmp_path).stdout)
    assert [r["state"] for r in rows] == ["completed", "completed", "failed"]
    assert "did you mean 'train'" in rows[2]["why"]
    runs = [run_of(find_job(queue, n).job) for n in "12"]
    assert len(list((tmp_path / "runs/tests").glob("2*"))) == 2
    assert digests(runs[0].path) == digests(runs[1].path)
    assert len(events_of(find_job(queue, "2").job)) == 2
    shown = minsnr("queue", "show", "1", cwd=tmp_path).stdout
    assert f"command: minsnr train {tmp_path / 'small.yaml'}\n" in shown


def test_queue_run_counts_and_goes_on_with_what_is_not_sealed(place, capsys, monkeypatch):
    monkeypatch.chdir(place.root)
    (place.root / "a.yaml").write_text("project: a\n")
    (place.root / "b.yaml").write_text("project: b\n")
    (place.root / "s.yaml").write_text("job: study\nconfig: n.ipynb\n")
    (place.root / "n.ipynb").write_text("{}")
    done = typed(capsys, "run", "a.yaml", "b.yaml", "s.yaml", "-n", "night", "--queue", place.queue)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "2 completed, 1 failed")
    assert done.stdout.count("RUN_DIR: ") == 2
    (place.root / "n.ipynb").unlink()
    again = typed(capsys, "run", "-n", "night", "-r", "--queue", place.queue)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (1, "2 completed, 1 failed")
    assert again.stdout.count("RUN_DIR: ") == 0
    done = typed(capsys, "run", "a.yaml", "b.yaml", "--queue", place.queue)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "2 completed")
