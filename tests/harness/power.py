"""Loss of power: what a disk may hold when only what was flushed is certain to be there.

Every operation of a training run is recorded. A crash state is made by stopping after any operation and, of what
was not flushed by then, keeping an arbitrary part: each file any prefix of its unflushed bytes, each directory any
prefix of its unflushed changes (in their order, as journals keep them). Each state is then read as a reader would.
"""

import hashlib
import json
import os
import random

from minsnr_nb import durable
from minsnr_nb.record.directory import LAYOUT

from .lab import Lab, durable_os, scratch


class Recorder:
    "The `os` module that writes down what it does"

    def __init__(self):
        self.ops, self._paths = [], {}

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags, mode=0o777):
        path = str(path)
        new = flags & os.O_CREAT and not os.path.lexists(path)
        fd = os.open(path, flags, mode)
        self._paths[fd] = path
        if new:
            self.ops.append(("create", path))
        return fd

    def write(self, fd, data):
        done = os.write(fd, data)
        self.ops.append(("write", self._paths[fd], bytes(data)[:done]))
        return done

    def fsync(self, fd):
        os.fsync(fd)
        self.ops.append(("fsync", self._paths[fd]))

    def replace(self, a, b):
        os.replace(a, b)
        self.ops.append(("rename", str(a), str(b)))

    rename = replace

    def link(self, a, b):
        os.link(a, b)
        self.ops.append(("link", str(a), str(b)))

    def unlink(self, path):
        os.unlink(path)
        self.ops.append(("unlink", str(path)))

    def mkdir(self, path):
        os.mkdir(path)
        self.ops.append(("mkdir", str(path)))

    def truncate(self, path, size):
        os.truncate(path, size)
        self.ops.append(("truncate", str(path), size))


class Trees:
    "`shutil` for `durable.remove`: a tree goes away as one recorded operation"

    def __init__(self, recorder):
        self.recorder = recorder

    def rmtree(self, path, ignore_errors=False):
        import shutil

        shutil.rmtree(path, ignore_errors)
        self.recorder.ops.append(("rmtree", str(path)))


class File:
    def __init__(self):
        self.data, self.safe = b"", 0  # content, flushed length


class Disk:
    "Directories of names; a name leads to a file or a directory; each directory keeps its unflushed changes"

    def __init__(self, root):
        self.root, self.now = root, {"": {}}  # directory -> name -> File or "dir"
        self.kept = {"": {}}  # the same, as flushed
        self.pending = {"": []}  # directory -> [(name, entry or None)]

    def at(self, path):
        folder, name = os.path.split(path)
        return self.dir_of(folder), name

    def dir_of(self, folder):
        if folder == self.root:
            return ""
        parent, name = self.at(folder)
        return self.now[parent][name]

    def put(self, folder, name, entry):
        if entry is None:
            self.now[folder].pop(name, None)
        else:
            self.now[folder][name] = entry
        self.pending[folder].append((name, entry))

    def step(self, op):
        kind, path, *rest = op
        if path == self.root:  # flushing it is the only thing that happens to it
            return self.flush("")
        folder, name = self.at(path)
        if kind == "create":
            self.put(folder, name, File())
        elif kind == "mkdir":
            key = f"{folder}/{name}#{len(self.now)}"
            self.now[key], self.kept[key], self.pending[key] = {}, {}, []
            self.put(folder, name, key)
        elif kind == "write":
            self.now[folder][name].data += rest[0]
        elif kind == "truncate":
            file = self.now[folder][name]
            file.data, file.safe = file.data[: rest[0]], min(file.safe, rest[0])
        elif kind in ("rename", "link"):
            target, new = self.at(rest[0])
            entry = self.now[folder][name]
            self.put(target, new, entry)
            if kind == "rename":
                self.put(folder, name, None)
        elif kind in ("unlink", "rmtree"):
            self.put(folder, name, None)
        elif kind == "fsync":
            entry = self.now[folder][name]
            if isinstance(entry, File):
                entry.safe = len(entry.data)
            else:
                self.flush(entry)

    def flush(self, folder):
        for name, entry in self.pending[folder]:
            self.kept[folder].pop(name, None) if entry is None else self.kept[folder].__setitem__(
                name, entry
            )
        self.pending[folder].clear()

    def crash(self, rng) -> dict:
        "One thing that may be on the disk: path -> content, None for a directory"
        out, lost = {}, {}

        def content(file):
            if id(file) not in lost:
                lost[id(file)] = file.data[: rng.randint(file.safe, len(file.data))]
            return lost[id(file)]

        def walk(key, prefix):
            names = dict(self.kept[key])
            for name, entry in self.pending[key][: rng.randint(0, len(self.pending[key]))]:
                names.pop(name, None) if entry is None else names.__setitem__(name, entry)
            for name, entry in names.items():
                if isinstance(entry, File):
                    out[prefix + name] = content(entry)
                else:
                    out[prefix + name] = None
                    walk(entry, f"{prefix}{name}/")

        walk("", "")
        return out


def _sha(data):
    return hashlib.sha256(data).hexdigest()


def _generation(state, base, entry) -> bool:
    manifest = state.get(f"{base}/{entry['dir']}/MANIFEST.json")
    if manifest is None or _sha(manifest) != entry["manifest_sha256"]:
        return False
    facts = json.loads(manifest)
    files = facts["files"].items()
    log = state.get(f"{base.removesuffix('/ckpts/last')}/logs/metrics.jsonl", b"")
    metrics = facts["metrics"]
    whole = all(
        _sha(state.get(f"{base}/{entry['dir']}/{n}") or b"") == f["sha256"] for n, f in files
    )
    return whole and _sha(log[: metrics["bytes"]]) == metrics["prefix_sha256"]


def problem(state, announced: int, interval: int) -> str | None:
    "What is wrong with a crash state"
    runs = [
        p
        for p in state
        if p.count("/") == 1 and not p.split("/")[1].startswith(".") and state[p] is None
    ]
    for run in runs:
        for entry in LAYOUT:
            path = f"{run}/{entry.path}"
            if path not in state or (entry.kind == "file") != (state[path] is not None):
                return f"{entry.path} is missing"
        stamp = state[f"{run}/meta/provenance.json"]
        try:
            manifest = json.loads(state[f"{run}/run_manifest.json"])
            for name in ("meta/status.json", "meta/heartbeat.json", "metrics.json"):
                json.loads(state[f"{run}/{name}"])
        except ValueError:
            return "half a document"
        resolved = (
            json.loads(stamp)["config"]["resolved_sha256"]
            if manifest["provenance_sha256"] == _sha(stamp)
            else ""
        )
        if any(
            _sha(state[f"{run}/{n}"]) != resolved
            for n in ("config.resolved.yaml", "config_resolved.yaml")
        ):
            return "half a config"
        current = state.get(f"{run}/ckpts/last/CURRENT.json")
        pointer = json.loads(current) if current else {}
        entries = [e for e in (pointer, pointer.get("previous")) if e]
        sound = [e["step"] for e in entries if _generation(state, f"{run}/ckpts/last", e)]
        if current and not sound:
            return "no loadable checkpoint behind CURRENT.json"
        if announced and max(sound, default=0) < announced - interval:
            return f"checkpoint of step {announced} announced, {max(sound, default=0)} found"
    return None if runs or not announced else "the run is gone"


def record(lab: Lab, root) -> list:
    "Operations of one whole run; where a checkpoint was announced, its step stands among them"
    recorder = Recorder()
    real, durable.shutil = durable.shutil, Trees(recorder)
    try:
        with durable_os(recorder):
            lab.whole(root)
    finally:
        durable.shutil = real
    return recorder.ops


def power(lab: Lab, n: int, without: str | None = None) -> tuple[bool, str]:
    "Random crash states of one run; `without` leaves out a kind of flush, to see the harness fail"
    rng, bad, states = random.Random(5), [], 0
    with scratch() as root:
        ops = record(lab, root)
    if without == "fsync":
        ops = [op for op in ops if op[0] != "fsync"]
    interval = lab.loaded.cfg.train.checkpoint_every
    each = -(-n // len(ops))
    disk, announced = Disk(str(root)), 0
    for op, following in zip(ops, [*ops[1:], None], strict=True):
        disk.step(op)
        if op[0] == "fsync" and op[1].endswith("ckpts/last") and following is not None:
            current = disk.now[disk.dir_of(op[1])].get("CURRENT.json")
            announced = json.loads(current.data)["step"] if current else announced
        for _ in range(each):
            states += 1
            if found := problem(disk.crash(rng), announced, interval):
                bad.append((op[0], found))
    return not bad, f"{states} states of {len(ops)} operations, {len(bad)} invalid {bad[:1] or ''}"
