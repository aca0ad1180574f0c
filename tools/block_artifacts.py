"""Check every file that a range of commits ever added, even one that a later commit removed again.

usage: python tools/block_artifacts.py [RANGE]        a range as git writes it; the whole history when not given
       python tools/block_artifacts.py --staged       what the next commit would add
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from _report import ROOT
from hygiene import content, placed


def _git(root: Path, *words: str, stdin: bytes = b"") -> bytes:
    command = ["git", *words]
    return subprocess.run(command, cwd=root, input=stdin, capture_output=True, check=True).stdout


def added(root: Path, what: str) -> dict[tuple[str, str], str]:
    "Every (name, blob) that was added or changed, and the commit that did it"
    kept = ["--raw", "-z", "--no-abbrev", "--diff-filter=AMRT", "--no-renames"]
    if what == "--staged":
        text = _git(root, "diff", "--cached", *kept)
    else:
        text = _git(root, "log", "--format=%x00%H", "-m", *kept, what)
    found, commit, fields = {}, "staged", iter(text.decode("utf-8", "surrogateescape").split("\0"))
    for field in fields:
        field = field.strip("\n")
        if field.startswith(":"):
            blob, name = field.split()[3], next(fields)
            found.setdefault((name, blob), commit)
        elif len(field) == 40:
            commit = field
    return found


def findings(root: Path, what: str) -> Iterator[str]:
    "What does not belong into git, with the commit that added it"
    blobs = added(root, what)
    for (name, blob), commit in blobs.items():
        if name.endswith(".gitmodules") or set(blob) == {"0"}:
            continue
        data = _git(root, "cat-file", "blob", blob)
        try:
            found = [*placed(name), *content(name, data)]
        except (ValueError, KeyError) as e:
            found = [f"cannot be read: {e}"]
        yield from (f"{commit[:9]} {name}: {line}" for line in found)


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    lines = list(findings(ROOT, what))
    print(*lines, sep="\n", end="\n" if lines else "")
    sys.exit(1 if lines else 0)
