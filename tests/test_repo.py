"The repository itself: the checks of tools/ pass on it, and each goes red on a copy that is broken on purpose"

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import _report  # noqa: E402
import check_layers  # noqa: E402
import check_nbs  # noqa: E402
import check_site  # noqa: E402
import docs_sync_check  # noqa: E402
import generate_docs  # noqa: E402
import hygiene  # noqa: E402

CHECKS = {"layers": check_layers, "nbs": check_nbs, "docs": docs_sync_check, "hygiene": hygiene}
SITE = {"site": check_site}  # slower than the others


@pytest.mark.parametrize("name", CHECKS)
def test_repo_repository(name):
    assert list(CHECKS[name].findings(ROOT)) == []


def test_repo_generated_parts_of_the_pages_are_current():
    assert generate_docs.findings(ROOT, write=False) == []


def test_repo_settings_ini_stays_inert():
    "Without this table nbdev would read settings.ini, which belongs to the kit"
    assert "[tool.nbdev]" in (ROOT / "pyproject.toml").read_text("utf-8")


def test_repo_a_check_is_a_command(tmp_path):
    "One line per finding on stdout, exit code 1; silence and 0 otherwise"
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    command = [sys.executable, ROOT / "tools/hygiene.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "weights.pt").write_bytes(b"")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "weights.pt: .pt files do not belong in git\n")


PAGES = sorted(_report.modules(ROOT).keys() - _report.PLAIN.keys())


@pytest.mark.parametrize("name", PAGES)
def test_repo_the_site_can_show_every_signature(name):
    "nbdev_docs evaluates each annotation; one that names what is only imported for type checkers ends it"
    module = importlib.import_module(f"minsnr_nb.{name}")
    own = [o for o in vars(module).values() if getattr(o, "__module__", "") == module.__name__]
    methods = [m for o in own if isinstance(o, type) for m in vars(o).values()]
    for thing in own + methods:
        if inspect.isfunction(thing):
            inspect.signature(thing, eval_str=True)
            typing.get_type_hints(thing)


def cell(kind: str, source: str, id: str) -> dict:
    "A cell of a notebook, as a clean one is stored"
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": id, "metadata": {}, "source": source.splitlines(True)} | code


KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
WING = {
    "cells": [
        cell("code", "#| default_exp analysis.wing", "aaaaaaaa"),
        cell("markdown", "# A wing\n\n> One room", "bbbbbbbb"),
        cell("markdown", "Why there is a wing.", "cccccccc"),
        cell("code", '#| export\ndef one() -> int:\n    "Give one"\n    return 1', "dddddddd"),
    ],
    "metadata": {"kernelspec": KERNEL},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@pytest.fixture(scope="session")
def _house(tmp_path_factory) -> Path:
    "Two notebooks with their modules, exported, as a repository of its own"
    house = tmp_path_factory.mktemp("house")
    names = "pyproject.toml nbs/00_config.ipynb nbs/01_registry.ipynb nbs/analysis/10_wing.ipynb"
    plain = "minsnr_nb/durable.py minsnr_nb/errors.py minsnr_nb/strict_yaml.py"
    for name in f"{names} {plain}".split():
        (house / name).parent.mkdir(exist_ok=True)
        if name.endswith("wing.ipynb"):
            (house / name).write_text(json.dumps(WING, indent=1, sort_keys=True) + "\n")
            continue
        shutil.copy(ROOT / name, house / name)
    (house / ".gitignore").write_text("__pycache__/\n")
    (house / "minsnr_nb/__init__.py").write_text('"A house"\n\n__version__ = "0"\n')
    (house / "README.md").write_text(
        "# House\n\n<!-- shared: a -->\n`uv run pytest`\n<!-- end -->\n"
    )
    keys = (ROOT / "nbs/docs/reference.qmd").read_text("utf-8")
    keys = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", keys)  # links lead to pages that are not here
    said = "\n".join(line for line in keys.splitlines() if re.match(r"\| `[a-z]+[.`]", line))
    (house / "nbs/index.qmd").write_text(
        (house / "README.md").read_text() + f"\n`minsnr list` `minsnr train`\n\n{said}\n"
    )
    contents = "[index.qmd, 00_config.ipynb, {section: S, contents: [01_registry.ipynb, analysis/10_wing.ipynb]}]"
    (house / "_quarto.yml").write_text(f"website: {{sidebar: {{contents: {contents}}}}}\n")
    (house / "nbs/_quarto.yml").symlink_to("../_quarto.yml")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=house, env=env, check=True)
    subprocess.run(["git", "init", "-q"], cwd=house, check=True)
    return house


@pytest.fixture
def house(_house, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(docs_sync_check, "verbs", lambda root: {"list", "train"})
    return shutil.copytree(_house, tmp_path / "house", symlinks=True)


def test_repo_the_house_is_in_order(house):
    "The control: what goes red below is green before it is broken"
    assert {name: list(check.findings(house)) for name, check in CHECKS.items()} == dict.fromkeys(
        CHECKS, []
    )


def add(name: str, content: str | bytes):
    "Break a house by appending to a file, or adding one"

    def broken(house: Path) -> None:
        path = house / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes((path.read_bytes() if path.exists() else b"") + data)

    return broken


def edit(change):
    "Break a house by changing its first notebook"

    def broken(house: Path) -> None:
        path = house / "nbs/00_config.ipynb"
        nb = json.loads(path.read_text("utf-8"))
        change(nb)
        path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n")

    return broken


def unsaid(word: str):
    "Break a house by taking a word out of its reference"

    def broken(house: Path) -> None:
        for page in house.glob("nbs/*.qmd"):
            page.write_text(page.read_text("utf-8").replace(word, ""))
        for page in house.glob("*.md"):
            page.write_text(page.read_text("utf-8").replace(word, ""))

    return broken


def copy_to(name: str):
    return lambda house: shutil.copy(house / "nbs/00_config.ipynb", house / f"nbs/{name}.ipynb")


def first_code(nb: dict) -> dict:
    return next(c for c in nb["cells"] if c["cell_type"] == "code")


def first_prose(nb):
    return next(c for c in nb["cells"] if c["cell_type"] == "markdown")


def only_headings(nb: dict) -> None:
    for c in nb["cells"]:
        if c["cell_type"] == "markdown":
            c["source"] = ["# Only a heading"]


def write_page(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(WING | {"cells": WING["cells"][1:3]}))


def output(**out):
    return edit(lambda nb: first_code(nb).update(outputs=[out]))


SAYS = {"name": "stdout", "output_type": "stream", "text": ["/home/somebody/data\n"]}
WARNS = {"name": "stderr", "output_type": "stream", "text": ["careful\n"]}

BROKEN = {
    "import upwards": (
        "layers",
        add("minsnr_nb/config.py", "from .registry import bind\n"),
        "not below",
    ),
    "hidden import upwards": (
        "layers",
        add("minsnr_nb/config.py", "def f():\n    import minsnr_nb.registry\n"),
        "not below",
    ),
    "dynamic import upwards": (
        "layers",
        add("minsnr_nb/config.py", "def f():\n    import_module('.registry', 'minsnr_nb')\n"),
        "not below",
    ),
    "a wing imports the record": (
        "layers",
        add("minsnr_nb/analysis/wing.py", "def f():\n    from ..record import git\n"),
        "never imports record",
    ),
    "the record imports torch": (
        "layers",
        lambda h: (
            add("minsnr_nb/record/new.py", "def f():\n    import torch\n")(h),
            write_page(h / "nbs/record/10_new.ipynb"),
        ),
        "record never imports torch",
    ),
    "a wing imports upwards": (
        "layers",
        add("minsnr_nb/registry.py", "def f():\n    from .analysis.wing import one\n"),
        "not below",
    ),
    "a number twice": (
        "layers",
        lambda h: shutil.copy(h / "nbs/01_registry.ipynb", h / "nbs/00_other.ipynb"),
        "a number occurs once",
    ),
    "a name twice": (
        "layers",
        lambda h: (h / "minsnr_nb/analysis/wing.py").write_text(
            "__all__ = ['nearest']\nnearest = 1\n"
        ),
        "public name of",
    ),
    "an unlisted name": ("layers", add("minsnr_nb/config.py", "def new(): ...\n"), "lacks new"),
    "an undeclared library": (
        "layers",
        add("minsnr_nb/config.py", "def f():\n    import selenium\n"),
        "not in pyproject",
    ),
    "a name of the config resolved": (
        "layers",
        add("minsnr_nb/registry.py", "def _f(r, cfg):\n    return r.bind(cfg.loss.name)\n"),
        "resolves a name",
    ),
    "broken import": (
        "layers",
        add("minsnr_nb/config.py", "import nowhere\n"),
        "cannot be imported",
    ),
    "module of no layer": ("layers", add("minsnr_nb/extra.py", "x = 1\n"), "no notebook"),
    "early pandas": ("layers", add("minsnr_nb/registry.py", "import pandas as pd\n"), "at the top"),
    "early torch": ("layers", add("minsnr_nb/registry.py", "import torch\n"), "imports torch"),
    "pickle": ("layers", add("minsnr_nb/config.py", "def f():\n    import pickle\n"), "no pickle"),
    "torch.save": (
        "layers",
        add("minsnr_nb/config.py", "def f():\n    torch.save(1, 'x')\n"),
        "is a pickle",
    ),
    "evaluated text": (
        "layers",
        add("minsnr_nb/config.py", "def f(x):\n    return eval(x)\n"),
        "nothing is run",
    ),
    "import by a name that was read": (
        "layers",
        add("minsnr_nb/config.py", "def f(x):\n    return importlib.import_module(x)\n"),
        "nothing is run",
    ),
    "objects in arrays": (
        "layers",
        add("minsnr_nb/config.py", "def f(x):\n    return np.load(x, allow_pickle=True)\n"),
        "must stay False",
    ),
    "careless YAML": (
        "layers",
        add("minsnr_nb/config.py", "def f(x):\n    return yaml.unsafe_load(x)\n"),
        "strict reader",
    ),
    "second writer": (
        "layers",
        add("minsnr_nb/config.py", "def f():\n    open('x', mode='ab')\n"),
        "only durable",
    ),
    "second remover": (
        "layers",
        add("minsnr_nb/config.py", "def f():\n    Path('x').unlink()\n"),
        "only durable",
    ),
    "edited module": ("nbs", add("minsnr_nb/config.py", "x = 1\n"), "run nbdev_export"),
    "orphan module": ("nbs", add("minsnr_nb/orphan.py", "x = 1\n"), "no notebook exports it"),
    "two notebooks, one module": ("nbs", copy_to("02_config"), "as 00_config.ipynb does"),
    "stem and module differ": ("nbs", copy_to("02_settings"), "the stem of its"),
    "long export": (
        "nbs",
        edit(lambda nb: first_code(nb).update(source=["#| export\n"] + ["x = 1\n"] * 26)),
        "at most 25",
    ),
    "prose beside the title": (
        "nbs",
        edit(lambda nb: first_prose(nb)["source"].append("\n\nLost words.")),
        "more than title and description",
    ),
    "name without a place": ("nbs", copy_to("scratch"), "neither NN_module nor study_name"),
    "unclean notebook": (
        "nbs",
        edit(lambda nb: first_code(nb)["metadata"].update(collapsed=True)),
        "run nbdev_clean",
    ),
    "other kernel": (
        "nbs",
        edit(lambda nb: nb["metadata"]["kernelspec"].update(name="mine")),
        "kernelspec",
    ),
    "huge notebook": (
        "nbs",
        edit(lambda nb: nb["cells"][1]["source"].append("words " * 50_000)),
        "at most 300000",
    ),
    "stored warning": ("nbs", output(**WARNS), "stored stderr"),
    "code without prose": (
        "nbs",
        edit(lambda nb: nb.update(cells=[c for c in nb["cells"] if c["cell_type"] == "code"])),
        "0 markdown cells with prose",
    ),
    "headings without prose": ("nbs", edit(lambda nb: only_headings(nb)), "0 markdown cells with"),
    "too many pages": (
        "nbs",
        lambda h: [write_page(h / f"nbs/{n}_page.ipynb") for n in range(50, 84)],
        "at most 32, the rest",
    ),
    "no export": (
        "nbs",
        edit(lambda nb: first_code(nb)["source"].append("\n#| export\nfrom . import x")),
        "export fails",
    ),
    "no notebooks": (
        "nbs",
        lambda h: [p.unlink() for p in h.rglob("nbs/**/*.ipynb")],
        "no notebooks",
    ),
    "missing command": ("docs", add("README.md", "`uv run nbdev_fly`\n"), "no such command"),
    "missing verb": ("docs", add("README.md", "```\nminsnr levitate RUN\n```\n"), "no such verb"),
    "missing file": ("docs", add("README.md", "`uv run python tools/none.py`\n"), "no such file"),
    "missing notebook": ("docs", add("README.md", "`37_nowhere`\n"), "no such notebook"),
    "a key on no page": ("docs", unsaid("`train.steps`"), "key `train.steps` is on no page"),
    "a verb on no page": ("docs", unsaid("`minsnr train`"), "verb `minsnr train` is on no page"),
    "missing test": ("docs", add("nbs/docs/problems.qmd", "`test_nobody_wrote`\n"), "no such test"),
    "missing registry": ("docs", add("README.md", "`POTIONS`\n"), "no module defines"),
    "missing module": ("docs", add("README.md", "`minsnr_nb.confg.Config`\n"), "no such module"),
    "missing name": ("docs", add("README.md", "`minsnr_nb.config.Confg`\n"), "no such name"),
    "missing name in an import": (
        "docs",
        add(
            "nbs/index.qmd",
            "```python\nfrom minsnr_nb.config import (\n    Config,\n    X as Y,\n)\n```\n",
        ),
        "`minsnr_nb.config.X`: minsnr_nb.config has no such name",
    ),
    "a function without a line": (
        "docs",
        add("minsnr_nb/registry.py", "\n\ndef load_plugins(x):\n    return x\n"),
        "load_plugins: say in one line",
    ),
    "a class with a story": (
        "docs",
        add("minsnr_nb/registry.py", "\n\nclass Registry:\n    'One.\\n\\nTwo'\n"),
        "Registry: say in one line",
    ),
    "missing key": ("docs", add("README.md", "`train.stpes=3`\n"), "no such key"),
    "dead link": ("docs", add("nbs/index.qmd", "[here](nowhere.ipynb)\n"), "no such file"),
    "dead anchor": ("docs", add("nbs/index.qmd", "[here](#nowhere)\n"), "no heading"),
    "picture without words": ("docs", add("nbs/index.qmd", "![](x.png)\n"), "alternative text"),
    "formula escaped twice": ("docs", add("nbs/index.qmd", "$$a\\\\,b$$\n"), "escaped twice"),
    "dead link in a notebook": (
        "docs",
        edit(lambda nb: nb["cells"][1]["source"].append("\n[here](nowhere.ipynb)")),
        "no such file",
    ),
    "front pages differ": (
        "docs",
        add("README.md", "<!-- shared: b -->\nonly here\n<!-- end -->\n"),
        "not the same",
    ),
    "page outside the sidebar": ("docs", add("nbs/docs/lost.qmd", "# Lost\n"), "missing from the"),
    "page that is gone": ("docs", lambda h: (h / "nbs/01_registry.ipynb").unlink(), "is not there"),
    "two site files": (
        "docs",
        lambda h: ((h / "nbs/_quarto.yml").unlink(), add("nbs/_quarto.yml", "website: {}")(h)),
        "is not _quarto.yml",
    ),
    "weights": ("hygiene", add("a/net.safetensors", b""), "do not belong"),
    "disguised weights": (
        "hygiene",
        add("net.txt", b"\x40" + bytes(7) + b'{"w":1}'),
        "safetensors",
    ),
    "disguised pickle": ("hygiene", add("notes.txt", b"\x80\x04\x95data"), "is a pickle"),
    "disguised archive": ("hygiene", add("notes.md", b"PK\x03\x04"), "is a zip archive"),
    "big file": ("hygiene", add("table.csv", b"1,2\n" * 300_000), "at most"),
    "uv.lock": ("hygiene", add("uv.lock", "version = 1\n"), "made locally"),
    "a run": ("hygiene", add("runs/p/2026-01-01_00-00-00_abcdefg/metrics.json", "{}"), "stays on"),
    "a run elsewhere": ("hygiene", add("x/r/meta/provenance.json", "{}"), "part of a run"),
    "a checkpoint elsewhere": ("hygiene", add("x/ckpts/last/CURRENT.json", "{}"), "part of a run"),
    "a model": ("hygiene", add("models/a/1/card.json", "{}"), "stay out of git"),
    "an environment": ("hygiene", add("nbs/.env", "TOKEN=1"), "secrets"),
    "a big output": (
        "hygiene",
        edit(lambda nb: first_code(nb).update(outputs=[{"text": ["x" * 200_000]}])),
        "stored outputs",
    ),
    "address in the lock": (
        "hygiene",
        add("requirements.lock", "-i https://example.org\n"),
        "address",
    ),
    "home in an output": ("hygiene", output(**SAYS), "names /home/somebody"),
    "secret": ("hygiene", add("notes.md", "AKIA" + "A1B2C3D4" * 2), "looks like a secret"),
    "password in an address": (
        "hygiene",
        add("notes.md", "https://me:tok" + "en@git.somewhere.org/x.git"),
        "looks like a secret",
    ),
    "password of an example": (
        "hygiene",
        add("notes.md", "https://me:tok" + "en@example.org/x.git"),
        "in two parts",
    ),
    "conflict": ("hygiene", add("README.md", "<<<" + "<<<< ours\n"), "merge conflict"),
    "link that leaves": (
        "hygiene",
        lambda h: (h / "out").symlink_to("/etc"),
        "leaves the repository",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_repo_goes_red(case, house):
    check, broken, expected = BROKEN[case]
    broken(house)
    found = list(CHECKS[check].findings(house))
    assert any(expected in line for line in found), found
    assert all("\n" not in line for line in found)


def test_repo_the_site_says_what_the_pages_say(house):
    "Prose beside a title is lost in processing; the check that looks at the processed pages says which"
    assert list(check_site.findings(house)) == []
    edit(lambda nb: first_prose(nb)["source"].append("\n\nLost words."))(house)
    assert "nbs/00_config.ipynb: the site loses 'Lost words.'…" in list(check_site.findings(house))
