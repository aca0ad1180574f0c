"What a run says about its origin must change when its origin does."

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minsnr_nb

CODE = "from minsnr_nb.record.provenance import source_digest; print(source_digest()['digest'])"


@pytest.fixture
def package(tmp_path):
    "A copy of the package with a wing in it"
    copy = tmp_path / "minsnr_nb"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(minsnr_nb.__file__).parent, copy, ignore=ignore)
    (copy / "wing").mkdir(exist_ok=True)
    (copy / "wing/room.py").write_text("x = 1\n")
    return copy


def digest_of(package: Path) -> str:
    "The digest that a fresh process computes of a copy"
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("line", ["wing/room.py", "config.py"])
def test_provenance_digest_sees_a_changed_line(package, line):
    before = digest_of(package)
    assert digest_of(package) == before
    (package / line).open("a").write("# changed\n")
    assert digest_of(package) != before


def test_provenance_digest_tells_where_a_module_lies(package):
    before = digest_of(package)
    (package / "other").mkdir()
    (package / "wing/room.py").rename(package / "other/room.py")
    assert digest_of(package) != before
