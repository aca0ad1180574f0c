"Signals and requests reach a training process within one step, and change no bit of what it computes."

import json
import os
import signal
import subprocess
import time

import pytest

from minsnr_nb.api import train_run
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.state import derive_state
from minsnr_nb.requests import ask
from minsnr_nb.runner import SlowSteps
from minsnr_nb.strict_yaml import read_yaml
from tests.runs import BIN, ROOT, SMALL, digests, environment, log_lines, minsnr, run_dir

LONG = SMALL.replace("steps: 12, batch_size: 32", "steps: 300, batch_size: 32")
LONG = LONG.replace("every: 6", "every: 150").replace(
    "checkpoint_every: 3", "checkpoint_every: 100"
)


def steps(run):
    lines = (run / "logs/metrics.jsonl").read_text().splitlines()
    return max((json.loads(x)["step"] for x in lines if x.endswith("}")), default=0)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def start(config, root):
    child = subprocess.Popen(
        [BIN / "minsnr", "train", str(config), "--run-root", str(root)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = open_run(run_dir(child.stdout.readline()))
    until(lambda: steps(run.path) > 0)
    return child, run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "long.yaml"
    path.write_text(LONG)
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return run_dir(minsnr("train", config, "--run-root", tmp_path_factory.mktemp("whole")).stdout)


@pytest.mark.parametrize("way", ["SIGTERM", "stop.json"])
def test_requests_stopped_with_a_checkpoint_then_resumed(way, config, whole, tmp_path):
    child, run = start(config, tmp_path)
    os.kill(child.pid, signal.SIGTERM) if way == "SIGTERM" else ask(run, "stop")
    _, said = child.communicate(timeout=60)
    status = json.loads(run.status_path.read_text())
    assert child.returncode == (143 if way == "SIGTERM" else 0)  # a request was obeyed
    assert derive_state(run) == "interrupted" and 0 < status["step"] < 300
    assert f"stopped at step {status['step']}" in said and len(said.strip().splitlines()) == 1
    pointer = json.loads((run.ckpts_last / "CURRENT.json").read_text())
    assert (
        pointer["step"]
        == status["step"]
        >= json.loads(run.summary_path.read_text())["last_step"]
        > 0
    )
    assert status["exit"]["signal"] == (15 if way == "SIGTERM" else None)
    assert minsnr("check", run.path).returncode == 0
    done = minsnr("resume", run.path)
    assert done.returncode == 0, done.stderr
    assert digests(run.path) == digests(whole) and log_lines(run.path) == log_lines(whole)


def test_requests_checkpoint_and_sample_while_training(config, whole, tmp_path):
    child, run = start(config, tmp_path)
    before = steps(run.path)
    ask(run, "checkpoint")
    ask(run, "sample", n=4)
    until(lambda: not list(run.requests.iterdir()))
    child.communicate(timeout=60)
    events = [json.loads(x) for x in run.events_path.read_text().splitlines()]
    served = {e["what"]: e["step"] for e in events if e["event"] == "request"}
    assert set(served) == {"checkpoint", "sample"} and before <= min(served.values()) < 300
    assert [p.name for p in run.grids.glob("request_*")] == [
        f"request_step_{served['sample']:09d}_n4.png"
    ]
    same = {k: v for k, v in digests(run.path).items() if not k.startswith("request")}
    assert same == digests(whole) and log_lines(run.path) == log_lines(whole)


def test_requests_a_process_that_was_taken_over_while_it_hung_writes_nothing_more(config, tmp_path):
    child, run = start(config, tmp_path)
    os.kill(child.pid, signal.SIGSTOP)
    first = json.loads((run.attempts / "0001.json").read_text())
    (run.attempts / "0002.json").write_text(json.dumps(first | {"attempt": 2, "host": "elsewhere"}))
    files = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    os.kill(child.pid, signal.SIGCONT)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said.count("\n")) == (1, 1) and "attempt 1 was taken over" in said
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == files


def test_requests_a_run_that_trains_cannot_be_evaluated_into_its_own_log(config, tmp_path):
    child, run = start(config, tmp_path)
    os.kill(child.pid, signal.SIGSTOP)  # it must not end before it is asked about
    log = run.metrics_path.read_bytes()
    done = minsnr("eval", run.path)
    assert done.returncode == 2 and f"written by process {child.pid}" in done.stderr
    assert run.metrics_path.read_bytes() == log
    child.kill()
    child.communicate()


def test_requests_a_run_whose_steps_become_slow_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(SlowSteps, "times", 0)  # each window of steps counts as slow
    said: list[str] = []
    listed = {"callbacks": [{"name": "log_events"}], "train": {"steps": 64}}
    train_run(read_yaml(SMALL)[0], listed, run_root=tmp_path, device="cpu", warn=said.append)
    (line,) = [x for x in said if "steps took" in x]
    assert "OMP_WAIT_POLICY=PASSIVE" in line and "MINSNR_THREADS=1" in line
