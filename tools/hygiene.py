"""Check that nothing is in git that does not belong there: pickles, weights, archives, big files, secrets, homes.

usage: python tools/hygiene.py [ROOT]
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from _report import main

from minsnr_nb.guard import secret_problem

MAX_BYTES = 1_000_000
MAX_OUTPUT, MAX_OUTPUTS = 150_000, 300_000  # characters of one stored output, of all in a notebook
BANNED = set(
    ".pkl .pickle .joblib .dill .pt .pth .ckpt .bin .safetensors .onnx .h5 .hdf5 .npy .npz .parquet "
    ".zip .tar .gz .tgz .bz2 .xz .zst .7z .rar .whl .egg .sqlite .db .so .dll .exe .pyc .arrow .mat".split()
)
MAGIC = {
    "pickle": rb"\x80[\x02-\x05]",
    "zip archive (or torch file)": rb"PK\x03\x04",
    "gzip archive": rb"\x1f\x8b",
    "bzip2 archive": rb"BZh[1-9]",
    "xz archive": rb"\xfd7zXZ\x00",
    "zstd archive": rb"\x28\xb5\x2f\xfd",
    "7z archive": rb"7z\xbc\xaf\x27\x1c",
    "tar archive": rb"(?s).{257}ustar",
    "numpy array": rb"\x93NUMPY",
    "HDF5 file": rb"\x89HDF",
    "safetensors file": rb"(?s).{5}\x00\x00\x00\{\"",
    "SQLite database": rb"SQLite format 3\x00",
    "program": rb"\x7fELF|MZ\x90\x00",
    "parquet table": rb"PAR1",
    "lz4 archive": rb"\x04\x22\x4d\x18",
    "rar archive": rb"Rar!\x1a\x07",
}
RUN_FILES = re.compile(
    r"(^|/)(meta/(provenance|status|seal|heartbeat)\.json|logs/(metrics|events)\.jsonl|ckpts/.+|\.index\.sqlite)$"
)
EXAMPLE = re.compile(
    rb"://[^\s/@]*@(?:example\.|[\w-]+(?![\w.-]))"
)  # in the history: hosts that cannot be
HOMES = re.compile(r"(?<![\w.])(?:/home/|/Users/|/root/|[A-Z]:\\\\?Users\\\\?)[\w.-]+")


def tracked(root: Path) -> list[str]:
    "Files that git knows, and those it would take next"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    return sorted(name for name in listed.decode().split("\0") if name)


def placed(name: str) -> Iterator[str]:
    "Things that may exist but not in git"
    if Path(name).name == "uv.lock":
        yield "made locally; requirements.lock is the committed form"
    if name.startswith("runs/") and name != "runs/.gitignore":
        yield "content of runs/ stays on the machine"
    if name.startswith("models/") and name != "models/index.json":
        yield "weights stay out of git; models/index.json names them"
    if RUN_FILES.search(name):
        yield "part of a run directory; `minsnr export RUN` makes the copy for git"
    if re.fullmatch(r"\.env(\..+)?", Path(name).name) and Path(name).name != ".env.example":
        yield "holds this machine's secrets"
    if Path(name).suffix.lower() in BANNED:
        yield f"{Path(name).suffix} files do not belong in git"


def content(name: str, data: bytes) -> Iterator[str]:
    "What the bytes say, whatever the name is"
    if len(data) > MAX_BYTES:
        yield f"{len(data)} bytes; at most {MAX_BYTES}"
    yield from (f"is a {kind}" for kind, magic in MAGIC.items() if re.match(magic, data))
    text = data.decode("utf-8", "ignore")
    if problem := secret_problem(EXAMPLE.sub(b"://example", data), {}):
        yield f"holds {problem}; write an example in two parts"
    if re.search(r"^(<{7} .*|={7}|>{7} .*)$", text, re.M):
        yield "holds a merge conflict"
    if name == "requirements.lock" and re.search(r"\w+://", text):
        yield "holds an address; export it without one"
    if name.endswith(".ipynb"):
        stored = [cell.get("outputs", []) for cell in json.loads(text)["cells"]]
        sizes = [len(json.dumps(out)) for outs in stored for out in outs]
        if max(sizes, default=0) > MAX_OUTPUT or sum(sizes) > MAX_OUTPUTS:
            yield f"stored outputs of {sum(sizes)} characters, one of {max(sizes)}; keep figures small"
        homes = {m[0] for m in HOMES.finditer(json.dumps(stored))}
        yield from (f"a stored output names {home}" for home in sorted(homes))


def findings(root: Path) -> Iterator[str]:
    for name in tracked(root):
        path = root / name
        found = [*placed(name)]
        if path.is_symlink():
            inside = path.resolve().is_relative_to(root.resolve())
            found += [] if inside else ["a link that leaves the repository"]
        elif path.is_file():
            data = path.read_bytes()
            found += content(name, data)
            if secret_problem(data, {}) and not any("in two parts" in line for line in found):
                found.append(
                    "holds the form of a secret; write an example in two parts"
                )  # a run's patch holds it
        yield from (f"{name}: {line}" for line in found)


if __name__ == "__main__":
    main(findings)
