"A run belongs to one living process, whatever clocks, hosts and process numbers say."

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest

from minsnr_nb import durable, runner
from minsnr_nb.durable import Displaced
from minsnr_nb.errors import ConfigError
from minsnr_nb.record import state
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.events import EventLog, read_events
from minsnr_nb.record.index import run_rows
from minsnr_nb.record.state import attempts_of, derive_state, lives, refuse_owner, start_attempt
from minsnr_nb.train_loop import Callback
from tests.harness.lab import LIGHT, Lab, different, invalid, things
from tests.runs import ROOT, environment, typed

OWNER = """
import sys, time
from minsnr_nb.record import process, state
from minsnr_nb.record.directory import open_run
skew, beats = float(sys.argv[2]), sys.argv[3] == "beats"
process.time = type("Clock", (), {"time": staticmethod(lambda: time.time() + skew)})
run = open_run(sys.argv[1])
number = state.start_attempt(run)
state.set_status(run, "running", 1, 3, attempt=number)
print(flush=True)
for n in range(1000):
    time.sleep(0.05)
    if beats:
        state.beat(run, 1, number, 0.05, n)
"""


@pytest.fixture(scope="module")
def lab():
    return Lab(LIGHT)


@pytest.fixture
def run(lab, tmp_path):
    return lab.create(tmp_path)


@pytest.fixture
def owner(run):
    "Starts a process that owns the run, perhaps through another program, and ends it"
    children = []

    def start(*, skew=0.0, beats=True, through=()):
        words = [*through, sys.executable, "-c", OWNER, str(run.path), str(skew)]
        child = subprocess.Popen(
            [*words, "beats" if beats else "still"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        children.append(child)
        assert child.stdout.readline() == "\n", child.communicate()[1]
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")


def _namespaces() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _namespaces(), reason="no right to make a PID namespace here")
def test_ownership_is_seen_from_another_pid_namespace(run, owner):
    "As between two containers: the same host name, and process 1 in both"
    child = owner(beats=False, through=NAMESPACE)
    with pytest.raises(ConfigError, match="is running, written by process"):
        start_attempt(run)
    subprocess.run(["pkill", "-9", "-P", str(child.pid)], check=True)
    child.wait()
    assert derive_state(run) == "lost" and start_attempt(run) == 2
    durable.close_desk(run.path)


@pytest.mark.parametrize("skew", [-3600, 0, 3600])
def test_ownership_of_a_beating_heart_is_not_judged_by_clocks(run, owner, skew, monkeypatch):
    "On a file system of several machines, where a lock says nothing"
    monkeypatch.setattr(state, "is_local", lambda path: False)
    monkeypatch.setattr(state, "PATIENCE", 1.0)
    child = owner(skew=skew)
    said = []
    with pytest.raises(ConfigError, match="stop that process first, or resume with --force"):
        refuse_owner(run, tell=said.append)
    assert "has not moved for 0 of 1 s; --force takes it over" in said[0]
    assert derive_state(run) == "running"
    child.kill()
    child.wait()
    since = time.monotonic()
    refuse_owner(run, tell=said.append)
    assert time.monotonic() - since >= 0.9
    assert derive_state(run) in ("running", "lost")  # a list waits for its own second look
    time.sleep(1.1)
    assert derive_state(run) == "lost"


def test_ownership_that_nobody_can_ask_about_is_lost_in_the_second_list(run, owner, monkeypatch):
    "Each list is a process of its own; the index remembers what the first one saw"
    child = owner()
    child.kill()
    child.wait()
    monkeypatch.setattr(state, "is_local", lambda path: False)
    root, states = run.path.parent.parent, []
    for patience in (60.0, 0.01):
        monkeypatch.setattr(state, "_seen", {})
        monkeypatch.setattr(state, "PATIENCE", patience)
        states += [row["state"] for row in run_rows(root)]
        time.sleep(0.05)
    assert states == ["running", "lost"]


def test_ownership_is_watched_once_before_a_resume(lab, run, owner, monkeypatch, capsys):
    child, said = owner(), []
    child.kill()
    child.wait()
    monkeypatch.setattr(state, "is_local", lambda path: False)
    monkeypatch.setattr(state, "PATIENCE", 0.2)
    runner.run_to_end(run, lab.lab, warn=said.append)
    assert [line for line in said if "has not moved" in line] == said[:1]
    assert "has not moved" not in capsys.readouterr().out and not invalid(run, "L3")


def test_ownership_is_taken_by_force_and_the_former_owner_told(lab, run, owner):
    child = owner()
    with pytest.raises(ConfigError, match="--force"):
        lab.train(run)
    lab.train(run, force=True)
    assert child.wait(20) == 1 and "was taken over" in child.communicate()[1]
    assert not invalid(run, "L3") and len(attempts_of(run)) == 2


def test_ownership_lasts_through_a_long_evaluation(lab, run, monkeypatch):
    "The heart beats while one step takes its time"
    beats = []
    monkeypatch.setattr(runner.Heartbeat, "interval", 0.05)
    monkeypatch.setattr(runner, "beat", lambda *words: beats.append(words))

    class Long(Callback):
        def after_step(self, loop, result):
            time.sleep(0.4 if result.step == 1 else 0)

    monkeypatch.setattr(
        lab, "lab", dataclasses.replace(lab.lab, callbacks=[*lab.lab.callbacks, Long])
    )
    lab.train(run)
    assert [words[1] for words in beats].count(1) >= 3


def test_ownership_is_claimed_for_what_was_looked_at(lab, run, tmp_path):
    "A resume that looked, paused, and finds that another one has completed the run"
    claim = runner._look(run, lab.lab, (), runner.quiet, 1)
    lab.train(run)
    before = things(run)
    with pytest.raises(ConfigError, match="another process has just claimed attempt 1"):
        runner._take(run, lab.lab, claim)
    assert different(run, before) == [] and not invalid(run, "L3")


def test_ownership_that_comes_after_a_completion_changes_nothing(lab, run):
    "The process that was called dead completed the run just before it was claimed"
    lab.train(run)
    before, said = things(run), []
    claim = runner._look(run, lab.lab, (), said.append, 1)
    with durable.desk(run.path, "test"):
        runner._go_on(run, lab.lab, runner._take(run, lab.lab, claim), said.append, None)
        runner.close(run)
    assert "another process has completed it" in said[-1]
    assert different(run, before) == [] and not invalid(run, "L3")


def test_ownership_survives_a_rival_that_comes_too_late(run, monkeypatch):
    "It makes its desk after the winner has cleared them, and takes it away while the winner tidies up"
    late, clear, scan = run.path / ".desk-attempt1-0badcafe", durable.clear_desks, os.scandir

    def gone(path):
        if os.fspath(path).rstrip("/").endswith(late.name):
            late.rmdir()
        return scan(path)

    monkeypatch.setattr(durable, "clear_desks", lambda root: (clear(root), late.mkdir()))
    monkeypatch.setattr(os, "scandir", gone)
    assert start_attempt(run) == 1 and not late.exists()


def test_ownership_is_lost_in_one_line_with_the_desk(run, monkeypatch):
    "The winner clears the desks of all others, this one before it is open"
    make = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *a: (make(path, *a), os.rmdir(path)))
    with pytest.raises(ConfigError, match="another process has just claimed attempt 1"):
        start_attempt(run)
    assert not list(run.path.glob(".desk-*")) and not attempts_of(run)


def test_ownership_ends_what_a_paused_writer_can_do(run):
    "It stood between the fence and the write, and wakes up later"
    first = start_attempt(run)
    log = EventLog(run, first)
    log.log(1, "train", {"train/loss": 1.0})
    staged = durable.staging(run.ckpts_last / "step_000000001")
    text = run.status_path.read_bytes()
    old = durable._desks.pop(durable._key(run.path))  # the next lines are another process
    os.close(old[1])
    assert start_attempt(run) == 2
    durable.close_desk(run.path)
    durable._desks[durable._key(run.path)] = (old[0], -1)
    for late in (
        lambda: durable.replace(run.status_path, "{}"),
        lambda: durable.claim(run.evaluations / "0.json", "{}"),
        lambda: durable.publish(staged, run.ckpts_last / "step_000000001"),
        lambda: durable.remove(run.metrics_path),
        lambda: durable.make_dir(old[0] / "again"),
        lambda: durable.publish_files(run.predictions / "late", {"a": "b"}),
    ):
        with pytest.raises(Displaced, match="was taken over by another process, or removed"):
            late()
    log._out.line('{"late": 1}')  # behind the fence: into a file without a name
    del durable._desks[durable._key(run.path)]
    assert run.status_path.read_bytes() == text
    assert [e["step"] for e in read_events(run)] == [1]
    assert not list(run.ckpts_last.iterdir()) and not list(run.evaluations.iterdir())


def test_ownership_of_a_run_that_is_deleted_while_it_trains(lab, run, monkeypatch):
    class Deletes(Callback):
        def after_step(self, loop, result):
            if result.step == 2:
                shutil.rmtree(run.path)

    monkeypatch.setattr(
        lab, "lab", dataclasses.replace(lab.lab, callbacks=[*lab.lab.callbacks, Deletes])
    )
    with pytest.raises(Displaced, match="or removed"):
        lab.train(run)
    assert not run.path.exists()


def test_ownership_by_an_older_version_is_watched(run, monkeypatch):
    "It knew no desks: an attempt without one may be of a process that lives"
    number = start_attempt(run)
    record = run.attempts / f"{number:04d}.json"
    facts = textwrap.dedent(record.read_text()).replace(attempts_of(run)[0]["desk"], "")
    record.write_text(facts)
    durable.close_desk(run.path)
    monkeypatch.setattr(state, "is_ours", lambda run: False)
    assert lives(run) is None and derive_state(run) == "running"
    monkeypatch.setattr(state, "PATIENCE", 0.2)
    refuse_owner(run, tell=lambda line: None)


def test_ownership_resume_has_a_force_option(run, capsys):
    assert "--force" in typed(capsys, "resume", "--help").stdout
    assert open_run(run.path).id == run.id
