"""Write the parts of the pages that are facts of the code: lanes, layout, settings, provenance, suffixes, licences.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; what is between them is replaced.

usage: python tools/generate_docs.py [--check]
"""

import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from _report import FOLDERS, ROOT, pages

PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)


def table(head: list[str], rows: list[list[str]]) -> str:
    "A Markdown table"
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def layout() -> str:
    "Every entry of a run directory"
    from minsnr_nb.record.directory import LAYOUT

    path = lambda e: f"`{e.path}{'/' * (e.kind == 'dir')}`"  # noqa: E731
    rows = [[path(e), " and ".join(e.contract), e.meaning] for e in LAYOUT]
    return table(["Path", "Contract", "What it is"], rows)


def tree() -> str:
    "A run directory as a tree, for a first look"
    from minsnr_nb.record.directory import LAYOUT

    width = max(len(e.path) for e in LAYOUT) + 4
    lines = [f"  {(e.path + '/' * (e.kind == 'dir')).ljust(width)}{e.meaning}" for e in LAYOUT]
    lines = [line.replace("`", "") for line in lines]
    return "\n".join(["```", "runs/<project>/<YYYY-MM-DD_HH-MM-SS>_<git hash>/", *lines, "```", ""])


def lanes() -> str:
    "Every lane: its registry, its section, and its entries"
    from minsnr_nb.lab import LANES

    rows = []
    for section, registry in LANES.items():
        homes = {entry.__module__ for _, entry in registry.items()}
        (name,) = {k for m in homes for k, v in vars(sys.modules[m]).items() if v is registry}
        rows.append([registry.lane, f"`{name}`", f"`{section}`", ", ".join(registry)])
    return table(["Lane", "Registry", "Section", "Entries"], rows)


def commands() -> str:
    "Every verb: how it is typed, and what it does"
    from minsnr_nb.cli import VERBS

    said = [(run.__doc__ or "").split(": ", 1) for run in VERBS.values()]
    rows = [[f"`{usage.split(', or ')[0]}`", about] for about, usage in said]
    return table(["Command", "What it does"], rows)


def settings() -> str:
    "Every key of a config"
    from minsnr_nb.lab import config_help

    rows = [r for r in config_help() if "key" in r]
    cells = [[f"`{r['key']}`", r["default"], r["allowed"], r["meaning"]] for r in rows]
    plain = [[c.replace(" | ", ", ").replace(", see below", "") for c in row] for row in cells]
    return table(["Key", "Default", "Allowed", "What it decides"], plain)


def provenance() -> str:
    "What every stamp must say"
    from minsnr_nb.record.checks import NEEDED

    return table(["Key", "Type"], [[f"`{k}`", kind.__name__] for k, kind in NEEDED.items()])


def blocked() -> str:
    "What the checks keep out of git, and out of a run"
    from hygiene import BANNED

    from minsnr_nb.guard import PICKLES

    listed = lambda names: " ".join(f"`{n}`" for n in sorted(names))  # noqa: E731
    return f"Never in git: {listed(BANNED)}\n\nNever in a run: {listed(PICKLES)}\n"


def folders() -> str:
    "The folders of nbs/ with their pages"
    import json

    def line(page: Path) -> str:
        cells = json.loads((ROOT / "nbs" / page).read_text("utf-8"))["cells"]
        text = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        said = re.search(r"^> (.+)", text, re.M)
        return f"| `{page.with_suffix('')}` | {said[1] if said else ''} |\n"

    out = []
    for folder in (".", *FOLDERS):
        mine = [p for p in pages(ROOT) if p.parent.as_posix() == folder]
        name = f"nbs/{folder}" if folder != "." else "nbs"
        out.append(
            f"**`{name}/`**\n\n| Page | What it has |\n|---|---|\n{''.join(map(line, mine))}"
        )
    return "\n".join(out)


def licences() -> str:
    "The libraries that the package asks for, with their licences"
    rows = []
    for need in metadata.requires("minsnr_nb") or []:
        name = re.findall(r"^[\w.-]+", need)[0]
        try:
            about = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        said = about.get("License-Expression") or next(
            (c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if "License ::" in c),
            (about.get("License") or "see its page").splitlines()[0][:60],
        )
        rows.append([name, said])
    return table(["Library", "Licence"], sorted(map(list, {tuple(r) for r in rows})))


PARTS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (layout, tree, lanes, commands, settings, provenance, blocked, folders, licences)
}


def findings(root: Path, write: bool) -> list[str]:
    "Bring every page up to date, or say which is not"
    found = []
    texts = [*root.glob("*.md"), *root.glob("nbs/*.qmd"), *root.glob("nbs/docs/*.qmd")]
    for path in sorted(texts):
        old = path.read_text("utf-8")
        new = PART.sub(lambda m: m[1] + PARTS[m[2]]() + m[3], old)
        if new != old and write:
            path.write_text(new, "utf-8")
        elif new != old:
            found.append(f"{path.relative_to(root)}: run python tools/generate_docs.py")
    return found


if __name__ == "__main__":
    lines = findings(ROOT, write="--check" not in sys.argv)
    print(*lines, sep="\n", end="\n" if lines else "")
    sys.exit(1 if lines else 0)
