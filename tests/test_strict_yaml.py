"Strict YAML and the nearest name: what a config may not hold, and what a message says."

import pytest

from minsnr_nb.errors import ConfigError, _slips, nearest
from minsnr_nb.strict_yaml import plain_values, read_yaml, write_yaml


def test_strict_yaml_errors_count_slips():
    words = ("steps", "stpes", "step", "stepps", "spets", "lr")
    assert [_slips(w, "steps") for w in words] == [0, 1, 1, 1, 2, 3]


def test_strict_yaml_errors_name_the_nearest():
    known = "; did you mean 'steps'? Known: seed, steps"
    assert nearest("stpes", ["seed", "steps"]) == known
    assert nearest("x", []) == "; Known: none"


def test_strict_yaml_reads_what_is_meant():
    values, where = read_yaml("lr: 1e-4\nflag: on\ntrain:\n  steps: 100\n", "demo.yaml")
    assert values == {"lr": 1e-4, "flag": "on", "train": {"steps": 100}}
    assert where["train", "steps"] == "demo.yaml:4"


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
REFUSED = {
    "lr: 1\nlr: 2": "<text>:2: lr: key given twice",
    "x: !!python/object/apply:os.system [ls]": "is not allowed",
    BOMB: "more than 100000 values",
    "- " * 100: "nested deeper",
    "[" * 1000: "nested deeper",
    "a: &a [*a]": "more than",
    "{a: " * 60_000: "more than 100000 values",
    "x" * 70_000: "a line longer than",
    f"a: 1{'0' * 70}": "at most 64 digits",
    "a\u202eb: 1": r"'a\\u202eb'",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda t: ascii(t)[:20])
def test_strict_yaml_refuses(text):
    with pytest.raises(ConfigError, match=REFUSED[text]):
        read_yaml(text)


@pytest.mark.parametrize(
    "value", ["1e3", "on", "null", "", 1e-4, [1, None, True], {"a": {"b": []}}]
)
def test_strict_yaml_reads_back_what_it_wrote(value):
    assert read_yaml(write_yaml({"x": value}))[0] == {"x": value}


@pytest.mark.parametrize("value", [object(), {1: 2}, "a\u202eb", 1 << 300])
def test_strict_yaml_refuses_values_it_could_not_hold(value):
    with pytest.raises(ConfigError):
        plain_values({"x": value})
