"The loaders against made-up and hostile input, in short; `python -m tests.harness` has the long form"

import pytest

from tests import property_loaders


def test_properties():
    figures = property_loaders.run(100)
    assert figures["slowest_refusal_ms"] < 100
    for loader in ("config", "mapping", "log", "tensors"):  # both ways were tried
        assert figures[f"{loader} accepted"] and figures[f"{loader} refused"]
    assert figures["typos"] > 50


# --- teeth ----------------------------------------------------------------------------------------


def test_a_loader_that_lets_an_error_through_is_found(monkeypatch):
    monkeypatch.setattr("minsnr_nb.records.from_json", lambda text: {}[text])
    with pytest.raises(KeyError):
        property_loaders.run(100, "log")


def test_a_header_that_overlaps_is_found(monkeypatch):
    monkeypatch.setattr("minsnr_nb.guard._placed", lambda tensors, body: None)
    with pytest.raises(Exception, match="deserializing"):
        property_loaders.run(200, "tensors")


def test_a_writer_of_yaml_1_1_is_found(monkeypatch):
    import yaml

    monkeypatch.setattr("minsnr_nb.config._Dumper", yaml.SafeDumper)
    with pytest.raises(Exception, match="valid string"):
        property_loaders.run(200, "round trip")


def test_a_wrong_suggestion_is_found(monkeypatch):
    monkeypatch.setattr("minsnr_nb.config._slips", lambda a, b: len(b) % 3)
    with pytest.raises(AssertionError, match="unknown key"):
        property_loaders.run(100, "typo")
