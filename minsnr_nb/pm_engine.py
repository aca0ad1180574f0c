"""Papermill's engine for studies: strict parameters, honest records, atomic saves.

Installed as the default engine through the `papermill.engine` entry point, so that the plain
`papermill` command does the right thing. A notebook is a study when its metadata says so
(`minsnr.study`); every other notebook goes to the stock engine untouched. For a study

- a parameter that is not declared, or has the wrong type, is refused in one line (exit code 2) and
  nothing is written;
- the kernel learns which notebook and parameters it serves (`MINSNR_PM`), so that its runs record a
  command that can be typed again;
- the executed notebook is replaced as a whole at every save, also by papermill itself, and copied
  into every run it made;
- the kernel is reached by sockets in a directory of its own, so that notebooks may start at the same time;
- while a run trains, the bar says which arm, which step and how long it still takes;
- an expected error inside the kernel is one line on the terminal, not a page of traceback, and so is
  Ctrl-C; a value that is refused before the first run leaves no output notebook.

Papermill imports this module in every process it starts: no torch, no work at import.
"""

import hashlib
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import nbformat
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.inspection import _infer_parameters
from papermill.iorw import LocalHandler, papermill_io
from papermill.translators import translate_parameters
from traitlets.config import Config

from minsnr_nb import errors
from minsnr_nb.durable import make_dir, remove, replace

__all__ = ["Pace", "StudyEngine", "StudyManager", "WholeFiles", "checked_parameters", "code_digest"]

TYPES = {"float": float, "int": int, "str": str, "bool": bool}
EXPECTED = ("ConfigError", "MinsnrError", "RunFailed", "Stopped", "DurableError", "CheckpointError")


def checked_parameters(nb, kernel_name: str) -> dict:
    "The given parameters, with whole numbers as floats where a float is declared"
    declared = {p.name: p for p in _infer_parameters(nb, name=kernel_name, language="python")}
    given, wrong = dict(nb.metadata.papermill.get("parameters") or {}), []
    for name, value in given.items():
        if name not in declared:
            wrong.append(f"no parameter {name!r}{errors.nearest(name, declared)}")
            continue
        want = TYPES.get(declared[name].inferred_type_name)
        if want is float and type(value) is int:
            given[name] = float(value)
        elif want and type(value) is not want:
            wrong.append(
                f"{name}: {value!r} is not {_a(want)}; its default is {declared[name].default}"
            )
    if wrong:
        raise click.UsageError("; ".join(wrong))
    return given


def _a(kind: type) -> str:
    return {float: "a number", int: "a whole number", str: "text", bool: "true or false"}[kind]


def code_digest(nb) -> str:
    "SHA-256 over the code cells as they will run"
    code = [c.source for c in nb.cells if c.cell_type == "code"]
    return hashlib.sha256("\n\0".join(code).encode()).hexdigest()


class WholeFiles(LocalHandler):
    "Papermill's way to local files, except that a notebook is replaced as a whole or not at all"

    def write(self, buf, path):
        target = Path(self._cwd or "", path).resolve()
        try:
            if target.is_file() or (target.parent.is_dir() and not target.exists()):
                replace(target, buf)
            else:  # a device or a pipe; or a missing folder, which is told as ever
                super().write(buf, path)
        except (errors.MinsnrError, OSError) as e:  # a full disk
            raise _ended(str(e), 1) from None


class StudyManager(NotebookExecutionManager):
    "Keeps the notebook in the runs as well"

    runs_list: Path

    def runs(self) -> list[Path]:
        "Run directories that the kernel has created so far"
        text = self.runs_list.read_text() if self.runs_list.exists() else ""
        return [Path(line) for line in text.splitlines() if Path(line).is_dir()]

    def notebook_complete(self, **kwargs):
        "Close the record; cells that an interrupt kept from running are not called completed"
        reached = [cell.metadata.papermill["status"] for cell in self.nb.cells]
        super().notebook_complete(**kwargs)
        if self.nb.metadata.papermill.get("exception"):
            for cell, status in zip(self.nb.cells, reached, strict=True):
                cell.metadata.papermill["status"] = status

    def keep(self) -> None:
        "Put a copy of the notebook into every run"
        self.save()
        text = nbformat.writes(self.nb) + "\n"
        for run in self.runs():
            make_dir(run / "notebook")
            replace(run / "notebook" / "study.ipynb", text)


class Pace:
    "Says how far the newest run of a study is, from what the run writes about itself"

    def __init__(self, clock=time.monotonic):
        self.clock, self.run, self.seen = clock, None, []

    def line(self, run: Path) -> str:
        "Arm, step, and time left"
        read = lambda name: json.loads((run / "meta" / name).read_text())  # noqa: E731
        try:
            status, arm = (
                read("status.json"),
                (read("provenance.json").get("study") or {}).get("arm"),
            )
            step = max(status["step"], read("heartbeat.json")["step"])
            total, state = status["total_steps"], status["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        if run != self.run:
            self.run, self.seen = run, []
        if not self.seen or step > self.seen[-1][0]:  # a run says where it is every ten seconds
            self.seen.append((step, self.clock()))
        where = f"{arm or run.name}: "
        if state != "running":
            return where + state
        return f"{where}step {step}/{total}{self._left(step, total)}"

    def _left(self, step: int, total: int) -> str:
        "Time left, once two moments are known"
        (since, start), (_, now) = self.seen[0], self.seen[-1]
        if step <= since:
            return ""
        seconds = max(0.0, (total - step) * (now - start) / (step - since) - self.clock() + now)
        return f", {int(seconds // 60)}:{int(seconds % 60):02} left"


@contextmanager
def _watched(manager: StudyManager, every: float = 2.0) -> Iterator[None]:
    "Show beside papermill's bar how far the newest run is"
    done, pace = threading.Event(), Pace()

    def look() -> None:
        while not done.wait(every):
            runs, bar = manager.runs(), manager.pbar
            if runs and bar is not None:
                bar.set_postfix_str(pace.line(runs[-1]))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class StudyEngine(NBClientEngine):
    "The default engine: studies are checked and recorded, other notebooks run as ever"

    @classmethod
    def execute_notebook(cls, nb, kernel_name, output_path=None, progress_bar=True, log_output=False,
                         autosave_cell_every=30, **kwargs):  # fmt: skip
        if not nb.metadata.get("minsnr", {}).get("study"):
            return super().execute_notebook(
                nb,
                kernel_name,
                output_path,
                progress_bar,
                log_output,
                autosave_cell_every,
                **kwargs,
            )
        parameters = checked_parameters(nb, kernel_name)
        for cell in nb.cells:
            if "injected-parameters" in cell.metadata.get("tags", []):
                cell.source = translate_parameters(kernel_name, "python", parameters, "Parameters")
        nb.metadata.papermill["parameters"] = parameters
        files = papermill_io.get_handler(nb.metadata.papermill["output_path"])
        if type(files) is LocalHandler:
            files.__class__ = WholeFiles  # papermill writes once more after this engine returned
        manager = StudyManager(
            nb, output_path=output_path, progress_bar=progress_bar, log_output=log_output,
            autosave_cell_every=autosave_cell_every,
        )  # fmt: skip
        target = nb.metadata.papermill["output_path"] or ""
        kept = Path(target).read_bytes() if Path(target).is_file() else None
        with tempfile.TemporaryDirectory(prefix="minsnr-") as scratch:
            manager.runs_list = Path(scratch) / "runs"
            record = {
                "notebook": str(kwargs.get("input_path") or "notebook"),
                "parameters": parameters,
                "sha256": code_digest(nb),
                "output": str(output_path or ""),
                "runs_list": str(manager.runs_list),
            }
            kwargs = _sockets(scratch) | kwargs
            with _environment(MINSNR_PM=json.dumps(record)):
                cls._execute(manager, kernel_name, log_output, kwargs)
            _raise_expected(manager.nb, None if manager.runs() else lambda: _put_back(target, kept))
        return manager.nb

    @classmethod
    def _execute(cls, manager, kernel_name, log_output, kwargs) -> None:
        "Run the kernel; whatever happens, the notebook that is left says what happened"
        before = signal.signal(signal.SIGTERM, _terminated)
        kwargs = {"extra_arguments": QUIET} | kwargs
        manager.notebook_start()
        try:
            with _watched(manager):
                cls.execute_managed_notebook(manager, kernel_name, log_output=log_output, **kwargs)
        except BaseException as e:
            manager.nb.metadata.papermill["exception"] = True
            if isinstance(e, KeyboardInterrupt):
                raise _interrupted(manager, e) from None
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            manager.cleanup_pbar()
            manager.notebook_complete()
            manager.keep()


def _sockets(scratch: str) -> dict:
    """Let the kernel be reached by files in a directory of its own, where the system has such sockets.

    A TCP port is chosen first and opened by the kernel later: of several notebooks that start at once, two may
    choose the same one, and the second fails with "address already in use".
    """
    place = f"{scratch}/k"
    if os.name != "posix" or len(place) > 90:  # the path of a socket has at most 107 bytes
        return {}
    return {"config": Config({"KernelManager": {"transport": "ipc", "ip": place}})}


QUIET = [
    "--IPKernelApp.log_level=CRITICAL"
]  # a kernel's last words about a closed socket help nobody


def _terminated(signum, frame):
    raise KeyboardInterrupt(signum)


def _interrupted(manager: StudyManager, e: KeyboardInterrupt) -> click.ClickException:
    "What is said after Ctrl-C or SIGTERM, with the exit code that shells use"
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks that waited for the kernel
    runs = manager.runs()
    again = f"; `-p resume {runs[-1]}` continues" if runs else ""
    return _ended(f"interrupted{again}", 128 + (e.args[0] if e.args else signal.SIGINT))


def _ended(message: str, code: int) -> click.ClickException:
    "An error that click turns into one line and this exit code"
    error = click.ClickException(message)
    error.exit_code = code  # type: ignore[misc]
    return error


def _put_back(target: str, kept: bytes | None) -> None:
    "Leave the output as it was before a request that was refused"
    if kept is not None:
        replace(Path(target), kept)
    elif Path(target).is_file():
        remove(Path(target))


def _raise_expected(nb, refused) -> None:
    "Turn an expected error of the kernel into one line and its exit code"
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            if out.get("output_type") == "error" and out.ename in EXPECTED:
                code = getattr(errors, out.ename, errors.MinsnrError).exit_code
                if refused and code == errors.ConfigError.exit_code:
                    refused()
                raise _ended(out.evalue, code)


class _environment:
    "Set environment variables for a while"

    def __init__(self, **values: str):
        self.values = values

    def __enter__(self):
        self.before = {k: os.environ.get(k) for k in self.values}
        os.environ.update(self.values)

    def __exit__(self, *exc):
        for k, v in self.before.items():
            if v is None:
                os.environ.pop(k, None)
            else:
                os.environ[k] = v


papermill_engines.register(None, StudyEngine)  # None is the engine that runs when none is named
