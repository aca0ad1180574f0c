"Flipped bytes, truncations, random documents and files made to do harm."

import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import unicodedata
import zipfile
from contextlib import contextmanager

import numpy as np

from minsnr_nb import api
from minsnr_nb.checkpoint import find_checkpoint
from minsnr_nb.config import MinsnrError, dump, read_yaml
from minsnr_nb.predictions import read_frame
from minsnr_nb.promote import find_model
from minsnr_nb.records import read_log
from minsnr_nb.run_layout import check_run

from .lab import Lab, scratch

UNSEALED = (
    "config.yaml",
    "config.resolved.yaml",
    "config_resolved.yaml",
    "run_manifest.json",
    "meta/provenance.json",
)
UNSEALED += (
    "metrics.json",
    "logs/metrics.jsonl",
    "MANIFEST.json",
    "model.safetensors",
    "optim.safetensors",
    "state.json",
)
SEALED = UNSEALED + (
    "meta/status.json",
    "meta/attempts/0001.json",
    "ckpts/last/CURRENT.json",
    "logs/events.jsonl",
    "meta/seal.json",
    "meta/manifest.json",
)


@contextmanager
def changed(path, data):
    "Other content for a while"
    before, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)
        path.chmod(mode)


def _cuts(size: int, rng, n: int) -> list[int]:
    every = [*range(0, size, 4096), *range(max(0, size - 512), size)]
    return every if len(every) <= n else rng.sample(every, n)


def corruption(lab: Lab, n: int) -> tuple[bool, str]:
    "Every flipped byte and every truncation is found; a damaged checkpoint gives way to the one before"
    rng, missed, tried, fallbacks = random.Random(6), [], 0, 0
    with scratch() as root:
        run = lab.whole(root)
        newest = run.ckpts_last / json.loads((run.ckpts_last / "CURRENT.json").read_text())["dir"]
        seal = (run.path / "meta/seal.json").read_bytes()
        for sealed, names in ((True, SEALED), (False, UNSEALED)):
            if not sealed:
                (run.path / "meta/seal.json").unlink()
            for name in names:
                path = newest / name if (newest / name).exists() else run.path / name
                data = path.read_bytes()
                flips = [rng.randrange(len(data)) for _ in range(n)]
                trials = [
                    data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
                    for i in flips
                ]
                trials += [data[:i] for i in _cuts(len(data), rng, n)]
                for bad in trials:
                    tried += 1
                    with changed(path, bad):
                        if all(c.ok for c in check_run(run.path)):
                            missed.append((name, sealed))
                        if path.parent == newest:
                            found, told = find_checkpoint(run)
                            fallbacks += bool(found and found.path != newest and told)
                            if found is None or found.path == newest or not told:
                                missed.append((name, "no fallback"))
        (run.path / "meta/seal.json").write_bytes(seal)
        lines = run.metrics_path.read_bytes().splitlines(keepends=True)
        for _ in range(n):
            at = rng.randrange(len(lines) - 1)
            bad = lines[at].replace(b":", b"", 1)
            with changed(run.metrics_path, b"".join([*lines[:at], bad, *lines[at + 1 :]])):
                try:
                    list(read_log(run.metrics_path))
                    missed.append("a damaged line")
                except MinsnrError as e:
                    if f"metrics.jsonl:{at + 1}:" not in str(e):
                        missed.append(str(e))
    return (
        not missed,
        f"{tried} flips and cuts, {fallbacks} fallbacks, {n} damaged lines, {len(missed)} missed {missed[:1] or ''}",
    )


# --- random documents -----------------------------------------------------------------------------

PIECES = [
    "a",
    "b: ",
    "- ",
    "\n",
    "  ",
    "{",
    "}",
    "[",
    "]",
    "&x ",
    "*x",
    "!!python/name:os.system ",
    "1e-4",
    "null",
    "'",
    '"',
]
PIECES += [
    "${a}",
    "${oc.env:HOME}",
    "\0",
    "\x85",
    "\ud7ff",
    "? ",
    ": ",
    "# ",
    "|\n",
    ">-\n",
    "<<: *x",
    "0x1F",
    ".nan",
    "%YAML 9",
    "---\n",
    "\t",
]


def _mutant(seeds, rng):
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.choice(PIECES).encode()
        elif kind == 2:
            del data[at : at + rng.randint(1, 20)]
        else:
            data[at:at] = bytes(data[at : at + 30]) * rng.randint(1, 3)
    return bytes(data)


def loaders(lab: Lab, n: int) -> tuple[bool, str]:
    "Whatever a document holds, only our own error leaves a loader; what is over budget is refused at once"
    rng, wrong, refused = random.Random(7), [], 0
    text = dump(lab.loaded.cfg)
    keep = [
        text.encode(),
        lab.loaded.composed.encode(),
        b"a: [1, {b: c}]\nd: ${a}\n",
        b"train: {steps: 3}\n",
    ]
    with scratch() as root:
        run = lab.whole(root)
        log = [run.metrics_path.read_bytes(), run.events_path.read_bytes()]
        tensors = [(run.checkpoints_dir / "last.safetensors").read_bytes()[:4000]]
        path = root / "document"

        def config(data):
            path.write_bytes(data)
            api.load(path)

        def lines(data):
            path.write_bytes(data)
            list(read_log(path))

        def header(data):
            path.write_bytes(data)
            api.read_tensors(path)

        for loader, seeds in ((config, keep), (lines, log), (header, tensors)):
            for _ in range(n):
                data = _mutant(seeds, rng)
                try:
                    loader(data)
                except MinsnrError:
                    refused += 1
                except BaseException as e:
                    wrong.append((loader.__name__, type(e).__name__, str(e)[:80], data[:60]))
        if api.load(read_yaml(text)[0]).cfg != lab.loaded.cfg:
            wrong.append("load(dump(c)) != c")
        slowest = 0.0
        for big in (
            "a: " + "x" * (1 << 20),
            "[" * 70 + "]" * 70,
            "- 1\n" * 100_001,
            "a: &a [1,1]\n" + "b: *a\n" * 2,
        ):
            start = time.perf_counter()
            try:
                read_yaml(big)
                if len(big) > 1000:
                    wrong.append(("over budget", big[:10]))
            except MinsnrError:
                slowest = max(slowest, time.perf_counter() - start)
    return (
        not wrong,
        f"3 x {n} documents, {refused} refused, {len(wrong)} escapes; over budget {1e3 * slowest:.0f} ms {wrong[:1] or ''}",
    )


# --- files made to do harm ------------------------------------------------------------------------


class Bomb:
    "Touches a canary when it is unpickled"

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def _npz(**members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            z.writestr(name.replace("__", "."), data)
    return buffer.getvalue()


def _npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _tensors(header: dict | bytes, size: int | None = None, body=b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def in_a_run(canary) -> dict[str, bytes]:
    "Files that must not be in a run: name -> content"
    bombs = {p: pickle.dumps(Bomb(canary), protocol=p) for p in range(6)}
    out = {
        f"x{p}.{ext}": bombs[p]
        for p, ext in enumerate(("pkl", "pickle", "pt", "pth", "ckpt", "joblib"))
    }
    out |= {f"innocent{p}.txt": bombs[p] for p in (2, 3, 4, 5)} | {
        "table.json": bombs[4],
        "grid.png": bombs[2],
    }
    objects = np.array([Bomb(canary)], dtype=object)
    out |= {
        "objects.npy": _npy(objects),
        "objects.npz": _npz(a__npy=_npy(objects)),
        "torch.bin": _npz(data__pkl=bombs[2]),
    }
    out |= {
        "hidden.npz": _npz(image__npy=bombs[4]),
        "weights.safetensors": _npz(archive_data__pkl=bombs[2]),
    }
    fields = np.zeros(1, dtype=[("a", "f4"), ("b", object)])
    out |= {
        "fields.npy": _npy(fields),
        "header.npy": b"\x93NUMPY\1\0" + struct.pack("<H", 20) + b"{'descr': __import__",
    }
    return out | {
        "a.tar": b"\0" * 600,
        "a.tar.gz": b"\x1f\x8b" + b"\0" * 60,
        "a.7z": b"7z\xbc\xaf\x27\x1c",
        "x.dill": b"",
    }


def documents(root) -> dict[str, object]:
    "Things that must be refused when they are opened: name -> call"

    def yaml(text):
        return lambda: api.load(_file(root, "c.yaml", text.encode()))

    def tensors(data):
        return lambda: api.read_tensors(_file(root, "w.safetensors", data))

    def frame(data):
        return lambda: read_frame(_file(root, "frame_0.npz", data))

    f4 = {"dtype": "F32", "shape": [4]}
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{c}: &{c} [{','.join(f'*{p}' for _ in range(9))}]\n"
        for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return {
        "yaml object": yaml("seed: !!python/object/apply:os.system [touch x]"),
        "yaml name": yaml("seed: !!python/name:os.system"),
        "yaml tag": yaml("seed: !mine 3"),
        "alias bomb": yaml(bomb),
        "deep": yaml("seed: " + "[" * 200 + "]" * 200),
        "big": yaml("# " + "x" * (1 << 20)),
        "many": yaml("x: [" + "1," * 100_001 + "]"),
        "target": yaml("model: {name: mlp, _target_: os.system}"),
        "target alone": yaml("_target_: os.system"),
        "resolver": yaml("project: ${oc.env:HOME}"),
        "merge key": yaml("a: &a {seed: 1}\n<<: *a"),
        "twice": yaml("seed: 1\nseed: 2"),
        "project up": yaml("project: ../up"),
        "project absolute": yaml("project: /tmp"),
        "project nul": yaml('project: "a\\0b"'),
        "import by name": yaml("model: {name: os.system}"),
        "huge header": tensors(_tensors({}, size=1 << 40)),
        "overlap": tensors(_tensors({"a": f4 | {"data_offsets": [0, 16]}, "b": f4 | {"data_offsets": [8, 24]}})),
        "beyond": tensors(_tensors({"a": f4 | {"data_offsets": [0, 16000]}})),
        "backwards": tensors(_tensors({"a": f4 | {"data_offsets": [16, 0]}})),
        "no header": tensors(b"\x80\x04K\x01."),
        "half a header": tensors(_tensors(b'{"a": ')),
        "unknown type": tensors(_tensors({"a": {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]}})),
        "zip bomb": frame(_npz(image__npy=b"\0" * (40 << 20))),
        "object frame": frame(_npz(image__npy=_npy(np.array([{}], dtype=object)))),
        "giant claim": frame(_npz(image__npy=b"\x93NUMPY\1\0" + struct.pack("<H", 64) + f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 50},)}}".ljust(64).encode())),
        "model up": lambda: find_model("local://../../etc", root),
        "model absolute": lambda: find_model("local:///etc/passwd", root),
        "model nul": lambda: find_model("local://a\0b", root),
    }  # fmt: skip


def _file(root, name, data):
    (root / name).write_bytes(data)
    return root / name


def odd_names(run) -> list:
    "Entries that are not plain files, or have names that other systems refuse"
    plots = run.plots
    makers = {
        "link out": lambda: (plots / "out").symlink_to("/etc/passwd"),
        "link up": lambda: (plots / "up").symlink_to("../../../.."),
        "pipe": lambda: os.mkfifo(plots / "pipe"),
        "bidi": lambda: (plots / "abc\u202egnp.txt").write_text(""),
        "not NFC": lambda: (plots / unicodedata.normalize("NFD", "é.txt")).write_text(""),
        "control": lambda: (plots / "a\x07.txt").write_text(""),
        "device": lambda: (plots / "con.txt").write_text(""),
        "long": lambda: (plots / ("x" * 250)).write_text(""),
    }
    return list(makers.items())


def hostile(lab: Lab) -> tuple[bool, str]:
    "All are refused, and the canary lives"
    passed, count = [], 0
    with scratch() as root:
        canary, run = root / "canary", lab.whole(root / "runs")
        (run.path / "meta/seal.json").unlink()  # each has to be noticed for what it is
        for name, data in in_a_run(canary).items():
            count += 1
            (run.plots / name).write_bytes(data)
            if all(c.ok for c in check_run(run.path)):
                passed.append(name)
            (run.plots / name).unlink()
        for name, make in odd_names(run):
            count += 1
            make()
            if all(c.ok for c in check_run(run.path)):
                passed.append(name)
            shutil.rmtree(run.plots)
            run.plots.mkdir()
        for name, call in documents(root).items():
            count += 1
            try:
                call()
                passed.append(name)
            except MinsnrError:
                pass
            except BaseException as e:
                passed.append((name, type(e).__name__, str(e)[:80]))
        alive = not canary.exists()
    return (
        alive and not passed,
        f"{count} files, {len(passed)} not refused, canary {'alive' if alive else 'DEAD'} {passed[:4] or ''}",
    )
