"""What the loaders promise for any input, tried on inputs that Hypothesis makes up: `run(examples)`.

Whatever a config, a log or a tensor file holds, only our own error leaves its loader; an unknown key within two
edits of a known one gets it as the suggestion; a config that is written and read again is the same; what is over
budget is refused at once.
"""

import json
import string
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minsnr_nb.config import Config, dump, load_config
from minsnr_nb.errors import ConfigError, MinsnrError
from minsnr_nb.guard import tensor_bytes, tensor_header
from minsnr_nb.record.strict_json import read_log
from minsnr_nb.strict_yaml import read_yaml

# --- inputs ---------------------------------------------------------------------------------------

SECTIONS = {n: set(f.annotation.model_fields) for n, f in Config.model_fields.items() if hasattr(f.annotation, "model_fields")}  # fmt: skip
FIXED = ("objective", "optim", "train", "eval")  # their keys are known without a registry
ODD = ("\0", "\x1b[2J", "\u202e", "\ud800", "é", "${seed}", "${oc.env:HOME}", "${a", "!!python/name:os.system")  # fmt: skip
ODD += ("<<", "*a", "&a", "- - -", "? ", "|", ">", "%YAML", "---", "...", ".nan", "1e999", "0x" + "f" * 80, "1:2:3")  # fmt: skip

words = st.one_of(st.sampled_from(ODD), st.text(max_size=12), st.sampled_from(sorted(SECTIONS)))
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([-1, 2**63, 1e308]),
    st.just(5000).map(lambda n: 10**n),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)
known = st.dictionaries(st.sampled_from(sorted(Config.model_fields)), values, max_size=4)


@st.composite
def texts(draw) -> str:
    "Text that is nearly a config"
    plain = draw(st.one_of(known, values))
    quoted = draw(st.booleans()) and _writable(plain)
    text = json.dumps(plain, ensure_ascii=False) if quoted else _yaml(plain)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(words) + text[at + draw(st.integers(0, 3)) :]
    return text


def _yaml(value, level: int = 0) -> str:
    "A careless writer: nothing is quoted"
    pad = "  " * level
    if isinstance(value, dict) and value:
        return "".join(f"\n{pad}{k}: {_yaml(v, level + 1)}" for k, v in value.items())
    if isinstance(value, list) and value:
        return "".join(f"\n{pad}- {_yaml(v, level + 1)}" for v in value)
    return str(value) if not isinstance(value, int) else f"{value:#x}"


@st.composite
def configs(draw) -> Config:
    "A valid config"
    positive, share = st.integers(1, 10**9), st.floats(0, 1)
    free = st.floats(1e-300, 1e300)
    name = st.text(string.ascii_letters + string.digits + "_-", max_size=20)
    own = st.dictionaries(
        st.from_regex(r"[a-z]\w{0,8}", fullmatch=True).filter(lambda k: k not in ("name", "timesteps", "zero_terminal_snr") and not k.startswith("model_")),
        st.one_of(st.integers(-(10**60), 10**60), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Cs")), max_size=9).filter(lambda s: "${" not in s)),
        max_size=3,
    )  # fmt: skip
    lane = st.builds(lambda n, kw: {**kw, "name": n}, st.sampled_from(["linear", "null", "1e3", "true", "a b", "é", "#"]), own)  # fmt: skip
    data = {
        "project": "p" + draw(name),
        "study": draw(name),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "optim": {"lr": draw(free), "betas": (draw(share), draw(share)), "warmup_steps": draw(st.integers(0, 10**9))},
        "train": {"steps": draw(positive), "flip": draw(st.booleans()), "precision": draw(st.sampled_from(["fp32", "bf16"]))},
        "data": draw(lane), "loss": draw(lane), "model": draw(lane),
        "objective": {"prediction": draw(st.sampled_from(["x0", "eps", "v"]))},
        "schedule": {**draw(lane), "timesteps": draw(positive)},
        "metrics": tuple(draw(st.lists(lane, max_size=3, unique_by=lambda m: m["name"]))),
        "callbacks": (),
    }  # fmt: skip
    return Config.model_validate(data)


@st.composite
def typos(draw) -> tuple[str, str, str]:
    "A section, one of its keys, and the key with one or two slips"
    section = draw(st.sampled_from(FIXED))
    key = draw(st.sampled_from(sorted(SECTIONS[section])))
    word = key
    for _ in range(draw(st.integers(1, 2))):
        at, letter = draw(st.integers(0, len(word) - 1)), draw(st.sampled_from(string.ascii_lowercase))  # fmt: skip
        change = draw(st.sampled_from("drop add change swap".split()))
        if change == "drop" and len(word) > 1:
            word = word[:at] + word[at + 1 :]
        elif change == "add":
            word = word[:at] + letter + word[at:]
        elif change == "change":
            word = word[:at] + letter + word[at + 1 :]
        else:
            word = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    return section, key, word


def distance(a: str, b: str) -> int:
    "Edits between two words, a swap of neighbours counting as one"
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and (x, y) == (b[j - 2], a[i - 2]):
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


events = st.fixed_dictionaries(
    {"step": numbers, "time": numbers}, optional={"kind": words, "train/loss": values}
)


@st.composite
def logs(draw) -> bytes:
    "Bytes that are nearly a log"
    lines = draw(st.lists(events, max_size=4))
    data = bytearray("".join(json.dumps(e) + "\n" for e in lines if _writable(e)).encode())
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"\n", b"NaN", b'"step": 1,', b"[" * 3000, b"1" * 5000])))  # fmt: skip
    return bytes(data)


def _writable(value) -> bool:
    try:
        json.dumps(value)
        return True
    except ValueError:  # an integer that is too long to write
        return False


FACTS = {"dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "OBJ", "", None]), "shape": st.one_of(st.lists(st.one_of(st.integers(-1, 4), st.just(2**62), st.booleans()), max_size=3), values), "data_offsets": st.one_of(st.lists(st.integers(-1, 64), min_size=2, max_size=2), values)}  # fmt: skip


@st.composite
def tensor_files(draw) -> bytes:
    "Bytes that are nearly a tensor file; half of them are one"
    if draw(st.booleans()):
        shapes = draw(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=3))
        header, at = {}, 0
        for i, shape in enumerate(shapes):
            size = 4
            for s in shape:
                size *= s
            header[f"t{i}"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        data = bytearray(_tensors(header, bytes(at)))
        if draw(st.booleans()):
            data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
        return bytes(data)
    header = draw(st.dictionaries(words, st.one_of(st.fixed_dictionaries(FACTS), values), max_size=3))  # fmt: skip
    if not _writable(header):
        return draw(st.binary(max_size=40))
    return _tensors(header, bytes(draw(st.integers(0, 64))), draw(st.integers(-9, 9)))


def _tensors(header: dict, body: bytes, off: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<q", len(text) + off) + text + body


@st.composite
def mutants(draw, whole: bytes) -> bytes:
    "A sound document with a few accidents"
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at, kind = draw(st.integers(0, len(data))), draw(st.sampled_from("flip insert cut double".split()))  # fmt: skip
        if kind == "flip" and data:
            data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[at:at] = draw(words).encode("utf-8", "surrogatepass")
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 20))]
        else:
            data[at:at] = bytes(data[at : at + 30])
    return bytes(data)


SOUND_LOG = b"".join(json.dumps({"step": i, "time": 1.5, "kind": "train", "attempt": 1, "train/loss": 1 / (i + 1)}).encode() + b"\n" for i in range(4))  # fmt: skip
SOUND_TENSORS = _tensors({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"step": "3"}}, bytes(24))  # fmt: skip


# --- promises -------------------------------------------------------------------------------------


def over_budget() -> dict[str, str]:
    "Documents that ask for too much work"
    return {
        "bytes": "a: " + "x " * (1 << 19),
        "lines": "- 1\n" * 100_001,
        "flow": "[" + "1," * 100_001 + "]",
        "mappings": "{" + ",".join(f"a{i}: {{b: 1}}" for i in range(40_000)) + "}",
        "depth": "[" * 99_000,
        "flow mappings": "{a: " * 49_000,
        "stacked": "- " * 90_000,
        "keys": "? " * 90_000,
        "indents": "".join("  " * i + "a:\n" for i in range(500)),
        "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "aliases at the edge": "a: &a [" + "x," * 300 + "]\nb: [" + "*a," * 400 + "]",
        "itself": "a: &a [*a, *a]",
        "scalar": "a: '" + "x" * 1_000_000 + "'",
        "integer": "seed: " + "9" * 60_000,
        "hexadecimal": "seed: 0x" + "f" * 60_000,
        "base 60": "seed: 1" + ":1" * 30_000,
        "digits of a float": "optim: {lr: 1." + "0" * 60_000 + "}",
    }  # fmt: skip


def doubled() -> dict:
    "References to references"
    return {"project": "x", **{f"a{i}": f"${{a{i - 1}}}${{a{i - 1}}}" for i in range(1, 64)}}


def budgets() -> float:
    "Refuse every document that is over budget; milliseconds of the slowest, the best of three"
    slowest = 0.0
    for name, text in over_budget().items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            try:
                read_yaml(text)
            except ConfigError as e:
                times.append(time.perf_counter() - start)
                assert len(str(e)) < 400, (name, str(e)[:400])
            else:
                raise AssertionError(f"{name}: was accepted")
        assert min(times) < 0.1, f"{name}: refused after {min(times):.3f} s"
        slowest = max(slowest, min(times))
    start = time.perf_counter()
    try:
        load_config(doubled())
    except ConfigError:
        slowest = max(slowest, time.perf_counter() - start)
    else:
        raise AssertionError("references: were accepted")
    return round(1e3 * slowest, 1)


def promises(folder: Path, counts: Counter) -> dict[str, tuple[st.SearchStrategy, Callable]]:
    "Every promise: what to try it on, and how"

    def only_ours(name: str, load: Callable, *args) -> None:
        try:
            load(*args)
            counts[f"{name} accepted"] += 1
        except MinsnrError as e:
            counts[f"{name} refused"] += 1
            assert str(e) and "\0" not in str(e) and "\u202e" not in str(e), ascii(str(e))

    def config_bytes(data):
        (folder / "c.yaml").write_bytes(data)
        only_ours("config", load_config, folder / "c.yaml")

    def config_text(text):
        config_bytes(text.encode("utf-8", "surrogatepass"))

    def config_mapping(data):
        only_ours("mapping", load_config, data if isinstance(data, dict) else {"seed": data})

    def override(text):
        only_ours("override", lambda: load_config(overrides=[text]))

    def log(data):
        (folder / "l.jsonl").write_bytes(data)
        only_ours("log", lambda: list(read_log(folder / "l.jsonl")))

    def tensors(data):
        (folder / "t.safetensors").write_bytes(data)
        only_ours("tensors", tensor_bytes, folder / "t.safetensors")
        _agree(data)

    def same_again(cfg):
        text = dump(cfg)
        again = Config.model_validate(_tuples(read_yaml(text)[0]))
        assert again == cfg and dump(again) == text

    def suggestion(case):
        section, key, word = case
        others = [distance(word, k) for k in SECTIONS[section] if k != key]
        if (
            word in SECTIONS[section]
            or distance(word, key) > min(2, len(word) - 1)
            or min(others, default=9) <= distance(word, key)
        ):
            return  # it is a key, or as near to another one
        try:
            load_config({section: {word: 1}})
        except ConfigError as e:
            counts["typos"] += 1
            assert f"{section}.{word}: unknown key; did you mean {key!r}?" in str(e), str(e)
        else:
            raise AssertionError(f"{section}.{word} was accepted")

    return {
        "config": (texts(), config_text),
        "damaged config": (mutants(dump(Config()).encode()), config_bytes),
        "damaged log": (mutants(SOUND_LOG), log),
        "damaged tensors": (mutants(SOUND_TENSORS), tensors),
        "mapping": (st.one_of(known, values), config_mapping),
        "override": (
            st.builds(
                "{}={}".format,
                st.one_of(
                    words,
                    st.sampled_from(
                        ["train.steps", "seed", "loss.name", "metrics.0.name", "optim.name", "name"]
                    ),
                ),
                st.one_of(words, st.integers(0, 99)),
            ),
            override,
        ),
        "log": (logs(), log),
        "tensors": (tensor_files(), tensors),
        "round trip": (configs(), same_again),
        "typo": (typos(), suggestion),
    }


def _agree(data: bytes) -> None:
    "What our reader of headers lets pass, the library reads, and finds the same in it"
    from safetensors.numpy import load

    try:
        header = tensor_header(data, "t")
    except MinsnrError:
        return
    if all(f["dtype"] != "BF16" for f in header.tensors.values()):
        assert {k: list(v.shape) for k, v in load(data).items()} == {k: f["shape"] for k, f in header.tensors.items()}  # fmt: skip


def _tuples(x):
    from minsnr_nb.config import frozen

    return frozen(x)


def run(
    examples: int,  # For each promise
    only: str | None = None,  # One promise, without the budgets
) -> dict:  # Figures
    "Try every promise; the first that is broken raises, with the smallest input that breaks it"
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, (strategy, check) in promises(Path(folder), counts).items():
            if only not in (None, name):
                continue
            profile = settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))  # fmt: skip
            profile(given(strategy)(check))()
    figures = {"examples": examples, **dict(sorted(counts.items()))}
    return figures if only else figures | {"slowest_refusal_ms": budgets()}


def part(lab, n: int) -> tuple[bool, str]:
    "The form that the harness calls"
    try:
        figures = run(n)
    except Exception as e:
        return False, f"{type(e).__name__}: {e}"[:2000]
    both = [f"{loader} {end}" for loader in ("config", "mapping", "log", "tensors") for end in ("accepted", "refused")]  # fmt: skip
    ok = all(figures[x] for x in both) and figures["typos"] > n // 3
    return ok and figures["slowest_refusal_ms"] < 100, str(figures)


if __name__ == "__main__":
    import sys

    start = time.perf_counter()
    print(run(int(sys.argv[1])), f"{time.perf_counter() - start:.0f} s")
