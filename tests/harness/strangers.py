"""A stranger's run under every verb, watched by its system calls.

Each plant is something that somebody may have put into a run. A process of its own, under strace, imports
everything once and forks for each trial; a trial is one verb on one planted copy. It is wrong when it opens or
changes anything outside the copy and its output, starts a program other than git called cleanly, connects, prints
a control character, ends in a traceback, or leaves what was planted for the outside different. A plant that no run
may hold has to be refused: exit code 2, one line, not a byte written.
"""

import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minsnr_nb.record.directory import Run
from tests import hostile

from .faults import dies, with_fault
from .lab import Lab, fork, forked, scratch, status_of, visible

ROOT = Path(__file__).resolve().parents[2]
SECRET = "TOP-SECRET-OF-THIS-MACHINE"


class Plant(NamedTuple):
    "Something in a run, and whether the gate has to see it"

    make: Callable[[Run, Path], object]  # into the run; the second is the outside
    refused: bool = True
    inside: bool = False  # whether the command is given with the run as working directory


# --- what is planted ------------------------------------------------------------------------------


def _swapped(name: str) -> Plant:
    "A part of the run moved out, and a link left"

    def make(run: Run, outside: Path) -> None:
        path, away = run.path / name, outside / Path(name).name
        if os.path.lexists(path):
            shutil.move(path, away)
        elif "." in path.name:
            shutil.copy(outside / "password", away)
        else:
            away.mkdir()
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(away)

    return Plant(make)


def _text(name: str, text: str, **more) -> Plant:
    def make(run: Run, outside: Path) -> None:
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{outside}", str(outside)))

    return Plant(make, **more)


def _edited(name: str, change: Callable[[dict, Path], object]) -> Plant:
    "A record that says something else; what provenance says of the config is brought up to date"

    def make(run: Run, outside: Path) -> None:
        path = run.path / name
        path.chmod(0o644)
        facts = json.loads(path.read_text())
        change(facts, outside)
        path.write_text(json.dumps(facts))

    return Plant(make, refused=False)


def _config(old: str, new: str) -> Plant:
    "A config that says something else, with the right digest in provenance"

    def make(run: Run, outside: Path) -> None:
        for name in ("config.resolved.yaml", "config_resolved.yaml"):
            path = run.path / name
            path.chmod(0o644)
            wanted = new.replace("{outside}", str(outside))
            text = re.sub(old, lambda _, w=wanted: w, path.read_text(), count=1)
            path.write_text(text)
        sha = hashlib.sha256(run.config_path.read_bytes()).hexdigest()
        stamp = json.loads(run.provenance_path.read_text())
        stamp["config"]["resolved_sha256"] = sha
        run.provenance_path.chmod(0o644)
        run.provenance_path.write_text(json.dumps(stamp))

    return Plant(make, refused=False)


def _hard(run: Run, outside: Path) -> None:
    os.link(outside / "password", run.plots / "password.png")


def _hard_log(run: Run, outside: Path) -> None:
    os.link(run.metrics_path, outside / "log")


def _socket(run: Run, outside: Path) -> None:
    place = os.getcwd()
    os.chdir(run.plots)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("s.png")
    os.chdir(place)


LINKED = """metrics.json config.yaml config.resolved.yaml run_manifest.json logs logs/metrics.jsonl
logs/events.jsonl logs/stdout.log logs/discarded meta meta/status.json meta/heartbeat.json meta/attempts
meta/attempts/0001.json meta/provenance.json meta/requests meta/seal.json meta/manifest.json ckpts ckpts/last
ckpts/last/CURRENT.json ckpts/best artifacts artifacts/grids artifacts/plots artifacts/evaluations
artifacts/predictions artifacts/checkpoints artifacts/checkpoints/last.safetensors artifacts/plots/out.png
notebook notebook/study.ipynb""".split()
MONITOR = '[core]\n\trepositoryformatversion = 0\n\tfsmonitor = "touch {outside}/ran; false"\n\thooksPath = {outside}\n'
DOTENV = "LD_PRELOAD={outside}/x.so\nGIT_CONFIG_COUNT=1\nGIT_CONFIG_KEY_0=core.fsmonitor\nGIT_CONFIG_VALUE_0=touch {outside}/ran\nMINSNR_RUNS={outside}/password\n"
CONTROL = "\x1b]0;owned\x07\u202e"


def _git(run: Run, outside: Path) -> None:
    "A repository with a commit, whose configuration starts a program"
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "config.yaml"], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=run.path, check=True)
    with open(run.path / ".git/config", "a") as f:
        f.write(MONITOR.replace("{outside}", str(outside)))


def plants() -> dict[str, Plant]:
    "Everything that is tried: name -> plant"
    out = {f"link at {name}": _swapped(name) for name in LINKED}
    out |= {"hard link to a password": Plant(_hard), "hard link of the log": Plant(_hard_log)}
    out |= {"socket": Plant(_socket)}
    out |= {
        "pipe for a log": Plant(
            lambda run, _: (run.stdout_path.unlink(), os.mkfifo(run.stdout_path))
        )
    }
    for name in (".git/config", ".env", "artifacts/.env", "meta/.x", "settings.ini", "torch.py"):
        out[f"a file {name}"] = _text(name, "[minsnr]\nruns = {outside}\n")
    for inside in (False, True):
        where = " around the command" if inside else ""
        out[f"repository{where}"] = Plant(_git, inside=inside)
        out[f"environment{where}"] = _text(".env", DOTENV, inside=inside)
        text = "[minsnr]\nruns = {outside}\nmodels = {outside}\ndata = {outside}\n"
        out[f"settings{where}"] = _text("settings.ini", text, inside=inside)
    for n in (1_000_000, -1, "8", 0, None, 1.5):
        change = lambda facts, _, n=n: facts["determinism"].update(num_threads=n)  # noqa: E731
        out[f"num_threads {n!r}"] = _edited("meta/provenance.json", change)
    folder = "data:\n  name: image_folder\n  path: {}\n"
    for name, path in {
        "absolute": "'{outside}/images'",
        "upwards": "../../../outside/images",
    }.items():
        out[f"data {name}"] = _config(r"data:\n(  .*\n)+", folder.replace("{}", path))
    told = json.dumps(CONTROL)[1:-1]
    out["escapes in a config"] = _config("name: min_snr|name: constant", f'name: "{told}"')
    out["escapes in a state"] = _edited("meta/status.json", lambda s, _: s.update(state=CONTROL))
    out["escapes in a summary"] = _edited(
        "metrics.json", lambda s, _: s["final"].update({f"eval/{CONTROL}": 1.0})
    )
    out["escapes in a number"] = _edited(
        "meta/provenance.json", lambda s, _: s["determinism"].update(num_threads=CONTROL)
    )
    return out | _corpus()


def _corpus() -> dict[str, Plant]:
    "The files and entries of `tests.hostile`, and records that name files elsewhere"
    out = {}
    for name, data in hostile.in_a_run(Path("/nowhere")).items():
        make = lambda run, _, n=name, d=data: (run.plots / n).write_bytes(d)  # noqa: E731
        out[f"in a run: {name}"] = Plant(make, refused=False)
    for name in hostile.odd_entries(Path()):
        make = lambda run, _, n=name: hostile.odd_entries(run.plots)[n]()  # noqa: E731
        out[f"in a run: {name}"] = Plant(make, refused="link" in name or name == "pipe")
    for at in range(8):

        def wish(run, outside, at=at):
            list(hostile.wishes(run, outside / "password").values())[at]()

        out[f"wish {at}"] = Plant(wish, refused=False)
    return out


# --- what is done ---------------------------------------------------------------------------------

VERBS: dict[str, str] = {  # {run}: the planted one, {out}: where output goes, {other}: a sound run
    "resume": "resume {run}",
    "train --resume": "train {run}/config.resolved.yaml --resume {run}",
    "train": "train {run}/config.resolved.yaml --run-root {out}/runs",
    "eval": "eval {run}",
    "eval other": "eval {run} sampler.steps=2",
    "sample": "sample {run} --n 2",
    "sample arrays": "sample {run} --n 2 --save-predictions",
    "export": "export {run} --dest {out}",
    "export tree": "export {run} --tree {out}",
    "promote": "promote {run} m",
    "compare": "compare {run} {other} --out {out}/c.html",
    "repro": "repro {run}",
    "runs": "runs --run-root {root} --columns loss.name",
    "ask": "ask {run} stop",
    "check": "check {run} --level L3",
    "check json": "check {run} --json",
    "fork": "fork {run} train.steps=10 --run-root {out}/runs",
    "continue": "continue {run} --steps 10 --run-root {out}/runs",
}
BASES = {"resume": "half", "train --resume": "half", "ask": "running"}  # else a finished run
TELLS = ("runs",)  # it lists what it cannot read


class Trial(NamedTuple):
    "One verb on one planted copy"

    plant: str
    verb: str
    place: str  # its directory


def _prepare(trial: Trial, bases: dict[str, Path]) -> dict:
    "Plant a copy; the words of the command, and what the places look like before it"
    place, plant = Path(trial.place), plants()[trial.plant]
    outside, out = place / "outside", place / "out"
    (outside / "images/a").mkdir(parents=True)
    out.mkdir()
    (outside / "password").write_text(SECRET)
    (outside / "images/a/x.png").write_bytes(hostile.flood())
    source = bases[BASES.get(trial.verb, "whole")]
    run = Run(Path(shutil.copytree(source, place / "runs/p" / source.name)))
    plant.make(run, outside)
    target = bases["whole"] if plant.inside else run.path
    if plant.inside:  # in the run of a stranger, with a run of one's own
        target = shutil.copytree(target, place / "mine/p" / target.name)
    names = {"run": target, "out": out, "other": bases["other"], "root": place / "runs"}
    words = [w.format(**names) for w in VERBS[trial.verb].split()]
    return {"words": words, "cwd": str(run.path if plant.inside else out), "run": str(run.path)}


def _state(place: Path) -> str:
    "Digest of names, kinds and contents, links not followed"
    lines = []
    for folder, dirs, names in os.walk(place):
        for path in (Path(folder, n) for n in sorted(dirs + names)):
            if path.is_symlink():
                lines.append(f"{path} -> {os.readlink(path)}")
            elif path.is_file():
                lines.append(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}")
            else:
                lines.append(str(path))
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "replace")).hexdigest()


# --- in the process that is watched ---------------------------------------------------------------


def _act(number: int, place: Path, job: dict) -> None:
    from minsnr_nb.cli import main

    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT, 0o666), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ |= {"XDG_CONFIG_HOME": str(place / "home"), "MINSNR_MODELS": str(place / "models")}
    os.chdir(job["cwd"])
    with suppress(OSError):
        os.mkdir(f"/trial/{number}/begin")  # a mark in the trace
    code = 99
    try:
        code = main(job["words"])
    except BaseException as e:
        print(f"Traceback: {type(e).__name__}: {e}", file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def serve(root: str) -> None:
    "Make the bases and try every trial of the plan, one child each"
    place = Path(root)
    plan = [Trial(*t) for t in json.loads((place / "plan.json").read_text())]
    bases, results = _bases(place / "bases"), []
    import matplotlib.font_manager  # noqa: F401  what children would do again and again

    import minsnr_nb.record.compare  # noqa: F401
    import minsnr_nb.record.repro  # noqa: F401
    import minsnr_nb.record.tree  # noqa: F401

    for number, trial in enumerate(plan):
        job, here = _prepare(trial, bases), Path(trial.place)
        watched = [here / "outside", Path(job["run"])]
        before = [_state(w) for w in watched]
        code = status_of(fork(lambda n=number, h=here, j=job: _act(n, h, j)))
        said = [(here / n).read_text(errors="replace") for n in ("stdout", "stderr")]
        same = [a == _state(w) for a, w in zip(before, watched, strict=True)]
        leaked = _holds(here / "out", SECRET.encode())
        results.append({"code": code, "said": said, "same": same, "leaked": leaked})
        shutil.rmtree(here)
    (place / "results.json").write_text(json.dumps(results))


def _holds(folder: Path, data: bytes) -> bool:
    return any(p.is_file() and data in p.read_bytes() for p in folder.rglob("*"))


def _bases(place: Path) -> dict[str, Path]:
    "A finished run, one that died half-way, one that is training, and another"
    from minsnr_nb.record.state import set_status, start_attempt

    lab = Lab()
    out = {name: lab.whole(place / name).path for name in ("whole", "other")}
    forked(with_fault(lab, place / "half", 260, dies))
    running = lab.whole(place / "running")
    set_status(running, "running", 8, 8, attempt=start_attempt(running))
    (half,) = visible(place / "half")
    return out | {"half": half.path, "running": running.path}


# --- the judge ------------------------------------------------------------------------------------

CALLS = "open openat openat2 creat rename renameat renameat2 unlink unlinkat rmdir mkdir mkdirat"
CALLS += (
    " link linkat symlink symlinkat mknod mknodat truncate chmod fchmodat chown lchown fchownat"
)
CALLS += " utimensat setxattr execve execveat clone clone3 fork vfork connect bind"
_LINE = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<(.*?)>)?(?: .*)?$")
_STRINGS = re.compile(r'(?:AT_FDCWD|\d+)<([^>]*)>, "([^"]*)"|"([^"]*)"')
_CLEAN = {"GIT_OPTIONAL_LOCKS", "GIT_NO_LAZY_FETCH", "GIT_TERMINAL_PROMPT"}
_CLEAN |= {"GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM"}


def _calls(trace: Path) -> dict[int, list[tuple[str, str, str]]]:
    "The calls of every trial that succeeded: number -> (call, arguments, resolved file)"
    files = {int(p.suffix[1:]): p for p in trace.parent.glob(f"{trace.name}.*")}
    lines = {pid: p.read_text(errors="replace").splitlines() for pid, p in files.items()}
    owner: dict[int, int] = {}
    for pid, text in lines.items():
        for line in text:
            if mark := re.search(r'"/trial/(\d+)/begin"', line):
                owner[pid] = int(mark[1])
    out: dict[int, list] = {n: [] for n in owner.values()}
    waiting = list(owner)
    while waiting:
        pid = waiting.pop()
        begun = not any("/trial/" in line for line in lines.get(pid, ()))
        for line in lines.get(pid, ()):
            begun = begun or '"/trial/' in line
            match = _LINE.match(line)
            if not begun or not match or int(match[3]) < 0:
                continue
            out[owner[pid]].append((match[1], match[2], match[4] or ""))
            if match[1] in ("clone", "clone3", "fork", "vfork") and int(match[3]) in lines:
                owner[int(match[3])] = owner[pid]
                waiting.append(int(match[3]))
    return out


def _program(arguments: str) -> str | None:
    "What is wrong with a program that was started"
    name = _STRINGS.search(arguments)
    path = (name[2] or name[3] or "") if name else ""
    if Path(path).name != "git":
        return f"starts {path}"
    names = set(re.findall(r'"(\w+)=', arguments))
    odd = {n for n in names if n.startswith(("GIT_", "LD_"))} - _CLEAN
    if odd or "core.fsmonitor=false" not in arguments:
        return f"starts git with {sorted(odd) or 'all its settings'}"
    return None


def _touches(call: str, arguments: str, resolved: str, place: Path) -> Iterator[str]:
    "What a call does outside of its trial"
    outside, changing = (
        f"{place}/outside",
        not call.startswith("open") or re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND)", arguments),
    )
    found = [os.path.join(m[1] or "", m[2] or m[3] or "") for m in _STRINGS.finditer(arguments)]
    for path in [resolved] if resolved else found:
        if path.startswith(outside):
            yield f"{call} {path.removeprefix(str(place))}"
        elif changing and not path.startswith(
            (f"{place}/", "/dev/null", "/dev/shm/torch", "/trial/")
        ):
            yield f"{call} {path}"


def _wrong(trial: Trial, result: dict, calls: list[tuple[str, str, str]]) -> list[str]:
    "Everything that is wrong with one trial"
    plant, found = plants()[trial.plant], []
    for call, arguments, resolved in calls:
        if call in ("execve", "execveat"):
            found += [p] if (p := _program(arguments)) else []
        elif call in ("connect", "bind"):
            found.append(f"{call}: {arguments[:80]}")
        elif call not in ("clone", "clone3", "fork", "vfork"):
            found += _touches(call, arguments, resolved, Path(trial.place))
    out, err = result["said"]
    if result["code"] not in (0, 1, 2) or "Traceback" in err:
        found.append(f"exit code {result['code']}: {err.strip()[-200:]}")
    if odd := re.search(
        r"[^\x20-\x7e\n\u00a0-\u200d\u2010-\u2027\u2030-\u205f\u2070-\ud7ff]", out + err
    ):
        found.append(f"prints {odd[0]!r}")
    found += [] if result["same"][0] else ["the outside has changed"]
    found += ["a secret has been copied"] if result["leaked"] else []
    if plant.refused and not plant.inside and trial.verb not in TELLS:
        refused = result["code"] == 2 and err.count("\n") == 1 and result["same"][1]
        found += [] if refused else [f"not refused: {result['code']}: {err.strip()[-200:]}"]
    return found


def traced(root: Path, trials: list[Trial], weaken: str = "", source: Path = ROOT) -> list[str]:
    "Try all under strace; what was wrong, one line each"
    (root / "plan.json").write_text(json.dumps(trials))
    trace = root / "trace"
    strace = ["strace", "-ff", "--seccomp-bpf", "-y", "-v", "-s", "4096", "-o", str(trace)]
    code = f"import sys; from tests.harness.strangers import serve\n{weaken}\nserve(sys.argv[1])"
    words = [
        *strace,
        "-e",
        f"trace={CALLS.replace(' ', ',')}",
        sys.executable,
        "-c",
        code,
        str(root),
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("MINSNR_PM", "IN_TEST")}
    env |= {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(root / "mpl")}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=source, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    results, calls = json.loads((root / "results.json").read_text()), _calls(trace)
    return [
        f"{t.plant}: {t.verb}: {problem}"
        for n, (t, result) in enumerate(zip(trials, results, strict=True))
        for problem in _wrong(t, result, calls.get(n, []))[:2]
    ]


def strangers(
    lab: Lab, most: int | None = None, only: str = "", weaken: str = ""
) -> tuple[bool, str]:
    "Every plant under every verb: nothing outside is touched, started or connected"
    if not shutil.which("strace"):
        return True, "not tried: strace is not installed (Debian: apt-get install strace)"
    every = [(p, v) for p in plants() for v in VERBS if re.search(only, p)]
    chosen = random.Random(8).sample(every, min(most or len(every), len(every)))
    with scratch() as root:
        trials = [Trial(p, v, str(root / str(n))) for n, (p, v) in enumerate(chosen)]
        wrong = traced(root, trials, weaken)
    text = f"{len(trials)} tried, {len({w.rpartition(': ')[0] for w in wrong})} wrong"
    return not wrong, f"{text} {wrong[:3] or ''}".strip()
