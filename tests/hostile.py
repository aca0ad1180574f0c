"""Files that somebody made to do harm: `make(folder)` writes them, `run()` hands each to whoever would open it.

Each is given to our loaders, or put into a run and given to the validator, in a process of its own whose audit hook
notes every process that is started, every connection, every import by a name in a file and every file that is opened
for writing outside the scratch directory. All have to be refused with our own error or a failed check; what was to be
protected, a canary file, stays as it was.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Bomb:
    "Removes the canary when it is unpickled"

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.remove, (str(self.canary),)


def npz(members: dict[str, bytes], pack: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", pack) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return buffer.getvalue()


def npy(array) -> bytes:
    np.save(buffer := io.BytesIO(), array, allow_pickle=True)
    return buffer.getvalue()


def npy_head(text: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + body


def tensors(header: dict | str, body: int = 64, size: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(body)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def flood() -> bytes:
    "A PNG whose header promises 40,000 x 40,000 pixels"
    head = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def lying_zip() -> bytes:
    "A member whose directory entry says it is small"
    data = bytearray(npz({"image.npy": npy(np.zeros(1 << 20, np.uint8))}))
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 200)
    return bytes(data)


def in_a_run(canary: Path) -> dict[str, bytes]:
    "Content that no run may hold, under names that look harmless: name -> content"
    bomb = {p: pickle.dumps(Bomb(canary), protocol=p) for p in range(6)}
    objects, fields = np.array([Bomb(canary)], dtype=object), np.zeros(1, [("a", "f4"), ("b", "O")])
    out = {f"named.{e}": bomb[2] for e in "pkl pickle pt pth ckpt joblib dill bin p".split()}
    out |= {f"protocol{p}.txt": bomb[p] for p in bomb}
    out |= {"table.json": bomb[4], "grid.png": bomb[0], "log.csv": bomb[1] + b"1,2,3\n"}
    out |= {"import.txt": b"cos\nsystem\n.", "inst.txt": b"(S'x'\nios\nsystem\n."}
    out |= {
        "pickled.safetensors": bomb[5],
        "zipped.safetensors": npz({"archive/data.pkl": bomb[2]}),
    }
    out |= {
        "torch.npz": npz({"archive/data.pkl": bomb[2]}),
        "hidden.npz": npz({"image.npy": bomb[4]}),
    }
    out |= {"objects.npy": npy(objects), "objects.npz": npz({"a.npy": npy(objects)})}
    out |= {"fields.npy": npy(fields), "nested.npz": npz({"a.npz": npz({"a.npy": npy(objects)})})}
    out |= {
        "up.npz": npz({"../../up.npy": npy(np.zeros(1))}),
        "code.npy": npy_head("__import__('os')"),
    }
    out |= {
        "deep.npy": npy_head("(" * 9000),
        "claim.npy": npy_head(f"{{'descr': '|u1', 'shape': ({1 << 50},)}}"),
    }
    out |= {
        "a.tar": bytes(600),
        "text.txt": b"\x1f\x8b" + bytes(60),
        "x.7z": b"",
        "notes.md": npz({"a": b"b"}),
    }
    out |= {"zlib.txt": b"x\x9c" + bytes(60), "token.txt": b"hf" + b"_" + b"a1" * 17}
    return out  # fmt: skip


def odd_entries(plots: Path) -> dict[str, Callable]:
    "Entries of a run that are not plain files, or have names that other systems refuse"
    return {
        "link to a file": lambda: (plots / "out.png").symlink_to("/etc/passwd"),
        "link out of the tree": lambda: (plots / "up").symlink_to("../../../.."),
        "link to itself": lambda: (plots / "loop").symlink_to("loop"),
        "pipe": lambda: os.mkfifo(plots / "pipe.json"),
        "bidi name": lambda: (plots / "abc\u202egnp.txt").write_text(""),
        "name in two spellings": lambda: (plots / unicodedata.normalize("NFD", "é.txt")).write_text(""),
        "control in a name": lambda: (plots / "a\x1b[2J.txt").write_text(""),
        "device name": lambda: (plots / "con.txt").write_text(""),
        "long name": lambda: (plots / ("x" * 250)).write_text(""),
    }  # fmt: skip


F4 = {"dtype": "F32", "shape": [4]}
TENSORS = {
    "huge header": tensors({}, size=1 << 40),
    "header of 2^64-1": tensors({}, size=(1 << 64) - 1),
    "overlap": tensors({"a": F4 | {"data_offsets": [0, 16]}, "b": F4 | {"data_offsets": [8, 24]}}),
    "beyond the end": tensors({"a": F4 | {"data_offsets": [0, 16000]}}),
    "backwards": tensors({"a": F4 | {"data_offsets": [16, 0]}}),
    "negative": tensors({"a": F4 | {"data_offsets": [-16, 0]}}),
    "hole": tensors({"a": F4 | {"data_offsets": [16, 32]}}, 32),
    "something left": tensors({"a": F4 | {"data_offsets": [0, 16]}}),
    "overflowing shape": tensors({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}, 0),
    "type of objects": tensors({"a": {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]}}, 16),
    "name twice": tensors('{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0),
    "deep header": tensors('{"a":' + "[" * 9000, 0),
    "long number": tensors('{"a": ' + "9" * 9000 + "}", 0),
    "bidi name": tensors({"a\u202eb": F4 | {"data_offsets": [0, 16]}}, 16),
    "half a header": tensors('{"a": ', 0),
    "metadata that is no text": tensors({"__metadata__": {"a": [1]}}, 0),
    "no header": b"\x80\x04K\x01.",
    "empty": b"",
}  # fmt: skip
YAML = {
    "object tag": "seed: !!python/object/apply:os.remove [{canary}]",
    "name tag": "seed: !!python/name:os.system",
    "module tag": "seed: !!python/module:antigravity",
    "own tag": "seed: !mine 3",
    "tag on a section": "train: !!python/dict {steps: 3}",
    "_target_": "model: {name: mlp, _target_: os.remove, path: '{canary}'}",
    "_target_ alone": "_target_: os.system",
    "import by name": "model: {name: os.system}",
    "import by path": "callbacks: [{name: 'antigravity:x'}]",
    "resolver": "project: ${oc.env:HOME}",
    "resolver in a resolver": "project: ${a.${oc.env:HOME}}",
    "decode": "seed: ${oc.decode:'1'}",
    "references that double": "a0: x\n" + "".join(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}\n" for i in range(1, 60)),
    "reference to itself": "project: ${project}",
    "reference that never closes": "project: ${",
    "reference that is cut off": "seed: ${a",
    "merge key": "a: &a {seed: 1}\n<<: *a",
    "key twice": "seed: 1\nseed: 2",
    "bidi key": "se\u202eed: 1",
    "NUL": 'project: "a\\0b"',
    "escape sequence": 'study: "\\e[2J"',
    "project up": "project: ../up",
    "project absolute": "project: /tmp",
    "data NUL": 'data: {name: image_folder, path: "a\\0b"}',
}  # fmt: skip


def frames() -> dict[str, bytes]:
    giant = npy_head(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 50},)}}")
    return {
        "zip bomb": npz({"image.npy": npy(np.zeros(40 << 20, np.uint8))}),
        "lying zip": lying_zip(),
        "objects": npz({"image.npy": npy(np.array([{}], dtype=object))}),
        "giant claim": npz({"image.npy": giant}),
        "a thousand members": npz({f"a{i}.npy": b"" for i in range(1001)}),
        "unusual packing": npz({"image.npy": npy(np.zeros(4))}, zipfile.ZIP_LZMA),
        "no zip": b"PK\3\4" + bytes(60),
    }


def documents(root: Path, canary: Path) -> dict[str, Callable]:
    "Things that have to be refused when they are opened: name -> call"
    from minsnr_nb import api
    from minsnr_nb.guard import inside
    from minsnr_nb.images.files import read_image
    from minsnr_nb.record.predictions import read_frame
    from minsnr_nb.record.promote import find_model
    from minsnr_nb.record.strict_json import read_json, read_log
    from tests.property_loaders import over_budget

    def kept(name: str, data: bytes) -> Path:
        path = root / f"{len(list(root.iterdir()))}-{name}"
        path.write_bytes(data)
        return path

    out: dict[str, Callable] = {}
    for name, text in (YAML | over_budget()).items():
        path = kept("c.yaml", text.replace("{canary}", str(canary)).encode())
        out[f"yaml: {name}"] = lambda path=path: api.load(path)
    for name, data in TENSORS.items():
        path = kept("w.safetensors", data)
        out[f"tensors: {name}"] = lambda path=path: api.read_tensors(path)
    for name, data in frames().items():
        path = kept("frame_0.npz", data)
        out[f"frame: {name}"] = lambda path=path: read_frame(path)
    for name, data in {"a program": EPS, "a flood of pixels": flood()}.items():
        out[f"image: {name}"] = lambda data=data: read_image(data, "cat.png")
    for name, data in {"a list": b"[1]\n", "no newline for 1 MB": b"x" * (1 << 20), "deep": b"[" * 60_000 + b"\n", "NaN": b'{"a": NaN}\n', "long number": b'{"a": ' + b"9" * 9000 + b"}\n"}.items():  # fmt: skip
        path = kept("l.jsonl", data)
        out[f"log: {name}"] = lambda path=path: list(read_log(path))
    os.mkfifo(root / "pipe.json")
    out["a pipe for a record"] = lambda: read_json(root / "pipe.json")
    out["a device for a record"] = lambda: read_json("/dev/zero")
    for address in ("local://../../etc", "local:///etc/passwd", "local://a\0b", "local://a@../1"):
        out[f"model {address!r}"] = lambda address=address: find_model(address, root)
    (root / "link").symlink_to("/etc")
    for name in ("../x", "/etc/passwd", "a\0b", "link/passwd", "C:/x", "a\\..\\b", "a/./../b", "~/x/.."):  # fmt: skip
        out[f"path {name!r}"] = lambda name=name: inside(root, name, "MANIFEST.json")
    return out


def wishes(run, canary: Path) -> dict[str, Callable]:
    "A run whose own records name files elsewhere: name -> change"

    def rewrite(name: str, change: Callable[[dict], object]):
        def edit():
            path = run.path / name
            facts = json.loads(path.read_text())
            change(facts)
            path.chmod(0o644)
            path.write_text(json.dumps(facts))

        return edit

    newest = run.ckpts_last / json.loads((run.ckpts_last / "CURRENT.json").read_text())["dir"]
    manifest, data = newest.relative_to(run.path) / "MANIFEST.json", canary.read_bytes()
    facts = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }  # all but the place is right
    names = (os.path.relpath(canary, newest), str(canary), "a\0b", "..")
    out = {
        f"manifest names {n[:12]!r}": rewrite(
            manifest, lambda m, n=n: m["files"].update({n: facts})
        )
        for n in names
    }
    out |= {
        f"pointer names {n!r}": rewrite("ckpts/last/CURRENT.json", lambda c, n=n: c.update(dir=n))
        for n in ("..", "/", "../last/up")
    }
    lock = facts | {"path": os.path.relpath(canary, run.path)}
    return out | {"provenance names a lock far away": rewrite("meta/provenance.json", lambda p: p["env"]["freeze"].update(lock))}  # fmt: skip


# --- in a process that is watched -----------------------------------------------------------------

WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
WATCHED += ("socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "exec.file")
WATCHED += ("ctypes.dlopen", "webbrowser.open", "urllib.Request", "marshal.loads.file")


def judge(run_path: str, scratch: str) -> dict:
    "Open everything that is hostile, and say what was not refused and what happened"
    from minsnr_nb.errors import MinsnrError
    from minsnr_nb.record.checks import check_run
    from minsnr_nb.record.directory import Run
    from minsnr_nb.record.generations import find_checkpoint

    root, run = Path(scratch) / "documents", Run(Path(run_path))
    canary = Path(scratch) / "canary"
    canary.write_text("alive")
    root.mkdir()
    from minsnr_nb import api

    api.load({"model": {"name": "mlp"}})  # imports what the calls below need
    healthy = [c for c in check_run(run.path) if not c.ok]
    passed, happened, opened, tried = [f"{c.id}: {c.message}" for c in healthy], [], [], []

    def watch(event: str, args: tuple) -> None:
        if event in WATCHED or (event == "import" and args[0] == "antigravity"):
            happened.append(f"{tried[-1] if tried else ''}: {event} {str(args)[:80]}")
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            if not str(args[0]).startswith(scratch):
                opened.append(str(args[0]))

    calls = documents(root, canary)
    in_run, odd, asked = in_a_run(canary), odd_entries(run.plots), wishes(run, canary)
    sys.addaudithook(watch)
    for name, call in calls.items():
        tried.append(name)
        try:
            call()
            passed.append(name)
        except MinsnrError as e:
            if not str(e).isprintable() and "\n" not in str(e):
                passed.append(f"{name}: its message cannot be printed")
        except BaseException as e:
            passed.append(f"{name}: {type(e).__name__}: {str(e)[:100]}")
    tried += [f"in a run: {name}" for name in in_run]
    for name, data in in_run.items():
        (run.plots / name).write_bytes(data)
    found = {c.path.rpartition("/")[2] for c in check_run(run.path) if not c.ok}
    passed += [f"in a run: {name}" for name in in_run if name not in found]
    for name in in_run:
        (run.plots / name).unlink()
    for name, make in odd.items():
        tried.append(f"in a run: {name}")
        make()
        if all(c.ok for c in check_run(run.path)):
            passed.append(tried[-1])
        for path in run.plots.iterdir():
            path.unlink()
    kept = Path(scratch) / "kept"
    shutil.copytree(run.path, kept)
    for name, change in asked.items():
        tried.append(f"a run in which {name}")
        change()
        try:
            said = " ".join(c.message for c in check_run(run.path) if not c.ok)
            if not any(w in said for w in ("stays inside", "leads out", "not the name")):
                passed.append(tried[-1])
            find_checkpoint(run)  # falls back, or says that there is none
        except MinsnrError:
            pass
        except BaseException as e:
            passed.append(f"{tried[-1]}: {type(e).__name__}: {e}")
        shutil.rmtree(run.path)
        shutil.copytree(kept, run.path)
    alive = canary.exists() and canary.read_text() == "alive"
    return {"tried": len(tried), "passed": passed, "happened": happened, "opened": opened, "canary": alive}  # fmt: skip


def run(
    healthy: Path,  # A run directory to put things into; it is copied
    weaken: str = "",  # Statements that take a guard away, to see that this is noticed
) -> dict:  # How many were tried, and what was not refused
    "Judge everything in a process of its own"
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch).resolve() / "runs/p" / Path(healthy).name
        shutil.copytree(healthy, place, symlinks=True)
        (place / "meta/seal.json").unlink(missing_ok=True)  # each has to be noticed for what it is
        code = f"import json, sys; from tests.hostile import judge\n{weaken}\n"
        code += "print(json.dumps(judge(*sys.argv[1:])))"
        words = [sys.executable, "-c", code, str(place), str(Path(scratch).resolve())]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])


def part(lab) -> tuple[bool, str]:
    "The form that the harness calls"
    with tempfile.TemporaryDirectory() as root:
        figures = run(lab.whole(Path(root)).path)
    bad = [*figures["passed"], *figures["happened"], *figures["opened"]]
    ok = figures["canary"] and not bad and figures["tried"] >= 130
    return ok, f"{figures['tried']} tried, {len(bad)} not refused, canary {'alive' if figures['canary'] else 'DEAD'} {bad[:4] or ''}"  # fmt: skip
