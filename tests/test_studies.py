"Both studies under Papermill: the plain command, its records, and what it refuses."

import json
import subprocess
from pathlib import Path

import pytest

from tests.runs import BIN, ROOT, environment, minsnr

FAST = "train: {steps: 30, batch_size: 64, checkpoint_every: 10}\neval: {every: 15, samples: 100, probe_draws: 1}\nsampler: {name: ddim, steps: 5}\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "fast.yaml"
    path.write_text("project: study\nmodel: {name: mlp, width: 32}\n" + FAST)
    return path


def papermill(notebook, out, *words, **kwargs):
    "Execute a notebook as a user does"
    command = [
        BIN / "papermill",
        ROOT / f"nbs/{notebook}.ipynb",
        out,
        "--no-progress-bar",
        *map(str, words),
    ]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, **kwargs
    )


def runs_in(root):
    return sorted(p.parent.parent for p in root.rglob("meta/provenance.json"))


@pytest.fixture(scope="module")
def executed(config, tmp_path_factory):
    "One execution of E02 that several tests look at"
    home = tmp_path_factory.mktemp("e02")
    done = papermill(
        "study_e02",
        home / "out.ipynb",
        "-p",
        "gamma",
        "5",
        "-p",
        "config",
        config,
        "-p",
        "run_root",
        home / "runs",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def test_studies_e02_trains_two_paired_arms(executed):
    runs = runs_in(executed / "runs")
    about = [json.loads((r / "meta/provenance.json").read_text()) for r in runs]
    assert {a["study"]["arm"] for a in about} == {"constant", "min_snr"}
    assert len({a["study"]["group"] for a in about}) == 1
    for run in runs:
        assert minsnr("check", run).returncode == 0
        notebook = json.loads((run / "notebook/study.ipynb").read_text())
        assert notebook["metadata"]["papermill"]["parameters"]["gamma"] == 5.0
        assert all(c["metadata"]["papermill"]["status"] == "completed" for c in notebook["cells"])


def test_studies_e02_provenance_is_a_command_that_can_be_typed_again(executed):
    about = json.loads((runs_in(executed / "runs")[0] / "meta/provenance.json").read_text())
    assert about["command"]["entrypoint"] == "papermill"
    argv = about["command"]["argv"]
    assert (
        argv[0] == "papermill"
        and argv[1].endswith("study_e02.ipynb")
        and argv[argv.index("gamma") + 1] == "5.0"
    )


def test_studies_e02_page_has_pictures_and_a_verdict(executed):
    cells = json.loads((executed / "out.ipynb").read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5
    assert any(
        "n = 1 seed" in t or "Inconclusive" in t
        for o in outputs
        for t in ["".join(o.get("data", {}).get("text/markdown", ""))]
    )
    assert not [o for o in outputs if o["output_type"] == "stream"], (
        "no bars or warnings in the page"
    )


def test_studies_e02_resume_reuses_complete_arms(executed, config):
    before = {r: (r / "logs/metrics.jsonl").read_bytes() for r in runs_in(executed / "runs")}
    one = next(iter(before))
    words = ["-p", "gamma", "5", "-p", "config", config, "-p", "resume", one]
    done = papermill("study_e02", executed / "again.ipynb", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {
        r: (r / "logs/metrics.jsonl").read_bytes() for r in runs_in(executed / "runs")
    } == before


def test_studies_e01_runs(config, tmp_path):
    done = papermill(
        "study_e01",
        tmp_path / "out.ipynb",
        "-p",
        "config",
        config,
        "-p",
        "run_root",
        tmp_path / "runs",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = runs_in(tmp_path / "runs")
    assert minsnr("check", run).returncode == 0


@pytest.mark.parametrize(
    "wrong, part",
    [
        (("gama", "5"), "did you mean 'gamma'"),
        (("gamma", "five"), "gamma: 'five' is not a number"),
        (("steps", "2.5"), "steps: 2.5 is not a whole number"),
    ],
)
def test_studies_wrong_parameters_write_nothing(wrong, part, tmp_path):
    done = papermill(
        "study_e02", tmp_path / "out.ipynb", "-p", *wrong, "-p", "run_root", tmp_path / "runs"
    )
    assert done.returncode == 2 and part in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong, part",
    [
        (("gamma", "-1"), "gamma: input should be greater than 0"),
        (("prediction", "epsilon"), "objective.prediction"),
        (("config", "nowhere.yaml"), "no file 'nowhere.yaml'"),
    ],
)
def test_studies_wrong_values_leave_no_run(wrong, part, tmp_path):
    done = papermill(
        "study_e02", tmp_path / "out.ipynb", "-p", *wrong, "-p", "run_root", tmp_path / "runs"
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("Error: ") and part in last, done.stderr[-1500:]
    assert not (tmp_path / "runs").exists()


def test_studies_of_a_grid_are_executed_once_each(tmp_path, monkeypatch):
    "Every combination gets a notebook of its own; what failed is executed again, what is done is not"
    import papermill

    from minsnr_nb.study import run_grid

    asked, failing = [], {"gamma": 5.0, "seed": 1, "steps": 10}

    def execute(source, out, parameters, **_):
        asked.append(parameters)
        about = {"end_time": "now", "exception": True if parameters == failing else None}
        Path(out).write_text(json.dumps({"metadata": {"papermill": about}}))

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    grid = {"gamma": [1.0, 5.0], "seed": [0, 1]}
    done = run_grid("nbs/study_e02.ipynb", tmp_path / "out", {"steps": 10}, **grid)
    assert len(asked) == 4 == len(set(done)) and all(p["steps"] == 10 for p in asked)
    assert "study_e02_gamma-5.0_seed-1.ipynb" in {p.name for p in done}
    assert run_grid("nbs/study_e02.ipynb", tmp_path / "out", {"steps": 10}, **grid) == done
    assert asked[4:] == [failing]
