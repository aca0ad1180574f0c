"What processes can do to a run directory: killed, racing, without space, moved, damaged."

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

from minsnr_nb import durable
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.checks import check_run, contract_report
from minsnr_nb.record.directory import create_run, list_runs, open_run, write_summary
from minsnr_nb.record.events import EventLog, lifecycle, read_events
from minsnr_nb.record.state import derive_state, set_status, start_attempt

from .faulty_os import FaultyOS, fails_with, half_then_dies

ROOT = Path(__file__).parents[1]
CONFIG = "train:\n  steps: 2\n"
WHEN = datetime(2026, 11, 20, 9, 30, tzinfo=timezone.utc)
PROVENANCE = {
    "command": {"argv": ["minsnr", "smoke"], "cwd": "."},
    "git": {"available": False, "repo_sha": "nogit", "is_dirty": False},
    "env": {"python": "3.11", "platform": "linux", "torch": "2.10"},
}


def make(root, **kwargs):
    kwargs = {"provenance": PROVENANCE, "stamp": WHEN} | kwargs
    return create_run(root, "p", config_text=CONFIG, resolved_text=CONFIG, **kwargs)


def failed(path):
    return [(c.id, c.path, c.message) for c in check_run(path) if not c.ok]


def visible(root):
    "Everything under a root that is not hidden, and that a reader may therefore meet"
    return [p for p in Path(root).glob("*/*") if not p.name.startswith(".")]


def finished(root):
    run = make(root)
    attempt = start_attempt(run)
    with EventLog(run, attempt) as log:
        for step in (1, 2):
            log.log(step, "train", {"train/loss": 1 / step})
    write_summary(run)
    set_status(run, "completed", 2, 2, attempt=attempt)
    return run


def python(code, *args, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


# --- killed ---------------------------------------------------------------------------------------


def fork(action):
    "Start `action` in a copy of this process; its pid"
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)


def in_child(action):
    "Run `action` in a copy of this process; its exit status"
    return os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])


def test_run_layout_killed_at_every_call_of_creation(tmp_path):
    "No run is visible, or a whole one; and the next creation works"
    at, seen = 0, set()
    while True:
        at += 1
        root = tmp_path / str(at)

        def action(root=root, at=at):
            durable.os = FaultyOS(at, half_then_dies)
            make(root)

        status = in_child(action)
        assert status in (0, 9)
        if status == 0:
            break
        assert [failed(path) for path in visible(root)] in ([], [[]])
        assert [r.path for r in list_runs(root)] == visible(root)
        seen.add(len(visible(root)))
        if at % 10 == 0:
            assert failed(make(root).path) == []
    assert at > 80 and seen == {0, 1}  # before the rename nothing, after it everything


def test_run_layout_killed_while_logging_then_resumed(tmp_path):
    "The torn lines of both logs are kept aside, and the run passes again"
    run = make(tmp_path)
    code = """
import sys
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.state import set_status, start_attempt
from minsnr_nb.record.events import EventLog
run = open_run(sys.argv[1])
set_status(run, "running", 0, None, attempt=start_attempt(run))
log, step = EventLog(run), 0
while True:
    step += 1
    log.log(step, "train", {"train/loss": 1 / step})
    if step == 20: print(flush=True)
"""
    p = python(code, run.path)
    p.stdout.readline()
    p.kill()
    p.communicate()
    for log in (run.metrics_path, run.events_path):
        with open(log, "ab") as f:
            f.write(b'{"step": 9')
    assert derive_state(run) == "lost" and failed(run.path) == []
    attempt = start_attempt(run)
    lifecycle(run, "resume", attempt=attempt)
    with EventLog(run, attempt) as log:
        assert log.offset()["lines"] == len(read_events(run)) >= 20
    assert [e["event"] for e in read_events(run.events_path)] == ["resume"]
    torn = [(run.discarded / n).read_text() for n in ("events.jsonl", "attempt_0002.jsonl")]
    assert torn == ['{"step": 9'] * 2 and failed(run.path) == []


def test_run_layout_killed_between_a_generation_and_its_pointer(tmp_path):
    "Lost but sound; only a run that ended without its pointer is at fault"
    run = make(tmp_path)
    assert in_child(lambda: start_attempt(run)) == 0
    generation(run)
    (run.ckpts_last / ".step_000000003").mkdir()
    assert derive_state(run) == "lost" and failed(run.path) == []
    attempt = start_attempt(run)
    assert list(run.ckpts_last.glob(".*")) == []
    set_status(run, "interrupted", 2, 4, attempt=attempt)
    assert [(c[0], "CURRENT.json" in c[1]) for c in failed(run.path)] == [("AB.checkpoints", True)]


# --- racing ---------------------------------------------------------------------------------------


def test_run_layout_a_suspended_process_is_not_lost(tmp_path):
    run = make(tmp_path)
    code = (
        "import sys, time\nfrom minsnr_nb.run_layout import open_run, set_status, start_attempt\n"
    )
    code += "run = open_run(sys.argv[1])\n"
    code += "set_status(run, 'running', 0, 9, attempt=start_attempt(run)); print(flush=True)\n"
    code += "time.sleep(60)"
    p = python(code, run.path)
    p.stdout.readline()
    p.send_signal(signal.SIGSTOP)
    assert derive_state(run) == "running"
    with pytest.raises(ConfigError, match=f"process {p.pid} on"):
        start_attempt(run)
    p.kill()
    p.communicate()
    assert derive_state(run) == "lost"


# --- without space, without permission ------------------------------------------------------------


def test_run_layout_every_call_of_creation_failing(tmp_path, monkeypatch):
    "One line with exit code 2, and the run root as it was"
    root, at = tmp_path / "new" / "runs", 0
    while True:
        at += 1
        faulty = FaultyOS(at, fails_with(errno.ENOSPC))
        error = None
        with monkeypatch.context() as m:
            m.setattr(durable, "os", faulty)
            try:
                make(root)
            except ConfigError as e:
                error = e
        if faulty.count < at:
            assert error is None
            break
        if error is None:  # only tidying up was hindered
            assert faulty.calls[at - 1] in ("unlink", "rmdir")
        else:
            assert (
                error.exit_code == 2 and "\n" not in str(error) and str(root.parent) in str(error)
            )
            assert "(ENOSPC)" in str(error)
            assert visible(root) == []
            assert not root.parent.exists() or faulty.calls[at - 1] in ("rmdir", "unlink")
        shutil.rmtree(root.parent, ignore_errors=True)
    assert at > 80


CREATE = """
import sys; sys.path.insert(0, sys.argv[2])
from tests.test_run_layout import make
from minsnr_nb.errors import ConfigError
try: print(make(sys.argv[1], files={"pip_freeze.txt": b"x" * 200_000}).id)
except ConfigError as e: sys.exit(f"{e.exit_code} {e}")
"""


def refused(root, **kwargs):
    p = python(CREATE, root, ROOT, **kwargs)
    out, err = p.communicate()
    assert p.returncode == 1 and out == "" and err.startswith("2 run_root: cannot "), err
    assert err.count("\n") == 1 and "choose a directory" in err
    return err


def test_run_layout_a_real_limit_on_file_size(tmp_path):
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert "(EFBIG)" in refused(tmp_path / "runs", preexec_fn=limit)
    assert list(tmp_path.iterdir()) == []


def unshared(script, *args):
    "Run a shell script in a mount namespace of its own"
    command = ["unshare", "-rm", "bash", "-euc", script, "-", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def can_mount():
    try:
        return unshared("mount -t tmpfs -o size=64k none /mnt").returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs mount namespaces")
@pytest.mark.parametrize("options, code", [("size=64k", "ENOSPC"), ("ro", "EROFS")])
def test_run_layout_a_full_and_a_read_only_disk(options, code, tmp_path):
    script = 'mount -t tmpfs -o "$1" none "$2"; "$3" -c "$4" "$2/runs" "$5" || true; ls -A "$2" >&2'
    here = ROOT
    done = unshared(script, options, tmp_path, sys.executable, CREATE, here)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("2 run_root: cannot "), done.stderr
    assert f"({code})" in lines[0]


@pytest.mark.parametrize("where", ["file", "file/below", "link"])
def test_run_layout_something_in_the_way(where, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ConfigError, match="run_root: cannot make"):
        make(tmp_path / where)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("project", ["", "..", "a/b", ".hidden", "x" * 65, "a b"])
def test_run_layout_a_project_is_a_plain_name(project, tmp_path):
    with pytest.raises(ConfigError, match="project"):
        create_run(tmp_path, project, config_text="", resolved_text="", provenance=PROVENANCE)
    assert list(tmp_path.iterdir()) == []


# --- moved ----------------------------------------------------------------------------------------


def test_run_layout_moved_copied_and_archived_runs_still_pass(tmp_path):
    run = finished(tmp_path / "runs")
    assert failed(run.path) == []
    copy = tmp_path / "copied to another place"
    shutil.copytree(run.path, copy)
    shutil.make_archive(str(tmp_path / "run"), "tar", run.path)
    shutil.unpack_archive(tmp_path / "run.tar", tmp_path / "unpacked")
    moved = tmp_path / "elsewhere" / "other_project" / run.id
    moved.parent.mkdir(parents=True)
    run.path.rename(moved)
    for place in (copy, tmp_path / "unpacked", moved):
        assert failed(place) == []
        assert all(contract_report(check_run(place)).values())
        assert open_run(place).config() == {"train": {"steps": 2}}
    text = "".join(p.read_text() for p in moved.rglob("*.json*") if p.parent.name != "attempts")
    assert str(tmp_path) not in text


# --- damaged --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "config.resolved.yaml",
        "config_resolved.yaml",
        "run_manifest.json",
        "metrics.json",
        "meta/provenance.json",
        "logs/metrics.jsonl",
    ],
)
def test_run_layout_any_flipped_byte_is_found(name, tmp_path):
    run = finished(tmp_path)
    path = run.path / name
    path.chmod(0o644)
    good, rng = path.read_bytes(), random.Random(name)
    for at in rng.sample(range(len(good)), min(25, len(good))):
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        assert failed(run.path), f"byte {at} of {name}"
    for size in rng.sample(range(len(good)), 8):
        path.write_bytes(good[:size])
        assert failed(run.path), f"{name} cut to {size} bytes"
    path.write_bytes(good)
    assert failed(run.path) == []


def generation(run, digest=None):
    "A checkpoint directory as far as the validator looks at it"
    step = run.ckpts_last / "step_000000002"
    step.mkdir()
    (step / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    digest = digest or durable.sha256(step / "model.safetensors")
    facts = {"files": {"model.safetensors": {"bytes": 10, "sha256": digest}}}
    facts |= {"config_sha256": durable.sha256(run.config_path), "metrics": None}
    (step / "MANIFEST.json").write_text(json.dumps(facts))


def damage(run, what):
    artifacts = run.path / "artifacts"
    if what == "missing":
        shutil.rmtree(run.ckpts_last)
    elif what == "outside link":
        (artifacts / "plots" / "p.svg").symlink_to("/etc/hostname")
    elif what == "fifo":
        os.mkfifo(artifacts / "pipe")
    elif what == "object array":
        import numpy as np

        np.savez(artifacts / "a.npz", x=np.array([{}], dtype=object))
    elif what == "torch zip":
        import zipfile

        with zipfile.ZipFile(artifacts / "weights.bin", "w") as z:
            z.writestr("archive/data.pkl", b"\x80\x02.")
    elif what == "pickle":
        (artifacts / "notes").write_bytes(b"\x80\x04K\x01.")
    elif what == "checkpoint":
        generation(run, digest="0" * 64)
    elif what == "frames":
        (run.predictions / "set").mkdir()
        (run.predictions / "set" / "metadata.json").write_text('{"frame_id": ["0001"]}')
    elif what == "interpolation":
        for name in ("config.resolved.yaml", "config_resolved.yaml"):
            (run.path / name).chmod(0o644)
            (run.path / name).write_text("a: ${b}\nb: 1\n")


@pytest.mark.parametrize(
    "what, id",
    [
        ("missing", "A.layout"),
        ("outside link", "AB.names"),
        ("fifo", "AB.names"),
        ("object array", "AB.no_pickle"),
        ("torch zip", "AB.no_pickle"),
        ("pickle", "AB.no_pickle"),
        ("checkpoint", "AB.checkpoints"),
        ("frames", "B.predictions"),
        ("interpolation", "AB.config"),
    ],
)
def test_run_layout_what_must_not_be(what, id, tmp_path):
    run = finished(tmp_path)
    damage(run, what)
    assert id in {c.id for c in check_run(run.path) if not c.ok}
    assert not all(contract_report(check_run(run.path)).values())


def test_run_layout_numbers_of_numpy_and_safetensors_are_no_pickles(tmp_path):
    "A safetensors header of 640 bytes begins like a pickle; a structured array is no object"
    import numpy as np

    run = finished(tmp_path)
    header = b'{"__metadata__":{}}'.ljust(640)
    (run.checkpoints_dir / "last.safetensors").write_bytes((640).to_bytes(8, "little") + header)
    np.savez(run.path / "artifacts" / "a.npz", x=np.zeros(3), y=np.zeros(2, [("Obj", "i4")]))
    assert failed(run.path) == []


def test_run_layout_a_directory_that_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    report = contract_report(check_run(tmp_path / "empty"))
    assert report == {"A: run layout": False, "B: runs and artifacts": False}
    with pytest.raises(ConfigError, match="not a run directory"):
        open_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no such directory"):
        open_run(tmp_path / "none")
    assert list_runs(tmp_path / "none") == []


# --- from every door ------------------------------------------------------------------------------

LIGHT = ["run_layout", *(f"record.{p.stem[3:]}" for p in sorted(ROOT.glob("nbs/record/*.ipynb")))]


def test_run_layout_these_modules_are_light():
    "No command waits for torch or pandas to look at a run"
    code = f"import sys, importlib\nfor m in {LIGHT}: importlib.import_module(f'minsnr_nb.{{m}}')\n"
    code += "print([m for m in ('torch', 'pandas', 'matplotlib', 'IPython') if m in sys.modules])"
    out, err = python(code).communicate()
    assert out == "[]\n", err


DOOR = "import json\nfrom minsnr_nb.record.provenance import command, project_root\n"
DOOR += "print(json.dumps(command(project_root())))"


def test_run_layout_provenance_from_a_kernel(tmp_path):
    "A real kernel, as Jupyter starts it: the notebook is named, the executed cells are identified"
    import nbformat
    from nbclient import NotebookClient

    (tmp_path / "settings.ini").write_text("[minsnr]\n")
    v4 = nbformat.v4
    nb = v4.new_notebook(cells=[v4.new_code_cell("x = 1"), v4.new_code_cell(DOOR)])
    nbformat.write(nb, tmp_path / "try.ipynb")
    env = os.environ | {"JPY_SESSION_NAME": str(tmp_path / "try.ipynb")}
    client = NotebookClient(nb, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=env)
    how = json.loads(nb.cells[1].outputs[0]["text"])
    assert how["argv"] == ["jupyter:try.ipynb"] and how["entrypoint"] == "notebook"
    assert how["notebook"]["path"] == "try.ipynb" and len(how["notebook"]["sha256"]) == 64
    assert how["notebook"]["executed"]["cells"] == 2 and how["cwd"] == str(tmp_path)


def test_run_layout_provenance_from_the_command_line(tmp_path):
    p = python(DOOR, "an argument", cwd=tmp_path)
    how = json.loads(p.communicate()[0])
    assert how["argv"] == ["python", "-c", DOOR, "an argument"] and how["notebook"] is None
    script = tmp_path / "minsnr"
    script.write_text(DOOR)
    command = [sys.executable, script, "train", "https://me:" + "secret@host/x.yaml"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(out)["argv"] == ["minsnr", "train", "https://host/x.yaml"]
    assert json.loads(out)["entrypoint"] == "cli"
