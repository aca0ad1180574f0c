"Networks that are told classes: what is trained, drawn, recorded and refused, and that nothing else has changed."

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from minsnr_nb import api, samplers, train_loop
from minsnr_nb.data import DATASETS, BucketSet
from minsnr_nb.errors import ConfigError
from minsnr_nb.evaluate import class_turns
from minsnr_nb.lab import build, load
from minsnr_nb.record.evaluations import read_record
from minsnr_nb.seeds import stream
from minsnr_nb.unet import MODELS, NO_CLASS, Attention
from tests.runs import ROOT, digests, log_lines, typed

TOLD = {
    "project": "told",
    "objective": {"prediction": "v"},
    "loss": {"name": "min_snr", "gamma": 5.0},
    "model": {"name": "mlp", "width": 16, "classes": True, "drop": 0.25},
    "optim": {"lr": 0.02, "warmup_steps": 2},
    "train": {"steps": 12, "batch_size": 16, "shards": 2, "log_every": 4, "checkpoint_every": 3},
    "sampler": {"name": "ddim", "steps": 3, "guidance": 2.0, "interval": [-4, 4]},
    "metrics": [{"name": "kid", "real_images": 32}],
    "eval": {
        "every": 6,
        "samples": 20,
        "probe_images": 16,
        "probe_draws": 1,
        "likelihood_draws": 2,
    },
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    "A run of a network that is told classes; tests read it, or add records"
    return api.train_run(TOLD, run_root=tmp_path_factory.mktemp("told"), device="cpu")


# --- what says nothing of classes is as it was ---------------------------------------------------

# digests of the resolved YAML, made by the last version that knew neither classes nor heads
OLD = {
    "2cfefdedd904dc95b6273b3435bdc29f357f9714ac378980ef56b2315bbde75c": {},
    "15144255cce198fce031e7bfe571fe390d2a17f9c0f80800217430c0a062ce8e": {
        "project": "old",
        "objective": {"prediction": "v"},
        "model": {"name": "unet", "ch": 8, "attention": [4]},
        "train": {
            "steps": 12,
            "batch_size": 32,
            "log_every": 4,
            "checkpoint_every": 3,
            "shards": 2,
        },
        "sampler": {"name": "heun", "steps": 3},
        "eval": {"every": 6, "samples": 20, "probe_images": 16, "probe_draws": 1}
        | {"likelihood_draws": 2},
    },
}


@pytest.mark.parametrize("digest", OLD)
def test_classes_old_configs_keep_their_bytes(digest):
    resolved = load(OLD[digest]).resolved
    assert hashlib.sha256(resolved.encode()).hexdigest() == digest
    quiet = ("model.classes=false", "sampler.guidance=1", "sampler.interval=null")
    assert load(OLD[digest], overrides=quiet).resolved == resolved
    if "model" in OLD[digest]:
        heads = ("model.heads=1", "model.qk_norm=false")
        assert load(OLD[digest], overrides=heads).resolved == resolved


def as_before(self: Attention, x: torch.Tensor) -> torch.Tensor:
    "Attention before there were heads"
    tokens = self.norm(x).flatten(2).mT.unsqueeze(1)
    h = F.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, -1))
    return x + self.out(h).mT.reshape(x.shape)


def steering_as_before(time, classes, t, labels=None):
    assert classes is None and labels is None
    return time(t)


def test_classes_old_networks_train_to_the_same_bits(tmp_path, monkeypatch):
    "With the former attention, time embedding, denoiser and call of the loss put back in"
    (config,) = [c for c in OLD.values() if c]
    now = api.train_run(config, run_root=tmp_path / "now", device="cpu")
    monkeypatch.setattr(Attention, "forward", as_before)
    monkeypatch.setattr("minsnr_nb.unet.steering", steering_as_before)
    monkeypatch.setattr(samplers, "knowing", lambda model, labels: model)
    monkeypatch.setattr(train_loop.Batch, "asked", lambda b, classes: (b.x0, b.t, b.eps))
    then = api.train_run(config, run_root=tmp_path / "then", device="cpu")
    assert digests(now.path) == digests(then.path)
    assert log_lines(now.path) == log_lines(then.path)
    assert now.path.joinpath("config.resolved.yaml").read_bytes() == then.config_path.read_bytes()


def test_classes_change_no_other_random_number():
    "The same start, images, noise and levels, with and without"
    plain = {k: v for k, v in TOLD.items() if k not in ("model", "sampler")}
    plain |= {"model": {"name": "mlp", "width": 16}}
    a, b = (build(load(c).cfg, "cpu") for c in (plain, TOLD))
    mine, theirs = a.state().model.state_dict(), b.state().model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    one, two = (train_loop.draw_batch(5, x.train, x.objective, x.cfg) for x in (a, b))
    assert all(map(torch.equal, one[:4], two[:4]))
    assert (one.labels == NO_CLASS).all() and (two.labels != NO_CLASS).any()


# --- training ------------------------------------------------------------------------------------


def test_classes_labels_follow_their_images_and_a_share_is_hidden():
    cfg = load(TOLD, overrides=("train.batch_size=100", "train.shards=1")).cfg
    data = DATASETS.bind("digits")(None, "train")
    batches = [
        train_loop.told_labels(train_loop.clean_images(s, data, cfg), data, cfg) for s in range(60)
    ]
    index = torch.cat([data.take(s, 100, 0).index for s in range(60)])
    labels = torch.cat(batches)
    shown = labels != NO_CLASS
    assert torch.equal(labels[shown], data.labels[index[shown]])
    assert abs((~shown).double().mean().item() - 0.25) < 0.02
    half = load(TOLD, overrides=("train.batch_size=50", "train.shards=1")).cfg
    parts = [
        train_loop.told_labels(train_loop.clean_images(s, data, half), data, half) for s in (6, 7)
    ]
    assert torch.equal(torch.cat(parts), batches[3])


def test_classes_labels_follow_their_images_into_buckets():
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 3, 4, 3, 4])
    images = torch.cat([labels[:8].repeat_interleave(64), labels[8:].repeat_interleave(48)])
    data = BucketSet(
        images.to(torch.uint8), labels, tuple("abcde"), "two", "train",
        sides=((8, 8), (6, 8)), counts=(8, 4), channels=1, size=8, canvas=(8, 8),
    )  # fmt: skip
    cfg = load(TOLD, overrides=("train.batch_size=4", "model.drop=0", "sampler.guidance=1",
                                "sampler.interval=null", "train.shards=1")).cfg  # fmt: skip
    seen = []
    for step in range(6):
        taken = train_loop.clean_images(step, data, cfg)
        value = (taken.x0[:, 0, 0, 0] * 127.5 + 127.5).round().long()
        assert torch.equal(train_loop.told_labels(taken, data, cfg), value)
        seen.append(len(value.unique()))
    assert max(seen) > 1
    of = [class_turns(part.labels, 6).unique().tolist() for part in data.parts]
    assert of == [[0, 1, 2], [3, 4]]


def test_classes_a_resumed_run_is_the_uninterrupted_one_to_the_bit(told, tmp_path, monkeypatch):
    real, made = train_loop.train_step, []

    def until_seven(state, *args):
        if state.step == 7:
            raise KeyboardInterrupt
        return real(state, *args)

    monkeypatch.setattr(train_loop, "train_step", until_seven)
    with pytest.raises(KeyboardInterrupt):
        api.train_run(TOLD, run_root=tmp_path, device="cpu", announce=made.append)
    monkeypatch.setattr(train_loop, "train_step", real)
    resumed = api.resume_run(made[0].path, device="cpu")
    assert digests(resumed.path) == digests(told.path)
    assert log_lines(resumed.path) == log_lines(told.path)


def test_classes_two_processes_give_the_same_bits(told, tmp_path):
    shared = api.train_run(TOLD, run_root=tmp_path, device="cpu", processes=2)
    assert digests(shared.path) == digests(told.path)


def test_classes_fork_and_repeat_take_the_labels_along(told):
    assert api.verify_run(told.path, device="cpu")[1] is None
    child = api.fork_run(told.path, overrides=("train.steps=14",), device="cpu")
    rows = [
        api.read_tensors(r.checkpoints_dir / "last.safetensors")["classes.rows"]
        for r in (told, child)
    ]
    assert rows[0].shape == (11, 128) and (rows[0] != rows[1]).any(1).all()


def test_classes_every_row_is_learnt(told):
    assert api.read_tensors(told.checkpoints_dir / "last.safetensors")["classes.rows"].any(1).all()


# --- drawing -------------------------------------------------------------------------------------


def test_classes_sample_k_has_one_class_and_one_image(told):
    network, lab = api.load_network(told, device="cpu")
    many, few = lab.evaluator.draw(network, 25), lab.evaluator.draw(network, 18)
    torch.testing.assert_close(many[:18], few, atol=1e-5, rtol=0)
    turns = class_turns(lab.train.labels, len(lab.train))
    assert torch.equal(turns.bincount(), lab.train.labels.bincount())
    assert sorted(turns[:10].tolist()) == [*range(10)]
    of = lab.evaluator.draw(network, 25, label=int(turns[17]))
    torch.testing.assert_close(of[17], many[17], atol=1e-5, rtol=0)
    assert not torch.allclose(lab.evaluator.draw(network, 25, label=int(turns[16]))[17], many[17])


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_classes_every_sampler_is_guided(name, told):
    "Guidance 1 is the answer for the class; 0 that for none; and each other one is another"
    network, _ = api.load_network(told, device="cpu")
    drawn = {}
    for g in (0.0, 1.0, 3.0):
        words = {"name": name, "steps": 3, "guidance": g}
        judge = build(load(TOLD | {"sampler": words}).cfg, "cpu").evaluator
        drawn[g] = judge.draw(network, 4, label=2)
    plain = judge.sampler
    alone = samplers.denoiser(network, judge.schedule, "v")
    how = dict(schedule=judge.schedule, shape=(1, 8, 8), n=4, rng=stream(0, "sample"))
    with torch.no_grad():
        by_class = samplers.sample(plain, alone, labels=torch.full((4,), 2), **how)
        by_none = samplers.sample(plain, alone, **how)
    assert torch.equal(drawn[1.0], by_class)
    torch.testing.assert_close(drawn[0.0], by_none, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn[3.0], by_class, atol=1e-4)


def test_classes_guidance_asks_both_questions_at_once_and_only_inside_its_interval(told):
    network, lab = api.load_network(told, device="cpu")
    judge, asked = lab.evaluator, []
    inner = network.forward

    def forward(x_t, t, labels=None):
        asked.append(
            (round(judge.schedule.log_snr[int(t[0])].item(), 1), len(x_t), labels.tolist())
        )
        return inner(x_t, t, labels)

    network.forward = forward
    judge.draw(network, 3, label=7)
    assert len(asked) == 3 and {n for _, n, _ in asked} == {3, 6}
    for log_snr, n, labels in asked:
        inside = -4 <= log_snr <= 4
        assert (n, labels) == ((6, [7] * 3 + [NO_CLASS] * 3) if inside else (3, [7] * 3))


def test_classes_the_probe_asks_under_the_true_class(told, monkeypatch):
    network, lab = api.load_network(told, device="cpu")
    seen = set()
    inner = network.forward
    network.forward = lambda x, t, labels=None: (seen.add(labels is None), inner(x, t, labels))[1]
    judge = lab.evaluator
    card = judge.probe(network)["mean"] | judge.bits(network)
    assert seen == {False}
    monkeypatch.setattr(type(judge), "asked_labels", lambda self: [None])
    assert card != judge.probe(network)["mean"] | judge.bits(network)


def test_classes_one_class_is_drawn_recorded_and_named(told, capsys):
    files = {}
    for words in (("--class", "3"), ("--class", "4"), ()):
        done = typed(capsys, "sample", told.path, "--n", 4, *words)
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.strip())
        records = [read_record(p) for p in told.evaluations.glob("*.json")]
        (record,) = [r for r in records if path.relative_to(told.path).as_posix() in r["files"]]
        wanted = {"class": words[1]} if words else {}
        assert record["decides"]["draw"] == {"n": 4, "seed": 0} | wanted
        assert (f"ddim3_{words[1]}_seed0" if words else "ddim3_seed0") in path.name
        assert record["decides"]["settings"]["sampler"]["guidance"] == 2.0
        files[words] = path.read_bytes()
    assert len(set(files.values())) == 3
    sets = [
        api.sample_run(told.path, n=2, kind=k, save_predictions=True, device="cpu") for k in (3, 4)
    ]
    assert sets[0] != sets[1]
    facts = json.loads((sets[0] / "metadata.json").read_text())["intrinsics"]
    assert (facts["guidance"], facts["keywords"]["class"]) == (2.0, "3")


def test_classes_promoted_model_knows_its_classes(told, tmp_path):
    model = api.promote_run(told.path, "digits_by_class", models=tmp_path / "models")
    assert model.card["classes"] == [*map(str, range(10))]
    how = {"n": 2, "out": tmp_path, "models": tmp_path / "models", "device": "cpu"}
    pictures = {
        api.sample_model("local://digits_by_class", kind=k, **how).read_bytes() for k in (3, 4)
    }
    assert len(pictures) == 2


# --- wrong requests ------------------------------------------------------------------------------

WRONG = [
    (("model.drop=0.1",), "model.drop: only model.classes=true reads it"),
    (("model.classes=true", "model.drop=1.0"), "model.drop"),
    (("sampler.guidance=2",), "sampler.guidance: this network was not told classes"),
    (("model.classes=true", "model.drop=0", "sampler.guidance=2"), "has seen images without"),
    (("model.classes=true", "sampler.interval=[0,1]"), "only sampler.guidance"),
    (("model.classes=true", "sampler.guidance=2", "sampler.interval=[1,0]"), "comes first"),
    (("model.classes=true", "sampler.guidance=-1"), "sampler.guidance"),
    (("model.clases=true",), "did you mean 'classes'"),
    (("sampler.guidence=2",), "did you mean 'guidance'"),
    (("model={name: unet, ch: 8, heads: 3}",), "model.heads: 3 does not divide"),
    (("model.heads=2",), "unknown key"),
]


@pytest.mark.parametrize("words, said", WRONG)
def test_classes_wrong_requests_are_one_line_and_write_nothing(words, said, capsys, tmp_path):
    done = typed(capsys, "train", ROOT / "configs/smoke.yaml", *words, "--run-root", tmp_path / "r")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr and not (tmp_path / "r").exists()


def test_classes_data_without_any_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MINSNR_DATA", str(tmp_path))
    (tmp_path / "flat").mkdir()
    for k in range(20):
        Image.fromarray(np.full((8, 8), 10 * k, np.uint8)).save(tmp_path / f"flat/{k}.png")
    words = "data={name: image_folder, path: flat}", "model.classes=true", "train.batch_size=4"
    where = "--run-root", tmp_path / "r"
    done = typed(capsys, "train", ROOT / "configs/smoke.yaml", *words, *where)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "model.classes: the data, flat, has no classes" in done.stderr
    assert not (tmp_path / "r").exists()


def test_classes_a_network_of_ones_own_that_takes_none_is_refused():
    @MODELS.register
    def untold(shape, *, width: int = 4):
        return MODELS["mlp"](shape, width=width)

    try:
        with pytest.raises(ConfigError, match="'untold' takes none; allowed: mlp, unet"):
            build(load({"model": {"name": "untold", "classes": True}}).cfg, "cpu")
    finally:
        MODELS.remove("untold")


@pytest.mark.parametrize("kind, said", [("ten", "no such class"), ("12", "no such class")])
def test_classes_a_class_that_is_none_is_refused(kind, said, told, capsys):
    before = sorted(told.path.rglob("*"))
    done = typed(capsys, "sample", told.path, "--class", kind)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and said in done.stderr
    assert sorted(told.path.rglob("*")) == before


def test_classes_are_not_asked_of_a_network_that_was_told_none(capsys, tmp_path):
    plain = TOLD | {"model": {"name": "mlp", "width": 8}, "sampler": {"name": "ddim", "steps": 2}}
    run = api.train_run(plain, run_root=tmp_path, device="cpu")
    done = typed(capsys, "sample", run.path, "--class", "3")
    assert done.returncode == 2 and "was not told classes" in done.stderr
    done = typed(capsys, "sample", run.path, "sampler.guidance=2")
    assert done.returncode == 2 and "was not told classes" in done.stderr


# --- attention -----------------------------------------------------------------------------------


def test_classes_heads_and_norm_reach_the_network(tmp_path):
    model = {
        "name": "unet",
        "ch": 8,
        "attention": [4],
        "heads": 2,
        "qk_norm": True,
        "classes": True,
    }
    cfg = load(TOLD | {"model": model}).cfg
    assert (cfg.model.drop, cfg.model.keywords["heads"]) == (0.1, 2)
    network = build(cfg, "cpu").state().model
    found = [m for m in network.modules() if isinstance(m, Attention)]
    assert found and all(m.heads == 2 and isinstance(m.q_norm, torch.nn.RMSNorm) for m in found)
    assert "heads: 2" in load(TOLD | {"model": model}).resolved
