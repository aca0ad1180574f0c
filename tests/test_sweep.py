"Sweeps: plans that are refused, workers that die, and verdicts that read the right numbers"

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

try:
    import resource
except ImportError:  # Windows
    resource = None

from minsnr_nb.errors import ConfigError
from minsnr_nb.record.checks import check_run, is_sealed
from minsnr_nb.record.directory import list_runs
from minsnr_nb.record.evaluations import read_evaluation
from minsnr_nb.sweep import engine
from minsnr_nb.sweep.plan import declared, read_plan
from minsnr_nb.sweep.report import prediction_lines
from minsnr_nb.sweep.verdict import Question, as_data, claimed_run, sentences, verdict_of
from tests.harness.lab import things
from tests.runs import BIN, environment, typed

STUDY = {
    "study": "tiny",
    "model": {"name": "mlp", "width": 8, "depth": 1},
    "train": {"steps": 6, "batch_size": 8, "log_every": 2, "checkpoint_every": 2},
    "callbacks": [{"name": "log_events"}, {"name": "evaluate"}, {"name": "checkpoint"}],
    "metrics": [],
    "sampler": {"name": "ddim", "steps": 1},
    "eval": {"every": 6, "samples": 4, "probe_images": 16, "probe_draws": 1},
    "sweep": {
        "seeds": {"count": 3},
        "baseline": "constant",
        "arms": {
            "constant": {"loss": {"name": "constant"}},
            "min_snr_5": {"loss": {"name": "min_snr", "gamma": 5.0}},
        },
        "primary": {"metric": "probe/x0"},
    },
}


def written(place: Path, sweep: dict | None = None, **settings) -> Path:
    "A study's file"
    study = STUDY | settings | {"sweep": STUDY["sweep"] | (sweep or {})}
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def whole(path: Path, root: Path) -> tuple:
    "Every trial of a study, one after another in this process, with the threads of a worker"
    torch.set_num_threads(1)
    plan = read_plan(path)
    home = declared(plan, root)
    assert [engine.run_trial(plan, home, t) for t in plan.trials] == [engine.DONE] * len(
        plan.trials
    )
    return plan, home


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A study that nobody disturbed"
    place = tmp_path_factory.mktemp("made")
    return whole(written(place), place / "runs")


def products(plan, home) -> dict[str, dict]:
    "What each trial left; portable weights name their run in a header whose length is padded"
    every = {t.id: things(claimed_run(home, t.id)) for t in plan.trials}
    padded = "artifacts/checkpoints/"
    return {
        id: {k: v for k, v in of.items() if not k.startswith(padded)} for id, of in every.items()
    }


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
    [
        ({"baseline": "constnt"}, "did you mean 'constant'"),
        ({"arms": {}}, "sweep.arms"),
        ({"seeds": []}, "sweep.seeds"),
        ({"seeds": [1, 1]}, "1 is listed twice"),
        ({"axes": {"loss.gamma": []}}, "sweep.axes"),
        ({"axes": {"train.stesp": [1]}}, "did you mean 'steps'"),
        ({"rule": {"n": 9}}, "9 seeds are asked for, and 3 are listed"),
        ({"primary": {"metric": "fd", "smallest": 2.0}}, "sweep.primary.smallest"),
        ({"arms": {"constant": {}, "same": {"loss": {"name": "constant"}}}}, "the same run"),
        (
            {"zip": {"optim.lr": [1e-3, 1e-2], "model.width": [8]}},
            "there are 1 of model.width, 2 of optim.lr",
        ),
        ({"zip": {"optim.lr": []}}, "sweep.zip"),
        ({"axes": {"optim.lr": [1e-3]}, "zip": {"optim.lr": [1e-2]}}, "set by sweep.axes too"),
        ({"zip": {"loss.gamma": [5.0]}}, "loss.gamma is set by sweep.arms.min_snr_5 too"),
        ({"axes": {"seed": [1, 2]}}, "seed is set by sweep.seeds too"),
        ({"rule": {"most": 2}}, "rule.most: has no effect"),
        ({"rule": {"sequential": True, "most": 9}}, "9 seeds are asked for, and 3 are listed"),
    ],
)
def test_sweep_a_senseless_plan_is_refused(tmp_path, capsys, change, said):
    path = written(tmp_path, change)
    for words in (("sweep", path), ("verdict", path), ("sweep", path, "--dry-run")):
        done = typed(capsys, *words, "--run-root" if "--dry-run" not in words else "--workers", *(
            (tmp_path / "runs",) if "--dry-run" not in words else ("1",)
        ))  # fmt: skip
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_sweep_a_plan_that_changed_after_its_start_is_refused(tmp_path, capsys):
    path, root = written(tmp_path), tmp_path / "runs"
    declared(read_plan(path), root)
    for change in ({"primary": {"metric": "probe/v"}}, {"seeds": {"count": 4}}):
        done = typed(capsys, "sweep", written(tmp_path, change), "--run-root", root)
        assert done.returncode == 2 and "then," in done.stderr and "another `study`" in done.stderr
    done = typed(capsys, "sweep", written(tmp_path, train={"steps": 7}), "--run-root", root)
    assert done.returncode == 2 and "shared settings have changed" in done.stderr
    record = json.loads((root / "sweeps/tiny/plan.json").read_text())
    record["sweep"]["rule"]["alpha"] = 0.4
    (root / "sweeps/tiny/plan.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="was changed after it was declared"):
        declared(read_plan(written(tmp_path)), root)
    assert list_runs(root) == []


def test_sweep_words_of_the_command_are_checked(tmp_path, capsys):
    path = written(tmp_path)
    for words, said in (
        (("sweep", path, path), "takes one study"),
        (("sweep", path, "--workers", "0"), "workers: 0"),
        (("sweep", "task", path, "6", "--run-root", tmp_path / "r"), "6 is no index; 0 to 5 are"),
        (("verdict", path, "--run-root", tmp_path / "r"), "has not run below"),
        (("sweep", tmp_path / "none.yaml"), "no such file"),
    ):
        done = typed(capsys, *words)
        assert done.returncode == 2 and said in done.stderr, (words, done.stderr)
    assert not (tmp_path / "r").exists()


def test_sweep_keys_of_a_zip_change_together(tmp_path):
    change = {
        "zip": {"optim.lr": [1e-3, 1e-2], "train.steps": [6, 4]},
        "axes": {"model.width": [4, 8]},
    }
    plan = read_plan(written(tmp_path, change))
    assert len(plan.trials) == 2 * 2 * 2 * 3 == len({t.id for t in plan.trials})
    rows = {
        (t.config["optim"]["lr"], t.config["train"]["steps"], t.config["model"]["width"])
        for t in plan.trials
    }
    assert rows == {(1e-3, 6, 4), (1e-3, 6, 8), (1e-2, 4, 4), (1e-2, 4, 8)}
    assert {"optim.lr", "train.steps", "model.width"} == plan.trials[0].axes.keys()
    assert len(plan.sweep.questions) == 4


def test_sweep_a_sequential_study_has_no_trials_beyond_its_last_seed(made, tmp_path):
    "The verdict misses no seed that the study gives up before"
    rule = {"rule": {"sequential": True, "most": 2}}
    plan = read_plan(written(tmp_path, rule))
    assert {t.pair for t in plan.trials} == {0, 1} and len(plan.trials) == 4
    path, root = written(tmp_path, rule, study="short"), tmp_path / "runs"
    plan, home = engine.run_sweep(path, 1, root, crew=Here())
    (question,) = verdict_of(plan, home)
    assert question.arms["min_snr_5"]["n"] == 2 and all(g.ok for g in question.gates)


class Here:
    "A crew that works in this process, and notes whom it was given"

    def begin(self, path, home):
        self.plan, self.home, self.given, self.words = read_plan(path), home, [], []

    def room(self):
        return 1 - len(self.words)

    def busy(self):
        return len(self.words)

    def start(self, trial):
        self.given.append(trial.id)
        self.words = [(trial, "", engine.run_trial(self.plan, self.home, trial))]

    def ended(self, timeout):
        time.sleep(0 if self.words else min(timeout, 0.1))
        words, self.words = self.words, []
        return words

    def stop(self):
        pass


def test_sweep_a_run_that_failed_before_is_counted_and_not_started(made, tmp_path):
    plan, home = made
    root = shutil.copytree(home.parents[1], tmp_path / "runs")
    run = claimed_run(root / "sweeps/tiny", plan.trials[0].id)
    status = json.loads((run.path / "meta/status.json").read_text())
    (run.path / "meta/seal.json").unlink()
    (run.path / "meta/status.json").write_text(json.dumps(status | {"state": "failed"}))
    said, seen, crew = [], [], Here()
    engine.run_sweep(written(tmp_path), 1, root, seen.append, said.append, crew)
    assert crew.given == [] and [(s.done, s.ended) for s in seen] == [(5, 1)]
    assert said == ["constant seed 0: ended without its last step: failed"]


def test_sweep_a_trial_of_somebody_else_is_asked_for_after_pauses(made, tmp_path):
    "Two others work on it; each time it is left for longer, and no process is started in between"
    from minsnr_nb.durable import alone

    plan, home = made
    root = shutil.copytree(home.parents[1], tmp_path / "runs")
    trial = plan.trials[0]
    (root / "sweeps/tiny" / trial.id / "run").unlink()
    start, crew = time.monotonic(), Here()
    with alone(root / "sweeps/tiny" / trial.id):
        seen = []

        def tell(now):
            seen.append(now.left)
            if time.monotonic() - start > 2.5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.run_sweep(written(tmp_path), 1, root, tell, crew=crew)
    assert crew.given in ([trial.id] * 2, [trial.id]) and max(seen) == 1


# --- workers that die -----------------------------------------------------------------------------


def start(path: Path, root: Path, workers: int = 2) -> subprocess.Popen:
    words = [BIN / "minsnr", "sweep", path, "--workers", str(workers), "--run-root", root]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment(OMP_NUM_THREADS="1"), **quiet)


def trainers(root: Path) -> list[int]:
    "Processes that own a run below a root now"
    found = []
    for record in root.glob("*/*/meta/attempts/*.json"):
        facts = json.loads(record.read_text())
        owner = facts.get("owner") or facts.get("process") or facts
        found += [owner["pid"]] if isinstance(owner.get("pid"), int) else []
    return [pid for pid in found if Path(f"/proc/{pid}").exists()]


def until(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_sweep_goes_on_after_its_workers_and_itself_were_killed(made, tmp_path):
    path, root = written(tmp_path, train=STUDY["train"] | {"steps": 6}), tmp_path / "runs"
    sweep = start(path, root)
    try:
        for _ in range(3):
            for pid in until(lambda: trainers(root) or sweep.poll() is not None and [0])[:1]:
                if pid:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.3)
        sweep.kill()
        sweep.communicate()
    finally:
        sweep.kill()
    until(lambda: not trainers(root))  # workers whose sweep is gone stop in order
    again = start(path, root)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    plan, home = read_plan(path), root / "sweeps/tiny"
    assert len(list_runs(root)) == len(plan.trials) == 6
    have, want = products(plan, home), products(*made)
    assert [(t, n) for t in want for n in want[t] if have[t].get(n) != want[t][n]] == []
    assert have.keys() == want.keys() and all(have[t].keys() == want[t].keys() for t in want)
    assert all(is_sealed(r) and all(c.ok for c in check_run(r.path)) for r in list_runs(root))
    assert "by probe/x0" in out and "n = 3 seeds" in out


def test_sweep_a_claim_lost_between_directory_and_line_is_adopted(made, tmp_path, monkeypatch):
    path, root = written(tmp_path), tmp_path / "runs"
    plan = read_plan(path)
    home = declared(plan, root)

    class Died(BaseException):
        pass

    def dies(*_):
        raise Died

    with monkeypatch.context() as m, pytest.raises(Died):
        m.setattr(engine, "_claimed", dies)
        engine.run_trial(plan, home, plan.trials[0])
    assert len(list_runs(root)) == 1 and claimed_run(home, plan.trials[0].id) is None
    assert [engine.run_trial(plan, home, t) for t in plan.trials] == [engine.DONE] * 6
    assert len(list_runs(root)) == 6 and products(plan, home) == products(*made)


def test_sweep_a_trial_that_somebody_works_on_is_left_alone(tmp_path):
    from minsnr_nb.durable import alone

    plan = read_plan(written(tmp_path))
    home = declared(plan, tmp_path / "runs")
    (home / plan.trials[0].id).mkdir()
    with alone(home / plan.trials[0].id):
        assert engine.run_trial(plan, home, plan.trials[0]) == engine.LEFT
    assert list_runs(tmp_path / "runs") == []


def limited(size: int, *words) -> tuple[int, list[str]]:
    "Type a command where no file may be longer than so many bytes: its exit code, and what it said"
    from minsnr_nb.cli import main
    from tests.harness.lab import fork

    ours, theirs = os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(theirs, "w")
        code = main([str(w) for w in words])
        sys.stderr.flush()
        os._exit(code)

    pid = fork(work)
    os.close(theirs)
    with open(ours) as said:
        lines = said.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines


@pytest.mark.skipif(resource is None, reason="limits are of POSIX")
def test_sweep_a_full_disk_is_one_line_and_nothing_is_half_made(made, tmp_path):
    path, root = written(tmp_path), tmp_path / "runs"
    code, (line,) = limited(100, "sweep", path, "--run-root", root)
    assert code == 1 and line.startswith("minsnr: cannot claim") and "(EFBIG)" in line
    assert [p for p in root.rglob("*") if p.is_file()] == []
    code, (line,) = limited(20_000, "sweep", "task", path, 0, "--run-root", root)
    assert code in (1, 2) and "cannot write" in line and "(EFBIG)" in line
    assert not [p for p in root.rglob(".*") if p.name != ".index.sqlite"] and list_runs(root) == []
    plan, home = read_plan(path), root / "sweeps/tiny"
    assert [engine.run_trial(plan, home, t) for t in plan.trials[:2]] == [engine.DONE] * 2
    want = products(*made)
    assert products(plan._replace(trials=plan.trials[:2]), home).items() <= want.items()


@pytest.mark.skipif(resource is None, reason="limits are of POSIX")
def test_sweep_a_disk_that_is_full_for_a_checkpoint_is_no_end_of_a_trial(tmp_path):
    "The run is called failed, and goes on as if nothing had been once there is room"
    wide = {"model": STUDY["model"] | {"width": 256}}
    path, root = written(tmp_path, {"seeds": [0]}, **wide), tmp_path / "runs"
    words = ("sweep", "task", path, 0, "--run-root", root)
    for _ in range(2):
        code, (line,) = limited(1_000_000, *words)
        assert code == 1 and "cannot write" in line and "(EFBIG)" in line
    plan, home = read_plan(path), root / "sweeps/tiny"
    assert engine.run_trial(plan, home, plan.trials[0]) == engine.DONE
    one, other = plan._replace(trials=plan.trials[:1]), declared(plan, tmp_path / "other")
    assert engine.run_trial(plan, other, plan.trials[0]) == engine.DONE
    assert products(one, home) == products(one, other)


# --- verdicts -------------------------------------------------------------------------------------


def test_verdict_is_data_and_sentences(made, tmp_path, capsys):
    plan, home = made
    data = as_data(verdict_of(plan, home))
    (question,) = data["questions"]
    arm = question["arms"]["min_snr_5"]
    assert {"outcome", "n", "difference", "low", "high", "p", "scores", "runs"} <= arm.keys()
    assert arm["n"] == 3 and arm["low"] <= arm["difference"] <= arm["high"]
    assert "outcome" not in question["arms"]["constant"]
    pairs = [(arm["scores"][s], question["arms"]["constant"]["scores"][s]) for s in (0, 1, 2)]
    log = np.log([a / b for a, b in pairs])
    assert np.isclose(arm["difference"], np.exp(log.mean()) - 1)
    path = written(tmp_path)
    done = typed(capsys, "verdict", path, "--run-root", home.parents[1], "--json")
    told = json.loads(done.stdout)
    assert told["questions"] == json.loads(json.dumps(data))["questions"]
    assert told["cost"]["runs"] == 6 and told["curves"][0]["constant"].keys() == {"0", "1", "2"}
    out = tmp_path / "report.html"
    assert typed(capsys, "verdict", path, "--run-root", home.parents[1], "--out", out).stdout
    ids = [run for facts in question["arms"].values() for run in facts["runs"].values()]
    assert all(id in out.read_text() for id in [*ids, told["sha256"], told["code"][0]])


@pytest.mark.parametrize(
    ("outcome", "how"),
    [
        ("better", "held"),
        ("worse", "did not hold"),
        ("undecided", "open"),
        ("inconclusive", "open"),
    ],
)
def test_report_says_whether_a_prediction_held(made, outcome, how):
    sweep = made[0].sweep.model_copy(update={"expected": {"min_snr_5": "better"}})
    question = Question({}, {"min_snr_5": {"outcome": outcome}}, [], "ratio")
    (line,) = prediction_lines(sweep, [question])
    assert line.endswith(f"is {outcome}: {how}.")


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"name": "cosine"}},
        {"objective": {"prediction": "v"}},
        {"sampler": {"name": "ddim", "steps": 3}},
        {"density": {"name": "min_snr", "gamma": 5.0}},
        {"uncertainty": {"name": "multitask"}},
    ],
)
def test_verdict_judges_each_arm_by_its_own_settings(change, tmp_path):
    "The numbers of the verdict are those of each run's own evaluation and log"
    from minsnr_nb.lab import LANES

    for section, lane in change.items():
        if section in ("density", "uncertainty") and lane["name"] not in LANES[section]:
            change = {
                section: {"name": next(n for n in LANES[section] if n not in ("uniform", "none"))}
            }
    arms = {"constant": {}, "other": change}
    path = written(tmp_path, {"arms": arms, "seeds": [0, 1], "primary": {"metric": "probe/x0"}})
    plan, home = whole(path, tmp_path / "runs")
    (question,) = verdict_of(plan, home)
    assert all(g.ok for g in question.gates), question.gates
    for trial in plan.trials:
        run = claimed_run(home, trial.id)
        own = read_evaluation(run)["values"]["probe/x0"]
        assert question.arms[trial.arm]["scores"][trial.pair] == own
        last = [json.loads(x) for x in run.metrics_path.read_text().splitlines()][-1]
        assert last["probe/x0"] == own


def test_verdict_refuses_runs_that_are_not_the_study(made, tmp_path):
    "Another length, width or schedule under the claim of a trial is named, not averaged"
    plan, home = made
    root = shutil.copytree(home.parents[1], tmp_path / "runs")
    other = written(tmp_path, {"seeds": [0]}, study="other", train=STUDY["train"] | {"steps": 4})
    mine, there = whole(other, root)
    (root / "sweeps/tiny" / plan.trials[0].id / "run").write_text(
        (there / mine.trials[0].id / "run").read_text()
    )
    with pytest.raises(
        ConfigError, match=f"{claimed_run(there, mine.trials[0].id).id}: study is 'other'"
    ):
        verdict_of(plan, root / "sweeps/tiny")
    longer = [
        t._replace(config=t.config | {"train": {**t.config["train"], "steps": 9}})
        for t in plan.trials
    ]
    with pytest.raises(ConfigError, match="train.steps is 6, and the study asks for 9"):
        verdict_of(plan._replace(trials=tuple(longer)), home)


def test_verdict_a_missing_failed_or_diverged_run_is_no_smaller_n(made, tmp_path):
    plan, home = made
    root = shutil.copytree(home.parents[1], tmp_path / "runs")
    lost = next(t for t in plan.trials if t.arm == "min_snr_5")
    (root / "sweeps/tiny" / lost.id / "run").unlink()
    (question,) = verdict_of(plan, root / "sweeps/tiny")
    assert question.arms["min_snr_5"]["outcome"] == "inconclusive"
    (said,) = sentences(plan.sweep, [question])
    assert "every run has ended: no (min_snr_5 seed 0 planned)" in said


def test_verdict_a_censored_run_takes_its_arm_and_no_other(tmp_path):
    arms = {name: {"loss": {"name": name}} for name in ("constant", "min_snr")}
    arms["wild"] = {"optim": {"lr": 1e38, "warmup_steps": 0}}
    path = written(tmp_path, {"arms": arms, "seeds": [0, 1]})
    plan = read_plan(path)
    home = declared(plan, tmp_path / "runs")
    said = [engine.run_trial(plan, home, t) for t in plan.trials]
    assert said == [engine.DONE, engine.DONE, f"{engine.ENDED}: diverged"] * 2
    (question,) = verdict_of(plan, home)
    assert question.arms["wild"]["outcome"] == "inconclusive" != question.arms["min_snr"]["outcome"]
    assert question.arms["min_snr"]["n"] == 2 and not question.arms["wild"]["scores"]
    told = {line.split("`")[1]: line for line in sentences(plan.sweep, [question])}
    assert "is censored: no (wild seed 0 diverged, wild seed 1 diverged)" in told["wild"]
    assert "wild" not in told["min_snr"]


def test_verdict_a_score_that_is_no_number_is_censored(made, monkeypatch):
    from minsnr_nb.sweep import verdict

    real, nan = verdict.read_score, float("nan")

    def read(run, *a):
        score = real(run, *a)
        return score._replace(value=nan, logged=nan) if run.config()["seed"] == 1 else score

    monkeypatch.setattr(verdict, "read_score", read)
    (question,) = verdict_of(*made)
    assert question.arms["min_snr_5"]["outcome"] == "inconclusive"
    assert question.arms["min_snr_5"]["scores"].keys() == {0, 2}
    assert ["censored" in g.question for g in question.gates if not g.ok] == [True]


def test_verdict_arms_that_are_clipped_differently_are_not_ranked(tmp_path):
    arms = {"constant": {}, "clipped": {"optim": {"clip_norm": 1e-6}}}
    callbacks = [{"name": "grad_norm"}, *STUDY["callbacks"]]
    path = written(tmp_path, {"arms": arms, "seeds": [0, 1]}, callbacks=callbacks)
    plan, home = whole(path, tmp_path / "runs")
    (question,) = verdict_of(plan, home)
    assert question.arms["clipped"]["outcome"] == "inconclusive"
    (gate,) = (g for g in question.gates if not g.ok)
    assert gate.arm == "clipped" and gate.evidence == "100% and 0% of steps"
    assert as_data([question])["questions"][0]["gates"][-1]["arm"] == "clipped"


def test_verdict_second_opinions_and_levels_stand_beside_it(tmp_path):
    cosine = {"schedule": {"name": "cosine"}}
    arms = {"constant": cosine, "linear": {}, "same": cosine | {"optim": {"lr": 0.0011}}}
    metrics = [{"name": n} for n in ("fd", "kid", "fd_inf", "fd_second", "precision_recall")]
    evaluation = STUDY["eval"] | {"samples": 20}
    path = written(tmp_path, {"arms": arms, "seeds": [0, 1]}, metrics=metrics, eval=evaluation)
    plan, home = whole(path, tmp_path / "runs")
    (question,) = verdict_of(plan, home)
    also = question.arms["same"]["also"]
    assert [k.split("@")[0] for k in also] == [
        f"eval/{n}" for n in ("fd", "fd_inf", "fd_second", "kid", "precision", "recall")
    ]
    for trial in plan.trials[:1]:
        own = read_evaluation(claimed_run(home, trial.id))["values"]
    same, other = (question.arms[a]["levels"] for a in ("same", "linear"))
    assert len(same) == sum(k.startswith("probe/x0/bin") for k in own)
    assert 0 < len(other) < len(same) and {x["log_snr"] for x in other} < {
        x["log_snr"] for x in same
    }
    runs = {t.arm: claimed_run(home, t.id) for t in plan.trials if t.pair == 0}
    ratio = [read_evaluation(runs[a])["values"]["probe/x0/bin0"] for a in ("same", "constant")]
    assert same[0]["low"] <= ratio[0] / ratio[1] - 1 <= same[0]["high"]


def test_verdict_a_baseline_broken_on_purpose_is_inconclusive(tmp_path):
    "A learning rate that is a hundred times too high draws noise, and nothing is better than noise"
    arms = {"constant": {"optim": {"lr": 0.1}}, "min_snr_5": {"loss": {"name": "min_snr"}}}
    more = {"metrics": [{"name": "fd"}], "train": STUDY["train"] | {"steps": 40}}
    more |= {"eval": STUDY["eval"] | {"every": 40, "samples": 64}}
    path = written(tmp_path, {"arms": arms, "primary": {"metric": "fd"}, "seeds": [0, 1]}, **more)
    plan, home = whole(path, tmp_path / "runs")
    (question,) = verdict_of(plan, home)
    assert question.arms["min_snr_5"]["outcome"] == "inconclusive"
    assert any("way from noise" in g.question and not g.ok for g in question.gates)


def test_verdict_a_number_that_is_not_the_logged_one_is_no_number(made, tmp_path, monkeypatch):
    from minsnr_nb.sweep import verdict

    real = verdict.read_score
    monkeypatch.setattr(verdict, "read_score", lambda *a: real(*a)._replace(value=1.0))
    (question,) = verdict_of(*made)
    assert [g.question for g in question.gates if not g.ok] == [
        "the number judged is the number logged"
    ]
    assert question.arms["min_snr_5"]["outcome"] == "inconclusive"


def test_verdicts_are_seldom_wrong(capsys):
    from tests import verdicts

    assert verdicts.main(["--short"]) == 0, capsys.readouterr().out


def test_verdicts_with_an_interval_for_each_arm_are_found_wrong(monkeypatch):
    from minsnr_nb.sweep import verdict
    from tests import verdicts

    alone = lambda d, level: [verdict.paired_t(row, level) for row in d]  # noqa: E731
    monkeypatch.setattr(verdict, "simultaneous", alone)
    assert verdicts.false_findings(8, 80) > 0.12


def test_sweep_plans_of_a_thousand_trials_are_quick(tmp_path):
    path = written(tmp_path, {"seeds": {"count": 500}})
    start = time.perf_counter()
    plan = read_plan(path)
    home = declared(plan, tmp_path / "runs")
    assert len(plan.trials) == 1000 and not any(claimed_run(home, t.id) for t in plan.trials)
    assert re.fullmatch("[0-9a-f]{12}", plan.trials[-1].id)
    assert time.perf_counter() - start < 60  # the figure is on the page; this only finds a blow-up


@pytest.mark.parametrize(
    "change",
    [{"schedule": {"name": "cosine"}}, {"objective": {"prediction": "v"}}, {"sampler": {"name": "ddim", "steps": 2}}],
)  # fmt: skip
def test_studies_judge_each_arm_by_its_own_schedule_prediction_and_sampler(change, tmp_path):
    "One pair of runs: what `compare` computes is what each run logged, whatever the arms differ in"
    from minsnr_nb.study import compare, gates, history, run_study, verdict

    small = STUDY | {"metrics": [{"name": "fd"}], "eval": STUDY["eval"] | {"samples": 64}}
    config = tmp_path / "c.yaml"
    config.write_text(
        yaml.safe_dump({k: v for k, v in small.items() if k not in ("sweep", "study")})
    )
    arms = {"constant": {}, "other": change}
    study = run_study("pair", str(config), arms, {"seed": 0}, run_root=str(tmp_path / "runs"))
    outcome = compare(study)
    for arm, value in outcome.scores.items():
        assert np.isclose(value, outcome.logged[arm], rtol=1e-3), arm
    assert np.isfinite(outcome.bins.to_numpy()).all() and len(outcome.bins) >= 3
    asked = [(q, True, e) for q, _, e in gates(study, history(study))]
    assert "no evidence about the weighting" in verdict(study, outcome, asked)
    assert not {"better", "worse"} & {*verdict(study, outcome, asked).split()}


def test_sweep_sequential_study_ends_when_there_is_enough_evidence(tmp_path, monkeypatch):
    "Seeds are added until every arm has an outcome, and no further"
    arms = {"constant": {"optim": {"lr": 0.01}}, "slow": {"optim": {"lr": 1e-6}}}
    more = {"arms": arms, "seeds": {"count": 30}, "rule": {"sequential": True, "most": 30}}
    settings = {"train": STUDY["train"] | {"steps": 30}, "ema": {"name": "ema", "decay": 0.9}}
    path = written(tmp_path, more, **settings)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan, home = engine.run_sweep(path, 2, tmp_path / "runs")
    (question,) = verdict_of(plan, home)
    arm = question.arms["slow"]
    assert arm["outcome"] == "worse" and 2 < arm["n"] < 20 and arm["e"] > 20
    assert len(list_runs(tmp_path / "runs")) < 45


def test_verdict_control_is_a_question_of_its_own():
    "The baseline trained again takes nothing from the level of the arms, and is judged by the same test"
    from minsnr_nb.sweep.plan import AGAIN
    from minsnr_nb.sweep.verdict import judge
    from tests import verdicts

    sweep, rng = verdicts.study(1, 8), np.random.default_rng(0)
    table = verdicts.scores(sweep, rng)
    alone, _ = judge(sweep, table)
    both, _ = judge(sweep, table | {AGAIN: verdicts.scores(sweep, rng)["base"]})
    assert both["arm0"] == alone["arm0"] and both[AGAIN].difference.n == 8
