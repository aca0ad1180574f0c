"The contract tests CT-01 to CT-05 of the run layout, through the installed command."

import hashlib
import json
import math
import shutil
from datetime import datetime

import pytest

from tests.runs import SMALL, digests, log_lines, minsnr, run_dir, typed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    "One uninterrupted run that several tests look at"
    done = minsnr("train", config, "--run-root", tmp_path_factory.mktemp("runs"))
    assert done.returncode == 0, done.stderr
    return run_dir(done.stdout)


WRONG = {
    "trainer.unknowntyppo=1": ("trainer", "did you mean 'train'"),
    "train.stpes=3": ("train.stpes", "did you mean 'steps'"),
    "loss.name=minsnr": ("loss.name", "did you mean 'min_snr'"),
    "loss.gama=5": ("loss.gama", "did you mean 'gamma'"),
    "loss.gamma=0": ("loss.gamma", "greater than 0"),
    "optim.lr=-1": ("optim.lr", "greater than 0"),
    "train.steps=five": ("train.steps", "valid integer"),
    "train.steps=2.5": ("train.steps", "valid integer"),
    "schedule.zero_terminal_snr=true": ("objective.prediction", "zero_terminal_snr"),
    "model.width=0": ("model.width", "greater than 0"),
    "data={name: image_folder, path: nowhere}": ("data.path", "nowhere"),
    "callbacks=[{name: timing}, {name: timing}]": ("callbacks", "twice"),
}


@pytest.mark.parametrize("override", WRONG)
def test_contracts_ct01_wrong_settings_leave_nothing(override, config, tmp_path, capsys):
    root = tmp_path / "runs"
    more = ["objective.prediction=eps"] if "zero_terminal" in override else []
    done = typed(capsys, "train", config, override, *more, "--run-root", root)
    assert done.returncode == 2 and not root.exists()
    (line,) = done.stderr.strip().splitlines()
    assert all(part in line for part in WRONG[override]), line


def test_contracts_ct01_duplicate_key_and_missing_file(tmp_path, capsys):
    twice = tmp_path / "twice.yaml"
    twice.write_text("seed: 1\nseed: 2\n")
    for path, part in (
        (twice, "twice.yaml:2: seed: key given twice"),
        (tmp_path / "no.yaml", "No such file"),
    ):
        done = typed(capsys, "train", path, "--run-root", tmp_path / "runs")
        assert (
            done.returncode == 2
            and part in done.stderr
            and len(done.stderr.strip().splitlines()) == 1
        )
    assert not (tmp_path / "runs").exists()


def test_contracts_ct01_unusable_run_root(config, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    done = minsnr("train", config, "--run-root", file)
    assert done.returncode == 2 and "run_root" in done.stderr and file.read_text() == "mine"


def test_contracts_ct02_smoke_creates_every_entry(config, tmp_path):
    done = minsnr("train", config, "train.steps=2", "--run-root", tmp_path)
    run = run_dir(done.stdout)
    for entry in (
        "config.yaml", "config.resolved.yaml", "config_resolved.yaml", "run_manifest.json", "metrics.json",
        "meta/provenance.json", "logs/metrics.jsonl", "ckpts/last", "artifacts/predictions", "artifacts/checkpoints",
    ):  # fmt: skip
        assert (run / entry).exists(), entry
    resolved = (run / "config.resolved.yaml").read_bytes()
    recorded = json.loads((run / "meta/provenance.json").read_text())["config"]["resolved_sha256"]
    assert hashlib.sha256(resolved).hexdigest() == recorded and b"${" not in resolved
    assert (run / "config_resolved.yaml").read_bytes() == resolved


def test_contracts_ct03_provenance(finished):
    about = json.loads((finished / "meta/provenance.json").read_text())
    assert about["run_id"] == finished.name and about["layout_version"] == 1
    datetime.strptime(about["created_at_utc"][:19] + "Z", "%Y-%m-%dT%H:%M:%SZ")
    assert about["created_at_utc"].endswith("Z")
    assert len(about["command"]["argv"]) >= 1 and about["command"]["cwd"]
    assert about["git"]["repo_sha"] and isinstance(about["git"]["is_dirty"], bool)
    assert all(about["env"][k] for k in ("python", "platform", "torch"))
    for line in (finished / "logs/metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        assert (
            isinstance(event["step"], int)
            and event["step"] >= 0
            and isinstance(event["time"], float)
        )


def test_contracts_ct04_same_config_same_bits(config, finished, tmp_path):
    again = run_dir(minsnr("train", config, "--run-root", tmp_path).stdout)
    assert digests(again) == digests(finished) and log_lines(again) == log_lines(finished)


def test_contracts_ct05_resume_equals_uninterrupted(config, finished, tmp_path):
    "A run whose process ended after step 3 goes on from ckpts/last and ends in the same bits"
    run = run_dir(minsnr("train", config, "--run-root", tmp_path).stdout)
    lines = (run / "logs/metrics.jsonl").read_text().splitlines(keepends=True)
    manifests = {
        p: json.loads((p / "MANIFEST.json").read_text())
        for p in (run / "ckpts/last").glob("step_*")
    }
    earlier = min(manifests, key=lambda p: manifests[p]["step"])
    assert manifests[earlier]["step"] < 12
    shutil.rmtree(max(manifests, key=lambda p: manifests[p]["step"]))
    status = run / "meta/status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "interrupted"}))
    (run / "logs/metrics.jsonl").write_text("".join(lines) + '{"step": 13, "ti')  # a torn tail, too
    done = minsnr("resume", run)
    assert done.returncode == 0 and run_dir(done.stdout) == run, done.stderr
    assert digests(run) == digests(finished) and log_lines(run) == log_lines(finished)
    second = json.loads((run / "meta/attempts/0002.json").read_text())
    assert second["resumed_from"]["step"] == manifests[earlier]["step"]


def test_contracts_resume_with_another_config_is_refused(config, finished, capsys):
    done = typed(capsys, "train", config, "optim.lr=0.01", "--resume", finished)
    assert done.returncode == 2 and "optim.lr: 0.001 then, 0.01 now" in done.stderr


def test_contracts_both_contracts_hold_and_notice_damage(finished, tmp_path, capsys):
    good = typed(capsys, "check", finished)
    assert good.returncode == 0 and good.stdout.count("ok") == 2, good.stdout
    moved = tmp_path / "elsewhere" / finished.parent.name / finished.name
    shutil.copytree(finished, moved)
    assert typed(capsys, "check", moved).returncode == 0
    text = (moved / "config_resolved.yaml").read_text()
    (moved / "config_resolved.yaml").chmod(0o644)
    (moved / "config_resolved.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    bad = typed(capsys, "check", moved)
    assert bad.returncode == 1 and "BROKEN" in bad.stdout and "config_resolved.yaml" in bad.stdout


def test_contracts_nonfinite_loss_fails_the_run_and_names_the_images(config, tmp_path, capsys):
    "A learning rate that no network survives"
    done = typed(
        capsys,
        "train",
        config,
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "train.steps=50",
        "--run-root",
        tmp_path,
    )
    run = run_dir(done.stdout)
    assert done.returncode == 1 and "loss is" in done.stderr
    status = json.loads((run / "meta/status.json").read_text())
    assert status["state"] == "failed" and status["exit"]["type"] == "NonFiniteLoss"
    events = [json.loads(x) for x in (run / "logs/events.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if e["event"] == "nonfinite_loss"]
    assert event["images"] and all(0 <= i < 1797 for i in event["images"])
    for line in (run / "logs/metrics.jsonl").read_text().splitlines():
        values = json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
        assert all(
            v is None or not isinstance(v, float) or math.isfinite(v) for v in values.values()
        )
