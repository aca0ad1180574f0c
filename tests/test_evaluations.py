"Every evaluation leaves a record under a name of its own, and nothing that was written before changes."

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors

from minsnr_nb import runner
from minsnr_nb.api import eval_run, promote_run, resume_run, sample_run, train_run
from minsnr_nb.callbacks import CALLBACKS
from minsnr_nb.errors import ConfigError, MinsnrError
from minsnr_nb.metrics import METRICS
from minsnr_nb.record.checks import CHECKS, check_run, is_sealed
from minsnr_nb.record.directory import Run, open_run
from minsnr_nb.record.evaluations import is_own, list_evaluations, read_evaluation
from minsnr_nb.record.state import read_status
from minsnr_nb.strict_yaml import read_yaml
from minsnr_nb.train_loop import Callback

from .runs import SMALL, log_lines, minsnr, run_dir, typed


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    return train_run(read_yaml(SMALL)[0], run_root=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(trained, tmp_path) -> Run:
    return open_run(shutil.copytree(trained.path, tmp_path / "tests" / trained.id))


def everything(run: Run) -> dict[str, str]:
    "Digest and moment of every file of a run, hidden ones included"
    files = [p for p in run.path.rglob("*") if p.is_file()]
    return {
        p.relative_to(run.path).as_posix(): f"{hashlib.sha256(p.read_bytes()).hexdigest()} "
        f"{p.stat().st_mtime_ns}"
        for p in files
    }


def broken(run: Run) -> list:
    return [c for c in check_run(run.path) if not c.ok]


EVALS = [
    ("sampler.steps=2",),
    ("sampler.steps=3",),
    ("sampler.eta=1",),
    ("sampler.steps=3", "sampler.eta=1"),
    ("eval.samples=30",),
    ("eval.probe_images=8",),
    ("eval.probe_draws=2",),
    ("metrics=[{name: fd}]",),
    ("metrics=[{name: kid}]",),
    ("callbacks=[{name: sample_grid, n: 4}]",),
    ("callbacks=[{name: predictions, n: 4}]",),
]
SAMPLES = [
    {"n": 4},
    {"n": 9},
    {"n": 4, "seed": 1},
    {"n": 4, "overrides": ("sampler.eta=1",)},
    {"n": 4, "overrides": ("sampler.steps=2",)},
    {"n": 4, "weights": "best"},
    {"n": 4, "save_predictions": True},
    {"n": 4, "save_predictions": True, "overrides": ("sampler.eta=1",)},
]
CALLS = [lambda run, o=o: eval_run(run.path, overrides=o) for o in EVALS]
CALLS += [lambda run: eval_run(run.path, overrides=EVALS[0], weights="best")]
CALLS += [lambda run, how=how: sample_run(run.path, **how) for how in SAMPLES]


def test_evaluations_twenty_calls_leave_twenty_records_and_a_repeated_one_nothing(run):
    assert len(CALLS) == 20
    summary, log = run.summary_path.read_bytes(), run.metrics_path.read_bytes()
    before = {p.name for p in run.evaluations.iterdir()}
    for call in CALLS:
        call(run)
    assert len({p.name for p in run.evaluations.iterdir()} - before) == 20
    assert (run.summary_path.read_bytes(), run.metrics_path.read_bytes()) == (summary, log)
    assert is_sealed(run) and broken(run) == []
    after = everything(run)
    for call in CALLS:
        call(run)
        assert everything(run) == after


def test_evaluations_pictures_and_sets_never_replace_each_other(run):
    for call in CALLS:
        call(run)
    assert len(list(run.grids.glob("sample_*.png"))) == 6
    assert len(list(run.grids.glob("eval_*.png"))) == 1
    assert len([p for p in run.predictions.iterdir()]) == 3


def test_evaluations_of_training_are_records_that_eval_finds(run):
    assert [r["kind"] for r in list_evaluations(run.evaluations)] == ["train", "train"]
    before, said = everything(run), []
    _, values = eval_run(run.path, warn=said.append)
    assert everything(run) == before and "with the same values" in said[0]
    assert read_evaluation(run)["values"] == values


def test_evaluations_with_other_settings_are_not_what_the_summary_shows(run):
    own = json.loads(run.summary_path.read_text())["final"]["eval/fd@digits_cnn"]
    _, values = eval_run(run.path, overrides=("sampler.steps=2",))
    assert values["eval/fd@digits_cnn"] != own
    assert read_evaluation(run)["values"]["eval/fd@digits_cnn"] == own
    assert json.loads(run.summary_path.read_text())["final"]["eval/fd@digits_cnn"] == own
    other = list_evaluations(run.evaluations)[-1]["id"]
    assert read_evaluation(run, other[:8])["values"] == values
    with pytest.raises(ConfigError, match="no evaluation 'ffff"):
        read_evaluation(run, "ffff0000")


def test_evaluations_that_differ_when_repeated_say_so_and_change_nothing(run, monkeypatch):
    from minsnr_nb import api

    _, values = eval_run(run.path, overrides=EVALS[0])
    before, said = everything(run), []
    odd = values | {"eval/fd@digits_cnn": 77.0}
    monkeypatch.setattr(api, "report", lambda *_: odd)
    eval_run(run.path, overrides=EVALS[0], warn=said.append)
    assert everything(run) == before and "77.0 now; the record stays" in said[0]


def test_evaluations_of_a_run_without_them_enter_its_log_once(tmp_path):
    listed = {"callbacks": [{"name": "log_events"}, {"name": "checkpoint"}]}
    run = train_run(read_yaml(SMALL)[0], listed, run_root=tmp_path)
    eval_run(run.path, overrides=("sampler.steps=2",))
    assert "eval/" not in run.summary_path.read_text() and read_evaluation(run) is None
    _, values = eval_run(run.path)
    final = json.loads(run.summary_path.read_text())["final"]
    assert final["eval/fd@digits_cnn"] == values["eval/fd@digits_cnn"]
    after = everything(run)
    eval_run(run.path)
    assert everything(run) == after and broken(run) == [] and is_sealed(run)


def test_evaluations_are_checked(run):
    path = next(run.evaluations.iterdir())
    for wrong in (path.read_text().replace('"step": ', '"step": 1'), "{", "[]"):
        path.write_text(wrong)
        assert "AB.evaluations" in [c.id for c in broken(run)]
    assert CHECKS["AB.evaluations"][0] == "L2"


def test_evaluations_are_not_asked_of_older_runs(run):
    shutil.rmtree(run.evaluations)
    (run.path / "meta/seal.json").unlink()
    (run.path / "logs/stdout.log").unlink(missing_ok=True)
    assert broken(run) == []
    assert read_evaluation(run)["decides"]["weights"]["step"] == 12
    eval_run(run.path, overrides=("sampler.steps=2",))
    assert len(list_evaluations(run.evaluations)) == 1


def test_evaluations_from_the_command_line(run, capsys):
    before = run.summary_path.read_bytes()
    done = typed(capsys, "eval", run.path, "sampler.steps=2")
    assert done.returncode == 0 and "kept in artifacts/evaluations/" in done.stderr
    argv = list_evaluations(run.evaluations)[-1]["argv"]
    assert not any(Path(w).is_absolute() for w in argv)
    assert run.summary_path.read_bytes() == before


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINSNR_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_evaluations_compare_shows_the_evaluation_that_is_named(run, tmp_path, capsys):
    eval_run(run.path, overrides=("eval.probe_images=8",))
    other = next(r for r in list_evaluations(run.evaluations) if not is_own(r, run.config()))
    pair = [run.path, shutil.copytree(run.path, tmp_path / "p" / run.id)]
    shutil.rmtree(pair[1] / "artifacts/evaluations")
    page = tmp_path / "page.html"
    shown = f"{other['values']['probe/x0']:.4g}"
    assert typed(capsys, "compare", *pair, "--out", page).returncode == 0
    assert shown not in page.read_text()
    assert (
        typed(capsys, "compare", *pair, "--out", page, "--evaluation", other["id"][:8]).returncode
        == 0
    )
    assert shown in page.read_text() and other["id"] in page.read_text()
    assert "0 of these runs" in typed(capsys, "compare", *pair, "--evaluation", "ffff").stderr


def test_evaluations_promote_reads_the_own_evaluation_or_the_one_that_is_named(run, models, capsys):
    eval_run(run.path, overrides=("sampler.steps=2",))
    other = list_evaluations(run.evaluations)[-1]
    own = promote_run(run.path, "own").card
    assert own["metrics"].items() <= read_evaluation(run)["values"].items()
    assert (
        typed(capsys, "promote", run.path, "named", "--evaluation", other["id"][:7]).returncode == 0
    )
    card = json.loads((models / "named/1/card.json").read_text())
    assert card["evaluation"] == other["id"]
    assert card["metrics"].items() <= other["values"].items()
    done = typed(capsys, "promote", run.path, "none", "--evaluation", "0000000")
    assert done.returncode == 2 and not (models / "none").exists()


def test_evaluations_eval_of_a_model_records_model_and_version(run, models, capsys):
    promote_run(run.path, "m")
    promote_run(run.path, "m")
    done = typed(capsys, "eval", "local://m@1", "sampler.steps=2")
    assert done.returncode == 0, done.stderr
    (record,) = list_evaluations(models / "m/1/evaluations")
    assert (record["model"]["name"], record["model"]["version"]) == ("m", 1)
    assert record["decides"]["weights"]["slot"] == "local://m@1"
    assert not (models / "m/2/evaluations").exists()


def test_evaluations_start_begins_with_a_models_weights_and_records_it(run, models, tmp_path):
    card = promote_run(run.path, "m").card
    weights, seen = load_tensors((models / "m/1/model.safetensors").read_bytes()), []
    begun = runner.make_loop

    def spied(lab, run=None, log=None):
        loop = begun(lab, run, log)
        loop.callbacks.append(Spy(seen))
        return loop

    with pytest.MonkeyPatch.context() as m:
        m.setattr(runner, "make_loop", spied)
        child = train_run(read_yaml(SMALL)[0], {"start": "local://m@1"}, run_root=tmp_path / "r")
    for state in seen[0]:
        assert all(torch.equal(state[k], weights[k]) for k in weights)
    lineage = child.provenance()["lineage"]
    assert (lineage["model"], lineage["source_run"]) == ("local://m@1", run.id)
    assert lineage["weights_sha256"] == card["files"]["model.safetensors"]["sha256"]
    assert broken(child) == [] and is_sealed(child)


class Spy(Callback):
    "Keep the weights before the first step"

    def __init__(self, seen: list):
        self.seen = seen

    def before_train(self, loop):
        copies = ({k: v.clone() for k, v in m.state_dict().items()} for m in networks(loop))
        self.seen.append(list(copies))


def networks(loop) -> tuple:
    return loop.state.model, loop.state.ema.model


@pytest.mark.parametrize(
    "words, says",
    [
        (["start=local://m"], "start"),
        (["start=local://other@1"], "no such model"),
        (["start=local://m@7"], "no such version"),
        (["start=local://m@1", "model.width=16"], "not the weights of this network"),
        (
            ["metrics=[{name: fd}, {name: echo}]"],
            "fd@digits_cnn/noise is written by fd and by echo",
        ),
    ],
)
def test_evaluations_start_and_metrics_that_cannot_be_are_one_line_and_no_run(
    run, models, tmp_path, capsys, words, says, request
):
    @METRICS.register("echo")
    def echo(samples, reference):
        return {"fd@digits_cnn": 1.0}

    request.addfinalizer(lambda: METRICS.remove("echo"))
    promote_run(run.path, "m")
    config = tmp_path / "c.yaml"
    config.write_text(SMALL)
    done = typed(capsys, "train", config, *words, "--run-root", tmp_path / "none")
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_evaluations_start_without_a_checkpoint_begins_again_with_the_same_model_only(
    run, models, tmp_path, monkeypatch
):
    promote_run(run.path, "m")
    paths = []

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(runner, "train", dies)
        with pytest.raises(KeyboardInterrupt):
            train_run(
                read_yaml(SMALL)[0],
                {"start": "local://m@1"},
                run_root=tmp_path / "r",
                announce=lambda r: paths.append(r.path),
            )
    shutil.move(models / "m", models / "gone")
    with pytest.raises(ConfigError, match="no such model"):
        resume_run(paths[0])
    shutil.move(models / "gone", models / "m")
    whole = train_run(read_yaml(SMALL)[0], {"start": "local://m@1"}, run_root=tmp_path / "w")
    assert log_lines(resume_run(paths[0]).path) == log_lines(whole.path)


@pytest.fixture
def own_callback():
    names = []

    def add(made: type) -> str:
        CALLBACKS.register(f"own{len(names)}")(made)
        names.append(f"own{len(names)}")
        return names[-1]

    yield add
    for name in names:
        CALLBACKS.remove(name)


def test_evaluations_callback_that_raises_is_named_in_the_error_and_in_the_status(
    tmp_path, own_callback
):
    class Careless(Callback):
        "Divide by zero"

        def after_step(self, loop, result):
            print("on the way")
            return 1 / (result.step - 3)

    paths, name = [], own_callback(Careless)
    with pytest.raises(ZeroDivisionError) as e:
        train_run(
            read_yaml(SMALL)[0],
            {"callbacks": [{"name": name}]},
            run_root=tmp_path,
            announce=lambda run: paths.append(run.path),
        )
    assert "Careless.after_step at step 3" in e.value.__notes__
    assert (
        "Careless.after_step at step 3: ZeroDivisionError" in read_status(Run(paths[0]))["reason"]
    )
    printed = (paths[0] / "logs/stdout.log").read_text()
    assert printed.count("on the way") == 3 and "ZeroDivisionError" in printed


def test_evaluations_callback_that_refuses_is_named_in_its_line(tmp_path, own_callback):
    class Strict(Callback):
        "Refuse to go on"

        def before_train(self, loop):
            raise MinsnrError("not today")

    listed = [{"name": own_callback(Strict)}]
    with pytest.raises(MinsnrError, match="^Strict.before_train at step 0: not today$"):
        train_run(read_yaml(SMALL)[0], {"callbacks": listed}, run_root=tmp_path)


@pytest.mark.parametrize("direct", [False, True])
def test_evaluations_callbacks_that_write_one_name_are_both_named(tmp_path, own_callback, direct):
    class Other(Callback):
        "Write a name of Timing's"

        def after_step(self, loop, result):
            if direct:
                loop.log.log(result.step, "train", {"time/step_ms": 1.0})
            else:
                loop.scalars |= {"time/step_ms": 1.0}

    listed = [{"name": n} for n in ("timing", own_callback(Other), "log_events")]
    with pytest.raises(MinsnrError, match="time/step_ms: is written by .*(Timing|Other)") as e:
        train_run(read_yaml(SMALL)[0], {"callbacks": listed}, run_root=tmp_path)
    assert "Timing" in str(e.value) and "Other" in str(e.value)


def test_evaluations_stdout_of_the_command_is_in_the_run(tmp_path):
    (tmp_path / "c.yaml").write_text(SMALL)
    done = minsnr("train", tmp_path / "c.yaml", "--run-root", tmp_path / "r")
    run = run_dir(done.stdout)
    assert (run / "logs/stdout.log").read_text() == done.stdout
