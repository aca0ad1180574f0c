"The command line: verbs from signatures, near names, ids of runs, and what is left behind"

import json
import os
import re
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from minsnr_nb import cli, lab
from minsnr_nb.config import Config
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.directory import Run

from .runs import BIN, ROOT, SMALL, environment, minsnr, run_dir, typed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A working directory under git, with a config and a finished run"
    home = tmp_path_factory.mktemp("home")
    (home / "settings.ini").write_text("[minsnr]\nruns = runs\ndata = data\nmodels = models\n")
    (home / "small.yaml").write_text(SMALL)
    me = "-c user.name=me -c user.email=me@example.org -c commit.gpgsign=false".split()
    for words in (["init", "-q"], ["add", "."], [*me, "commit", "-q", "-m", "Begin"]):
        subprocess.run(["git", *words], cwd=home, check=True)
    done = minsnr("train", "small.yaml", cwd=home)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(path=home, run=run_dir(done.stdout))


@pytest.fixture
def inside(home, monkeypatch):
    "The same, with this process in it"
    monkeypatch.chdir(home.path)
    monkeypatch.delenv("MINSNR_RUNS", raising=False)
    return home


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, part",
    [
        (["trian"], "did you mean 'train'"),
        (["train", "small.yaml", "--devise", "cpu"], "did you mean '--device'"),
        (["train", "small.yaml", "--device", "cdua"], "did you mean 'cuda'"),
        (["train", "small.yaml", "loss.nme=p2"], "did you mean 'name'"),
        (["runs", "--columns", "optm.lr"], "did you mean 'optim.lr'"),
        (["runs", "--sort", "-eval/fd@digits_cn"], "did you mean 'eval/fd@digits_cnn'"),
        (["runs", "--where", "loss.nam=constant"], "did you mean 'loss.name'"),
        (["check", "nowhere", "--pdb"], "unrecognized arguments: --pdb"),
        (["compare"], "the following arguments are required: RUN"),
        (["continue", "nowhere"], "--steps"),
    ],
)
def test_cli_names_what_was_meant(words, part, inside, capsys):
    words = ["--sort=" + words[2] if w == "--sort" else w for w in words]
    words = [w for w in words if not w.startswith("-eval")]
    done = typed(capsys, *words)
    assert done.returncode == 2 and done.stdout == "" and part in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_cli_verbs_may_hold_dashes(monkeypatch, capsys):
    monkeypatch.setattr(cli, "VERBS", dict(cli.VERBS))

    @cli._verb("two-words")
    def _two(first: str, *more: str, loud: bool = False) -> int:
        "Try it: minsnr two-words"
        print(first, more, loud)
        return 3

    done = typed(capsys, "two-words", "a", "--loud", "b")
    assert (done.returncode, done.stdout) == (3, "a ('b',) True\n")
    assert re.search(r"^two-words +Try it$", typed(capsys, "--help").stdout, re.M)


def test_cli_every_parameter_of_every_verb_is_explained(capsys):
    for verb in cli.VERBS:
        text = typed(capsys, verb, "--help").stdout
        assert f"minsnr {verb}" in text
        for action in cli._parser(verb)._actions:
            said = (action.help or "").partition("(default:")[0].strip()
            assert said, (verb, action.dest)


def test_cli_help_of_train_has_every_key_and_entry(capsys):
    text = typed(capsys, "train", "--help").stdout
    rows = {row["key"]: row for row in lab.config_help() if "key" in row}
    sections = {
        k for k, f in Config.model_fields.items() if not hasattr(type(f.default), "model_fields")
    }
    assert rows.keys() >= {"train.steps", "optim.betas", "schedule.timesteps", "loss"} | sections
    for key, row in rows.items():
        assert f"\n{key} " in text and row["meaning"], key
    for registry in lab.LANES.values():
        assert all(f" {name} " in text for name in registry)
    schema = json.loads((ROOT / "configs/schema.json").read_text())
    assert schema["$defs"]["TrainSection"]["properties"]["steps"]["description"]


# --- configs --------------------------------------------------------------------------------------


def test_cli_train_composes_files(inside, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("train: {steps: 2}\nloss: {name: constant}\n")
    words = ("small.yaml", tmp_path / "more.yaml", "seed=7", "--run-root", tmp_path / "runs")
    done = typed(capsys, "train", *words)
    assert done.returncode == 0, done.stderr
    resolved = (run_dir(done.stdout) / "config.resolved.yaml").read_text()
    assert "steps: 2\n" in resolved and "seed: 7" in resolved and "batch_size: 32" in resolved


def test_cli_config_takes_variables_of_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    file.write_text("seed: ${env:MY_SEED}\n\nstudy: s_${env:MY_STUDY}\n")
    monkeypatch.setenv("MY_SEED", "11")
    with pytest.raises(ConfigError, match=r"a\.yaml:3: study: .*no variable MY_STUDY"):
        lab.load(file)
    monkeypatch.setenv("MY_STUDY", "x")
    loaded = lab.load(file)
    assert (loaded.cfg.seed, loaded.cfg.study) == (11, "s_x")
    assert "${env:MY_SEED}" in loaded.composed and "env:" not in loaded.resolved
    monkeypatch.setenv("MY_STUDY", "${seed}")
    with pytest.raises(ConfigError, match="holds a reference"):
        lab.load(file)


@pytest.mark.parametrize(
    "name, value", [("MY_TOKEN", "x"), ("MY_STUDY", "hf_" + "a" * 34), ("MY_STUDY", "the secret!")]
)
def test_cli_config_records_no_secret_of_the_environment(name, value, tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER_SECRET", "the secret!")
    monkeypatch.setenv(name, value)
    (tmp_path / "a.yaml").write_text(f"study: ${{env:{name}}}\n")
    with pytest.raises(ConfigError, match="holds .*and a config is recorded") as e:
        lab.load(tmp_path / "a.yaml")
    assert value == "x" or value not in str(e.value)


# --- data -----------------------------------------------------------------------------------------


def pictures(folder: Path, n: int = 8) -> Path:
    "A folder of two classes, n pictures each"
    draw = np.random.default_rng(0)
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for i in range(n):
            pixels = draw.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


TINY = ["small.yaml", "data.name=image_folder", "train.steps=2", "eval.every=2", "eval.samples=4"]
TINY += ["train.batch_size=4", "eval.probe_images=2", "metrics=[{name: kid}]"]


@pytest.mark.parametrize("name", ["sp ace dir", "cats(1)"])
def test_cli_data_of_any_folder_name_is_trained_and_evaluated(name, inside, tmp_path, capsys):
    pictures(tmp_path / "data" / name)
    os.environ["MINSNR_DATA"] = str(tmp_path / "data")
    try:
        where = f"data.path={tmp_path / 'data' / name}"
        done = typed(capsys, "train", *TINY, where, "--run-root", tmp_path / "runs")
    finally:
        del os.environ["MINSNR_DATA"]
    assert done.returncode == 0, done.stderr
    run = run_dir(done.stdout)
    assert f"path: {name}" in (run / "config.resolved.yaml").read_text()
    assert any(
        k.startswith("eval/kid@") for k in json.loads((run / "metrics.json").read_text())["final"]
    )


def test_cli_data_elsewhere_is_answered_with_the_command_that_works(inside, tmp_path, capsys):
    folder = pictures(tmp_path / "far" / "cats")
    done = typed(capsys, "train", *TINY, f"data.path={folder}", "--run-root", tmp_path / "runs")
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    command = done.stderr.strip().split("; ")[-1]
    env = environment(PATH=f"{BIN}:{os.environ['PATH']}")
    again = subprocess.run(command, shell=True, env=env, capture_output=True, text=True)
    assert again.returncode == 0, (command, again.stderr)


def test_cli_data_left_out_is_counted_once(inside, tmp_path):
    folder = pictures(tmp_path / "data" / "phone")
    (folder / "a" / "1.HEIC").write_bytes(b"x")
    (folder / "b" / "2.heic").write_bytes(b"x")
    env = environment(MINSNR_DATA=str(tmp_path / "data"))
    words = ("train", *TINY, "data.path=phone", "--run-root", tmp_path / "runs")
    done = minsnr(*words, cwd=inside.path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out 2 .heic") == 1, done.stderr


def test_cli_data_that_cannot_be_read_at_all_says_why(tmp_path):
    from minsnr_nb.images.files import list_images

    with zipfile.ZipFile(tmp_path / "phone.zip", "w") as z:
        z.writestr("a/1.heic", b"x")
    with pytest.raises(ConfigError, match="left out 1 .heic"):
        list_images(tmp_path / "phone.zip")


# --- runs -----------------------------------------------------------------------------------------


def test_cli_takes_ids_and_beginnings_of_ids(inside, capsys):
    for name in (inside.run.name, inside.run.name[:16], f"tests/{inside.run.name[:12]}"):
        assert typed(capsys, "check", name, "--quiet").returncode == 0, name
    missing = typed(capsys, "check", "1999-01-01")
    assert missing.returncode == 2 and "no such directory" in missing.stderr


def test_cli_names_the_candidates_of_an_ambiguous_id(inside, tmp_path, capsys, monkeypatch):
    for end in ("a", "b"):
        folder = tmp_path / f"runs/p/2026-01-01_00-00-00_aaaaaa{end}/meta"
        folder.mkdir(parents=True)
        (folder / "provenance.json").write_text("{}")
    monkeypatch.setenv("MINSNR_RUNS", str(tmp_path / "runs"))
    done = typed(capsys, "check", "2026-01")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "p/2026-01-01_00-00-00_aaaaaaa, p/2026-01-01_00-00-00_aaaaaab" in done.stderr


def test_cli_lists_runs_relative_to_where_you_are(inside, capsys):
    lines = typed(capsys, "runs").stdout.splitlines()
    assert lines[1].startswith(f"runs/tests/{inside.run.name}")
    done = typed(capsys, "runs", "--where", "seed=99")
    assert "no run matches seed=99; 1 runs in " in done.stdout and done.returncode == 0


def test_cli_eval_prints_a_table(inside, capsys):
    done = typed(capsys, "eval", inside.run.name)
    line = next(x for x in done.stdout.splitlines() if x.startswith("eval/fd@digits_cnn"))
    assert float(line.split()[1]) > 0
    done = typed(capsys, "eval", inside.run.name, "--json")
    assert "eval/fd@digits_cnn" in json.loads(done.stdout.split("\n", 1)[1])


def test_cli_samples_can_be_seen(inside, capsys):
    picture = Path(typed(capsys, "sample", inside.run, "--n", "4").stdout.strip())
    with Image.open(picture) as image:
        pixels = np.asarray(image)
    assert 256 <= pixels.shape[1] < 512
    small = pixels[:: pixels.shape[1] // 17, :: pixels.shape[1] // 17]
    assert small.shape[:2] == (17, 17), "two images of 8 pixels and a line between them"


def test_cli_exports_into_the_working_directory(inside, capsys):
    done = typed(capsys, "export", inside.run)
    assert done.returncode == 0 and (inside.path / "exports").is_dir()


def test_cli_repro_prints_commands(inside, capsys):
    before = sorted(inside.run.rglob("*"))
    done = typed(capsys, "repro", inside.run)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    sha = json.loads((inside.run / "meta/provenance.json").read_text())["git"]["repo_sha"]
    assert lines[0] == f"git clone --no-checkout {inside.path} again"
    assert f"git checkout --detach {sha}" in lines
    assert any(f"train {inside.run}/config.resolved.yaml" in line for line in lines)
    assert sorted(inside.run.rglob("*")) == before


def test_cli_ask_says_what_it_asked(inside, capsys, tmp_path):
    config = tmp_path / "long.yaml"
    config.write_text(SMALL.replace("steps: 12", "steps: 100000"))
    command = [BIN / "minsnr", "train", config, "--run-root", tmp_path / "runs"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, env=environment(), **options)
    run = Path(child.stdout.readline().strip().removeprefix("RUN_DIR: "))
    while json.loads((run / "meta/status.json").read_text())["state"] != "running":
        time.sleep(0.05)
    done = typed(capsys, "ask", run, "stop")
    assert done.returncode == 0 and f"asked {run.name}: it stops" in done.stdout
    _, said = child.communicate(timeout=60)
    assert child.returncode == 0 and "stopped at step" in said and "minsnr resume" in said


# --- papermill ------------------------------------------------------------------------------------


def papermill(out: Path, *words, **more) -> list[str]:
    return [str(BIN / "papermill"), "nbs/study_e02.ipynb", str(out), *map(str, words)]


@pytest.mark.parametrize("before", [None, "an older notebook"])
def test_cli_papermill_leaves_nothing_of_a_refused_value(before, tmp_path):
    out = tmp_path / "out.ipynb"
    if before:
        out.write_text(before)
    env = environment(MINSNR_RUNS=str(tmp_path / "runs"))
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(papermill(out, "-p", "gamma", 0), **options)
    assert done.returncode == 2 and "greater than 0" in done.stderr
    assert (out.read_text() if before else out.exists()) == (before or False)
    assert not (tmp_path / "runs").exists()


def test_cli_papermill_interrupted_is_one_line(tmp_path):
    env = environment(MINSNR_RUNS=str(tmp_path / "runs"))
    options = {"cwd": ROOT, "env": env, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(
        papermill(tmp_path / "out.ipynb", "-p", "steps", 100000), start_new_session=True, **options
    )
    while not list(tmp_path.glob("runs/*/*/meta/heartbeat.json")):
        assert child.poll() is None
        time.sleep(0.1)
    time.sleep(5)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("Error: interrupted; `-p resume ")
    assert "Traceback" not in said and "ZMQ" not in said
    assert "constant: step" in said, "the bar says which arm is trained"


def test_cli_papermill_bar_says_arm_step_and_time_left(inside, tmp_path):
    import papermill  # noqa: F401  it imports the engine

    from minsnr_nb.pm_engine import Pace

    now = iter([0.0, 10.0, 10.0])
    run, pace = Run(tmp_path / "run"), Pace(clock=lambda: next(now))
    (run.path / "meta").mkdir(parents=True)
    put = lambda name, value: (run.path / "meta" / name).write_text(json.dumps(value))  # noqa: E731
    put("provenance.json", {"study": {"arm": "min_snr"}})
    put("status.json", {"step": 0, "total_steps": 300, "state": "running"})
    put("heartbeat.json", {"step": 100})
    assert pace.line(run.path) == "min_snr: step 100/300"
    put("heartbeat.json", {"step": 150})
    assert pace.line(run.path) == "min_snr: step 150/300, 0:30 left"
    (run.path / "meta/status.json").write_text("{")
    assert pace.line(run.path) == ""


# --- one point ------------------------------------------------------------------------------------


def test_cli_show_draws_a_single_point():
    from minsnr_nb.show import curves

    axes = curves([3.0], {"a": [1.0], "b": [2.0]}, "x", "y").axes[0]
    assert [line.get_marker() for line in axes.lines] == ["o", "o"]
    many = [float(i) for i in range(20)]
    ys = {"a": many, "b": [1.0] + [float("nan")] * 19}
    axes = curves(many, ys, "x", "y").axes[0]
    assert [bool(line.get_marker()) for line in axes.lines] == [False, True]


def test_cli_smoke_config_is_part_of_the_package():
    assert (ROOT / "configs/smoke.yaml").samefile(ROOT / "minsnr_nb/smoke.yaml")


def test_cli_core_needs_nothing_of_the_laboratory(tmp_path):
    "What the wheel installs without `[lab]` trains, lists and checks"
    lab_only = ["matplotlib", "pandas", "papermill", "click", "nbformat", "ipywidgets", "nbdev"]
    code = f"import sys; sys.modules |= dict.fromkeys({lab_only})\n"
    code += "from minsnr_nb.cli import main; import minsnr_nb.all; sys.exit(main())"
    python = [str(BIN / "python"), "-c", code]
    options = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run([*python, "smoke", "train.steps=2", "eval.samples=8"], **options)
    assert done.returncode == 0, done.stderr
    run = run_dir(done.stdout)
    for words in (
        ["runs"],
        ["check", run.name],
        ["sample", run.name, "--n", "4"],
        ["export", run.name],
    ):
        done = subprocess.run([*python, *words], **options)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_cli_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [BIN / "minsnr", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert done.returncode == 1
    assert done.stderr == "minsnr: No space left on device; --debug shows where\n"


@pytest.mark.parametrize("text", ["{", "[1]", '{"runs_list": 3}', '{"parameters": []}'])
def test_cli_a_wrong_word_of_the_engine_is_refused_before_a_run(
    text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MINSNR_PM", text)
    monkeypatch.setenv("MINSNR_RUNS", str(tmp_path / "runs"))
    done = typed(capsys, "train", ROOT / "configs/smoke.yaml", "--device", "cpu")
    assert done.returncode == 2 and "MINSNR_PM: not as" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["resume", "eval", "sample", "fork", "promote", "export"])
def test_cli_a_run_without_its_log_is_refused(copy, verb, capsys):
    (copy / "logs/metrics.jsonl").unlink()
    more = {"fork": ["train.steps=99"], "promote": ["x"]}.get(verb, [])
    done = typed(capsys, verb, copy, *more)
    assert done.returncode == 2 and "logs/metrics.jsonl is missing; restore" in done.stderr
    assert typed(capsys, "check", copy).stdout.startswith("A: run layout: BROKEN")


def test_cli_show_draws_dollars_as_dollars():
    from minsnr_nb.show import curves, png, side_by_side

    odd = r"$\frac{1}$"
    png(curves([0, 1], {odd: [1, 2], "b": [2, 3]}, odd, odd, title=odd))
    png(side_by_side({odd: np.zeros((2, 1, 4, 4)), "b": np.zeros((2, 1, 4, 4))}))
