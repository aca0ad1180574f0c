"A run goes on, is judged, and is repeated with the images it began with, or says what differs."

import shutil

import numpy as np
import pytest
from PIL import Image

from minsnr_nb import api, lab, runner
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.state import attempts_of
from minsnr_nb.requests import Requests, Stopped
from tests.harness.identity import CONFIG as SHORT

CONFIG = SHORT | {"train": SHORT["train"] | {"steps": 8}}


class StopAtSix(Requests):
    "Asks for a stop after step 6"

    def commit(self, loop, result):
        if result.step == 6:
            self._stop(loop, "the test")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    "A folder of twelve images in the place where data lives"
    folder = tmp_path / "pictures/one"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    monkeypatch.setenv("MINSNR_DATA", str(tmp_path))
    lab._images.cache_clear()
    return folder


def replace_one(folder):
    "Another image under the same name, as a second process would find it"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "3.png")
    lab._images.cache_clear()


def stopped(root, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(runner, "Requests", StopAtSix)
        with pytest.raises(Stopped):
            api.train_run(CONFIG, run_root=root, device="cpu")
    (path,) = root.glob("default/[!.]*")
    return open_run(path)


def test_identity_of_images_is_compared_before_a_resume(pictures, tmp_path, monkeypatch):
    run = stopped(tmp_path / "runs", monkeypatch)
    replace_one(pictures)
    with pytest.raises(ConfigError, match=r"data: pictures.*then.*now.*--allow data"):
        api.resume_run(run.path, device="cpu")
    assert len(attempts_of(run)) == 1
    api.resume_run(run.path, device="cpu", allow=("data",))
    assert attempts_of(run)[-1]["overrides_allowed"] == ["data"]


def test_identity_of_images_is_compared_by_eval_fork_and_repro(pictures, tmp_path):
    run = api.train_run(CONFIG, run_root=tmp_path / "runs", device="cpu")
    api.eval_run(run.path, device="cpu")
    replace_one(pictures)
    before = sorted(p.name for p in run.path.parent.iterdir())
    for call in (
        lambda **how: api.eval_run(run.path, device="cpu", **how),
        lambda **how: api.fork_run(run.path, overrides=("train.steps=9",), device="cpu", **how),
        lambda **how: api.continue_run(run.path, 9, device="cpu", **how),
        lambda **how: api.verify_run(run.path, device="cpu", **how),
    ):
        with pytest.raises(ConfigError, match=r"other data: pictures.*--allow data"):
            call()
    assert sorted(p.name for p in run.path.parent.iterdir()) == before
    with pytest.raises(ConfigError, match="--allow dta: nothing of that name; did you mean 'data'"):
        api.eval_run(run.path, device="cpu", allow=("dta",))
    api.eval_run(run.path, device="cpu", allow=("data",))
    api.fork_run(run.path, overrides=("train.steps=9",), device="cpu", allow=("data",))


def test_identity_is_no_matter_of_place_or_name(pictures, tmp_path, monkeypatch):
    run = stopped(tmp_path / "runs", monkeypatch)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "pictures", moved / "pictures")
    monkeypatch.setenv("MINSNR_DATA", str(moved))
    lab._images.cache_clear()
    api.resume_run(run.path, device="cpu")
