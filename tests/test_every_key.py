"Every key of a config and of settings.ini has an effect: each is set in turn, and something must change."

import json
import re

import pytest
import torch
from pydantic import BaseModel

from minsnr_nb import api
from minsnr_nb.config import Config
from minsnr_nb.evaluate import Evaluator
from minsnr_nb.record.directory import Run
from minsnr_nb.record.events import read_events
from minsnr_nb.settings import SETTINGS

BASE = {
    "data": {"name": "digits"},
    "objective": {"prediction": "F"},
    "loss": {"name": "min_snr", "gamma": 5.0},
    "model": {"name": "mlp", "width": 16},
    "optim": {"warmup_steps": 2, "lr": 0.01, "weight_decay": 0.0},
    "train": {"steps": 6, "batch_size": 16, "log_every": 2, "checkpoint_every": 3},
    "sampler": {"name": "ddim", "steps": 2},
    "metrics": [{"name": "kid", "real_images": 64}],
    "callbacks": [{"name": n} for n in ("log_events", "sample_grid", "evaluate", "checkpoint")],
    "eval": {"every": 6, "samples": 32, "batch_size": 16, "probe_images": 16, "probe_bins": 4}
    | {"probe_draws": 2},
}
OTHER = {  # another value for each key; a key that is missing here fails the first test
    "project": "elsewhere",
    "study": "named",
    "seed": 1,
    "data": {"name": "shapes", "size": 8, "n": 64, "n_test": 32},
    "schedule.name": "cosine",
    "schedule.timesteps": 500,
    "schedule.zero_terminal_snr": True,
    "objective.prediction": "v",
    "objective.sigma_data": 0.7,
    "loss.name": "soft_min_snr",
    "loss.normalize": "mean",
    "density": {"name": "logit_normal"},
    "uncertainty": {"name": "bins"},
    "model.name": "unet",
    "model.classes": True,
    "model.drop": 0.9,
    "ema": {"name": "ema", "decay": 0.05},
    "optim.lr": 0.02,
    "optim.betas": [0.5, 0.9],
    "optim.weight_decay": 0.5,
    "optim.warmup_steps": 0,
    "optim.decay": "cosine",
    "optim.clip_norm": 0.001,
    "train.steps": 5,
    "train.batch_size": 8,
    "train.shards": 4,
    "train.flip": True,
    "train.precision": "bf16",
    "train.deterministic": True,
    "train.tf32": True,
    "train.compile": True,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "sampler.name": "ddpm",
    "sampler.guidance": 3.0,
    "sampler.interval": [-1.0, 1.0],
    "sampler.eps_scale": [[-3.0, 1.5], [0.0, 1.2]],
    "metrics": [{"name": "kid", "real_images": 32}],
    "callbacks": [{"name": "log_events"}],
    "eval.every": 3,
    "eval.samples": 24,
    "eval.batch_size": 8,
    "eval.probe_images": 8,
    "eval.probe_bins": 2,
    "eval.probe_draws": 1,
    "eval.likelihood_draws": 2,
}
CLASSES = {"model": BASE["model"] | {"classes": True}}
GUIDED = CLASSES | {"sampler": BASE["sampler"] | {"guidance": 3.0}}
NEEDS = {"model.drop": CLASSES, "sampler.guidance": CLASSES, "sampler.interval": GUIDED}
NEEDS |= {"model.name": {"model": {"name": "mlp"}}, "sampler.name": {"sampler": {"name": "ddim"}}}
SAME_NUMBERS = {"eval.batch_size"}  # a batch changes memory and time, never what is measured
ELSEWHERE = {"codec", "extensions", "start"}  # in test_codec, test_extensions and test_evaluations


def keys() -> list[str]:
    "Every key of the schema, lane sections as a whole"
    found = []
    for name, field in Config.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel) and kind.model_fields.keys()
        found += [f"{name}.{k}" for k in inner] if inner and inner != {"name"} else [name]
    return found


def changed(key: str) -> dict:
    "The base with one key set to its other value"
    first, _, rest = key.partition(".")
    start = BASE | NEEDS.get(key, {})
    value = {first: start.get(first, {}) | {rest: OTHER[key]}} if rest else {first: OTHER[key]}
    return json.loads(json.dumps(start | value))


def facts(run: Run) -> dict:
    "What a user can see of a run, without names, times and what repeats the config"
    stamp = run.provenance()
    timed = ("time", "system/", "eval/seconds")
    log = [{k: v for k, v in e.items() if not k.startswith(timed)} for e in read_events(run)]
    unnamed = lambda path: re.sub(
        r"[_/][0-9a-f]{6,}(?=[._]|$)", "", path.relative_to(run.path).as_posix()
    )  # noqa: E731
    files = sorted({unnamed(p) for p in run.path.rglob("*") if p.is_file()})
    tensors = [api.read_tensors(p) for p in sorted(run.checkpoints_dir.glob("*"))]
    weights = [{k: v.tolist() for k, v in found.items()} for found in tensors]
    about = {"project": run.path.parent.name, "study": stamp.get("study")}
    about["determinism"] = stamp["determinism"]
    return about | {"log": log, "files": files, "weights": weights}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict:
    return facts(api.train_run(BASE, run_root=tmp_path_factory.mktemp("base"), device="cpu"))


def test_every_key_has_another_value():
    assert sorted(keys()) == sorted(OTHER.keys() | ELSEWHERE)


def test_every_key_same_settings_change_nothing(base, tmp_path):
    "The control: what the next test calls a change is none of chance"
    assert facts(api.train_run(BASE, run_root=tmp_path, device="cpu")) == base


@pytest.mark.parametrize("key", sorted(OTHER.keys() - SAME_NUMBERS))
def test_every_key_changes_something(key, base, tmp_path, monkeypatch):
    compiled = []  # without waiting for a compiler, which a bare machine may not have
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    if key in NEEDS:  # a key that means something only beside another one
        start = json.loads(json.dumps(BASE | NEEDS[key]))
        base = facts(api.train_run(start, run_root=tmp_path / "base", device="cpu"))
        compiled.clear()
    assert facts(api.train_run(changed(key), run_root=tmp_path, device="cpu")) != base
    assert bool(compiled) == (key == "train.compile")


@pytest.mark.parametrize("key", ["deterministic", "tf32"])
def test_every_key_of_switches_holds_while_training_and_judging(key, tmp_path, monkeypatch):
    "A CPU computes the same either way: what counts is what each step and the record see"
    cudnn, matmul, seen = torch.backends.cudnn, torch.backends.cuda.matmul, set()
    real = torch.Tensor.backward

    def state() -> tuple:
        algorithms = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic
        return (*algorithms, matmul.allow_tf32, cudnn.allow_tf32)

    def backward(self, *args, **kwargs):
        seen.add(state())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    before, wanted = state(), (key == "deterministic",) * 2 + (key == "tf32",) * 2
    run = api.train_run(changed(f"train.{key}"), run_root=tmp_path, device="cpu")
    said = run.provenance()["determinism"]
    recorded = said["deterministic_algorithms"], said["cudnn"]["deterministic"]
    assert seen == {wanted} == {(*recorded, said["tf32"]["matmul"], said["tf32"]["cudnn"])}
    judged, draw = set(), Evaluator.draw
    monkeypatch.setattr(Evaluator, "draw", lambda *a, **k: judged.add(state()) or draw(*a, **k))
    api.eval_run(run.path, device="cpu", overrides=("sampler.steps=2",))
    assert judged == {wanted}
    judged.clear()
    api.sample_run(run.path, n=2, device="cpu")
    assert judged == {wanted} and state() == before


def test_every_key_of_evaluation_is_read(monkeypatch):
    "The one key that must not change a number is seen where it acts"
    from minsnr_nb.lab import build, load

    seen = []
    for size in (16, 8):
        cfg = load(changed("eval.batch_size"), {"eval": {"batch_size": size}}).cfg
        lab = build(cfg, "cpu")
        network = lab.state().model
        inner = network.forward
        network.forward = lambda x, t, inner=inner: (seen.append(len(x)), inner(x, t))[1]
        lab.evaluator.draw(network, 16)
    assert {16, 8} <= set(seen)


SET = {"runs": "r", "data": "d", "models": "m", "device": "nowhere", "threads": "2"}
SET |= {"latents": "direct", "queue": "q"}  # in test_codec, in test_queue


def test_every_key_of_settings_is_tried():
    assert SET.keys() == SETTINGS.keys()


@pytest.mark.parametrize("key", ["runs", "models", "threads"])
def test_every_key_of_settings_acts(key, tmp_path, monkeypatch):
    value = SET[key] if key == "threads" else str(tmp_path / SET[key])
    monkeypatch.setenv(f"MINSNR_{key.upper()}", value)
    if key != "runs":
        monkeypatch.setenv("MINSNR_RUNS", str(tmp_path / "runs"))
    threads = []
    real = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        threads.append(torch.get_num_threads())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = api.train_run(BASE, device="cpu")
        if key == "runs":
            assert run.path.is_relative_to(tmp_path / "r")
        elif key == "models":
            assert api.promote_run(run.path, "one").path.is_relative_to(tmp_path / "m")
        else:
            assert set(threads) == {2} == {run.provenance()["determinism"]["num_threads"]}
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_every_key_of_settings_device_acts(monkeypatch):
    from minsnr_nb.errors import ConfigError
    from minsnr_nb.lab import build, load

    monkeypatch.setenv("MINSNR_DEVICE", "nowhere")
    with pytest.raises(ConfigError, match="device: 'nowhere'"):
        build(load(BASE).cfg)


def test_every_key_of_settings_data_acts(tmp_path, monkeypatch):
    "A relative path of a config begins in the data directory"
    from minsnr_nb.errors import ConfigError
    from minsnr_nb.lab import build, load

    monkeypatch.setenv("MINSNR_DATA", str(tmp_path / "d"))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "d"))):
        build(load(BASE, {"data": {"name": "image_folder", "path": "cats"}}).cfg, "cpu")
