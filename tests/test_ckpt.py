"Weights files by the commands that a user types, diffusers' own networks, and the scales of a run."

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from minsnr_nb import api
from minsnr_nb.lab import build, load
from minsnr_nb.record.checks import check_run
from minsnr_nb.seeds import fixed_torch, stream
from minsnr_nb.strict_yaml import read_yaml
from minsnr_nb.unet import unet
from minsnr_nb.weights.diffusers import counterpart, from_twin, to_twin, twin_config
from minsnr_nb.weights.tensors import read_tensors
from tests.runs import typed
from tests.test_pipeline import DIGITS

SMALL = DIGITS | {"model": {"name": "unet", "ch": 8, "groups": 4, "attention": [4]}}
SMALL |= {"train": {"steps": 40, "batch_size": 32, "log_every": 20, "checkpoint_every": 20}}
SMALL |= {"eval": {"every": 40, "samples": 8, "probe_images": 32, "probe_draws": 1}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A run on digits, promoted as local://digit@1"
    place = tmp_path_factory.mktemp("ckpt")
    names = {f"MINSNR_{k.upper()}": str(place / k) for k in ("runs", "models", "cache", "data")}
    before = {k: os.environ.get(k) for k in names}
    os.environ.update(names)
    run = api.train_run(SMALL, device="cpu")
    api.promote_run(run.path, "digit")
    yield SimpleNamespace(path=place, run=run, last=run.checkpoints_dir / "last.safetensors")
    for k, v in before.items():
        os.environ.pop(k) if v is None else os.environ.update({k: v})


def awake(network):
    "Draw all parameters anew: layers that start at zero would hide what is tested"
    with torch.no_grad(), fixed_torch(0, "awake"):
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return network.eval()


def furthest(ours, theirs, shape, classes=0) -> float:
    "Largest difference of outputs, relative to their spread"
    x, far = stream(1, "ckpt").normal(4, shape), 0.0
    told = torch.tensor([0, 1, classes - 1, -1]) if classes else None
    named = torch.where(told < 0, classes, told) if classes else None
    for t in [0, 1, 2, 10, 99, 333, 500, 777, 998, 999]:
        with torch.no_grad():
            a = ours(x, torch.full((4,), t), *([] if told is None else [told]))
            b = theirs(x, t, class_labels=named).sample
        far = max(far, ((a - b).abs().max() / a.std()).item())
    return far


OURS = {
    "plain": ({"mult": (1, 2)}, 0),
    "attention at two levels": ({"mult": (1, 2, 2), "attention": (8, 4), "blocks": 2}, 0),
    "heads": ({"mult": (1, 1), "attention": (8, 4), "heads": 4}, 0),
    "classes": ({"mult": (1, 3), "attention": (4,)}, 5),
    "one level": ({"mult": (1,), "attention": (8,)}, 0),
}


@pytest.mark.parametrize("case", OURS)
def test_ckpt_our_network_is_a_unet2dmodel(case):
    diffusers = pytest.importorskip("diffusers")
    keys, classes = OURS[case]
    ours = awake(unet((2, 8, 12), classes, ch=8, groups=4, **keys))
    config = twin_config(ours, (2, 8, 12))
    theirs = diffusers.UNet2DModel(**{k: v for k, v in config.items() if k[0] != "_"}).eval()
    theirs.load_state_dict(to_twin(ours, ours.state_dict()))
    assert furthest(ours, theirs, (2, 8, 12), classes) < 1e-4
    found = counterpart(theirs.config)
    back = from_twin(found.make(), theirs.state_dict(), False)
    assert all(torch.equal(back[k], v) for k, v in ours.state_dict().items())


THEIRS = {
    "flipped": {"flip_sin_to_cos": True},
    "not flipped": {"flip_sin_to_cos": False},
    "no head width": {"attention_head_dim": None},
    "one group": {"norm_num_groups": 1},
    "classes": {"num_class_embeds": 4},
    "three layers": {"layers_per_block": 3},
}


@pytest.mark.parametrize("case", THEIRS)
def test_ckpt_a_unet2dmodel_is_our_network(case):
    diffusers = pytest.importorskip("diffusers")
    config = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "freq_shift": 1,
    }
    with fixed_torch(0, "theirs"):
        theirs = awake(diffusers.UNet2DModel(**config | THEIRS[case]))
    found = counterpart(theirs.config)
    ours = found.make().eval()
    flip = theirs.config["flip_sin_to_cos"]
    ours.load_state_dict(from_twin(ours, theirs.state_dict(), flip))
    assert furthest(ours, theirs, (3, 16, 16), found.classes) < 1e-4
    wrong = from_twin(ours, theirs.state_dict(), not flip)  # the measure can tell
    ours.load_state_dict(wrong)
    assert furthest(ours, theirs, (3, 16, 16), found.classes) > 1e-3


def test_ckpt_convert_writes_what_diffusers_reads_and_reads_it_back(home, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    done = typed(
        capsys, "ckpt", "convert", home.run.path, "--to", "diffusers", "--out", tmp_path / "d"
    )
    assert done.returncode == 0 and "predicts v" in done.stdout, done.stderr
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "d").eval()
    assert furthest(api.load_network(home.run)[0], theirs, (1, 8, 8)) < 1e-4
    theirs.save_pretrained(tmp_path / "again")
    for folder in ("d", "again"):
        new = tmp_path / f"{folder}_back"
        done = typed(capsys, "ckpt", "convert", tmp_path / folder, "--to", "minsnr", "--out", new)
        assert done.returncode == 0, done.stderr
        assert typed(capsys, "ckpt", "diff", home.last, new / "model.safetensors").returncode == 0
        model = read_yaml((new / "model.yaml").read_text())[0]
        assert build(load(SMALL | model).cfg, "cpu").state().model.head[0].num_groups == 4


def test_ckpt_precision_there_and_back(home, tmp_path, capsys):
    for kind, type_ in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        half, full = tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}_32.safetensors"
        for source, to, out in ((home.run.path, kind, half), (half, "fp32", full)):
            done = typed(capsys, "ckpt", "convert", source, "--to", to, "--out", out)
            assert done.returncode == 0, done.stderr
        assert {t.dtype for t in read_tensors(half).values()} == {type_}
        assert half.stat().st_size < 0.6 * home.last.stat().st_size
        done = typed(capsys, "ckpt", "diff", home.last, full, "--json")
        found = json.loads(done.stdout)
        assert done.returncode == 1 and 0 < found["changed"][0]["apart"] < 2**-7
        before = half.read_bytes()
        done = typed(capsys, "ckpt", "convert", home.last, "--to", kind, "--out", half)
        assert done.returncode == 2 and "never replaced" in done.stderr
        assert half.read_bytes() == before


def test_ckpt_show_names_every_tensor(home, capsys):
    done = typed(capsys, "ckpt", "show", home.run.path, "--json")
    rows = json.loads(done.stdout)["tensors"]
    tensors = read_tensors(home.last)
    assert {r["name"]: r["shape"] for r in rows} == {k: [*v.shape] for k, v in tensors.items()}
    assert all(abs(r["norm"] - tensors[r["name"]].norm().item()) < 1e-4 for r in rows)
    for name in (home.last, "local://digit", home.run.path):
        done = typed(capsys, "ckpt", "show", name)
        assert done.returncode == 0 and "stem.weight" in done.stdout, done.stderr
        assert f"{len(rows)} tensors" in done.stdout and "0 not finite" in done.stdout


def test_ckpt_diff_tells_changes_and_renames(home, tmp_path, capsys):
    same = typed(capsys, "ckpt", "diff", home.run.path, "local://digit")
    assert (same.returncode, "0 changed" in same.stdout) == (0, True), same.stderr
    tensors = read_tensors(home.last)
    tensors["tail.weight"] = tensors.pop("head.2.weight") * 1.001
    tensors["stem.bias"] = tensors["stem.bias"] + 1
    save_file(tensors, tmp_path / "other.safetensors")
    done = typed(capsys, "ckpt", "diff", home.last, tmp_path / "other.safetensors")
    assert done.returncode == 1 and "head.2.weight -> tail.weight: renamed? 0.001" in done.stdout
    assert "1 changed, 1 only in the first, 1 only in the second" in done.stdout
    assert done.stdout.splitlines()[1].startswith("stem.bias")
    assert typed(capsys, "ckpt", "diff", home.last).returncode == 2


def test_ckpt_average_is_the_mean_and_refuses_strangers(home, tmp_path, capsys):
    tensors = read_tensors(home.last)
    save_file({k: 3 * v for k, v in tensors.items()}, tmp_path / "three.safetensors")
    out = tmp_path / "mean.safetensors"
    pair = (home.last, tmp_path / "three.safetensors")
    assert typed(capsys, "ckpt", "average", *pair, "--out", out).returncode == 0
    assert all(torch.allclose(v, 2 * tensors[k]) for k, v in read_tensors(out).items())
    new = tmp_path / "a.safetensors"
    words = ("ckpt", "average", *pair, "--out", new, "--weights", "1.5", "-0.5")
    assert typed(capsys, *words).returncode == 0
    assert all(v.abs().max() < 1e-6 for v in read_tensors(new).values())
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    for more in (["--weights", "1", "1"], [tmp_path / "x.safetensors"]):
        new = tmp_path / "no" / "b.safetensors"
        done = typed(capsys, "ckpt", "average", *pair, *more, "--out", new)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert not new.parent.exists()


HOSTILE = {
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "a header that is too long": (1 << 40).to_bytes(8, "little") + b"{}",
    "cut": (16).to_bytes(8, "little") + b"{",
    "nothing": b"",
}


@pytest.mark.parametrize("verb", ["show", "diff", "convert", "average"])
@pytest.mark.parametrize("case", HOSTILE)
def test_ckpt_hostile_files_are_one_line(case, verb, home, tmp_path, capsys):
    (bad := tmp_path / "bad.safetensors").write_bytes(HOSTILE[case])
    more = {"diff": [home.last], "average": [home.last], "convert": ["--to", "fp16"]}.get(verb, [])
    more = [*more, *(["--out", tmp_path / "new"] if verb in ("convert", "average") else [])]
    done = typed(capsys, "ckpt", verb, bad, *more)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "not a tensor file" in done.stderr and not (tmp_path / "new").exists()


def test_ckpt_convert_says_why_not(home, tmp_path, capsys):
    mlp = SMALL | {"model": {"name": "mlp", "width": 16}}
    auto = SMALL | {"model": {"name": "unet", "ch": 8}}
    runs = {k: api.train_run(v, device="cpu").path for k, v in (("mlp", mlp), ("auto", auto))}
    config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "in_channels": 1}
    config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    (folder := tmp_path / "theirs").mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"out_channels": 1, "sample_size": 8}))
    save_file({"x": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    save_file(read_tensors(home.last), tmp_path / "loose.safetensors")
    for source, to, why in (
        (runs["mlp"], "diffusers", "'mlp' has no counterpart"),
        (runs["auto"], "diffusers", "model.groups"),
        (folder, "minsnr", "freq_shift: 0"),
        (tmp_path / "loose.safetensors", "diffusers", "does not say which network"),
        (home.last, "minsnr", "config.json"),
        (home.last, "fp15", "did you mean"),
    ):
        done = typed(capsys, "ckpt", "convert", source, "--to", to, "--out", tmp_path / "new")
        assert done.returncode in (1, 2) and why in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "new").exists()


def test_ckpt_scales_of_a_run(home, tmp_path, capsys):
    words = ("scales", home.run.path, "--sampler", "ddim", "--steps", "6", "--n", "24")
    done = typed(capsys, *words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["before"]["ratio"]) == 6 and found["before"]["t"][0] == 199
    kid = found["kid"]
    assert kid["low"] <= kid["difference"] <= kid["high"]
    assert abs(kid["after"] - kid["before"] - kid["difference"]) < 1e-6
    assert [c for c in check_run(home.run.path) if not c.ok] == []
    said = typed(capsys, *words).stdout
    assert "(n = 1 run)" in said and found["picture"] in said
    (key,) = [line for line in said.splitlines() if line.startswith("sampler.eps_scale=")]
    done = typed(capsys, "sample", home.run.path, "--n", "4", key, "--steps", "6")
    assert done.returncode == 0, done.stderr
    done = typed(capsys, "scales", "local://digit", "--n", "8", "--out", tmp_path / "out")
    assert done.returncode == 0 and len(list((tmp_path / "out").iterdir())) == 2, done.stderr


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "heun", "dpmpp_2m"])
def test_ckpt_eps_scale_reaches_every_sampler(sampler, home):
    steps = {"name": sampler, "steps": 4}
    drawn = {}
    for name, more in (("none", {}), ("one", [[-2.0, 1.0]]), ("far", [[-2.0, 1.1], [2.0, 1.2]])):
        keys = steps | ({"eps_scale": more} if more else {})
        judge = build(load(SMALL | {"sampler": keys}).cfg, "cpu").evaluator
        drawn[name] = judge.draw(api.load_network(home.run)[0], 3)
    assert torch.equal(drawn["none"], drawn["one"])
    assert (drawn["none"] - drawn["far"]).abs().max() > 1e-3


def test_ckpt_eps_scale_must_rise(home, capsys):
    for table in ("[[0,1],[0,1]]", "[[0,-1]]", "[]", "3"):
        done = typed(capsys, "sample", home.run.path, f"sampler.eps_scale={table}")
        assert done.returncode == 2 and "sampler.eps_scale" in done.stderr


def test_ckpt_calibrate_makes_an_arm(home, tmp_path, capsys):
    new = tmp_path / "measured.yaml"
    done = typed(capsys, "calibrate", home.run.path, "--bins", "8", "--out", new)
    assert done.returncode == 0, done.stderr
    loss = read_yaml(new.read_text())[0]["loss"]
    found = json.loads(typed(capsys, "calibrate", home.run.path, "--bins", "8", "--json").stdout)
    assert loss["weight"] == found["weight"] and len(loss["log_snr"]) == len(found["error"])
    shares = [w * e for w, e in zip(found["weight"], found["error"], strict=True)]
    assert all(abs(s - 1) < 1e-4 for s in shares)
    run = api.train_run(SMALL | {"loss": loss}, device="cpu")
    assert run.config()["loss"] == loss | {"normalize": "none"}
    assert typed(capsys, "calibrate", home.run.path, "--out", new).returncode == 2
