"Folders as people have them, through the commands: faults, repair, buckets, and what must not go wrong."

import json
import os
import random
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minsnr_nb.analysis import loader
from minsnr_nb.data import DATASETS
from minsnr_nb.errors import ConfigError
from minsnr_nb.images import buckets, files, mapped
from minsnr_nb.images.doctor import inspect_folder
from tests.runs import digests, environment, run_dir, typed

SHAPES = [(40, 30), (30, 40), (32, 32), (48, 27), (27, 48), (45, 30)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MINSNR_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(seed: int, kind="PNG", mode="RGB", size=None, **how) -> bytes:
    "A smooth drawing: large enough to be cut off, small enough for a test"
    rng = np.random.default_rng(seed)
    size = size or SHAPES[seed % len(SHAPES)]
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(file := BytesIO(), kind, **how)
    return file.getvalue()


def folder(path: Path, n: int = 60) -> Path:
    "Sound pictures of six shapes"
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (path / f"{i:03}.png").write_bytes(picture(i))
    return path


def exif(value) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = value
    return tags


def plant(path: Path) -> dict[str, str]:
    "Twelve faults"
    deep = BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(deep, "PNG")
    gif = [Image.new("RGB", (30, 20), c) for c in ("red", "blue")]
    gif[0].save(moving := BytesIO(), "GIF", save_all=True, append_images=gif[1:])
    broken = b"Exif\0\0MM\0*\0\0\0\x08\0\x09brok"
    planted = {
        "x/text.png": (b"no picture", "unreadable"),
        "x/short.png": (picture(900)[:-60], "truncated"),
        "x/jpeg.png": (picture(901, "JPEG"), "extension"),
        "x/move.gif": (moving.getvalue(), "animated"),
        "x/print.jpg": (picture(902, "JPEG", "CMYK"), "cmyk"),
        "x/deep.png": (deep.getvalue(), "16-bit"),
        "x/glass.png": (picture(903, mode="RGBA"), "alpha"),
        "x/zero.jpg": (picture(904, "JPEG", exif=exif(0)), "orientation"),
        "x/tags.jpg": (picture(905, "JPEG", exif=broken), "exif"),
        "x/copy.png": (picture(3), "duplicate"),
        "x/.ipynb_checkpoints/0.png": (picture(0), "checkpoint"),
        "x/._0.png": (b"\0\5\x16\7", "resource fork"),
    }
    for name, (data, _) in planted.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return {name: fault for name, (_, fault) in planted.items()}


CONFIG = {
    "project": "images",
    "data": {"name": "image_folder", "path": "pictures", "resize": "bucket", "size": 16}
    | {"step": 4, "fewest": 8},
    "model": {"name": "unet", "ch": 8, "mult": [1, 2], "blocks": 1},
    "optim": {"warmup_steps": 2},
    "train": {"steps": 12, "batch_size": 8, "shards": 2, "flip": True, "log_every": 4}
    | {"checkpoint_every": 3},
    "sampler": {"name": "ddim", "steps": 2},
    "metrics": [],
    "eval": {"every": 12, "samples": 12, "probe_images": 6, "probe_draws": 1}
    | {"likelihood_draws": 1},
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    "A data directory with a folder of pictures and a config"
    monkeypatch.setenv("MINSNR_DATA", str(tmp_path))
    monkeypatch.setenv("MINSNR_RUNS", str(tmp_path / "runs"))
    folder(tmp_path / "pictures")
    (tmp_path / "b.yaml").write_text(json.dumps(CONFIG))
    return tmp_path


def load(place: Path, split="train", **keys):
    return DATASETS.bind("image_folder", {"path": "pictures", **keys})(place, split)


# Faults -------------------------------------------------------------------------------------------


def test_images_twelve_faults_are_named_repaired_and_trained_on(here, capsys):
    pictures = here / "pictures"
    for file in sorted(pictures.iterdir()):  # class folders
        (pictures / "ab"[int(file.stem) % 2]).mkdir(exist_ok=True)
        file.rename(pictures / "ab"[int(file.stem) % 2] / file.name)
    planted, before = plant(pictures), inspect_folder(pictures).sha256
    said = typed(capsys, "data", "inspect", pictures, "--json")
    record = json.loads(said.stdout)
    named = {(f["file"], f["fault"]) for f in record["faults"]}
    assert said.returncode == 1 and named == {*planted.items(), ("x/move.gif", "palette")}
    assert record["sha256"] == before and not record["takes"]
    plain = typed(capsys, "data", "inspect", pictures, "--sheet", here / "sheet.png")
    assert plain.returncode == 1 and all(name in plain.stdout for name in planted)
    (here / "mine.png").write_bytes(b"mine")
    refused = typed(capsys, "data", "inspect", pictures, "--sheet", here / "mine.png")
    assert refused.returncode == 2 and (here / "mine.png").read_bytes() == b"mine"
    assert "no, 3 faults stop it" in plain.stdout and Image.open(here / "sheet.png").size[0] > 500
    refused = typed(capsys, "train", here / "b.yaml")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "x/text.png" in refused.stderr and "x/short.png" in refused.stderr
    assert not (here / "runs").exists()
    done = typed(capsys, "data", "repair", pictures, "--out", here / "copy")
    assert done.returncode == 0 and inspect_folder(pictures).sha256 == before, done.stderr
    assert typed(capsys, "data", "inspect", here / "copy").returncode == 0
    assert inspect_folder(here / "copy").faults == ()
    trained = typed(capsys, "train", here / "b.yaml", "data.path=copy", "train.steps=2")
    assert trained.returncode == 0, trained.stderr
    again = typed(capsys, "data", "repair", pictures, "--out", here / "copy")
    assert again.returncode == 2 and "exists already" in again.stderr
    card = typed(capsys, "data", "card", here / "copy", "--json", "--licence", "CC0-1.0")
    assert json.loads(card.stdout)["license"] == "CC0-1.0"


@pytest.mark.parametrize("value", [0, 9, 6, "up"])
def test_images_a_strange_orientation_does_not_stop_training(value, here):
    tags = exif(value) if isinstance(value, int) else b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    (here / "pictures/turned.jpg").write_bytes(picture(1, "JPEG", exif=tags))
    assert len(load(here, size=16)) == 55
    found = inspect_folder(here / "pictures")
    assert found.takes and [f.file for f in found.faults] == ["turned.jpg"]


def test_images_every_problem_of_a_folder_is_in_one_error(here):
    for i in range(0, 60, 5):
        (here / f"pictures/{i:03}.png").write_bytes(b"no picture")
    for keys in ({"size": 16}, {"size": 16, "resize": "bucket"}, {"size": 16, "resize": "cover"}):
        (here / "pictures/000.png").write_bytes(picture(0))  # the first one decides on colour
        with pytest.raises(
            ConfigError, match=r"pictures in .*010.png.*and \d+ more; `minsnr data"
        ) as e:
            load(here, **keys, test_share=0.1)
        assert "\n" not in str(e.value)


# Buckets ------------------------------------------------------------------------------------------


def random_sizes(rng: random.Random) -> np.ndarray:
    n = rng.randint(1, 400)
    return np.array([[rng.randint(1, 300), rng.randint(1, 300)] for _ in range(n)])


@pytest.mark.parametrize("seed", range(25))
def test_images_buckets_lose_nothing_for_any_folder_batch_and_processes(seed):
    rng = random.Random(seed)
    sizes = random_sizes(rng)
    processes = rng.choice([1, 2, 3, 4])
    batch = processes * rng.randint(1, max(1, min(16, len(sizes) // processes)))
    sides = buckets.bucket_sides(8 * rng.randint(4, 12), 8, rng.choice([1.0, 1.5, 2.0, 3.0]))
    found = buckets.assign(sizes, sides, batch)
    assert sum(found.counts) == len(sizes) and min(found.counts) >= min(batch, len(sizes))
    best = buckets.kept_area(sizes, found.sides).max(1)
    assert np.allclose(found.kept, best)
    done = loader.check_loader(found, batch, rng.randint(1, 3), seed, processes)
    assert done.ok, done
    ahead = rng.randint(0, 10**9)
    turns = [buckets.turn_at(ahead + k, found.counts) for k in range(2 * len(found.counts) + 2)]
    for k, n in enumerate(found.counts):  # no bucket waits, none has two turns for one
        mine = [t.batch for t in turns if t.bucket == k]
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else True
        share = n / len(sizes)
        assert not mine or abs(mine[0] - ahead * share) <= 2 + len(found.counts) * share


def test_images_the_check_sees_a_loader_that_loses_pictures(monkeypatch):
    found = buckets.assign(random_sizes(random.Random(1)), buckets.bucket_sides(64), 8)
    true = loader.bucket_batch

    def repeats(step, *args):
        turn, index = true(step, *args)
        return turn, index.roll(1) if step % 5 else index.clone().fill_(index[0])

    monkeypatch.setattr(loader, "bucket_batch", repeats)
    assert not loader.check_loader(found, 8).ok
    monkeypatch.setattr(loader, "bucket_batch", lambda s, *args: true(s // 2 * 2, *args))
    done = loader.check_loader(found, 8)
    assert done.twice > 0 and done.lost > 0
    monkeypatch.setattr(loader, "bucket_batch", true)
    assert loader.check_loader(found, 8).ok


def test_images_buckets_keep_94_percent_of_a_mixed_set():
    rng = np.random.default_rng(0)
    common = np.array([(640, 480), (600, 400), (1280, 720), (500, 500), (750, 600), (427, 640)])
    sizes = common[rng.choice(6, 2000)] * rng.uniform(0.95, 1.05, (2000, 2))
    sizes = np.where(rng.random((2000, 1)) < 0.5, sizes, sizes[:, ::-1])
    found = buckets.assign(sizes, buckets.bucket_sides(64), 64)
    assert found.kept.mean() > 0.94 and buckets.kept_area(sizes, [(64, 64)]).mean() < 0.8


def test_images_commands_show_buckets_and_prove_the_loader(here, capsys):
    words = (here / "pictures", "--size", "16", "--step", "4", "--batch", "8")
    shown = typed(capsys, "data", "buckets", *words)
    assert shown.returncode == 0 and "60 pictures" in shown.stdout
    assert shown.stdout.rstrip().endswith("0 never seen"), shown.stdout
    proved = typed(capsys, "data", "loader-check", *words, "--epochs", "2", "--processes", "2")
    assert proved.returncode == 0 and "0 lost, 0 twice, 0 never seen" in proved.stdout


def test_images_a_run_on_buckets_resumes_and_shares_to_the_bit(here, capsys):
    whole = typed(capsys, "train", here / "b.yaml")
    assert whole.returncode == 0, whole.stderr
    first = run_dir(whole.stdout)
    assert typed(capsys, "check", first, "--level", "L3").returncode == 0
    shared = typed(capsys, "train", here / "b.yaml", "--processes", "2")
    assert digests(run_dir(shared.stdout)) == digests(first)
    cut = here / "cut.py"  # dies in the middle of an epoch, after the checkpoint of step 6
    cut.write_text(
        "import os, signal\nfrom minsnr_nb.callbacks import CALLBACKS\n"
        "from minsnr_nb.cli import main\nfrom minsnr_nb.train_loop import Callback\n"
        "real = CALLBACKS['progress'].after_step\n"
        "def die(self, loop, result):\n    real(self, loop, result)\n"
        "    if result.step == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"CALLBACKS['progress'].after_step = die\nmain(['train', {str(here / 'b.yaml')!r}])\n"
    )
    dead = subprocess.run(
        [sys.executable, cut], capture_output=True, text=True, env=environment(), timeout=240
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    resumed = typed(capsys, "resume", run_dir(dead.stdout))
    assert resumed.returncode == 0, resumed.stderr
    assert digests(run_dir(dead.stdout)) == digests(first)


# The cache ----------------------------------------------------------------------------------------

FILL = """
import sys
from pathlib import Path
from minsnr_nb.images import files, mapped
import minsnr_nb.data as data
files.PART, mapped.CACHE_FROM = 2000, 1
print(data.image_folder(Path("."), "train", path=sys.argv[1], size=16, resize="bucket", fewest=8).sha256)
"""


def filling(place: Path, kill_after: float | None = None) -> str:
    words = [sys.executable, "-c", FILL, str(place / "pictures")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
    if kill_after is not None:
        until = time.monotonic() + 60
        cache = Path(os.environ["MINSNR_CACHE"]) / "images"
        while process.poll() is None and time.monotonic() < until:
            lists = list(cache.glob("*/.pixels.u8.done"))
            if lists and lists[0].stat().st_size > kill_after:
                break
        process.kill()
    return process.communicate()[0].strip()


def test_images_a_killed_cache_goes_on_where_it_was(here, monkeypatch):
    filling(here, kill_after=30)
    left = list(Path(os.environ["MINSNR_CACHE"]).glob("images/*/.pixels.u8.done"))
    decoded: list[str] = []
    true = files.Decoding.decode
    monkeypatch.setattr(files, "PART", 2000)
    monkeypatch.setattr(mapped, "CACHE_FROM", 1)
    monkeypatch.setattr(
        files.Decoding, "decode", lambda w, i, d: decoded.append(w.names[i]) or true(w, i, d)
    )
    keys = {"size": 16, "resize": "bucket", "fewest": 8}
    resumed = load(here, **keys)
    assert left and 0 < len(decoded) < 54  # the kill came in between
    monkeypatch.setenv("MINSNR_CACHE", str(here / "other"))
    assert load(here, **keys).sha256 == resumed.sha256 == filling(here)
    decoded.clear()
    assert load(here, **keys).sha256 == resumed.sha256 and not decoded


def test_images_two_processes_share_one_cache(here):
    words = [sys.executable, "-c", FILL, str(here / "pictures")]
    both = [
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) for _ in "ab"
    ]
    said = {p.communicate(timeout=120)[0].strip() for p in both}
    assert len(said) == 1 and said.pop()
    entries = list(Path(os.environ["MINSNR_CACHE"], "images").iterdir())
    assert [p.name for p in entries[0].iterdir()] == ["pixels.u8"] and len(entries) == 1


def test_images_a_damaged_part_is_decoded_again(here, monkeypatch):
    monkeypatch.setattr(files, "PART", 2000)
    monkeypatch.setattr(mapped, "CACHE_FROM", 1)
    whole = load(here, size=16)
    (entry,) = Path(os.environ["MINSNR_CACHE"], "images").iterdir()
    data = bytearray((entry / "pixels.u8").read_bytes())
    (entry / "pixels.u8").unlink()
    slab = mapped.durable.Slab(entry / "pixels.u8", len(data))
    for start in range(0, len(data) - 1536, 1536):
        slab.put(start, bytes(data[start : start + 1536]))
    slab.close()
    with open(entry / ".pixels.u8.part", "r+b") as file:
        file.seek(2000)
        file.write(b"\xff\x00\xff")
    assert load(here, size=16).sha256 == whole.sha256


def test_images_a_folder_that_changes_while_it_is_cached_leaves_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr(mapped, "CACHE_FROM", 1)
    true = files.Decoding.decode

    def decode(wanted, i, data):
        (here / "pictures/059.png").write_bytes(picture(59, size=(20, 20)))
        return true(wanted, i, data)

    monkeypatch.setattr(files.Decoding, "decode", decode)
    done = typed(capsys, "train", here / "b.yaml")
    assert done.returncode == 2 and "changed while it was read" in done.stderr
    assert done.stderr.count("\n") == 1 and not (here / "runs").exists()
    assert not list(Path(os.environ["MINSNR_CACHE"], "images").iterdir())


# Wrong requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, part",
    [
        (["train.batch_size=64"], "train.batch_size: 64, but data has 54 pictures"),
        (["train.batch_size=16"], "a bucket has"),
        (["data.size=18"], "data.size: 18 is no multiple of data.step, 4; 16 or 20 is"),
        (["model.mult=[1,2,2,2]"], "cannot take the bucket"),
        (["model={name: mlp}"], "'mlp' cannot take the bucket"),
        (["data.resize=square"], "data.step: only data.resize=bucket reads it; data.fewest: only"),
        (["data.size=null"], "data.resize=bucket: needs data.size"),
        (["data.resize=buckets"], "data.resize"),
        (["data.max_aspect=0.5"], "data.max_aspect"),
    ],
)
def test_images_a_wrong_request_is_one_line_and_nothing_is_made(words, part, here, capsys):
    done = typed(capsys, "train", here / "b.yaml", *words)
    assert done.returncode == 2 and part in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (here / "runs").exists()


@pytest.mark.parametrize(
    "words, part",
    [
        (("buckets", "{}", "--batch", "61"), "has only 60 pictures"),
        (("buckets", "{}", "--size", "20", "--batch", "8"), "20 is no multiple"),
        (("buckets", "{}", "--max-aspect", "0.5"), "between 1 and 8"),
        (("loader-check", "{}", "--processes", "3"), "--processes divides --batch"),
        (("inspect", "{}/nowhere"), "wanted a directory or a zip"),
        (("inspect", "{}", "--sheet", "{}/no/sheet.png"), "its folder does not exist"),
        (("repair", "{}", "--out", "{}/inside"), "lies inside"),
        (("repair", "{}"), "--out"),
        (("card", "{}/../none"), "no picture that can be decoded"),
    ],
)
def test_images_a_wrong_question_about_a_folder_is_one_line(words, part, here, capsys):
    (here / "none").mkdir()
    (here / "none/broken.png").write_bytes(b"no picture")
    before = sorted(here.rglob("*"))
    done = typed(capsys, "data", *(w.format(here / "pictures") for w in words))
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_images_old_configs_keep_their_bits(here):
    "Squares are what `size` alone has always made"
    from PIL import ImageOps

    new = load(here, size=16)
    names = [f"{i:03}.png" for i in range(60)]
    kept = [n for n, t in zip(names, files.held_out(names, 0.1), strict=True) if not t]
    one = Image.open(here / "pictures" / kept[7])
    by_hand = np.asarray(ImageOps.fit(one, (16, 16), Image.Resampling.LANCZOS))
    assert torch.equal(new.images[7], torch.from_numpy(by_hand.transpose(2, 0, 1).copy()))
