"What several files of tests begin with."

import shutil

import pytest

from .runs import SMALL


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A complete run; tests read it only"
    from minsnr_nb.api import train_run

    root = tmp_path_factory.mktemp("finished")
    (root / "small.yaml").write_text(SMALL)
    return train_run(root / "small.yaml", run_root=root / "runs").path


@pytest.fixture
def copy(finished, tmp_path):
    "The same run somewhere else, to be written to"
    return shutil.copytree(finished, tmp_path / "runs" / "tests" / finished.name)
