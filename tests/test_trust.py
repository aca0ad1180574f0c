"What a finished run promises afterwards: its seal, its predictions, its promotion, its copies."

import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from minsnr_nb.record.directory import open_run, write_summary
from minsnr_nb.record.provenance import freeze
from minsnr_nb.record.seal import audit, is_sealed, unseal
from tests.runs import SMALL, run_dir, typed


def broken(path, level=None):
    return [(c.id, c.path) for c in audit(path, level) if not c.ok]


# --- the seal -------------------------------------------------------------------------------------


def test_trust_training_ends_with_a_seal_that_travels(finished, tmp_path, capsys):
    assert is_sealed(open_run(finished)) and broken(finished, "L3") == []
    with tarfile.open(tmp_path / "run.tar", "w") as tar:
        tar.add(finished, arcname=f"renamed/{finished.name}")
    with tarfile.open(tmp_path / "run.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    moved = (tmp_path / "out/renamed").rename(tmp_path / "out/project-2") / finished.name
    done = typed(capsys, "check", moved, "--level", "L3", "--json")
    (checks,) = json.loads(done.stdout).values()
    assert done.returncode == 0 and {c["level"] for c in checks} == {"L0", "L1", "L2", "L3"}


def test_trust_evaluating_and_sampling_renew_the_seal(copy, capsys):
    before = json.loads((copy / "meta/seal.json").read_text())["manifest_sha256"]
    assert typed(capsys, "eval", copy, "sampler.steps=2").returncode == 0
    assert typed(capsys, "sample", copy, "--n", 4).returncode == 0
    assert broken(copy, "L3") == []
    assert json.loads((copy / "meta/seal.json").read_text())["manifest_sha256"] != before


def test_trust_the_summary_of_a_complete_run_leaves_out_no_training(copy):
    "A killed evaluation may not have counted itself yet; the training has"
    run = open_run(copy)
    unseal(run)
    with run.metrics_path.open("a") as log:
        log.write('{"step": 20, "time": 1.0, "kind": "eval", "attempt": 1, "eval/x": 1.0}\n{"st')
    assert broken(copy) == []
    first = run.metrics_path.read_bytes().index(b"\n") + 1
    write_summary(run, first)
    assert ("B.summary", "metrics.json") in broken(copy)


def test_trust_a_damaged_run_is_not_sealed_again(copy, capsys):
    picture = next((copy / "artifacts/grids").glob("*.png"))
    picture.write_bytes(picture.read_bytes()[:-1] + b"!")
    assert broken(copy) == [("AB.seal", picture.relative_to(copy).as_posix())]
    done = typed(capsys, "eval", copy, "sampler.steps=3")
    assert done.returncode == 1 and picture.name in done.stderr
    assert broken(copy) == [("AB.seal", picture.relative_to(copy).as_posix())]


def test_trust_an_unsealed_complete_run_is_sealed_by_resume(copy, capsys):
    (copy / "meta/seal.json").unlink()
    assert broken(copy) == [] and broken(copy, "L3") == [("AB.sealed", "meta/seal.json")]
    assert run_dir(typed(capsys, "resume", copy).stdout) == copy
    assert broken(copy, "L3") == []


# --- predictions, export, models ------------------------------------------------------------------


def test_trust_stored_predictions_pass_and_any_flip_is_named(copy, capsys):
    done = typed(capsys, "sample", copy, "--n", 4, "--seed", 7, "--save-predictions")
    (folder,) = (copy / "artifacts/predictions").glob("step000000012_ema_ddim4_seed7_n4_????????")
    assert done.stdout.strip() == str(folder) and broken(copy, "L3") == []
    facts = json.loads((folder / "metadata.json").read_text())
    pointer = json.loads((copy / "ckpts/last/CURRENT.json").read_text())
    assert facts["intrinsics"]["checkpoint"]["manifest_sha256"] == pointer["manifest_sha256"]
    frame = folder / "frame_000002.npz"
    data = bytearray(frame.read_bytes())
    data[40] ^= 1
    frame.write_bytes(data)
    done = typed(capsys, "check", copy, "--level", "L2")
    assert done.returncode == 1 and "B.frames" in done.stdout and frame.name in done.stdout


def test_trust_a_callback_stores_predictions(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        SMALL + "callbacks: [{name: log_events}, {name: checkpoint}, {name: predictions, n: 2}]\n"
    )
    run = run_dir(typed(capsys, "train", tmp_path / "c.yaml", "--run-root", tmp_path).stdout)
    sets = sorted(p.name for p in (run / "artifacts/predictions").iterdir())
    assert [s[:13] for s in sets] == ["step000000006", "step000000012"] and broken(run, "L3") == []


def test_trust_export_is_small_redacted_and_described(finished, tmp_path, capsys):
    done = typed(capsys, "export", finished, "--dest", tmp_path / "assets")
    folder = tmp_path / "assets" / finished.name
    assert done.returncode == 0 and str(folder) in done.stdout
    crate = json.loads((folder / "ro-crate-metadata.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {e["@id"] for e in crate["@graph"] if e["@type"] == "File"} == files - {
        "ro-crate-metadata.json"
    }
    text = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert str(finished.parent).encode() not in text and sum(map(len, (text,))) < 10 << 20


def test_trust_a_tree_to_the_letter(copy, tmp_path, capsys):
    from minsnr_nb.record.tree import literal_problems

    assert typed(capsys, "sample", copy, "--n", "4", "--save-predictions").returncode == 0
    done = typed(capsys, "export", copy, "--tree", tmp_path / "b")
    tree = tmp_path / "b/runs/tests" / copy.name
    assert done.stdout.strip() == str(tree) and list(literal_problems(tree)) == []
    frames = list(tree.glob("artifacts/predictions/frame_*.npz"))
    weights = (tree / "artifacts/checkpoints/last.safetensors").read_bytes()
    assert (
        len(frames) == 4
        and weights == open_run(copy).checkpoints_dir.joinpath("last.safetensors").read_bytes()
    )
    assert (tree / "requirements.lock").is_file() and not (tree / "meta").exists()
    moved = shutil.move(tmp_path / "b", tmp_path / "c") / f"runs/tests/{copy.name}"
    assert list(literal_problems(moved)) == []
    assert typed(capsys, "export", copy, "--tree", tmp_path / "c").returncode == 2


def test_trust_a_secret_stops_the_export(copy, tmp_path, capsys):
    (copy / "config.yaml").chmod(0o644)
    (copy / "config.yaml").write_text("token: hf_" + "x" * 34)
    done = typed(capsys, "export", copy, "--dest", tmp_path / "assets")
    assert done.returncode == 1 and "config.yaml" in done.stderr and "xxxx" not in done.stderr
    assert not (tmp_path / "assets").exists()


def test_trust_promotion_and_sampling_by_name(finished, copy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINSNR_MODELS", str(tmp_path / "models"))
    assert typed(capsys, "promote", finished, "tiny").stdout.startswith("local://tiny@1 ")
    drawn = typed(capsys, "sample", "local://tiny@1", "--n", 4, "--size", "8x8", "--out", tmp_path)
    assert drawn.returncode == 0 and len(list(tmp_path.glob("tiny-1_ddim4_seed0_n4_*.png"))) == 1
    wrong = typed(capsys, "sample", "local://tiny", "--size", 16, "--out", tmp_path)
    assert wrong.returncode == 2 and "8x8 is the only one" in wrong.stderr
    (copy / "metrics.json").write_text("{}")
    damaged = typed(capsys, "promote", copy, "tiny")
    assert damaged.returncode == 1 and "metrics.json" in damaged.stderr
    assert [p.name for p in (tmp_path / "models/tiny").iterdir()] == ["1"]


# --- resume, continue, fork -----------------------------------------------------------------------


def test_trust_a_strict_resume_refuses_what_changes_bits(copy, capsys):
    status = copy / "meta/status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "interrupted"}))
    stamp = copy / "meta/provenance.json"
    stamp.chmod(0o644)
    facts = json.loads(stamp.read_text())
    facts["source"]["digest"] = "0" * 64
    stamp.write_text(json.dumps(facts))
    done = typed(capsys, "resume", copy)
    assert (
        done.returncode == 2
        and "code: 000000000000 then" in done.stderr
        and "--allow code" in done.stderr
    )
    assert typed(capsys, "resume", copy, "--allow", "coed").returncode == 2
    assert len(list((copy / "meta/attempts").iterdir())) == 1
    done = typed(capsys, "resume", copy, "--allow", "code")
    assert done.returncode == 1 and "not sealed: B.manifest" in done.stderr  # its stamp was edited
    assert json.loads((copy / "meta/attempts/0002.json").read_text())["overrides_allowed"] == [
        "code"
    ]


def test_trust_continue_and_fork_know_their_parent(finished, tmp_path, capsys):
    done = typed(capsys, "continue", finished, "--steps", 15, "--run-root", tmp_path)
    child = run_dir(done.stdout)
    assert (
        json.loads((child / "meta/provenance.json").read_text())["lineage"]["parent_run"]
        == finished.name
    )
    assert broken(child, "L3") == []
    fork = run_dir(
        typed(
            capsys, "fork", child, "train.steps=18", "optim.lr=1e-4", "--run-root", tmp_path
        ).stdout
    )
    lineage = json.loads((fork / "meta/provenance.json").read_text())["lineage"]
    assert (lineage["parent_step"], lineage["reason"]) == (15, "fork")
    empty = tmp_path / "empty"
    assert (
        typed(
            capsys, "fork", child, "model.width=8", "train.steps=99", "--run-root", empty
        ).returncode
        == 2
    )
    assert not empty.exists()


# --- the index, comparison, repetition ------------------------------------------------------------


def test_trust_the_list_comes_from_the_index(finished, capsys):
    root = finished.parent.parent
    words = ["runs", "--run-root", root, "--columns", "loss.gamma", "--where", "state=completed"]
    (row,) = json.loads(typed(capsys, *words, "--json").stdout)
    assert (
        row["loss.gamma"] == 5.0
        and row["path"] == str(finished)
        and (root / ".index.sqlite").exists()
    )
    assert "min_snr" in typed(capsys, *words).stdout
    assert typed(capsys, "runs", "--run-root", root, "--where", "nonsense").returncode == 2


def test_trust_compare_makes_one_page(finished, copy, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert typed(capsys, "compare", finished, copy, "--out", page).returncode == 0
    text = page.read_text()
    assert (
        text.count("data:image/png") >= 2 + 2 * 2
        and "http://" not in text
        and "https://" not in text
    )


def test_trust_an_old_run_repeats_to_the_last_bit(finished, copy, capsys):
    done = typed(capsys, "repro", finished, "--verify")
    assert done.stdout.strip() == "identical to step 12" and done.returncode == 0, done.stderr
    log = copy / "logs/metrics.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()]
    second = next(e for e in lines if e["step"] == 8)
    second["train/loss"] += 1e-9
    log.write_text("".join(json.dumps(e) + "\n" for e in lines))
    done = typed(capsys, "repro", copy, "--verify")
    assert done.returncode == 1 and done.stdout.startswith(
        "first difference at step 8: train/loss: "
    )


def test_trust_changed_packages_are_taken_from_the_runs_own_lock(
    finished, capsys, monkeypatch, tmp_path
):
    uv = tmp_path / "uv"
    uv.write_text(
        f"#!/bin/sh\necho $* >> {tmp_path}/words\nmkdir -p env/bin\n"
        f"printf '#!/bin/sh\\nexec {sys.executable} \"$@\"' > env/bin/python\nchmod +x env/bin/python\n"
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("minsnr_nb.record.repro.freeze", lambda: freeze() + "another==1\n")
    done = typed(capsys, "repro", finished, "--verify")
    assert done.stdout.strip() == "identical to step 12" and done.returncode == 0, done.stderr
    assert "changed: another: absent then, 1 now" in done.stderr
    asked = (tmp_path / "words").read_text().splitlines()
    assert len(asked) == 2 and asked[1].endswith("meta/requirements.lock")
    done = typed(capsys, "repro", finished, "--verify", "--here")
    assert done.stdout.strip() == "identical to step 12" and "another" in done.stderr
    assert len((tmp_path / "words").read_text().splitlines()) == 2


def test_trust_checks_find_a_broken_seal_in_a_fresh_process(copy):
    "Whoever imports the front page of a run has every check; one process more or less must not matter"
    code = "import sys; from minsnr_nb.run_layout import check_run\n"
    code += "print([c.id for c in check_run(sys.argv[1]) if not c.ok])"
    command = [sys.executable, "-c", code, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    (copy / "artifacts/plots/late.txt").write_text("added after the seal")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['AB.seal']", done.stdout + done.stderr


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE runs SET row = 'not json'",
        "UPDATE runs SET config = x'ff00'",
        "UPDATE runs SET row = '[]'",
    ],
)
def test_trust_of_a_damaged_index_ends_in_one_line_and_a_new_one(finished, capsys, sql):
    import sqlite3

    root = finished.parent.parent
    words = ["runs", "--run-root", root, "--columns", "seed"]
    assert typed(capsys, *words).returncode == 0
    with sqlite3.connect(root / ".index.sqlite") as db:
        db.execute(sql)
    db.close()
    done = typed(capsys, *words)
    assert done.returncode == 0 and finished.name in done.stdout
    assert done.stderr.count("\n") == 1 and "damaged" in done.stderr and "made anew" in done.stderr
    assert typed(capsys, *words).stderr == ""


def test_trust_of_a_flipped_index_is_not_needed(finished, capsys):
    root = finished.parent.parent
    typed(capsys, "runs", "--run-root", root)
    path = root / ".index.sqlite"
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 97):
        data[at] ^= 0xFF
    path.write_bytes(data)
    done = typed(capsys, "runs", "--run-root", root)
    assert done.returncode == 0 and finished.name in done.stdout and "Traceback" not in done.stderr
