"Nothing slips into the history: not even a file that the next commit removes."

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import block_artifacts  # noqa: E402


def git(root, *words):
    config = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *config, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repo(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_block_artifacts_a_removed_file_is_still_in_the_history(repo):
    (repo / "weights.txt").write_bytes(b"\x80\x04K\x01.")
    git(repo, "add", "-A")
    assert list(block_artifacts.findings(repo, "--staged")) == ["staged weights.txt: is a pickle"]
    git(repo, "commit", "-qm", "second")
    (repo / "weights.txt").unlink()
    git(repo, "commit", "-qam", "third")
    (line,) = block_artifacts.findings(repo, "HEAD")
    assert line.endswith("weights.txt: is a pickle")
    assert list(block_artifacts.findings(repo, "HEAD~1..HEAD")) == []


@pytest.mark.parametrize(
    "name, data",
    [
        ("runs/p/2026/metrics.json", b"{}"),
        ("model.safetensors", b""),
        ("big.csv", b"1," * 600_000),
        ("data.bin", b"PK\x03\x04"),
        ("key.txt", b"hf" + b"_" + b"a" * 34),
    ],
)
def test_block_artifacts_what_must_not_be_added(name, data, repo):
    (repo / name).parent.mkdir(parents=True, exist_ok=True)
    (repo / name).write_bytes(data)
    git(repo, "add", "-Af")
    assert [x for x in block_artifacts.findings(repo, "--staged") if name in x]


def test_block_artifacts_the_last_commits_of_this_repository_are_clean():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    depth = subprocess.run(
        ["git", "rev-list", "--count", "--first-parent", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    what = f"HEAD~{min(30, int(depth.stdout) - 1)}..HEAD"
    assert list(block_artifacts.findings(ROOT, what)) == []
