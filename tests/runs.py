"Helpers of the process tests: the command, its runs, and what must be equal in two of them."

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from minsnr_nb.cli import main

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SMALL = """\
project: tests
model: {name: mlp, width: 32}
loss: {name: min_snr, gamma: 5.0}
train: {steps: 12, batch_size: 32, log_every: 4, checkpoint_every: 3}
eval: {every: 6, samples: 20, probe_images: 16, probe_draws: 1}
sampler: {name: ddim, steps: 4}
"""


def environment(**more) -> dict:
    "The environment of a user: not the one that nbdev sets for its own tests"
    drop = ("IN_TEST", "MINSNR_PM")
    return {k: v for k, v in os.environ.items() if k not in drop} | {"OMP_NUM_THREADS": "1"} | more


def minsnr(*words, **kwargs) -> subprocess.CompletedProcess:
    "Run the command as a user does"
    command = [BIN / "minsnr", *map(str, words)]
    options = {
        "cwd": ROOT,
        "env": environment(),
        "capture_output": True,
        "text": True,
        "timeout": 240,
    }
    return subprocess.run(command, **options | kwargs)


def typed(capsys, *words) -> SimpleNamespace:
    "Run the command in this process, for what does not depend on being one of its own"
    capsys.readouterr()
    try:
        code = main([str(w) for w in words])
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)


def run_dir(stdout: str) -> Path:
    "The path that a command announced"
    (line,) = [x for x in stdout.splitlines() if x.startswith("RUN_DIR: ")]
    return Path(line.removeprefix("RUN_DIR: "))


def log_lines(run: Path) -> list[dict]:
    "The metrics log without what measures time"
    lines = (run / "logs/metrics.jsonl").read_text().splitlines()
    skip = ("time", "attempt")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(skip)} for x in lines]


def digests(run: Path) -> dict[str, str]:
    "SHA-256 of everything that must be byte-equal in two runs of one config"
    last = json.loads((run / "ckpts/last/CURRENT.json").read_text())["dir"]
    files = [
        run / f"ckpts/last/{last}/{n}"
        for n in ("model.safetensors", "ema.safetensors", "optim.safetensors", "state.json")
    ]
    files += sorted((run / "artifacts/grids").glob("*.png"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
