"What a finished run promises afterwards: its seal, its predictions, its promotion, its copies."

import json
import shutil
import tarfile

import pytest

from minsnr_nb.run_layout import open_run
from minsnr_nb.seal import audit, is_sealed
from tests.runs import SMALL, run_dir, typed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from minsnr_nb.api import train_run

    root = tmp_path_factory.mktemp("trust")
    (root / "small.yaml").write_text(SMALL)
    return train_run(root / "small.yaml", run_root=root / "runs").path


@pytest.fixture
def copy(finished, tmp_path):
    "The same run somewhere else, to be written to"
    return shutil.copytree(finished, tmp_path / "runs" / "tests" / finished.name)


def broken(path, level=None):
    return [(c.id, c.path) for c in audit(path, level) if not c.ok]


# --- the seal -------------------------------------------------------------------------------------


def test_training_ends_with_a_seal_that_travels(finished, tmp_path, capsys):
    assert is_sealed(open_run(finished)) and broken(finished, "L3") == []
    with tarfile.open(tmp_path / "run.tar", "w") as tar:
        tar.add(finished, arcname=f"renamed/{finished.name}")
    with tarfile.open(tmp_path / "run.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    moved = (tmp_path / "out/renamed").rename(tmp_path / "out/project-2") / finished.name
    done = typed(capsys, "check", moved, "--level", "L3", "--json")
    (checks,) = json.loads(done.stdout).values()
    assert done.returncode == 0 and {c["level"] for c in checks} == {"L0", "L1", "L2", "L3"}


def test_evaluating_and_sampling_renew_the_seal(copy, capsys):
    before = json.loads((copy / "meta/seal.json").read_text())["manifest_sha256"]
    assert typed(capsys, "eval", copy, "sampler.steps=2").returncode == 0
    assert typed(capsys, "sample", copy, "--n", 4).returncode == 0
    assert broken(copy, "L3") == []
    assert json.loads((copy / "meta/seal.json").read_text())["manifest_sha256"] != before


def test_a_damaged_run_is_not_sealed_again(copy, capsys):
    picture = next((copy / "artifacts/grids").glob("*.png"))
    picture.write_bytes(picture.read_bytes()[:-1] + b"!")
    assert broken(copy) == [("AB.seal", picture.relative_to(copy).as_posix())]
    done = typed(capsys, "eval", copy)
    assert done.returncode == 1 and picture.name in done.stderr
    assert broken(copy) == [("AB.seal", picture.relative_to(copy).as_posix())]


def test_an_unsealed_complete_run_is_sealed_by_resume(copy, capsys):
    (copy / "meta/seal.json").unlink()
    assert broken(copy) == [] and broken(copy, "L3") == [("AB.sealed", "meta/seal.json")]
    assert run_dir(typed(capsys, "resume", copy).stdout) == copy
    assert broken(copy, "L3") == []
