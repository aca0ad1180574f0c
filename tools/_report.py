"What the checks share: the table of folders, where modules and pages are, and how findings are reported"

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Folder(NamedTuple):
    "A wing of nbs/ and of the package"

    place: float  # among the numbers of the top level: it may import what is below, and be imported from above
    without: tuple[str, ...] = ()  # folders and libraries that it never imports, however deep


# The one table of folders. A module imports lower numbers of its own folder, and folders that stand lower.
FOLDERS = {
    "record": Folder(9, without=("torch",)),
    "images": Folder(19, without=("record",)),
    "processes": Folder(19.5, without=("record",)),
    "judge": Folder(59, without=("record",)),
    "weights": Folder(59.5, without=("record",)),
    "pipeline": Folder(62.3, without=("record",)),
    "vae": Folder(62.5, without=("record",)),
    "analysis": Folder(69, without=("record",)),
    "sweep": Folder(72.5),
    "jobs": Folder(72.7, without=("torch",)),
}
# At the top level, the pages between these numbers (both included) never import the record.
HEART = ((20, 51), (60, 62))
# Names in a config become objects in these modules and nowhere else.
RESOLVES = ("lab",)
# Hand-written modules and their places: plumbing whose tests are in tests/
PLAIN = {"errors": -3, "strict_yaml": -2, "durable": -1, "pm_engine": 6, "all": 100}
PLAIN |= {"capture": 69.1, "own_code": 69.2, "rank": 72.1}


def pages(root: Path) -> list[Path]:
    "Every notebook, relative to nbs/; hidden and generated ones are left out"
    found = sorted(p.relative_to(root / "nbs") for p in (root / "nbs").rglob("*.ipynb"))
    return [p for p in found if not any(part.startswith((".", "_")) for part in p.parts)]


def modules(root: Path) -> dict[str, Path]:
    "Every module by its dotted name inside the package: `record.git`"
    package = root / "minsnr_nb"
    files = (p for p in sorted(package.rglob("*.py")) if not p.stem.startswith("_"))
    return {".".join(p.relative_to(package).with_suffix("").parts): p for p in files}


def module_of(page: Path) -> str | None:
    "The dotted name of the module that a page is meant to export, None for a page without a number"
    numbered = re.fullmatch(r"\d\d_(\w+)", page.stem)
    return ".".join([*page.parent.parts, numbered[1]]) if numbered else None


def places(root: Path) -> dict[str, tuple[float, float]]:
    "Where every module stands: (place of its folder or its own number, number inside the folder)"
    found = {name: (float(place), 0.0) for name, place in PLAIN.items()}
    for page in pages(root):
        if name := module_of(page):
            number, folder = float(page.stem[:2]), page.parent.as_posix()
            if folder == ".":
                found[name] = (number, 0.0)
            elif folder in FOLDERS:
                found[name] = (FOLDERS[folder].place, number)
    return found


def main(findings: Callable[[Path], Iterable[str]]) -> None:
    "Print one line per finding; exit 1 when there is any"
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    found: list[str] = list(findings(root))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)


def twice(items: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    "Keys that occur again: (key, first place, later place)"
    seen: dict[str, str] = {}
    for key, place in items:
        if key in seen:
            yield key, seen[key], place
        seen.setdefault(key, place)
