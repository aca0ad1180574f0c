"""YAML read strictly: no tags, no key twice, `1e-4` a float, `on` a string, and budgets on size and depth.

YAML 1.1, which most Python tools read, turns `1e-4` into a string, `on` into `True`, and lets the
second of two equal keys win. A document may come from anywhere, so what exceeds a budget is refused
before the work it would cause: first the bare text, then the nodes (an alias of aliases can stand
for millions of values), then each value as it is made. `write_yaml` writes what `read_yaml` reads.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

import yaml

from minsnr_nb.errors import ConfigError

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_COLUMNS",
    "MAX_NODES",
    "plain_values",
    "read_yaml",
    "write_yaml",
]

MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_COLUMNS = 1 << 20, 64, 100_000, 1 << 16


class _Loader(yaml.SafeLoader):
    "YAML with plain scalars only: no tags, `1e-4` a float, `on` a string; at most 64 levels"

    level = 0

    def compose_node(self, parent, index):
        self.level += 1
        if self.level > MAX_DEPTH:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in rules if not tag.endswith((":float", ":bool", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = (
    r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)"
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^{_FLOAT}$"), list("-+.0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))


def _text_problem(text: str) -> str | None:
    "What is too much about a document, judged before it is parsed"
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        return f"larger than {MAX_BYTES} bytes"
    if sum(map(text.count, ("\n", ",", "[", "{", ":", "- -", "? "))) > MAX_NODES:
        return f"more than {MAX_NODES} values"
    if max(map(len, text.split("\n"))) > MAX_COLUMNS:
        return f"a line longer than {MAX_COLUMNS} characters"
    return None


def _weigh(node, known: dict, level: int = 0) -> tuple[int, int]:
    "Number of values and of levels below a YAML node, each shared node counted once"
    if level > MAX_DEPTH:
        raise RecursionError
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1, 0  # what a node that contains itself finds
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            inner = [v for _, v in inner]
        parts = [_weigh(n, known, level + 1) for n in inner]
        known[id(node)] = 1 + sum(n for n, _ in parts), 1 + max((d for _, d in parts), default=0)
    return known[id(node)]


_TAGS = {"map", "seq", "null", "bool", "int", "float", "str"}
_UNSEEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def _scalar(node) -> Any:
    "The plain value of a YAML scalar"
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in _TAGS:
        raise ValueError(f"tag {node.tag!r} is not allowed; plain values only")
    if kind in ("int", "float") and (len(node.value) > 64 or ":" in node.value):
        raise ValueError("not a number that can be read; at most 64 digits, none to the base 60")
    if kind == "str" and _UNSEEN.search(node.value):
        raise ValueError(f"holds a character that cannot be seen: {ascii(node.value)[:60]}")
    return _Loader("").construct_object(node)


def _tree(node, path: tuple, where: dict, source: str) -> Any:
    "Build plain values from a YAML node, noting the line of every key"
    where[path] = at = f"{source}:{node.start_mark.line + 1}"
    try:
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise ValueError(f"tag {node.tag!r} is not allowed; plain values only")
    except ValueError as e:
        raise ConfigError(f"{at}: {'.'.join(map(str, path))}: {e}") from None
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, where, source)
    return [_tree(n, (*path, i), where, source) for i, n in enumerate(node.value)]


def _mapping(node, path: tuple, where: dict, source: str) -> dict:
    "Build a dictionary from a YAML mapping, refusing a key given twice"
    out = {}
    for k, v in node.value:
        key, at = k.value, f"{source}:{k.start_mark.line + 1}"
        if not isinstance(k, yaml.ScalarNode) or k.tag.endswith((":merge", ":null")):
            raise ConfigError(f"{at}: keys are plain words")
        if not key.isprintable() or len(key) > 256:
            raise ConfigError(f"{at}: {ascii(key)[:60]}: keys are plain words")
        if key in out:
            raise ConfigError(f"{at}: {'.'.join(map(str, (*path, key)))}: key given twice")
        out[key] = _tree(v, (*path, key), where, source)
    return out


def read_yaml(
    text: str,  # The document
    source: str = "<text>",  # Its name in messages
) -> tuple[Any, dict]:  # Plain values, and {key path: "file:line"}
    "Read one YAML document strictly"
    data, where = _read(text, source)
    return deepcopy(data), dict(where)


@lru_cache(maxsize=32)
def _read(text: str, source: str) -> tuple[Any, dict]:
    "The same, once for each text: a run's config is asked for by many"
    if problem := _text_problem(text):
        raise ConfigError(f"{source}: {problem}")
    where: dict = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node and _weigh(node, {})[0] > MAX_NODES:
            raise ConfigError(f"{source}: more than {MAX_NODES} values")
        return (_tree(node, (), where, source) if node else {}), where
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: not YAML: {getattr(e, 'problem', None) or e}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested deeper than {MAX_DEPTH} levels") from None


class _Dumper(yaml.SafeDumper):
    "YAML that `read_yaml` reads back"


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + rules
    for first, rules in {
        **dict.fromkeys(yaml.SafeDumper.yaml_implicit_resolvers, []),
        **_Loader.yaml_implicit_resolvers,
    }.items()
}


def write_yaml(data: Any) -> str:
    "Write plain values so that `read_yaml` gives them back"
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def plain_values(value: Any, path: tuple = ()) -> Any:
    "Copy settings that came as Python values; what YAML could not hold is refused"
    at = f"settings: {'.'.join(map(str, path))}"
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"settings: {path[0]}: more than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not (isinstance(key, str) and key.isprintable() and 0 < len(key) <= 256):
                raise ConfigError(f"{at}: {ascii(key)[:60]}: keys are plain words")
        return {k: plain_values(v, (*path, k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(v, (*path, i)) for i, v in enumerate(value)]
    if not (value is None or type(value) in (bool, int, float, str)):
        raise ConfigError(f"{at}: a plain value is needed, not {type(value).__name__}")
    if isinstance(value, str) and _UNSEEN.search(value):
        raise ConfigError(f"{at}: holds a character that cannot be seen: {ascii(value)[:60]}")
    if type(value) is int and value.bit_length() > 200:
        raise ConfigError(f"{at}: an integer of {value.bit_length()} bits")
    return value
