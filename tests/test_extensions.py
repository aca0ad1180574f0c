"Own code: it travels with the run, it runs only where it is trusted, and it never goes astray."

import json
import linecache
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from minsnr_nb import lab
from minsnr_nb.cli import VERBS
from minsnr_nb.config import config_sha256, dump
from minsnr_nb.errors import ConfigError
from minsnr_nb.minsnr_loss import WEIGHTINGS
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.state import set_status
from minsnr_nb.record.trust import code_hash, stored_code
from minsnr_nb.registry import load_plugins
from minsnr_nb.sweep.plan import declared, read_plan
from tests.runs import BIN, ROOT, SMALL, digests, environment, minsnr, run_dir, typed

OWN = """\
import os
import re
from pathlib import Path

from minsnr_nb.minsnr_loss import WEIGHTINGS

if place := os.environ.get("CANARY"):
    Path(place).touch()


@WEIGHTINGS.register
def my_loss(snr, *, power: float = 0.5):
    "SNR to a power"
    return snr**power
"""
NAMED = SMALL.replace("{name: min_snr, gamma: 5.0}", "{name: my_loss, power: 0.7}")
CELLS = [
    """
import math
import torch
import torch.nn.functional as F
from dataclasses import dataclass
from torch import Tensor
from minsnr_nb.api import train_run
from minsnr_nb.callbacks import CALLBACKS
from minsnr_nb.config import Positive
from minsnr_nb.metrics import METRICS
from minsnr_nb.minsnr_loss import WEIGHTINGS
from minsnr_nb.train_loop import Callback
unrelated = torch.zeros(3)
""",
    """
SCALE = 2.0

@dataclass
class Bend:
    scale: float = SCALE

def softly(x):
    return F.softplus(x) * Bend().scale
""",
    """
@WEIGHTINGS.register
def mine(
    snr: "Tensor",  # Signal-to-noise ratio
    *,
    gamma: Positive = 5.0,  # Where it levels off
) -> Tensor:
    "levels off softly"
    return softly(snr.clamp(max=gamma)) * math.cos(0)

@METRICS.register
def brightness(samples, reference) -> dict[str, float]:
    "mean of all pixels"
    return {"brightness": float(samples.float().mean())}

@CALLBACKS.register("seen")
class Seen(Callback):
    "counts images"
    order = 25

    def after_step(self, loop, result):
        loop.scalars["train/seen"] = float(result.step * SCALE)
""",
    """
run = train_run({
    "project": "tests", "model": {"name": "mlp", "width": 32}, "loss": {"name": "mine"},
    "train": {"steps": 12, "batch_size": 32, "log_every": 4, "checkpoint_every": 3},
    "eval": {"every": 6, "samples": 20, "probe_images": 16, "probe_draws": 1},
    "sampler": {"name": "ddim", "steps": 4}, "metrics": [{"name": "brightness"}],
    "callbacks": [{"name": n} for n in ("seen", "log_events", "sample_grid", "evaluate", "checkpoint")],
}, run_root=ROOT, device="cpu")
print(f"RUN_DIR: {run.path}")
""",
]
NOTEBOOK = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.user_ns["ROOT"] = sys.argv[1]
for cell in json.loads(sys.argv[2]):
    assert shell.run_cell(cell).success
"""


@pytest.fixture(autouse=True)
def trust(tmp_path, monkeypatch):
    "Another user each time: nobody's own list of trusted code is read or written"
    from minsnr_nb.record import trust

    monkeypatch.setenv("MINSNR_TRUST", str(tmp_path / "trusted.json"))
    monkeypatch.setattr(trust, "_HERE", set())
    return tmp_path / "trusted.json"


def elsewhere(folder: Path, **more) -> dict:
    return environment(MINSNR_TRUST=str(folder / "theirs.json"), **more)


@pytest.fixture(scope="module")
def celled(tmp_path_factory):
    "A run with three entries from the cells of a notebook, made in a process that is gone"
    root = tmp_path_factory.mktemp("celled")
    command = [sys.executable, "-c", NOTEBOOK, str(root / "runs"), json.dumps(CELLS)]
    done = subprocess.run(
        command, cwd=ROOT, env=elsewhere(root), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir(done.stdout)


@pytest.fixture(scope="module")
def filed(tmp_path_factory):
    "A run with a file of own code, made in a process that is gone; the original file is gone, too"
    root = tmp_path_factory.mktemp("filed")
    (root / "my_loss.py").write_text(OWN)
    (root / "named.yaml").write_text(f"extensions: [my_loss.py]\n{NAMED}")
    done = minsnr("train", root / "named.yaml", "--run-root", root / "runs", env=elsewhere(root))
    assert done.returncode == 0, done.stderr
    (root / "my_loss.py").write_text("raise SystemExit('the original file was run')")
    return run_dir(done.stdout)


def moved(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to / "moved" / "tests" / run.name)


def hash_of(run: Path) -> str:
    return code_hash(stored_code(run))


# --- it travels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["celled", "filed"])
def test_extensions_own_code_survives_a_new_process_and_a_move(which, request, tmp_path, capsys):
    run = moved(request.getfixturevalue(which), tmp_path)
    assert [c.message for c in check_run(run) if not c.ok] == []
    done = typed(capsys, "resume", run, "--trust-code", hash_of(run))
    assert done.returncode == 0, done.stderr
    for words in (
        ("eval", run),
        ("sample", run, "--n", 4),
        ("fork", run, "train.steps=14"),
        ("continue", run, "--steps", 14),
        ("promote", run, "mine"),
    ):
        models = {"MINSNR_MODELS": str(tmp_path / "models")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(*next(iter(models.items())))
            done = typed(capsys, *words)
        assert done.returncode == 0, (words, done.stderr)
        if words[0] in ("fork", "continue"):
            child = run_dir(done.stdout)
            assert stored_code(child) == stored_code(run) and check_run(child)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINSNR_MODELS", str(tmp_path / "models"))
        done = typed(capsys, "sample", "local://mine", "--n", 4, "--out", tmp_path)
        assert done.returncode == 0, done.stderr
    assert [c.message for c in check_run(run) if not c.ok] == []


def test_extensions_a_killed_run_ends_with_the_same_bytes(celled, tmp_path, capsys):
    run = moved(celled, tmp_path)
    want = digests(run)
    newest = json.loads((run / "ckpts/last/CURRENT.json").read_text())["dir"]
    shutil.rmtree(run / "ckpts/last" / newest)
    status = json.loads((run / "meta/status.json").read_text()) | {"state": "interrupted"}
    (run / "meta/status.json").write_text(json.dumps(status | {"step": 9}))
    done = typed(capsys, "resume", run, "--trust-code", hash_of(run))
    assert done.returncode == 0, done.stderr
    assert digests(run) == want and len(list((run / "meta/attempts").iterdir())) == 2


def test_extensions_another_clone_repeats_it_bit_by_bit(celled, tmp_path):
    "In a clone of another user, who trusts nothing yet"
    run, clone = moved(celled, tmp_path), tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--shared", ROOT, clone], check=True)
    env = elsewhere(tmp_path, PYTHONPATH=str(clone))
    refused = minsnr("repro", run, "--verify", "--here", cwd=clone, env=env)
    assert refused.returncode == 2 and hash_of(run) in refused.stderr
    done = minsnr(
        "repro", run, "--verify", "--here", "--trust-code", hash_of(run), cwd=clone, env=env
    )
    assert done.returncode == 0 and "identical to step 12" in done.stdout, done.stderr


def test_extensions_the_record_of_own_code(filed, celled):
    for run, name, origin in ((filed, "my_loss.py", "file"), (celled, "cells.py", "cell")):
        (facts,) = open_run(run).provenance()["extensions"]
        assert (facts["name"], facts["origin"]) == (name, origin)
        file = run / facts["path"]
        assert file == run / "meta/extensions" / name and not file.stat().st_mode & 0o222
        for config in ("config.yaml", "config.resolved.yaml"):
            assert f"extensions:\n- {name}\n" in (run / config).read_text()
    assert (filed / "meta/extensions/my_loss.py").read_text() == OWN
    assert "unrelated" not in (celled / "meta/extensions/cells.py").read_text()


def test_extensions_a_config_without_own_code_has_the_hash_it_always_had():
    cfg = lab.load({}).cfg
    assert "extensions" not in dump(cfg)
    assert len(config_sha256(cfg)) == 64


def test_extensions_an_absolute_path_becomes_content(tmp_path, capsys):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/my_loss.py").write_text(OWN)
    (tmp_path / "named.yaml").write_text(NAMED)
    asked = f"extensions=[{tmp_path}/far/my_loss.py]"
    done = typed(capsys, "train", tmp_path / "named.yaml", asked, "--run-root", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    run = run_dir(done.stdout)
    assert [c.message for c in check_run(run) if not c.ok] == []
    assert str(tmp_path) not in (run / "config.yaml").read_text()


def test_extensions_a_resume_with_a_config_wants_the_same_code(tmp_path, capsys):
    config, own = tmp_path / "named.yaml", tmp_path / "my_loss.py"
    own.write_text(OWN)
    config.write_text(f"extensions: [my_loss.py]\n{NAMED}")
    run = run_dir(typed(capsys, "train", config, "--run-root", tmp_path / "runs").stdout)
    assert typed(capsys, "train", config, "--resume", run).returncode == 0
    own.write_text(OWN + "raise SystemExit('was run')")
    done = typed(capsys, "train", config, "--resume", run)
    assert done.returncode == 2 and "my_loss.py: has changed since the run began" in done.stderr
    own.unlink()
    assert typed(capsys, "train", config, "--resume", run).returncode == 0


def test_extensions_two_files_of_one_name_do_not_mix(tmp_path):
    sources = {}
    for power in (1, 2):
        folder = tmp_path / str(power)
        folder.mkdir()
        (folder / "own.py").write_text(
            "from minsnr_nb.minsnr_loss import WEIGHTINGS\n"
            f"@WEIGHTINGS.register\ndef own(snr):\n    return snr**{power}\n"
        )
        (folder / "c.yaml").write_text("extensions: [own.py]\nloss: {name: own}\n")
        sources[power] = lab.load(folder / "c.yaml").cfg
    labs = {power: lab.build(cfg, "cpu") for power, cfg in sources.items()}
    one, two = (labs[power].objective.weight.double() for power in (1, 2))
    snr = labs[1].evaluator.schedule.snr
    assert torch.allclose(two / one, snr.double().to(two), rtol=1e-4)
    assert "own" not in WEIGHTINGS


# --- it is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:\n", "own.py:1: invalid syntax"),
        ("\nimport sys\nsys.exit(0)\n", "own.py:3: SystemExit: 0"),
        ("x = 1\nraise ValueError('two\\nlines')\n", "own.py:2: ValueError: two lines"),
        ("from . import x\n", "a relative import leads nowhere"),
        ("import beside\n", "own.py:1: imports beside"),
        (
            "from minsnr_nb.minsnr_loss import WEIGHTINGS\n"
            "@WEIGHTINGS.register\ndef min_snr(snr): return snr\n",
            "'min_snr' is already defined (built in)",
        ),
    ],
)
def test_extensions_a_file_that_cannot_be_used_is_one_line(
    text, says, tmp_path, capsys, monkeypatch
):
    (tmp_path / "own.py").write_text(text)
    (tmp_path / "beside.py").write_text("x = 1\n")
    (tmp_path / "c.yaml").write_text(f"extensions: [own.py]\n{SMALL}")
    monkeypatch.syspath_prepend(tmp_path)
    done = typed(capsys, "train", tmp_path / "c.yaml", "--run-root", tmp_path / "runs")
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_extensions_a_file_is_found_or_its_places_are_named(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"extensions: [own.py]\n{SMALL}")
    done = typed(capsys, "train", tmp_path / "c.yaml", "--run-root", tmp_path / "runs")
    assert done.returncode == 2 and "extensions: no file 'own.py'" in done.stderr


def run_cell(source: str, names: dict) -> dict:
    "Execute a text as a cell of a notebook does"
    place = f"<cell {len(linecache.cache)}>"
    linecache.cache[place] = (len(source), None, source.splitlines(True), place)
    exec(compile(source, place, "exec"), names)
    return names


HEAD = """
import torch
from minsnr_nb.minsnr_loss import WEIGHTINGS
"""
WEIGHT = """
@WEIGHTINGS.register
def caught(snr):
    "a weighting"
    return {}
"""


@pytest.fixture
def notebook():
    yield {"__name__": "__main__"}
    for name in {"caught", "my_weighting"} & set(WEIGHTINGS):
        WEIGHTINGS.remove(name)


@pytest.mark.parametrize(
    ("given", "body", "says"),
    [
        ({"table": torch.ones(3)}, "snr * table.sum()", "uses 'table' (Tensor)"),
        ({"frame": pd.DataFrame({"a": [1]})}, "snr * frame.a[0]", "uses 'frame' (DataFrame)"),
        ({"array": np.ones(2)}, "snr * array[0]", "uses 'array' (ndarray)"),
        ({}, "snr * gone", "uses 'gone', which is not defined"),
    ],
)
def test_extensions_a_cell_that_cannot_stand_alone_is_refused(
    given, body, says, notebook, tmp_path
):
    from minsnr_nb.api import train_run

    run_cell(HEAD + WEIGHT.format(body), notebook | given)
    with pytest.raises(ConfigError) as e:
        train_run({"project": "tests", "loss": {"name": "caught"}}, run_root=tmp_path / "runs")
    assert says in str(e.value) and "name that file in `extensions`" in str(e.value)
    assert "\n" not in str(e.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("f = lambda x: x\n" + WEIGHT.format("f(snr)"), "uses 'f', which is a lambda"),
        ('WEIGHTINGS.register("caught")(lambda snr: snr)', "it is a lambda"),
        (
            "def make(n):\n    def caught(snr):\n        return snr * n\n    return caught\n"
            "WEIGHTINGS.register(make(3))",
            "is defined inside another function",
        ),
        (
            "import functools\ndef two(snr, n: int): return snr\n"
            "WEIGHTINGS.register('caught')(functools.partial(two, n=2))",
            "is a partial without source",
        ),
    ],
)
def test_extensions_a_definition_without_source_is_refused(cell, says, notebook):
    run_cell(HEAD + cell, notebook)
    with pytest.raises(ConfigError, match=says):
        lab.for_training(lab.load({"loss": {"name": "caught"}}))


def test_extensions_a_definition_from_nowhere_is_refused(notebook):
    exec(compile(HEAD + WEIGHT.format("snr"), "<nowhere>", "exec"), notebook)
    with pytest.raises(ConfigError, match="has no source"):
        lab.for_training(lab.load({"loss": {"name": "caught"}}))


def test_extensions_a_capture_is_tried_by_itself(notebook):
    wide = WEIGHT.replace("(snr)", '(snr, *, n: int = eval("hidden"))')
    run_cell(HEAD + wide.format("snr"), notebook | {"hidden": 3})
    with pytest.raises(ConfigError, match="by themselves: cells.py:.*NameError: name 'hidden'"):
        lab.for_training(lab.load({"loss": {"name": "caught"}}))


def test_extensions_a_cell_that_is_another_one_by_itself_is_refused(notebook):
    kind = '(snr, *, n: {"__main__": int}.get(__name__, float) = 1)'
    run_cell(
        HEAD + WEIGHT.replace("(snr)", kind.replace("{", "{{").replace("}", "}}")).format("snr"),
        notebook,
    )
    with pytest.raises(ConfigError, match="is another one when it stands alone"):
        lab.for_training(lab.load({"loss": {"name": "caught"}}))


def test_extensions_a_capture_holds_what_is_needed_and_nothing_else(notebook):
    run_cell(HEAD + "import math as m\nA, B, UNUSED = 2.0, [1, {'x': None}], 3\n", notebook)
    run_cell("def even(n): return n == 0 or odd(n - 1)\n", notebook)
    run_cell("def odd(n): return n > 0 and even(n - 1)\n", notebook)
    run_cell(WEIGHT.format("snr * A * m.pi if even(len(B)) else torch.relu(snr)"), notebook)
    loaded = lab.for_training(lab.load({"loss": {"name": "caught"}}))
    (file,) = loaded.cfg.code
    text = file.data.decode()
    for part in (
        "import math as m",
        "import torch\n",
        "A = 2.0",
        "B = [1, {'x': None}]",
        "def odd",
    ):
        assert text.count(part) == 1, text
    assert "UNUSED" not in text
    names = {"__name__": "alone"}
    WEIGHTINGS.remove("caught")
    exec(text, names)
    assert torch.equal(names["caught"](torch.ones(2)), notebook["caught"](torch.ones(2)))


def test_extensions_an_entry_that_was_registered_by_a_call_is_captured(notebook):
    run_cell(HEAD + "def plain(snr): return snr\nWEIGHTINGS.register('caught')(plain)\n", notebook)
    (file,) = lab.for_training(lab.load({"loss": {"name": "caught"}})).cfg.code
    assert "WEIGHTINGS.register('caught')(plain)" in file.data.decode()


def test_extensions_a_cell_run_again_is_captured_again(notebook):
    digests = set()
    for factor in (2, 3, 2):
        run_cell(HEAD + WEIGHT.format(f"snr * {factor}"), notebook)
        digests.add(lab.for_training(lab.load({"loss": {"name": "caught"}})).cfg.code[0].sha256)
    assert len(digests) == 2


def test_extensions_the_cells_of_the_readme_run(notebook, tmp_path, monkeypatch, capsys):
    "The weighting and the study with it, as a reader copies them; only shorter"
    text = (ROOT / "README.md").read_text()
    cells = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    monkeypatch.setenv("MINSNR_RUNS", str(tmp_path / "runs"))
    shorter = {
        '{"loss": {"name": "my_weighting", ': '{"train": {"steps": 20}, "loss": {"name": "my_weighting", '
    }
    shorter["steps=2000"] = "steps=20"
    for long, short in shorter.items():
        assert sum(long in cell for cell in cells) == 1, long
        cells = [cell.replace(long, short) for cell in cells]
    for cell in cells:
        run_cell(cell, notebook)
    assert notebook["study"].ids in capsys.readouterr().out


# --- it is not run by itself ----------------------------------------------------------------------

EXECUTES = {  # verb -> words after it; {run} is a stranger's run, {model} its promoted model
    "train": ["{run}/config.resolved.yaml", "--run-root", "{out}"],
    "resume": ["{run}"],
    "eval": ["{run}"],
    "sample": ["{run}", "--n", "4"],
    "fork": ["{run}", "train.steps=14", "--run-root", "{out}"],
    "continue": ["{run}", "--steps", "14", "--run-root", "{out}"],
    "repro": ["{run}", "--verify", "--here"],
    "promote": ["{run}", "stolen"],
    "cache": ["{run}/config.resolved.yaml"],
    "vae": ["eval", "{run}"],
    "picture": ["{run}", "invert", "--n", "2"],
    "ckpt convert": ["{run}", "--to", "diffusers", "--out", "{out}/folder"],
    "scales": ["{run}", "--n", "4"],
    "calibrate": ["{run}"],
}
READS = {
    "check": ["{run}"],
    "runs": ["--run-root", "{runs}"],
    "compare": ["{run}", "{run}", "--out", "{out}/compare.html"],
    "export": ["{run}", "--dest", "{out}"],
    "list": ["weightings"],
    "ckpt show": ["{run}"],
    "ckpt diff": ["{run}", "{run}"],
    "ckpt average": ["{run}", "{run}", "--out", "{out}/mean.safetensors"],
}
APART = {"smoke", "ask", "identify"}  # no run of somebody else's is loaded by them
APART |= {
    "data inspect",
    "data repair",
    "data card",
    "data buckets",
    "data loader-check",
}  # they read folders of pictures
APART |= {"run", *(f"queue {v}" for v in "add ls show mv rm stop retry work".split())}
# they start the other verbs, as processes
APART |= {"sweep", "verdict"}  # tried by themselves: their runs belong to a study


def test_extensions_every_verb_is_tried_against_a_stranger():
    assert set(VERBS) == {*EXECUTES, *READS, *APART}


@pytest.fixture
def stranger(filed, tmp_path, monkeypatch):
    "A run with a canary in it, on the machine of somebody who has not trusted it"
    run = moved(filed, tmp_path)
    monkeypatch.setenv("CANARY", str(tmp_path / "sang"))
    monkeypatch.setenv("MINSNR_MODELS", str(tmp_path / "models"))
    (tmp_path / "out").mkdir()
    put = {"run": run, "runs": run.parents[1], "out": tmp_path / "out"}
    return SimpleNamespace(
        run=run,
        words=lambda verb, words: [verb, *(w.format(**put) for w in words)],
        sang=(tmp_path / "sang").exists,
    )


@pytest.mark.parametrize("verb", EXECUTES)
def test_extensions_a_strangers_code_is_not_run(verb, stranger, capsys):
    before = sorted(p for p in stranger.run.rglob("*"))
    done = typed(capsys, *stranger.words(verb, EXECUTES[verb]))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "my_loss.py" in done.stderr and f"--trust-code {hash_of(stranger.run)}" in done.stderr
    assert not stranger.sang() and sorted(stranger.run.rglob("*")) == before
    done = typed(capsys, *stranger.words(verb, EXECUTES[verb]), "--trust-code", "0" * 64)
    assert done.returncode == 2 and "is not the hash" in done.stderr and not stranger.sang()


@pytest.mark.parametrize("verb", READS)
def test_extensions_reading_a_strangers_run_needs_no_trust(verb, stranger, capsys):
    done = typed(capsys, *stranger.words(verb, READS[verb]))
    assert done.returncode == 0, done.stderr
    assert not stranger.sang()


@pytest.mark.parametrize("verb", ["sweep", "verdict"])
def test_extensions_a_study_does_not_run_a_strangers_code(verb, stranger, tmp_path, capsys):
    "A run of somebody else's stands where a trial of ours should"
    arms = "{a: {loss: {gamma: 5.0}}, b: {loss: {gamma: 1.0}}}"
    (tmp_path / "mine.yaml").write_text(f"{SMALL}sweep: {{seeds: [0], baseline: a, arms: {arms}}}")
    plan = read_plan(tmp_path / "mine.yaml")
    for trial in plan.trials:
        (place := declared(plan, stranger.run.parents[1]) / trial.id).mkdir()
        (place / "run").write_text(f"tests/{stranger.run.name}\n")
    set_status(open_run(stranger.run), "interrupted", 6, 12)  # one that a sweep would go on with
    next(stranger.run.glob("meta/seal*")).unlink()
    done = typed(capsys, verb, tmp_path / "mine.yaml", "--run-root", stranger.run.parents[1])
    assert done.returncode in (1, 2) and not stranger.sang(), done.stdout
    assert "and the study asks for" in done.stderr.splitlines()[-1], done.stderr


def test_extensions_the_canary_can_sing(stranger):
    "Without trust it does not, with trust it does: the tests above could have failed"
    env = elsewhere(stranger.run.parents[2], CANARY=os.environ["CANARY"])
    assert minsnr("eval", stranger.run, env=env).returncode == 2 and not stranger.sang()
    key = hash_of(stranger.run)
    assert minsnr("eval", stranger.run, "--trust-code", key, env=env).returncode == 0
    assert stranger.sang()
    assert minsnr("sample", stranger.run, "--n", 4, env=env).returncode == 0  # trusted from now on


def test_extensions_a_strangers_model_is_not_run(filed, stranger, tmp_path, capsys):
    home = filed.parents[2]
    theirs = elsewhere(home, MINSNR_MODELS=str(tmp_path / "models"), CANARY="")
    assert minsnr("promote", filed, "canary", env=theirs).returncode == 0
    words = ("sample", "local://canary", "--n", 4, "--out", tmp_path / "out")
    done = typed(capsys, *words)
    assert done.returncode == 2 and hash_of(filed) in done.stderr and not stranger.sang()
    assert typed(capsys, *words, "--trust-code", hash_of(filed)).returncode == 0


@pytest.mark.parametrize("verb", EXECUTES)
def test_extensions_tampered_code_is_not_run_by_those_who_trusted_it(verb, filed, stranger, capsys):
    "The user's own list has the hash of what the run once held"
    from minsnr_nb.record.trust import trust

    trust(stored_code(stranger.run))
    file = stranger.run / "meta/extensions/my_loss.py"
    file.chmod(0o644)
    file.write_text(OWN.replace("**power", "**-power"))
    done = typed(capsys, *stranger.words(verb, EXECUTES[verb]))
    assert done.returncode == 2 and "is not the code that was recorded" in done.stderr
    assert not stranger.sang()
    assert ("AB.immutable", "meta/extensions/my_loss.py") in [
        (c.id, c.path) for c in check_run(stranger.run) if not c.ok
    ]


def test_extensions_added_code_is_found(stranger):
    (stranger.run / "meta/extensions/more.py").write_text("")
    bad = [(c.id, c.path) for c in check_run(stranger.run) if not c.ok]
    assert ("AB.immutable", "meta/extensions/more.py") in bad


@pytest.mark.parametrize("name", ["../../../x.py", "/etc/x.py", "x.txt", 3, None])
def test_extensions_names_in_provenance_are_not_followed(name, stranger, capsys):
    path = stranger.run / "meta/provenance.json"
    stamp = json.loads(path.read_text())
    stamp["extensions"][0]["name"] = name
    path.write_text(json.dumps(stamp))
    done = typed(capsys, "eval", stranger.run)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not stranger.sang()


def test_extensions_a_run_cannot_bring_its_own_list_of_trusted_code(
    stranger, tmp_path, capsys, monkeypatch
):
    place = tmp_path / "checkout"
    place.mkdir()
    (place / "settings.ini").write_text("[minsnr]\n")
    (place / "trusted.json").write_text(json.dumps({"trusted": {hash_of(stranger.run): {}}}))
    (place / ".env").write_text(f"MINSNR_TRUST={place}/trusted.json\n")
    monkeypatch.delenv("MINSNR_TRUST")
    monkeypatch.setattr(os, "environ", os.environ)
    done = minsnr("eval", stranger.run, cwd=place, env=environment() | {"HOME": str(tmp_path)})
    assert done.returncode == 2 and "MINSNR_TRUST: left out" in done.stderr
    assert not stranger.sang()


# --- plug-ins -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    "The example package, installed somewhere of its own"
    target = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(ROOT / "examples/minsnr_example", target / "source")
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    words = ["pip", "install", "-q", "--offline", "--no-deps", "--no-build-isolation"]
    where = ["--python", sys.executable, "--target", str(target / "site")]
    done = subprocess.run([*uv, *words, *where, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / "site"


def test_extensions_a_plug_in_trains_and_is_recorded(plugin, tmp_path):
    (tmp_path / "c.yaml").write_text(
        SMALL.replace("{name: min_snr, gamma: 5.0}", "{name: example_saturating, half: 2.0}")
        + "callbacks: [{name: example_largest}, {name: log_events}, {name: checkpoint}]\n"
    )
    env = environment(PYTHONPATH=str(plugin))
    words = ("train", tmp_path / "c.yaml", "train.steps=50", "--run-root", tmp_path / "runs")
    done = minsnr(*words, env=env)
    assert done.returncode == 0, done.stderr
    run = open_run(run_dir(done.stdout))
    assert run.provenance()["env"]["packages"]["minsnr-example"] == "0.1.0"
    assert "minsnr-example==0.1.0" in (run.path / "meta/pip_freeze.txt").read_text()
    assert '"example/largest"' in run.metrics_path.read_text()
    assert run.provenance()["extensions"] == []
    done = minsnr("list", "weightings", env=env)
    line = next(x for x in done.stdout.splitlines() if x.startswith("example_saturating"))
    assert "plug-in minsnr-example 0.1.0" in line and "built in" in done.stdout


@pytest.mark.parametrize(
    "body",
    ["raise SystemExit(3)", "raise ValueError('two\\nlines')", "import gone", "print('x'); 1/0"],
)
def test_extensions_a_broken_plug_in_is_one_line_from_every_command(body, tmp_path, filed):
    (tmp_path / "broken.py").write_text(body)
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[minsnr_nb.plugins]\nbroken = broken\n")
    env = elsewhere(filed.parents[2], PYTHONPATH=str(tmp_path))
    for words in (("list", "weightings"), ("check", filed), ("eval", filed)):
        done = minsnr(*words, env=env)
        told = [x for x in done.stderr.splitlines() if "broken" in x]
        assert done.returncode == 0 and len(told) == 1, done.stderr
        assert told[0].startswith("minsnr: plug-in 'broken' (broken) not loaded: ")
        assert not done.stdout.startswith("x")


def test_extensions_the_list_says_where_entries_come_from(tmp_path, capsys, notebook):
    (tmp_path / "my_loss.py").write_text(OWN)
    run_cell(HEAD + WEIGHT.format("snr"), notebook)
    done = typed(capsys, "list", "weightings", "--extension", tmp_path / "my_loss.py")
    rows = {x.split()[0]: x for x in done.stdout.splitlines()}
    assert "built in" in rows["min_snr"] and "extension my_loss.py" in rows["my_loss"]
    assert "  cell  " in rows["caught"] and "my_loss" not in WEIGHTINGS
    assert load_plugins() == () and BIN.exists()
