"Proof that the harness against made-up and hostile input can fail"

import pytest

from tests import hostile, property_loaders
from tests.harness.lab import Lab


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return Lab().whole(tmp_path_factory.mktemp("runs")).path


def test_loaders_a_loader_that_lets_an_error_through_is_found(monkeypatch):
    monkeypatch.setattr("minsnr_nb.record.strict_json.from_json", lambda text: {}[text])
    with pytest.raises(KeyError):
        property_loaders.run(100, "log")


def test_loaders_a_header_that_overlaps_is_found(monkeypatch):
    monkeypatch.setattr("minsnr_nb.guard._placed", lambda tensors, body: None)
    with pytest.raises(Exception, match="deserializing"):
        property_loaders.run(200, "tensors")


def test_loaders_a_writer_of_yaml_1_1_is_found(monkeypatch):
    import yaml

    monkeypatch.setattr("minsnr_nb.strict_yaml._Dumper", yaml.SafeDumper)
    with pytest.raises(Exception, match="valid string"):
        property_loaders.run(200, "round trip")


def test_loaders_a_wrong_suggestion_is_found(monkeypatch):
    monkeypatch.setattr("minsnr_nb.errors._slips", lambda a, b: len(b) % 3)
    with pytest.raises(AssertionError, match="unknown key"):
        property_loaders.run(100, "typo")


def test_loaders_missing_guards_are_found(healthy):
    weaker = """
import minsnr_nb.weights.tensors as a, minsnr_nb.record.generations as c, minsnr_nb.record.checks as r
a.tensor_bytes = lambda path: path.read_bytes()
c.inside = r.inside = lambda root, name, source="": root / name
"""
    passed = " ".join(hostile.run(healthy, weaker)["passed"])
    for what in ("tensors: name twice", "manifest names '../", "lock far away"):
        assert what in passed, passed


def test_loaders_a_pickle_that_is_opened_is_found(healthy):
    weaken = """
import pickle, minsnr_nb.record.checks as r
def careless(path):
    try:
        pickle.loads(path.read_bytes())
    except Exception:
        pass
r.pickle_problem = careless
"""
    figures = hostile.run(healthy, weaken)
    assert not figures["canary"] and any("pickle.find_class" in x for x in figures["happened"])


def test_loaders_a_decoder_that_starts_a_program_is_found(healthy):
    figures = hostile.run(healthy, "import minsnr_nb.images.files as i; i.FORMATS = None")
    assert any(x.startswith("image: a program: subprocess.Popen") for x in figures["happened"])
