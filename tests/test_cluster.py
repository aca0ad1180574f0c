"Sweeps whose processes are somebody else's: Dask's workers, jobs of a batch system; killed and not"

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minsnr_nb.cli import main
from minsnr_nb.record.checks import check_run, is_sealed
from minsnr_nb.record.directory import list_runs
from minsnr_nb.record.state import derive_state
from minsnr_nb.sweep.plan import read_plan
from tests.harness.lab import fork
from tests.runs import BIN, ROOT, environment, typed
from tests.test_sweep import STUDY, made, products, trainers, until, written  # noqa: F401

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
SMALL = {"seeds": {"count": 2}}  # the first four trials of the undisturbed study


def as_undisturbed(path: Path, root: Path, made) -> None:  # noqa: F811
    "Every trial once, sealed, sound, with the bytes of a study that nobody disturbed"
    plan, home, want = read_plan(path), root / "sweeps/tiny", products(*made)
    runs = list_runs(root)
    assert len(runs) == len(plan.trials) == 4
    assert all(is_sealed(r) and all(c.ok for c in check_run(r.path)) for r in runs)
    for id, have in products(plan, home).items():
        assert not {
            n: (have.get(n), want[id].get(n))
            for n in {*have, *want[id]}
            if have.get(n) != want[id].get(n)
        }


def killed(root: Path, found=trainers) -> int:
    "Kill the first process that is found working"
    pid = until(lambda: found(root))[0]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in status(pid))
    return pid


def status(pid: int) -> str:
    try:
        return "\n" + Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "\nState:\tZ"


# --- bare tasks -----------------------------------------------------------------------------------


def task(path: Path, root: Path, *words) -> int:
    "A task in a process of its own, which has imported everything already; its pid"

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = main(["sweep", "task", str(path), *map(str, words), "--run-root", str(root)])
        os._exit(code)

    return fork(work)


def test_cluster_tasks_that_are_killed_go_on(made, tmp_path):  # noqa: F811
    path, root = written(tmp_path, SMALL), tmp_path / "runs"
    tasks = [task(path, root, i) for i in (0, 1)]
    for _ in range(3):
        pid = killed(root, lambda root: [p for p in trainers(root) if p in tasks])
        os.waitpid(pid, 0)
        tasks[tasks.index(pid)] = task(path, root, tasks.index(pid))
    for pid in tasks:  # "the sweep": all at once
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    again = [task(path, root, i) for i in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in again] == [0] * 4
    as_undisturbed(path, root, made)


def test_cluster_tasks_share_a_plan_that_is_longer_than_an_array(made, tmp_path, capsys):  # noqa: F811
    path, root = written(tmp_path, SMALL), tmp_path / "runs"
    for i in (0, 1, 2):
        done = typed(capsys, "sweep", "task", path, i, "--of", 3, "--run-root", root)
        assert done.returncode == 0, done.stderr
    as_undisturbed(path, root, made)
    for words, said in ((("task", path, "3", "--of", "3"), "0 to 2 are"), ((path, "--of", "2"), "--of: only")):  # fmt: skip
        done = typed(capsys, "sweep", *words)
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_cluster_a_job_whose_time_is_nearly_over_saves_and_is_put_back(made, tmp_path, signum):  # noqa: F811
    "The shipped script under bash, with a real signal; Slurm's own part is a fake `scontrol`"
    long = {
        "train": {"steps": 100_000, "batch_size": 8, "log_every": 2, "checkpoint_every": 50_000}
    }
    path, root = written(tmp_path, SMALL, **long), tmp_path / "my runs"
    words = [BIN / "minsnr", "sweep", path, "--sbatch", "--run-root", root]
    text = subprocess.run(
        words, env=environment(), capture_output=True, text=True, check=True, cwd=ROOT
    )
    (tmp_path / "job").write_text(text.stdout)
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> '{tmp_path}/queue'\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert "--array=0-3" in text.stdout and "--requeue" in text.stdout
    slurm = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "77", "OMP_NUM_THREADS": "1"}
    slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(["bash", tmp_path / "job"], env=environment(**slurm), **pipes)
    until(lambda: any(root.glob("*/*/logs/metrics.jsonl")) and any(p.stat().st_size for p in root.glob("*/*/logs/metrics.jsonl")))  # fmt: skip
    job.send_signal(signum)
    out, _ = job.communicate(timeout=60)
    assert "with a checkpoint" in out and signum.name in out, out
    (run,) = list_runs(root)
    assert json.loads((run.path / "ckpts/last/CURRENT.json").read_text())["dir"] > "step_000000000"
    if signum == signal.SIGUSR1:
        assert job.returncode == 0 and (tmp_path / "queue").read_text() == "requeue 77_2\n"
    else:  # Slurm knows why it did that
        assert job.returncode == 143 and not (tmp_path / "queue").exists()


# --- Dask -----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def dask(tmp_path):
    "A scheduler; workers are started by a call"
    address, processes = f"tcp://127.0.0.1:{free_port()}", []

    def start(part: str, *words) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{part}", *words, "--no-dashboard"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        how = {"env": environment(), "cwd": tmp_path, **quiet}
        processes.append(subprocess.Popen(command, **how))
        return processes[-1]

    start("scheduler", "--host", "127.0.0.1", "--port", address.split(":")[-1])
    worker = lambda: start("worker", address, "--nthreads", "1", "--no-nanny")  # noqa: E731
    yield address, worker
    for process in processes:
        process.kill()
        process.wait()


def sweep(path: Path, root: Path, address: str) -> subprocess.Popen:
    words = [BIN / "minsnr", "sweep", path, "--scheduler", address, "--run-root", root]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment(), cwd=ROOT, **pipes)


def test_cluster_workers_of_a_scheduler_that_are_killed_go_on(made, tmp_path, dask):  # noqa: F811
    "Two children, a worker, and the sweep itself"
    path, root, (address, worker) = written(tmp_path, SMALL), tmp_path / "runs", dask
    first, _ = worker(), worker()
    running = sweep(path, root, address)
    killed(root)
    killed(root)
    killed(root, lambda _: [first.pid])
    first.wait()
    worker()
    time.sleep(1)
    running.kill()
    running.communicate()
    until(lambda: not trainers(root))  # children whose sweep is gone stop in order
    again = sweep(path, root, address)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "dashboard: http://" in err and "n = 2 seeds" in out
    as_undisturbed(path, root, made)


def test_cluster_a_sweep_that_is_asked_to_stop_takes_its_tasks_along(tmp_path, dask):
    long = {
        "train": {"steps": 100_000, "batch_size": 8, "log_every": 2, "checkpoint_every": 50_000}
    }
    path, root, (address, worker) = written(tmp_path, SMALL, **long), tmp_path / "runs", dask
    worker()
    running = sweep(path, root, address)
    until(lambda: trainers(root))
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143 and "goes on" in err.splitlines()[-1], err
    assert [derive_state(run) for run in list_runs(root)] == ["interrupted"]
    until(lambda: not trainers(root))


def test_cluster_a_scheduler_that_does_not_answer_is_one_line(tmp_path, capsys, monkeypatch):
    from minsnr_nb.sweep import cluster

    path, root = written(tmp_path, SMALL), tmp_path / "runs"
    monkeypatch.setattr(cluster.Dask.__init__, "__defaults__", (lambda line: None, 0.5))
    deaf = socket.create_server(("127.0.0.1", 0))  # takes calls, and never says a word
    for address in ("tcp://127.0.0.1:9", "nowhere", f"tcp://127.0.0.1:{deaf.getsockname()[1]}"):
        done = typed(capsys, "sweep", path, "--scheduler", address, "--run-root", root)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert (
            f"--scheduler {address}" in done.stderr
            and "no answer of a scheduler within" in done.stderr
        )
    assert not root.exists() and STUDY


def test_cluster_without_dask_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = typed(capsys, "sweep", written(tmp_path), "--scheduler", "tcp://127.0.0.1:9")
    assert done.returncode == 2 and "minsnr_nb[dask]" in done.stderr
