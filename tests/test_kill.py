"kill -9 at any moment, twice, then resume: byte-equal to the uninterrupted run."

import json
import os
import random
import signal
import subprocess
import time

from tests.runs import BIN, ROOT, SMALL, digests, environment, log_lines, minsnr, run_dir

LONGER = SMALL.replace("steps: 12, batch_size: 32", "steps: 250, batch_size: 32").replace(
    "checkpoint_every: 3", "checkpoint_every: 7"
)
LONGER = LONGER.replace("every: 6", "every: 100")


def killed(words, wait_for, delay):
    "Start a command, wait until it has trained a little, then kill it"
    child = subprocess.Popen(
        [BIN / "minsnr", *map(str, words)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = child.stdout.readline()
    run = run_dir(line)
    deadline = time.monotonic() + 120
    while not wait_for(run) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    return run


def step_of(run):
    pointer = run / "ckpts/last/CURRENT.json"
    return json.loads(pointer.read_text())["step"] if pointer.exists() else 0


def test_kill_two_kills_change_no_bit(tmp_path):
    config = tmp_path / "longer.yaml"
    config.write_text(LONGER)
    whole = run_dir(minsnr("train", config, "--run-root", tmp_path / "a").stdout)
    chance = random.Random(0)
    run = killed(
        ["train", config, "--run-root", tmp_path / "b"],
        lambda r: step_of(r) >= 50,
        chance.uniform(0, 0.05),
    )
    assert (
        50 <= step_of(run) < 250
        and json.loads((run / "meta/status.json").read_text())["state"] == "running"
    )
    listed = json.loads(minsnr("runs", "--json", "--run-root", tmp_path / "b").stdout)
    assert [row["state"] for row in listed] == ["lost"]
    before = step_of(run)
    killed(["resume", run], lambda r: step_of(r) >= before + 40, chance.uniform(0, 0.05))
    assert before < step_of(run) < 250
    done = minsnr("resume", run)
    assert done.returncode == 0, done.stderr
    assert digests(run) == digests(whole) and log_lines(run) == log_lines(whole)
    assert minsnr("check", run).returncode == 0
    attempts = sorted(p.name for p in (run / "meta/attempts").iterdir())
    assert attempts == ["0001.json", "0002.json", "0003.json"]


def test_kill_killed_before_the_first_checkpoint(tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    run = killed(["train", config, "--run-root", tmp_path / "b"], lambda r: True, 0)
    assert minsnr("resume", run).returncode == 0
    whole = run_dir(minsnr("train", config, "--run-root", tmp_path / "a").stdout)
    assert digests(run) == digests(whole) and log_lines(run) == log_lines(whole)
