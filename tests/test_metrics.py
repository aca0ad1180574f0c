"The metrics module as installed: caches, edge cases, the door to Inception."

import sys
from dataclasses import replace

import pytest
import torch

from minsnr_nb import metrics
from minsnr_nb.data import pixels, shapes
from minsnr_nb.errors import ConfigError
from minsnr_nb.images.files import cache_dir
from minsnr_nb.metrics import METRICS, anchors, cloud, feature_net, frechet, mmd2, moments
from minsnr_nb.seeds import stream


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    "An empty cache, and a training that takes no time"
    monkeypatch.setenv("MINSNR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "STEPS", 3)
    monkeypatch.setattr(metrics, "_kept", {})
    return monkeypatch


@pytest.fixture(scope="module")
def small():
    return shapes(None, "train", size=8, n=60), shapes(None, "test", size=8, n_test=20)


def count_trainings(monkeypatch) -> list:
    calls, train = [], metrics.train_classifier

    def counted(data, second=False):
        calls.append(data.sha256)
        return train(data, second)

    monkeypatch.setattr(metrics, "train_classifier", counted)
    return calls


def test_metrics_trained_once_per_session_and_once_per_machine(small, fresh):
    calls, x = count_trainings(fresh), pixels(small[1], torch.arange(20))
    first = feature_net(small[0])(x)
    assert feature_net(replace(small[0], split="test")) is feature_net(small[0])  # by content
    fresh.setattr(metrics, "_kept", {})
    assert torch.equal(feature_net(small[0])(x), first) and len(calls) == 1
    fresh.setattr(metrics, "STEPS", 4)  # another recipe is another network
    assert not torch.equal(feature_net(small[0])(x), first) and len(calls) == 2


@pytest.mark.parametrize("damage", [b"", b"\0" * 20, b"not safetensors at all"])
def test_metrics_a_damaged_cache_is_computed_again(small, fresh, damage):
    calls, x = count_trainings(fresh), pixels(small[1], torch.arange(20))
    first = feature_net(small[0])(x)
    (file,) = (cache_dir() / "metrics").iterdir()
    file.write_bytes(damage)
    fresh.setattr(metrics, "_kept", {})
    assert torch.equal(feature_net(small[0])(x), first) and len(calls) == 2
    assert len(file.read_bytes()) > 1000


def test_metrics_without_a_place_for_the_cache_it_still_works(small, fresh, tmp_path):
    (tmp_path / "taken").write_text("")
    fresh.setenv("MINSNR_CACHE", str(tmp_path / "taken"))
    assert METRICS["fd"](pixels(small[1], torch.arange(20)), small[0])["fd@shapes_cnn"] > 0


def test_metrics_thread_count_and_random_state_survive_a_training_and_do_not_matter(small, fresh):
    before, weights = torch.get_rng_state(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weights.append(metrics.train_classifier(small[0]).state_dict())
        assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_metrics_one_class_and_few_images(small):
    train = replace(small[0], labels=0 * small[0].labels, classes=("all",), name="one")
    test = replace(small[1], labels=0 * small[1].labels, classes=("all",), name="one")
    found = anchors(METRICS["fd"], train, test, stream(0, "anchor"), 5)
    assert set(found) == {"noise", "test"} and set(found["test"]) == {"fd@one_cnn"}


def test_metrics_distances_of_too_few_or_broken_features_are_numbers_or_nan():
    good = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for bad in (good * torch.nan, good / 0):
        assert frechet(moments(bad), moments(good)) != frechet(moments(bad), moments(good))  # NaN
    value, error = mmd2(cloud(good[:2]), cloud(good))
    assert value == value and error != error  # an estimate, but no error bar, from two images


def test_metrics_rank_deficient_clouds_lose_nothing():
    a = torch.zeros(5, 64, dtype=torch.float64)
    a[:, 0] = torch.arange(5)
    b = torch.zeros(5, 64, dtype=torch.float64)
    b[:, 1] = torch.arange(5) * 2
    # along each axis the other cloud is a point: the squared distance of means plus both variances
    expected = 2.0**2 + 4.0**2 + 2.5 + 10.0
    assert abs(frechet(moments(a), moments(b)) - expected) < 1e-12


def test_metrics_fid_says_in_one_line_how_to_get_it(small, fresh):
    fresh.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ConfigError, match=r"pip install minsnr_nb\[fid\]") as e:
        METRICS["fid"](pixels(small[1], torch.arange(20)), small[0])
    assert "\n" not in str(e.value)
