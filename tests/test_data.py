"The data module as installed: downloads, damaged archives, threads, the cache."

import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from copy import copy
from hashlib import md5
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minsnr_nb.data import DATASETS, ImageSet, find, order
from minsnr_nb.errors import ConfigError
from minsnr_nb.images.files import cache_dir, held_out, read_image
from minsnr_nb.seeds import stream
from tests.runs import ROOT, run_dir, typed

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MINSNR_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(shape=(8, 8, 3), kind="PNG", **how) -> bytes:
    file = BytesIO()
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **how)
    return file.getvalue()


def make_zip(path: Path, files: dict, method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return path


def load(path, split="train", root=Path("nowhere"), **keys) -> ImageSet:
    return DATASETS.bind("image_folder", {"path": str(path), **keys})(root, split)


def tree(path: Path) -> dict:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


PLAIN = {f"{c}/{i}.png": picture() for c in "ab" for i in range(10)}


# The order of images ------------------------------------------------------------------------------


@pytest.mark.parametrize("n, batch", [(10, 7), (10, 10), (3, 8), (1, 5), (97, 32)])
def test_data_each_image_once_per_epoch_for_any_batch_size(n, batch):
    rng, steps = stream(3, "order"), -(-5 * n // batch)
    seen = torch.cat([order(n, batch * s, batch, rng) for s in range(steps)])[: 5 * n].view(5, n)
    assert (seen.sort(1).values == torch.arange(n)).all()
    assert torch.equal(seen.flatten(), order(n, 0, 5 * n, rng))


def test_data_callers_cannot_change_the_kept_permutation():
    rng = stream(0, "order")
    first = order(20, 0, 20, rng)
    before = first.clone()
    first.zero_()
    assert torch.equal(order(20, 0, 20, rng), before)


# Bad images and archives --------------------------------------------------------------------------


def test_data_one_line_for_every_damaged_member(tmp_path):
    whole = make_zip(tmp_path / "z.zip", PLAIN, zipfile.ZIP_STORED)
    with zipfile.ZipFile(whole) as z:
        at = z.getinfo("b/3.png").header_offset + 70
    data = bytearray(whole.read_bytes())
    data[at] ^= 0xFF  # the checksum of that member no longer fits
    whole.write_bytes(data)
    for _ in range(3):  # whichever thread meets it
        with pytest.raises(ConfigError, match=r"cannot read image b/3\.png: Bad CRC") as e:
            load(whole)
        assert "\n" not in str(e.value)


def test_data_a_cut_off_zip_is_no_zip(tmp_path):
    whole = make_zip(tmp_path / "z.zip", PLAIN)
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="neither a directory nor a zip"):
        load(whole)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_data_damage_anywhere_is_an_error_or_an_image_but_never_another_exception(kind):
    data = picture((24, 24, 3), kind)
    for cut in range(0, len(data), max(1, len(data) // 60)):
        try:
            assert read_image(data[:cut], "x").shape == (3, 24, 24)
        except ConfigError as e:
            assert str(e).startswith("data.path: cannot read image x: ") and "\n" not in str(e)


def declare(path: Path, size: int) -> Path:
    "Let a zip's directory say that its first member has `size` bytes"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, size)
    path.write_bytes(data)
    return path


def blank(width: int, height: int) -> bytes:
    "The beginning of a PNG, which says how large it is"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = b"IHDR" + header, b"IDAT" + zlib.compress(bytes(100))
    chunks = (struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def refused(path: Path, match: str) -> int:
    "Refuse a zip in one line and without a warning; bytes of memory that it took"
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=match) as e:
            load(path)
        assert "\n" not in str(e.value)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_data_a_zip_that_grows_beyond_measure_is_refused_before_it_is_unpacked(
    tmp_path, monkeypatch
):
    zeros = {"a/0.png": bytes(32 << 20)}
    bomb = make_zip(tmp_path / "bz2.zip", zeros, zipfile.ZIP_BZIP2)
    assert refused(bomb, r"a/0\.png in .* 33554432 bytes, packed in \d+; at most") < 2 << 20
    huge = declare(make_zip(tmp_path / "huge.zip", PLAIN | zeros), 0xFFFFFFF0)
    assert refused(huge, "would have 4294967280 bytes") < 2 << 20
    with zipfile.ZipFile(tmp_path / "often.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/0.png", bytes(4 << 20))
        for i in range(1, 500):  # all of them are the same bytes of the file
            z.filelist.append(other := copy(z.filelist[0]))
            other.filename = f"b/{i}.png"
    assert refused(tmp_path / "often.zip", "would have 2097152000 bytes") < 4 << 20
    monkeypatch.setattr("minsnr_nb.images.files.MAX_INFLATED", 1 << 20)
    refused(make_zip(tmp_path / "large.zip", zeros), "33554432 bytes, packed in")


def test_data_a_zip_that_lies_about_its_sizes_is_not_unpacked_further_than_it_says(tmp_path):
    files = {"a/0.png": picture() + bytes(32 << 20), "b/0.png": picture()}
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        lying = declare(make_zip(tmp_path / "lying.zip", files, method), 100)
        assert refused(lying, r"cannot read image a/0\.png: ") < 2 << 20


@pytest.mark.parametrize("side", [9500, 20_000])  # Pillow would warn of the first
def test_data_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(side, tmp_path, recwarn):
    bomb = make_zip(tmp_path / "z.zip", {"a/0.png": blank(side, side), "b/0.png": picture()})
    assert refused(bomb, r"cannot read image a/0\.png: .*pixels") < 4 << 20
    assert not recwarn.list


def test_data_modes_and_orientation():
    for shape, kind, mode, channels in (
        ((6, 4), "PNG", "L", 1),
        ((6, 4), "PNG", "1", 1),
        ((6, 4), "PNG", "LA", 1),
        ((6, 4, 3), "PNG", "P", 3),
        ((6, 4, 3), "PNG", "RGBA", 3),
        ((6, 4, 3), "JPEG", "CMYK", 3),
    ):
        file = BytesIO()
        pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(file, kind)
        assert read_image(file.getvalue(), mode).shape == (channels, 6, 4), mode
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    assert read_image(picture((6, 4, 3), "JPEG", exif=exif), "turned").shape == (3, 4, 6)


def test_data_grey_and_colour_mix_follows_the_first_image_in_both_splits(tmp_path):
    grey = {f"a/{i}.png": picture((8, 8)) for i in range(5)}
    mixed = make_zip(tmp_path / "m.zip", grey | {f"b/{i}.png": picture() for i in range(5)})
    for split in ("train", "test"):
        assert load(mixed, split, test_share=0.4).shape == (1, 8, 8)
        assert load(mixed, split, test_share=0.4, channels=3).shape == (3, 8, 8)


def test_data_an_unreadable_folder_and_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "notes.txt").write_text("no zip")
    with pytest.raises(ConfigError, match="neither a directory nor a zip"):
        load(tmp_path / "notes.txt")
    (tmp_path / "flat" / "a").mkdir(parents=True)
    for name in ("1.png", "a/2.png"):
        (tmp_path / "flat" / name).write_bytes(picture())
    with pytest.raises(ConfigError, match=r"1\.png in .* lies in no class folder"):
        load(tmp_path / "flat")
    with pytest.raises(ConfigError, match="no test split .* too few images|no train split"):
        load(make_zip(tmp_path / "one.zip", {"a/1.png": picture()}), "train")


def test_data_nothing_of_the_users_is_touched(tmp_path):
    folder = tmp_path / "mine"
    zipfile.ZipFile(make_zip(tmp_path / "z.zip", PLAIN)).extractall(folder)
    (folder / "a" / "broken.png").write_bytes(b"broken")
    (folder / "a" / ".hidden.png").write_bytes(b"broken")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="a/broken.png"):
        [load(folder, split) for split in ("train", "test")]
    (folder / "a" / "broken.png").unlink()
    load(folder)
    before.pop(folder / "a" / "broken.png")
    assert tree(tmp_path) == before


# Paths and the cache ------------------------------------------------------------------------------


def test_data_a_relative_path_means_the_callers_directory_first(tmp_path, monkeypatch):
    for place in ("cwd", "root"):
        (tmp_path / place).mkdir()
        make_zip(tmp_path / place / "z.zip", {})
    monkeypatch.chdir(tmp_path / "cwd")
    assert find("z.zip", tmp_path / "root") == (tmp_path / "cwd" / "z.zip").resolve()
    (tmp_path / "cwd" / "z.zip").unlink()
    assert find("z.zip", tmp_path / "root") == (tmp_path / "root" / "z.zip").resolve()
    with pytest.raises(ConfigError, match="data.path: nothing at ''"):
        find("", tmp_path / "root")


def test_data_a_config_names_no_place_on_this_machine(tmp_path, capsys, monkeypatch):
    make_zip(tmp_path / "z.zip", PLAIN)
    runs, words = tmp_path / "runs", ["train.steps=1", "eval.samples=10"]
    command = ["train", ROOT / "configs/smoke.yaml", *words, "--run-root", runs]
    data = "data={{name: image_folder, path: '{}'}}"
    refused = typed(capsys, *command, data.format(tmp_path / "z.zip"))
    assert (
        refused.returncode == 2
        and "data.path" in refused.stderr
        and "MINSNR_DATA" in refused.stderr
    )
    assert not runs.exists()
    monkeypatch.setenv("MINSNR_DATA", str(tmp_path))
    done = typed(capsys, *command, data.format("z.zip"))
    assert done.returncode == 0, done.stderr
    assert typed(capsys, "check", run_dir(done.stdout), "--level", "L3").returncode == 0


def test_data_a_changed_image_is_decoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("minsnr_nb.images.mapped.CACHE_FROM", 1)
    folder = tmp_path / "mine"
    zipfile.ZipFile(make_zip(tmp_path / "z.zip", PLAIN)).extractall(folder)
    first = load(folder)
    assert load(folder).sha256 == first.sha256
    assert len(list((cache_dir() / "images").iterdir())) == 1
    used = next(n for n, test in zip(PLAIN, held_out(list(PLAIN), 0.1), strict=True) if not test)
    (folder / used).write_bytes(picture())
    assert load(folder).sha256 != first.sha256
    assert len(list((cache_dir() / "images").iterdir())) == 2


def test_data_a_cache_that_is_a_file_does_not_stop_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr("minsnr_nb.images.mapped.CACHE_FROM", 1)
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MINSNR_CACHE", str(tmp_path / "taken"))
    assert len(load(make_zip(tmp_path / "z.zip", PLAIN))) == 18


# Downloads ----------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def fake_fashion_mnist(root: Path) -> None:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 12), ("t10k", 5)):
        pixels = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n, dtype=np.uint8) % 10))


def test_data_fashion_mnist_is_downloaded_once_and_appears_whole(tmp_path, monkeypatch):
    calls = []

    def download(self):
        calls.append(self.root)
        if not self._check_exists():
            fake_fashion_mnist(Path(self.root))

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", download)
    train, test = (DATASETS["fashion_mnist"](tmp_path / "data", s) for s in ("train", "test"))
    assert (len(train), len(test), train.shape, len(calls)) == (12, 5, (1, 28, 28), 1)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["FashionMNIST"]
    assert train.classes[9] == "Ankle boot" and train.labels.tolist()[:3] == [0, 1, 2]


def test_data_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def download(self):
        Path(self.root, "half.tar.gz").write_bytes(b"half")
        raise RuntimeError("Error downloading")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    with pytest.raises(ConfigError, match="connect this machine") as e:
        DATASETS["cifar10"](tmp_path / "data", "train")
    assert "\n" not in str(e.value) and not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("stays")
    with pytest.raises(ConfigError, match="connect this machine"):
        DATASETS["cifar10"](tmp_path / "data", "train")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["mine.txt"]


def test_data_cifar10_keeps_the_channels_apart(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = RNG.integers(0, 256, (6, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": rows, "labels": [0, 1, 2, 3, 4, 5]})
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    for name, data in (("one", batch), ("batches.meta", meta)):
        (folder / name).write_bytes(data)
    cifar = "torchvision.datasets.CIFAR10"
    monkeypatch.setattr(f"{cifar}.train_list", [["one", md5(batch).hexdigest()]])
    monkeypatch.setattr(f"{cifar}.test_list", [["one", md5(batch).hexdigest()]])
    monkeypatch.setattr(f"{cifar}.meta", {
        "filename": "batches.meta", "key": "label_names", "md5": md5(meta).hexdigest()
    })  # fmt: skip
    data = DATASETS["cifar10"](tmp_path, "train")
    assert np.array_equal(data.images.numpy(), rows.reshape(6, 3, 32, 32))
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5] and data.images.is_contiguous()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_data_large_images_are_decoded_one_at_a_time_and_not_copied(tmp_path):
    side = 5000  # 25 million pixels: 75 MB as colours
    folder = tmp_path / "one"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (side, side), (i, 2, 3)).save(folder / f"{i}.png", compress_level=1)
    code = f"""
import re
from pathlib import Path
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from minsnr_nb.images.files import Decoding, read_images
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before, names = peak(), [f"one/{{i}}.png" for i in range(4)]
read_images(Decoding(Path({str(tmp_path)!r}), names[:1] * 64 + names, 3, np.full((68, 2), 8), True))
print((peak() - before) / ({side} ** 2 * 3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4.5  # it was 8: three copies of each, two at a time


def test_data_two_images_are_too_few_to_compare(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "two/one"
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    monkeypatch.setenv("MINSNR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MINSNR_DATA", str(tmp_path))
    words = ["data.name=image_folder", "data.path=two", "--device", "cpu"]
    done = typed(capsys, "train", ROOT / "configs/smoke.yaml", *words)
    assert done.returncode == 2 and "1 training and 1 held-out image" in done.stderr
    assert not (tmp_path / "runs").exists()
