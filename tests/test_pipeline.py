"Pictures of a run, a promoted model and a checkpoint, by the commands that a user types."

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minsnr_nb import api
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.evaluations import list_evaluations
from minsnr_nb.show import png
from tests.runs import typed
from tests.test_codec import NETWORK, VAE

DIGITS = {
    "project": "pipeline",
    "objective": {"prediction": "v"},
    "schedule": {"name": "cosine", "timesteps": 200},
    "loss": {"name": "min_snr", "gamma": 5.0},
    "model": {"name": "unet", "ch": 8},
    "optim": {"lr": 3e-3, "warmup_steps": 10},
    "train": {"steps": 200, "batch_size": 64, "log_every": 50, "checkpoint_every": 100},
    "sampler": {"name": "ddim", "steps": 5},
    "eval": {"every": 200, "samples": 8, "probe_images": 5, "probe_draws": 1},
    "metrics": [],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A place with a run on digits, promoted as local://digit@1, and a run in latents"
    place = tmp_path_factory.mktemp("pipeline")
    names = {f"MINSNR_{k.upper()}": str(place / k) for k in ("runs", "models", "cache", "data")}
    before = {k: os.environ.get(k) for k in names}
    os.environ.update(names)
    run = api.train_run(DIGITS, device="cpu")
    api.promote_run(run.path, "digit")
    api.promote_run(api.train_run(VAE, device="cpu", autoencoder=True).path, "tiny")
    yield SimpleNamespace(path=place, run=run, latents=api.train_run(NETWORK, device="cpu"))
    for k, v in before.items():
        os.environ.pop(k) if v is None else os.environ.update({k: v})


def picture(capsys, *words) -> SimpleNamespace:
    done = typed(capsys, "picture", *words, "--json")
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(**json.loads(done.stdout))


def files(folder) -> dict:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def drawing(path, high=8, wide=8) -> str:
    "A grey picture that is not flat"
    shade = np.arange(high * wide, dtype=np.uint8).reshape(high, wide)
    Image.fromarray(shade).save(path)
    return str(path)


@pytest.mark.parametrize("kind", ["run", "latents"])
@pytest.mark.parametrize("act", api.ACTS)
def test_pipeline_every_act_leaves_one_picture_and_one_record(act, kind, home, capsys):
    run = getattr(home, kind)
    first = picture(capsys, run.path, act, "--n", 2)
    before = files(run.path)
    assert picture(capsys, run.path, act, "--n", 2) == first and files(run.path) == before
    assert first.picture.startswith(str(run.path / "artifacts/grids" / act))
    (record,) = [
        r
        for r in list_evaluations(run.evaluations)
        if (r["decides"]["draw"] or {}).get("act") == act
    ]
    assert [str(run.path / f) for f in record["files"]] == [first.picture]
    assert record["values"] == {f"{act}/{k}": v for k, v in first.values.items()}
    assert [c for c in check_run(run.path) if not c.ok] == []
    other = picture(capsys, run.path, act, "--n", 2, "--seed", 1)
    assert other.picture != first.picture


def test_pipeline_training_images_come_back_from_their_noise(home, capsys):
    few, many = (
        picture(capsys, home.run.path, "invert", "--split", "train", "--n", 8, "--steps", k).values
        for k in (20, 190)
    )
    assert many["back"] > 35 and many["back, least"] > 30 and many["back"] > few["back"] + 5


def test_pipeline_less_survives_more_noise(home, capsys):
    done = typed(capsys, "picture", home.run.path, "reconstruct", "--t", 5, 100, 199)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    dB = [float(line.split()[-1]) for line in rows[1:4]]
    assert [line.rsplit(maxsplit=1)[0] for line in rows[1:4]] == ["t = 5", "t = 100", "t = 199"]
    assert dB[0] > 20 > 18 > dB[1] > dB[2] and rows[-1].endswith(".png")


@pytest.mark.parametrize(
    "words, said",
    [
        (("invrt",), "no act 'invrt'; did you mean 'invert'?"),
        (("inpaint", "--t", "3"), "--t: inpaint starts at the noisiest level"),
        (("invert", "--t", "3", "4"), "--t: invert takes one level, not 2"),
        (("reconstruct", "--t", "200"), "t = 200: the schedule has the levels 0 to 199"),
        (("trajectory", "--t", "-1"), "t = -1: the schedule has the levels 0 to 199"),
        (("invert", "--hole", "left"), "--hole: invert paints nothing"),
        (("invert", "--sampler", "heun"), "--sampler: invert of pictures walks the levels"),
        (("inpaint", "--hole", "middle"), "hole 'middle': allowed: centre, left"),
        (("inpaint", "--hole", "no.png"), "no.png"),
        (("inpaint", "--hole", "{big}"), "has 12x16 pixels, the pictures have 8x8"),
        (("invert", "--image", "no.png"), "no.png"),
        (("invert", "--image", "{odd}"), "size 7x9: the network does not take it; 8x10 fits"),
        (("invert", "--image", "{fit}", "--image", "{big}"), "pictures of 8x8, 12x16; --size HxW"),
        (("interpolate", "--image", "{fit}"), "1 pictures; wanted are two for each row"),
        (("invert", "--size", "16"), "--size: needs --image; the run's own pictures are 8x8"),
        (("trajectory", "--size", "9x8"), "size 9x8: the network does not take it; 10x8 fits"),
        (("trajectory", "--size", "wide"), "--size 'wide': written as 32 or as 32x48"),
        (("trajectory", "--n", "0"), "n must be at least 1"),
        (("invert", "--steps", "0"), "steps"),
        (("trajectory", "--sampler", "huen"), "did you mean 'heun'?"),
        (("trajectory", "sampler.rho=7"), "sampler.rho"),
        (("trajectory", "model.ch=4"), "only sampler may be changed here"),
        (("trajectory", "--weights", "step_000000007"), "has no checkpoint step_000000007"),
    ],
)
def test_pipeline_a_wrong_request_is_one_line_and_leaves_nothing(
    words, said, home, tmp_path, capsys
):
    put = {"fit": drawing(tmp_path / "fit.png"), "odd": drawing(tmp_path / "odd.png", 7, 9)}
    put["big"] = drawing(tmp_path / "big.png", 12, 16)
    before = files(home.path)
    done = typed(capsys, "picture", home.run.path, *(w.format(**put) for w in words))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert said in done.stderr and files(home.path) == before


@pytest.mark.parametrize(
    "words, said",
    [
        (("--size", "9x9"), "size 9x9: the network does not take it; 10x10 fits"),
        (("--steps", "0"), "sampler.steps"),
        (("--sampler", "huen"), "did you mean 'heun'?"),
        (("--grid", "0"), "grid=0: between 1 and the number of pictures, 64"),
        (("--grid", "65"), "grid=65: between 1 and the number of pictures, 64"),
    ],
)
def test_pipeline_wrong_flags_of_sample_leave_nothing(words, said, home, capsys):
    before = files(home.path)
    for whose in (home.run.path, "local://digit"):
        done = typed(capsys, "sample", whose, *words, "--out", home.path / "out")
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done
    assert files(home.path) == before and not (home.path / "out").exists()


def test_pipeline_sample_without_new_flags_is_what_it_was(home, capsys):
    done = typed(capsys, "sample", home.run.path, "--n", 4, "--seed", 3)
    (name,) = done.stdout.split()
    network, lab = api.load_network(home.run, device="cpu")
    images = lab.evaluator.draw(network, 4, seed=3)
    assert (home.path / name).read_bytes() == png(api._grid(images))
    assert torch.equal(api.open_pipeline(home.run.path).sample(4, seed=3).images, images)
    record = list_evaluations(home.run.evaluations)[-1]
    assert record["decides"]["draw"] == {"n": 4, "seed": 3}
    own = typed(capsys, "sample", home.run.path, "--n", 4, "--seed", 3, "--size", "8")
    assert own.stdout.split() == [name], "the size that it was trained on is no other picture"


def test_pipeline_flags_of_the_sampler_are_its_settings(home, capsys):
    short = ("--sampler", "heun", "--steps", 3)
    flags, keys = (
        typed(capsys, "sample", home.run.path, "--n", 2, *more).stdout.strip()
        for more in (short, ("sampler.name=heun", "sampler.steps=3"))
    )
    assert flags == keys and "_heun3_seed0_n2_" in flags
    drawn = typed(capsys, "sample", home.run.path, "--n", 6, "--grid", 6, "--size", "12x16")
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(drawn.stdout.strip()) as image:
        assert image.width * 12 == image.height * (6 * 16 + 5)
    assert "_n6_12x16_" in drawn.stdout


def test_pipeline_nothing_of_a_stranger_is_replaced(home, tmp_path, capsys):
    for verb in (["picture", "local://digit@1", "invert"], ["sample", "local://digit@1"]):
        words = [*verb, "--n", 2, "--out", tmp_path / "out"]
        name = typed(capsys, *words).stdout.splitlines()[-1]
        assert typed(capsys, *words).returncode == 0, "the same picture again is none"
        (path := home.path / name).write_bytes(b"mine")
        done = typed(capsys, *words)
        assert done.returncode == 2 and "is never replaced" in done.stderr
        assert path.read_bytes() == b"mine"
    there = picture(capsys, home.run.path, "inpaint", "--n", 1, "--hole", "top").picture
    os.chmod(there, 0o644)
    made = (path := home.path / there).read_bytes()
    path.write_bytes(b"mine")
    done = typed(capsys, "picture", home.run.path, "inpaint", "--n", 1, "--hole", "top")
    assert "with other pixels; it stays as it is" in done.stderr and path.read_bytes() == b"mine"
    path.write_bytes(made)  # the run is sealed, and sound again


def test_pipeline_pictures_of_ones_own(home, tmp_path, capsys):
    one, two = drawing(tmp_path / "one.png", 12, 16), drawing(tmp_path / "two.png", 24, 16)
    found = picture(capsys, home.run.path, "invert", "--image", one, "--out", tmp_path)
    assert set(found.values) == {"back", "back, least"}
    with Image.open(found.picture) as image:
        assert image.height * (3 * 16 + 2 * 1) == image.width * 12
    both = ("--image", one, "--image", two, "--size", "8", "--out", tmp_path)
    found = picture(capsys, home.run.path, "interpolate", *both)
    with Image.open(found.picture) as image:
        assert image.height * (10 * 8 + 9) == image.width * 8
    Image.fromarray(np.uint8([[255] * 8] * 4 + [[0] * 8] * 4)).save(tmp_path / "mask.png")
    mask = picture(capsys, home.run.path, "inpaint", "--hole", tmp_path / "mask.png")
    top = picture(capsys, home.run.path, "inpaint", "--hole", "top")
    assert mask.values == top.values and mask.picture != top.picture


def test_pipeline_a_checkpoint_is_used_when_it_is_whole(home, tmp_path):
    import shutil

    run = shutil.copytree(home.run.path, tmp_path / "run")
    now, then = "step_000000200", "step_000000100"
    last = api.open_pipeline(run).sample(2).images
    assert torch.equal(api.open_pipeline(run, now).sample(2).images, last)
    assert torch.equal(api.open_pipeline(run / "ckpts/last" / now).sample(2).images, last)
    assert not torch.equal(api.open_pipeline(run, then).sample(2).images, last)
    file = run / "ckpts/last" / then / "ema.safetensors"
    os.chmod(file, 0o644)
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ConfigError, match="ema.safetensors is missing or damaged"):
        api.open_pipeline(run, then)


def test_pipeline_latents_give_pictures_of_every_size_that_fits(home):
    pipe = api.open_pipeline(home.latents.path)
    network, lab = api.load_network(home.latents, device="cpu")
    assert torch.equal(pipe.sample(3, seed=2).images, lab.evaluator.draw(network, 3, seed=2))
    images = lab.test.images[:2].float() / 127.5 - 1
    left = api.hole("left", 8, 8)
    painted = pipe.inpaint(images, left, 2)
    assert torch.equal(painted.column("1")[..., 4:], images[..., 4:])
    assert (painted.column("1")[..., :4] != images[..., :4]).any()
    found = pipe.reconstruct(images, [0])
    assert found.heads == ("picture", "codec", "t = 0") and found.values["codec"] > 0
    with pytest.raises(ConfigError, match="the network does not take it; 8x8 is the only one"):
        pipe.sample(1, size=(16, 16))  # an mlp
    with pytest.raises(ConfigError, match="is an autoencoder; `minsnr vae recon`"):
        api.open_pipeline("local://tiny@1")
