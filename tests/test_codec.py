"Autoencoders, training in their latents, and the cache of latents, by the commands that a user types."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minsnr_nb import api, train_loop
from minsnr_nb.errors import ConfigError, MinsnrError
from minsnr_nb.lab import build, load
from minsnr_nb.record.checks import check_run
from tests.runs import typed
from tests.test_images import folder

DATA = {"name": "shapes", "size": 8, "n": 40, "n_test": 12}
VAE = {
    "project": "vae",
    "data": DATA,
    "codec": {"name": "kl_vae", "factor": 2, "channels": 2, "width": 8},
    "optim": {"lr": 2e-3, "warmup_steps": 2},
    "train": {"steps": 6, "batch_size": 8, "log_every": 2, "checkpoint_every": 3},
    "eval": {"every": 6, "samples": 12},
    "metrics": [],
}
NETWORK = {
    "project": "latents",
    "data": DATA,
    "codec": {"name": "local://tiny@1"},
    "objective": {"prediction": "v"},
    "loss": {"name": "min_snr", "gamma": 5.0},
    "model": {"name": "mlp", "width": 16},
    "optim": {"warmup_steps": 2},
    "train": {"steps": 4, "batch_size": 8, "log_every": 2, "checkpoint_every": 2, "flip": True},
    "sampler": {"name": "ddim", "steps": 2},
    "eval": {"every": 4, "samples": 8, "probe_images": 5, "probe_draws": 1},
    "metrics": [],
    "callbacks": [{"name": n} for n in ("log_events", "evaluate", "checkpoint", "sample_grid")],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A place with one trained and promoted autoencoder, local://tiny@1"
    place = tmp_path_factory.mktemp("codec")
    names = {f"MINSNR_{k.upper()}": str(place / k) for k in ("runs", "models", "cache", "data")}
    before = {k: os.environ.get(k) for k in names}
    os.environ.update(names)
    api.promote_run(api.train_run(VAE, device="cpu", autoencoder=True).path, "tiny")
    yield place
    for k, v in before.items():
        os.environ.pop(k) if v is None else os.environ.update({k: v})


def weights(run) -> dict:
    return api.read_tensors(run.checkpoints_dir / "last.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- autoencoders ---------------------------------------------------------------------------------


def test_codec_vae_run_is_a_run_like_any_other(home, monkeypatch):
    "Interrupted and resumed it has the weights of one that was left alone"
    whole = api.train_run(VAE, device="cpu", autoencoder=True)
    assert all(c.ok for c in check_run(whole.path))
    real = train_loop.train_step

    def tired(state, *args):
        if state.step == 4:
            raise KeyboardInterrupt
        return real(state, *args)

    monkeypatch.setattr(train_loop, "train_step", tired)
    seen: list = []
    with pytest.raises(KeyboardInterrupt):
        api.train_run(VAE, device="cpu", autoencoder=True, announce=seen.append)
    monkeypatch.undo()
    resumed = api.resume_run(seen[0].path, device="cpu")
    assert same(weights(resumed), weights(whole))


def test_codec_vae_eval_repeats_and_recon_takes_any_size(home, capsys, tmp_path):
    from PIL import Image

    (run, *_) = sorted((home / "runs/vae").iterdir())
    first, second = (typed(capsys, "vae", "eval", run, "--json") for _ in range(2))
    assert first.returncode == 0 and json.loads(first.stdout) == json.loads(second.stdout)
    assert "with the same values" in second.stderr
    Image.new("RGB", (13, 7), (200, 30, 90)).save(tmp_path / "odd.png")
    for codec in (run, "local://tiny@1"):
        words = ("--image", tmp_path / "odd.png", "--out", tmp_path / "out", "--json")
        done = typed(capsys, "vae", "recon", codec, *words)
        assert done.returncode == 0, done.stderr
        assert Image.open(tmp_path / "out/odd_recon.png").size == (13, 7)
        assert {"psnr", "ssim", "latent/sigma_data"} <= json.loads(done.stdout).keys()
    (tmp_path / "out/odd_recon.png").write_bytes(b"mine")
    done = typed(capsys, "vae", "recon", run, *words)
    assert done.returncode == 2 and "is never replaced" in done.stderr
    assert (tmp_path / "out/odd_recon.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "words, said",
    [
        (("vae", "recon", "local://no@1", "--image", "in.png"), "no such model"),
        (("vae", "recon", "local://tiny@1", "--image", "no.png"), "no.png"),
        (("vae", "recon", "local://tiny@1"), "--image FILE"),
        (("vae", "train", "vae.yaml", "loss.name=min_snr"), "loss: an autoencoder has none"),
        (("vae", "train", "vae.yaml", "data.size=9"), "images are 9x9; data.size=8 fits"),
        (("vae", "train", "vae.yaml", "codec.name=none"), "is nothing to train; kl_vae is"),
        (("vae", "train", "vae.yaml", "--promote", "a b"), "letters, digits, '_' and '-' only"),
        (("train", "vae.yaml"), "has no weights; `minsnr vae train` first"),
        (("train", "net.yaml", "codec.name=local://tiny@2"), "no such version"),
        (("train", "net.yaml", "codec.name=local://tiny"), "no codec"),
        (("train", "net.yaml", "sampler.clip=true"), "latents have no bounds"),
        (("train", "net.yaml", "data.name=digits"), "sees 3 channels, and images have 1"),
        (("cache", "net.yaml", "codec.name=none"), "trains on pixels"),
    ],
)
def test_codec_wrong_requests_are_one_line_and_write_nothing(
    words, said, home, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("vae.yaml").write_text(json.dumps(VAE))
    Path("net.yaml").write_text(json.dumps(NETWORK))
    before = sorted(home.glob("*/*/*"))
    done = typed(capsys, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr and sorted(home.glob("*/*/*")) == before


# --- training in latents --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(home):
    return api.train_run(NETWORK, device="cpu")


def test_codec_is_recorded_with_its_digest(home, trained):
    stamp = trained.provenance()["codec"]
    codec = build(load(NETWORK).cfg, "cpu").latents[0].codec
    assert (stamp["name"], stamp["sha256"]) == ("local://tiny@1", codec.digest)
    assert stamp["sigma_data"] == pytest.approx(codec.scale.sigma_data)
    assert all(c.ok for c in check_run(trained.path))


def test_codec_cache_changes_no_bit(home, trained, monkeypatch):
    "Mirrored pictures included; without it nothing is read from there"
    assert trained.provenance()["determinism"]["mode"] == "strict"
    monkeypatch.setenv("MINSNR_LATENTS", "direct")
    monkeypatch.setenv("MINSNR_CACHE", str(home / "nothing"))
    direct = api.train_run(NETWORK, device="cpu")
    assert same(weights(direct), weights(trained))
    assert not (home / "nothing/latents").exists()
    final = [json.loads(r.summary_path.read_text())["final"] for r in (direct, trained)]
    keys = [k for k in final[0] if k.startswith(("train/loss", "probe/", "eval/"))]
    assert len(keys) > 5 and all(final[0][k] == final[1][k] for k in keys if "seconds" not in k)


def test_codec_sees_the_mirrored_pictures_of_a_training_on_pixels(home):
    "The same coin as on pixels, and the latents of the mirrored picture"
    lab = build(load(NETWORK).cfg, "cpu")
    latents, n = lab.latents[0], lab.cfg.train.batch_size
    unflipped = load(NETWORK, overrides=("train.flip=false",)).cfg
    pictures = train_loop.clean_images(1, lab.train, lab.cfg).x0
    upright = train_loop.clean_images(1, lab.train, unflipped).x0
    assert 0 < (pictures != upright).flatten(1).any(1).sum() < n
    mean, logvar = latents.codec.encode(pictures)
    noise = train_loop.stream(0, "posterior").normal(n, latents.nominal, first=n)
    wanted = latents.scale.normalise(mean + (logvar / 2).exp() * noise)
    assert torch.equal(train_loop.clean_images(1, latents, lab.cfg).x0, wanted)


def test_codec_shares_of_a_batch_give_the_same_bits(home):
    one, two = (
        api.train_run(
            NETWORK | {"train": NETWORK["train"] | {"shards": 2}}, device="cpu", processes=n
        )
        for n in (1, 2)
    )
    assert same(weights(one), weights(two))


def test_codec_samples_are_pictures(home, trained, capsys):
    done = typed(capsys, "sample", trained.path, "--n", 4)
    assert done.returncode == 0 and Path(done.stdout.strip()).is_file()
    lab = build(api.config_of(trained), "cpu")
    network, _ = api.load_network(trained, device="cpu")
    assert lab.evaluator.draw(network, 3).shape == (3, 3, 8, 8)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_codec_of_diffusers_trains_and_must_stay(kind, home):
    "A folder that somebody else wrote; with other weights in it the run cannot go on"
    import diffusers

    tiny = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    kl = {"block_out_channels": (8,), "norm_num_groups": 4}
    make = lambda: getattr(diffusers, kind)(**(kl if kind == "AutoencoderKL" else tiny))  # noqa: E731
    folder = home / "models" / kind
    make().save_pretrained(folder)
    run = api.train_run(NETWORK | {"codec": {"name": "diffusers", "path": kind}}, device="cpu")
    assert run.provenance()["codec"]["name"] == f"diffusers:{kind}"
    make().save_pretrained(folder)
    with pytest.raises(ConfigError, match="another autoencoder"):
        api.eval_run(run.path, device="cpu")


# --- latents in buckets ---------------------------------------------------------------------------

BUCKETS = {
    "data": {"name": "image_folder", "path": "mixed", "resize": "bucket", "size": 16}
    | {"step": 4, "fewest": 8},
    "model": {"name": "unet", "ch": 8, "mult": [1, 2], "blocks": 1},
    "train": NETWORK["train"] | {"steps": 6},
    "eval": NETWORK["eval"] | {"every": 6},
}


@pytest.fixture(scope="module")
def mixed(home):
    "A config for pictures of six shapes in the latents of local://tiny@1"
    folder(home / "data/mixed")
    return NETWORK | BUCKETS


def test_codec_buckets_have_latents_of_their_own_shapes(home, mixed):
    "Each step sees latents of one shape, of the pictures that a training on pixels would see"
    lab = build(load(mixed).cfg, "cpu")
    latents, n = lab.latents[0], lab.cfg.train.batch_size
    shapes = set()
    for step in range(8):
        seen, taken = (train_loop.clean_images(step, x, lab.cfg) for x in (latents, lab.train))
        mean, logvar = latents.codec.encode(taken.x0)
        rng = train_loop.stream(0, f"posterior{taken.stream}")
        noise = rng.normal(n, tuple(mean.shape[1:]), first=taken.first)
        assert torch.equal(seen.x0, latents.scale.normalise(mean + (logvar / 2).exp() * noise))
        assert torch.equal(seen.index, taken.index) and seen[2:] == taken[2:]
        shapes.add(tuple(seen.x0.shape[1:]))
    assert shapes == {(2, h // 2, w // 2) for h, w in lab.train.sides} and len(shapes) > 2


def test_codec_buckets_train_to_the_same_bits_from_cache_directly_resumed_and_shared(
    home, mixed, monkeypatch
):
    whole = api.train_run(mixed, device="cpu")
    assert all(c.ok for c in check_run(whole.path))
    half = api.train_run(mixed, overrides=("train.steps=3",), device="cpu")
    on = api.continue_run(half.path, 6, device="cpu")
    monkeypatch.setenv("MINSNR_LATENTS", "direct")
    direct = api.train_run(mixed, device="cpu")
    assert same(weights(whole), weights(direct)) and same(weights(whole), weights(on))
    shards = mixed | {"train": mixed["train"] | {"shards": 2}}
    one, two = (api.train_run(shards, device="cpu", processes=n) for n in (1, 2))
    assert same(weights(one), weights(two))


def test_codec_buckets_through_the_commands(home, mixed, capsys, tmp_path):
    config = tmp_path / "mixed.yaml"
    config.write_text(json.dumps(mixed))
    said = typed(capsys, "cache", config).stdout
    assert said.count("mixed.on") == said.count("digest") > 4 and "/train/16x16: " in said
    again = typed(capsys, "cache", config, "--explain").stdout
    assert not [x for x in again.splitlines() if x.split(": ")[1].split()[0] != x.split()[-3]], (
        again
    )
    done = typed(capsys, "train", config)
    run = done.stdout.split("RUN_DIR: ")[1].strip()
    drawn = typed(capsys, "sample", run, "--n", 4)
    assert (done.returncode, drawn.returncode) == (0, 0) and Path(drawn.stdout.strip()).is_file()
    judged = typed(capsys, "eval", run)
    assert judged.returncode == 0, judged.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (("train", "mixed.yaml", "data.step=1"), "data.step: 1 is no multiple of 2"),
        (("train", "mixed.yaml", "data.step=2"), "cannot take the bucket"),
        (("train", "mixed.yaml", "data={name: image_folder, path: mixed, resize: cover, size: 16}"),
         "looks at another part in every epoch"),
        (("train", "mixed.yaml", "model={name: mlp}"), "'mlp' cannot take the bucket"),
        (("vae", "train", "mixed_vae.yaml"), "an autoencoder is trained on one size"),
    ],
)  # fmt: skip
def test_codec_buckets_wrong_requests_are_one_line(
    words, said, home, mixed, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("mixed.yaml").write_text(json.dumps(mixed))
    Path("mixed_vae.yaml").write_text(json.dumps(VAE | {"data": mixed["data"]}))
    before = sorted(home.glob("runs/*/*"))
    done = typed(capsys, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr and sorted(home.glob("runs/*/*")) == before


def test_codec_learns_from_random_parts_of_pictures_and_is_promoted(home, mixed, capsys, tmp_path):
    parts = mixed["data"] | {"resize": "cover"}
    data = {k: v for k, v in parts.items() if k not in ("step", "fewest")}
    (tmp_path / "vae.yaml").write_text(json.dumps(VAE | {"data": data}))
    done = typed(capsys, "vae", "train", tmp_path / "vae.yaml", "--promote", "parts")
    assert done.returncode == 0 and "local://parts@1" in done.stdout
    assert all(c.ok for c in check_run(done.stdout.split("RUN_DIR: ")[1].split("\n")[0]))


def test_codec_networks_are_told_classes_in_latents_and_in_buckets_of_them(home, mixed, capsys):
    "The class of a latent is that of its picture; samples of one class have its name"
    told = {"model": {"classes": True, "drop": 0.2}}
    for k, file in enumerate(sorted((folder(home / "data/sorted")).glob("*.png"))):
        (home / "data/sorted" / "ab"[k % 2]).mkdir(exist_ok=True)
        file.rename(home / "data/sorted" / "ab"[k % 2] / file.name)
    sets = (NETWORK, mixed | {"data": mixed["data"] | {"path": "sorted"}})
    for config in sets:
        settings = config | {"model": config["model"] | told["model"]}
        lab = build(load(settings).cfg, "cpu")
        for step in range(4):
            batch = train_loop.draw_batch(step, lab.source, lab.objective, lab.cfg)
            known = batch.labels >= 0
            assert torch.equal(batch.labels[known], lab.train.labels[batch.index][known])
        assert lab.train.labels.unique().numel() > 1
        run = api.train_run(settings, device="cpu")
        name = lab.train.classes[1]
        one, way = (typed(capsys, *words) for words in (
            ("sample", run.path, "--n", 4, "--class", name, "sampler.guidance=2"),
            ("picture", run.path, "trajectory", "--n", 2, "--class", name),
        ))  # fmt: skip
        assert (one.returncode, way.returncode) == (0, 0), (one.stderr, way.stderr)
        assert all(f"_{name}_" in Path(x.stdout.strip().splitlines()[-1]).name for x in (one, way))


# --- the cache ------------------------------------------------------------------------------------

SLOW = """
import sys, time, torch
from pathlib import Path
from types import SimpleNamespace
from torch import nn
from minsnr_nb.images import latent_cache as c
from minsnr_nb.images.codec import Codec
from minsnr_nb.images.latents import Latents

c.SHARD = 4
images = torch.arange(48 * 3 * 4 * 4).view(48, 3, 4, 4).mul(37).remainder(251).to(torch.uint8)
source = type("S", (), {"__len__": lambda s: 48})()
source.images, source.name, source.split, source.shape = images, "slow", "train", (3, 4, 4)
torch.manual_seed(0)
network = nn.Conv2d(3, 4, 2, 2)
done = 0

def code(x):
    global done
    done += 1
    time.sleep(float(sys.argv[2]))
    y = network(x)
    return y, y - 1

codec = Codec("slow", network, code, None, (4, 2, 2), 2, "slow")
latents = Latents(source, lambda i: images[i].div(127.5).sub(1), codec)
facts = c.facts_of(latents, {"name": "slow"})
rows = [*range(48)]
wanted = c.Wanted(rows, c.keys_of(latents, facts, rows))
print("begins", flush=True)
found = c.fill_latents(c.Store(Path(sys.argv[1])), latents, wanted)
print(done, c.Table(found, wanted).digest, len(found.bad), flush=True)
"""


def encoding(folder, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ended(process) -> tuple[int, str, int]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    done, digest, bad = out.splitlines()[-1].split()
    return int(done), digest, int(bad)


def test_codec_cache_killed_and_shared(tmp_path):
    "Killed in the middle: the rest is encoded, to the same digest. Two at once share the work"
    whole = ended(encoding(tmp_path / "whole", 0))
    assert whole[0] == 48
    killed = encoding(tmp_path / "killed", 0.05)
    shards = tmp_path / "killed/shards"
    until = time.monotonic() + 60
    while len(list(shards.glob("*.safetensors")) if shards.is_dir() else []) < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done, digest, bad = ended(encoding(tmp_path / "killed", 0))
    assert (digest, bad) == (whole[1], 0) and 0 < done < 48
    assert not list((tmp_path / "killed").rglob(".desk-*"))
    two = [encoding(tmp_path / "two", 0.1) for _ in range(2)]
    ends = [ended(p) for p in two]
    assert sum(e[0] for e in ends) == 48 and min(e[0] for e in ends) > 0
    assert {e[1] for e in ends} == {whole[1]}


def test_codec_cache_command_explains_and_frees(home, trained, capsys, tmp_path):
    config = tmp_path / "net.yaml"
    config.write_text(json.dumps(NETWORK))
    said = typed(capsys, "cache", config, "--explain").stdout
    assert "shapes/train: 80 of 80 are there" in said  # upright and mirrored, since the training
    said = typed(capsys, "cache", config, "--explain", "data.seed=1").stdout
    assert "80: data.seed: 0 then, 1 now" in said
    first, second = (typed(capsys, "cache", config).stdout for _ in range(2))
    assert first == second and "80 rows, digest" in first
    shard = next((home / "cache/latents/shards").iterdir())
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    damaged = typed(capsys, "cache", config).stdout
    assert f"{shard.name}: other content than was written; it is left where it is" in damaged
    assert [x for x in damaged.splitlines() if "digest" in x] == first.splitlines()
    assert typed(capsys, "cache", "gc").returncode == 0 and shard.exists()
    assert typed(capsys, "cache", config, "--explain").stdout.startswith("shapes/train: 80 of 80")


def test_codec_cache_full_disk_is_one_line_and_loses_nothing(home, monkeypatch, capsys, tmp_path):
    from minsnr_nb import durable

    config = tmp_path / "net.yaml"
    config.write_text(json.dumps(NETWORK | {"data": DATA | {"seed": 5}}))
    runs = sorted((home / "runs").glob("*/*"))

    def full(path, data):
        raise durable.DurableError(f"cannot claim {path}: No space left on device (ENOSPC)")

    monkeypatch.setattr(durable, "claim", full)
    done = typed(capsys, "train", config)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "ENOSPC" in done.stderr
    assert sorted((home / "runs").glob("*/*")) == runs
    monkeypatch.undo()
    assert typed(capsys, "train", config).returncode == 0


def test_codec_of_a_stranger_is_not_followed(home, trained):
    "A run that came from elsewhere names no folder outside of the data directory"
    cfg = load(NETWORK | {"codec": {"name": "diffusers", "path": "../elsewhere"}}).cfg
    with pytest.raises(MinsnrError, match="codec.path"):
        api.refuse_elsewhere(cfg, trained.config_path)
