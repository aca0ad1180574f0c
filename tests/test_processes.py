"One run on several processes: the same bits, one line, no orphans, and an end in order when one is killed."

import json
import os
import signal
import subprocess
import time

import psutil
import pytest

from minsnr_nb.api import read_tensors, resume_run, train_run
from minsnr_nb.checkpoint import state_sha256
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.state import derive_state
from minsnr_nb.runner import RunFailed
from tests.runs import BIN, ROOT, digests, environment, log_lines, run_dir, typed

# dropout, a learned weighting and a density that learns: all that may depend on who computes what
CONFIG = """\
project: tests
schedule: {name: cosine, timesteps: 10}
density: {name: loss_second_moment, history: 2}
uncertainty: {name: bins}
model: {name: unet, ch: 8, mult: [1, 2], blocks: 1, attention: [], dropout: 0.2}
train: {steps: 40, batch_size: 16, shards: 4, log_every: 4, checkpoint_every: 4}
eval: {every: 20, samples: 16, probe_images: 16, probe_draws: 1}
sampler: {name: ddim, steps: 2}
metrics: [{name: kid, real_images: 32}]
"""
LOST = 20.0  # seconds in which a run has ended whose process was killed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "shared.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def alone(config):
    "The run of one process, which all others must equal; tests read it only"
    return train_run(config, run_root=config.parent / "alone", device="cpu").path


def same(run, other) -> None:
    "Compare weights, what is learnt beside them, and the log"
    last = "ckpts/last/step_000000040"
    for name in ("uncertainty", "density"):
        file = f"{last}/{name}.safetensors"
        assert (run / file).read_bytes() == (other / file).read_bytes()
    assert digests(run) == digests(other)
    assert log_lines(run) == log_lines(other)
    assert weights(run) == weights(other)


def weights(run) -> str:
    "Digest of the portable weights; the file also names its run"
    return state_sha256(
        dict(sorted(read_tensors(run / "artifacts/checkpoints/last.safetensors").items()))
    )


def below(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def started(*words) -> tuple:
    "A command on its way: its process, its run, and the processes it has started, when it has taken some steps"
    child = subprocess.Popen(
        [BIN / "minsnr", *map(str, words), "--processes", "2", "--device", "cpu"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = run_dir(child.stdout.readline())
    before, deadline = step_of(run), time.monotonic() + 120
    while step_of(run) < before + 4 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return child, run, below(psutil.Process(child.pid))


def step_of(run) -> int:
    pointer = run / "ckpts/last/CURRENT.json"
    return json.loads(pointer.read_text())["step"] if pointer.exists() else 0


def test_processes_four_give_the_bits_of_one(config, alone, tmp_path):
    before = below(psutil.Process())  # of other tests
    run = train_run(config, run_root=tmp_path, device="cpu", processes=4)
    same(run.path, alone)
    assert not {*below(psutil.Process())} - {*before}
    said = run.provenance()["determinism"]
    assert (said["mode"], said["world_size"], said["num_threads"]) == ("strict", 4, 1)
    assert said["world_size_changes_bits"] is False


def test_processes_that_are_killed_end_in_one_line_and_change_no_bit(config, alone, tmp_path):
    "Two processes, the second killed; two again, the first killed; the rest by four"
    child, run, (gate, second) = started("train", config, "--run-root", tmp_path)
    since = time.monotonic()
    second.send_signal(signal.SIGKILL)
    out, err = child.communicate(timeout=LOST)
    assert time.monotonic() - since < LOST and child.returncode == 1
    (line,) = err.splitlines()
    assert "rank 1 of 2 was killed by SIGKILL, at step" in line and "minsnr resume" in line
    assert out == "" and not gate.is_running()
    status = json.loads((run / "meta/status.json").read_text())
    assert status["state"] == "interrupted" and "rank 1 of 2" in status["reason"]
    child, _, others = started("resume", run)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert len(others) == 2 and psutil.wait_procs(others, timeout=LOST)[1] == []
    assert 4 <= step_of(run) < 40
    done = resume_run(run, device="cpu", processes=4)
    same(done.path, alone)
    attempts = [json.loads(p.read_text()) for p in sorted((run / "meta/attempts").iterdir())]
    assert [a["world_size"] for a in attempts] == [2, 2, 4]


def test_processes_a_loss_without_numbers_ends_all_of_them(config, tmp_path):
    how, before = ("optim.lr=1e30", "optim.warmup_steps=0"), below(psutil.Process())
    with pytest.raises(RunFailed, match="loss is nan at step"):
        train_run(config, overrides=how, run_root=tmp_path, device="cpu", processes=2)
    (run,) = (tmp_path / "tests").iterdir()
    assert derive_state(open_run(run)) == "diverged"
    assert not {*below(psutil.Process())} - {*before}


def test_processes_fast_sum_is_close_and_says_so(config, alone, tmp_path):
    run = train_run(
        config,
        overrides=("train.shards=0", "train.steps=8"),
        run_root=tmp_path,
        device="cpu",
        processes=2,
    )
    said = run.provenance()["determinism"]
    assert (said["mode"], said["world_size_changes_bits"]) == ("best_effort", True)
    first, other = (log_lines(r)[0]["train/loss"] for r in (run.path, alone))
    assert 0 < abs(first - other) < 0.5  # other dropout, another sum


def test_processes_that_cannot_share_are_refused(config, capsys, tmp_path):
    where = ("--run-root", tmp_path / "runs")
    refused = {
        ("--processes", "3"): "--processes 3: train.shards is 4, so 1 or 2 or 4 can share it",
        ("train.shards=1", "--processes", "2"): "--processes 2: train.shards is 1, so 1 can",
        ("--processes", "0"): "--processes 0: at least 1",
        ("train.shards=0", "--processes", "3"): "does not divide train.batch_size, 16",
        ("train.shards=3",): "train.shards: 3 equal parts of a batch of 16",
        ("train.shards=32",): "use 0 or one of [1, 2, 4, 8, 16]",
    }
    for words, text in refused.items():
        done = typed(capsys, "train", config, *words, *where)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and text in line
    assert not (tmp_path / "runs").exists()


def test_processes_resume_refuses_a_number_that_does_not_fit(alone):
    with pytest.raises(ConfigError, match="--processes 3: train.shards is 4"):
        resume_run(alone, processes=3)
