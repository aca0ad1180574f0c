"What a crash, a full disk and a second process can do to a file: see `minsnr_nb.durable`."

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minsnr_nb import durable
from minsnr_nb.durable import (
    DurableError,
    create,
    cut,
    make_dir,
    publish,
    remove,
    replace,
    sha256,
    whole_lines,
)

from .faulty_os import FaultyOS, fails_with, half_then_fails


def every_fault(monkeypatch, prepare, action, check, fault):
    "Run `action` once for each changing call it makes, with that call failing"
    at = 1
    while True:
        folder = prepare(at)
        faulty = FaultyOS(at, fault)
        monkeypatch.setattr(durable, "os", faulty)
        error = None
        try:
            action(folder)
        except DurableError as e:
            error = e
        monkeypatch.setattr(durable, "os", os)
        if faulty.count < at:
            assert error is None
            return at - 1
        check(folder, error, faulty.calls[at - 1])
        at += 1


@pytest.fixture
def fresh(tmp_path):
    def make(at):
        folder = tmp_path / f"case{at}"
        folder.mkdir()
        (folder / "f.json").write_text("old")
        return folder

    return make


@pytest.mark.parametrize("fault", [fails_with(errno.EIO), half_then_fails], ids=["EIO", "ENOSPC"])
def test_durable_replace_leaves_old_or_new_and_no_temporary(fault, fresh, monkeypatch):
    def check(folder, error, call):
        assert (folder / "f.json").read_text() in ("old", "new content")
        # only a failing unlink may leave the temporary, and then the file itself is in place
        if call != "unlink":
            assert [p.name for p in folder.iterdir()] == ["f.json"]
            assert str(folder / "f.json") in str(error) and error.errno in (errno.EIO, errno.ENOSPC)
            assert "\n" not in str(error) and f"({errno.errorcode[error.errno]})" in str(error)

    n = every_fault(
        monkeypatch, fresh, lambda d: replace(d / "f.json", "new content"), check, fault
    )
    assert n >= 6  # open write fsync rename unlink open(dir) fsync(dir)


def test_durable_publish_shows_all_or_nothing(fresh, monkeypatch):
    def prepare(at):
        folder = fresh(at)
        (folder / ".new" / "sub").mkdir(parents=True)
        create(folder / ".new" / "sub" / "a", "1")
        return folder

    def check(folder, error, call):
        assert error is not None
        final = folder / "run"
        assert not final.exists() or (final / "sub" / "a").read_text() == "1"

    def action(folder):
        publish(folder / ".new", folder / "run")

    assert every_fault(monkeypatch, prepare, action, check, fails_with(errno.EIO)) >= 9


@pytest.mark.parametrize("kind", ["file", "empty", "filled", "link"])
def test_durable_publish_refuses_an_existing_target(tmp_path, kind):
    staging, final = tmp_path / ".new", tmp_path / "run"
    make_dir(staging)
    create(staging / "a", b"1")
    if kind == "file":
        final.write_text("mine")
    elif kind == "link":
        final.symlink_to(tmp_path)
    else:
        final.mkdir()
        if kind == "filled":
            (final / "mine").touch()
    with pytest.raises(DurableError, match="EEXIST") as e:
        publish(staging, final)
    assert e.value.errno == errno.EEXIST and staging.exists() and not (final / "a").exists()


def test_durable_claim_has_one_winner(tmp_path):
    code = (
        "import sys; from minsnr_nb.durable import claim; sys.stdin.readline();"
        "print(claim(sys.argv[1], sys.argv[2]), flush=True)"
    )
    for attempt in range(2):
        target = tmp_path / f"lease{attempt}.json"
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", code, target, str(i)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(4)
        ]
        for p in racers:
            p.stdin.write("go\n")
            p.stdin.flush()
        won = [i for i, p in enumerate(racers) if p.communicate()[0].strip() == "True"]
        assert len(won) == 1 and target.read_text() == str(won[0])
    assert len(list(tmp_path.iterdir())) == 2


def test_durable_a_line_that_does_not_fit_is_taken_back(tmp_path):
    "A real short write: the file may hold 100 bytes, the second line needs 120"
    log = tmp_path / "m.jsonl"
    code = f"""
import resource, signal
from minsnr_nb.durable import Appender, DurableError
a = Appender({str(log)!r}); a.line("x" * 59)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try: a.line("y" * 119)
except DurableError as e: print(e)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
a.line("z"); a.close(); a.close()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == f"cannot append to {log}: File too large (EFBIG)\n"
    assert log.read_text() == "x" * 59 + "\nz\n"


def test_durable_killed_writers_leave_whole_lines(tmp_path):
    "kill -9 in the middle of appending: every line but the last parses, and the cut keeps the rest"
    log = tmp_path / "m.jsonl"
    code = (
        "import sys; from minsnr_nb.durable import Appender; a = Appender(sys.argv[1])\n"
        "n = 0\nwhile True:\n    a.line(f'{n:040d}'); n += 1\n    if n == 50: print(flush=True)"
    )
    p = subprocess.Popen([sys.executable, "-c", code, log], stdout=subprocess.PIPE)
    p.stdout.readline()
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()
    size = whole_lines(log)
    lines = log.read_bytes()[:size].splitlines()
    assert len(lines) >= 50 and [int(x) for x in lines] == list(range(len(lines)))


def test_durable_whole_lines_and_cut(tmp_path):
    log, kept = tmp_path / "m.jsonl", tmp_path / "discarded" / "attempt_0002.jsonl"
    for content, size in [("", 0), ("a", 0), ("a\n", 2), ("a\nb", 2), ("a\n" + "b" * 200_000, 2)]:
        log.write_text(content)
        assert whole_lines(log) == size
    assert cut(log, 2, kept) == 200_000 and log.read_text() == "a\n"
    assert cut(log, 2, kept) == 0  # a second time there is nothing to cut
    log.write_text("a\n" + "b" * 200_000)  # killed between keeping and truncating: kept once
    cut(log, 2, kept)
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]
    log.write_text("a\nother")
    cut(log, 2, kept)
    assert (kept.parent / "attempt_0002-1.jsonl").read_text() == "other"
    with pytest.raises(DurableError, match="shorter than the 99 bytes"):
        cut(log, 99, kept)


def test_durable_make_dir_reports_what_it_made_and_what_is_in_the_way(tmp_path):
    assert make_dir(tmp_path / "a" / "b") == [tmp_path / "a", tmp_path / "a" / "b"]
    assert make_dir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(DurableError, match=r"cannot make .*file: File exists \(EEXIST\)"):
        make_dir(tmp_path / "file" / "x")


def test_durable_create_takes_buffers_and_never_overwrites(tmp_path):
    import numpy as np

    a = np.arange(6, dtype="<f4").reshape(2, 3)
    create(tmp_path / "w", (b"head", a, np.empty((0, 3)), "t".encode()), mode=0o444)
    assert (tmp_path / "w").read_bytes() == b"head" + a.tobytes() + b"t"
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o444
    with pytest.raises(DurableError, match="EEXIST"):
        create(tmp_path / "w", b"x")
    digest = hashlib.sha256(b"head" + a.tobytes() + b"t").hexdigest()
    assert sha256(tmp_path / "w") == digest


def test_durable_remove_hides_a_tree_before_deleting_it(tmp_path, monkeypatch):
    tree = tmp_path / "step_000000001"
    make_dir(tree / "sub")
    create(tree / "sub" / "f", b"1")
    (tmp_path / "outside").write_text("kept")
    (tree / "link").symlink_to(tmp_path / "outside")

    def stop(path, *args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as m:
        m.setattr(durable.shutil, "rmtree", stop)
        with pytest.raises(DurableError, match="EIO"):
            remove(tree)
    assert not tree.exists() and [p.name[:6] for p in tmp_path.glob(".*")] == [".gone-"]
    remove(next(tmp_path.glob(".gone-*")))
    remove(tmp_path / "never there")
    assert [p.name for p in tmp_path.iterdir()] == ["outside"]


def test_durable_the_next_one_comes_in_when_the_holder_dies(tmp_path):
    "A second process waits, is told after a while, and goes on after a kill"
    code = "import sys, time; from minsnr_nb.durable import alone\n"
    code += "with alone(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"in\n"
        with pytest.raises(durable.DurableError, match="another process"):
            with durable.alone(tmp_path, wait_s=0.1):
                raise AssertionError("nobody gets here")
    finally:
        holder.kill()
        holder.communicate()
    with durable.alone(tmp_path, wait_s=0.1):
        assert list(tmp_path.iterdir()) == []


def test_durable_publishing_sweeps_after_those_that_died_there(tmp_path):
    "A killed export leaves a hidden directory until the next one; that of a living process stays"
    code = "import sys, time; from minsnr_nb import durable\n"
    code += "def slow(*a): print('half', flush=True); time.sleep(60)\n"
    code += "durable.publish = slow; durable.publish_files(sys.argv[1] + '/x', {'a': 'b'})"
    words = [sys.executable, "-c", code, tmp_path]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert [p.stdout.readline() for p in processes] == [b"half\n"] * 2
        assert len(list(tmp_path.glob(".desk-publish-*"))) == 2
        processes[0].kill()
        processes[0].wait()
        durable.publish_files(tmp_path / "mine", {"a": "b"})
        assert len(list(tmp_path.iterdir())) == 2  # what was published, and the living one's desk
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    durable.publish_files(tmp_path / "more", {"a": "b"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "more"]


def test_durable_a_link_that_was_made_although_it_is_said_to_exist(tmp_path, monkeypatch):
    "NFS: the first answer is lost, the request is repeated, and the second answer is told"
    real = os.link

    def twice(*names):
        real(*names)
        real(*names)

    with monkeypatch.context() as m:
        m.setattr(durable.os, "link", twice)
        assert durable.claim(tmp_path / "mine", b"1") is True
    assert (
        durable.claim(tmp_path / "mine", b"2") is False and (tmp_path / "mine").read_bytes() == b"1"
    )


def test_durable_an_open_file_on_nfs_does_not_stop_a_removal(tmp_path, monkeypatch):
    "NFS: a removed file that somebody has open stays as .nfs…, so its directory stays as well"
    tree = tmp_path / "step_000000001"
    make_dir(tree)
    create(tree / "f", b"1")

    def silly(path, *args, **kwargs):
        os.rename(Path(path, "f"), Path(path, ".nfs0001"))
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(durable.shutil, "rmtree", silly)
    remove(tree)
    assert [p.name[:6] for p in tmp_path.iterdir()] == [".gone-"]
