"""The short form of `python -m tests.harness`, and proof that its parts can fail. `RUN_SLOW=1` runs the parts at full size (40 minutes)."""

import os
import shutil
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from minsnr_nb import checkpoint, cli, durable, runner
from minsnr_nb.record import generations, seal
from tests.harness import (
    PARTS,
    after,
    damage,
    ends,
    faults,
    identity,
    notebook,
    power,
    races,
    strangers,
    syscalls,
)
from tests.harness.lab import Lab


@pytest.fixture(scope="module")
def lab():
    return Lab()


@pytest.mark.parametrize("name", PARTS)
def test_harness_part(name, lab):
    part, full, short = PARTS[name]
    if name in ("strangers", "syscalls") and not shutil.which("strace"):
        pytest.skip("strace is not installed (Debian: apt-get install strace)")
    ok, text = part(lab, **(full if os.environ.get("RUN_SLOW") else short))
    assert ok, text


# --- teeth ----------------------------------------------------------------------------------------


def test_harness_without_fsync_power_loss_is_found(lab):
    ok, text = power.power(lab, 2000, without="fsync")
    assert not ok and " 0 invalid" not in text


def test_harness_without_the_rename_of_a_checkpoint_a_kill_is_found(lab, monkeypatch):
    "A generation that is written in its final place, file by file"

    def in_place(staging, final):
        durable.make_dir(final)
        for path in sorted(staging.iterdir(), reverse=True):
            durable.create(final / path.name, path.read_bytes())
        shutil.rmtree(staging)

    monkeypatch.setattr(checkpoint, "publish", in_place)
    ok, text = faults.inventory(lab, most=30)
    assert not ok, text


def test_harness_without_rewinding_the_log_a_resume_is_found(lab, monkeypatch):
    monkeypatch.setattr(runner, "rewind", lambda *_: 0)
    ok, text = faults.inventory(lab, most=30)
    assert not ok and "not the same" in text, text


def test_harness_without_the_last_summary_a_killed_evaluation_is_found(lab, monkeypatch):
    monkeypatch.setattr(seal, "write_summary", lambda run: None)
    ok, text = after.afterwards(lab, 40, verbs=("eval",))
    assert not ok and "B.summary" in text, text


def test_harness_a_fork_that_begins_with_nothing_is_found(lab, monkeypatch):
    monkeypatch.setattr(runner, "_refuse_orphan", lambda run: None)
    ok, text = after.afterwards(lab, 20, verbs=("fork",))
    assert not ok and "another run" in text, text


def test_harness_without_the_lock_a_wrong_seal_is_found(lab, monkeypatch):
    monkeypatch.setattr(durable, "alone", lambda folder: nullcontext())
    ok, text = races.writers(lab, 12)
    assert not ok, text


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_harness_without_the_gate_a_link_is_found(lab):
    weaken = "from minsnr_nb.record import directory\ndirectory.refuse_strange = lambda *_: None"
    ok, text = strangers.strangers(lab, 8, "link at (logs|artifacts)", weaken)
    assert not ok and "not refused" in text, text


def test_harness_without_digests_damage_is_found(lab, monkeypatch):
    real = generations.problems
    blind = lambda *args: (p for p in real(*args) if p[0] == "MANIFEST.json")  # noqa: E731
    monkeypatch.setattr(generations, "problems", blind)
    ok, text = damage.corruption(lab, 2)
    assert not ok and "no fallback" in text


def test_harness_without_the_replacement_a_torn_notebook_is_found(lab, monkeypatch):
    def in_place(self, buf, path):
        with open(path, "w") as f:
            f.write(buf[: len(buf) // 2])
            f.flush()
            time.sleep(0.003)
            f.write(buf[len(buf) // 2 :])

    monkeypatch.setattr(notebook.pm_engine.WholeFiles, "write", in_place)
    ok, text = notebook.notebook(lab, 20, 0)
    assert not ok and "out.ipynb: NotJSONError" in text, text


def test_harness_without_the_comparison_other_images_are_found(lab, monkeypatch):
    monkeypatch.setattr(runner, "data_changes", lambda *_: {})
    monkeypatch.setitem(identity.CHANGES, "nothing", identity.CHANGES["replaced"])
    ok, text = identity.identity(lab, 8)
    assert not ok and "not refused by name" in text, text


def test_harness_without_a_word_about_memory_its_end_is_found(lab, monkeypatch):
    for module in (runner, cli):
        monkeypatch.setattr(module, "exhausted", lambda e: "")
    least = SimpleNamespace(randrange=lambda low, high: low)  # hardly room for anything
    monkeypatch.setattr(ends, "LIMITS", {"memory": lambda _: ends._memory(least)})
    monkeypatch.setattr(ends, "DISKS", {})
    ok, text = ends.ends(lab, 1, 0)
    assert not ok and "Traceback" in text, text


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_harness_without_a_line_for_errors_of_the_system_they_are_found(lab, monkeypatch):
    monkeypatch.setattr(cli, "_said", lambda e: "")
    ok, text = syscalls.syscalls(lab, 12, 0, ("sample",))
    assert not ok and "Traceback" in text, text
