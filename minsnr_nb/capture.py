"""The source of something that a notebook defines, with all that it needs, as a module that stands alone.

A definition in a cell uses names of the notebook: imports, other functions and classes, plain values.
`standalone` collects them, in the order of need. What cannot be written down as source (a tensor, a data
frame, a lambda, a function made by another function) is an error that names it.
"""

import ast
import builtins
import inspect
import linecache
import math
import symtable
import sys
import textwrap
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from minsnr_nb.errors import ConfigError
from minsnr_nb.registry import Registry

__all__ = ["CURE", "standalone"]

_MAX_VALUE = 1 << 16  # characters of one plain value
CURE = "move it to a file and name that file in `extensions`"


class _Missing(Exception):
    "What stands in the way, in words"


def _codes(value: Any) -> Iterator[CodeType]:
    "The compiled functions of a function or a class"
    if isinstance(value, FunctionType):
        yield value.__code__
    for part in vars(value).values() if isinstance(value, type) else ():
        part = getattr(part, "fget", None) or getattr(part, "__func__", part)
        part = inspect.unwrap(part) if callable(part) else part
        if isinstance(part, FunctionType) and part.__module__ == value.__module__:
            if linecache.getlines(
                part.__code__.co_filename
            ):  # dataclass writes some without source
                yield part.__code__


def _texts(value: Any, space: dict) -> Iterator[str]:
    "Sources in which something may be defined, likeliest first"
    places = [code.co_filename for code in _codes(value)]
    if isinstance(value, type):  # one without methods does not know its cell
        places += [space.get("__file__") or "", *reversed(linecache.cache)]
    for place in dict.fromkeys(places):
        if lines := linecache.getlines(place) if place else []:
            yield "".join(lines)


def _definition(value: Any, space: dict) -> str:
    "The source of a function or a class, decorators included"
    name, lines = value.__qualname__, {code.co_firstlineno for code in _codes(value)}
    if name == "<lambda>":
        raise _Missing("is a lambda")
    if "." in name:
        raise _Missing("is defined inside another function or class")
    for text in _texts(value, space):
        try:
            nodes = [n for n in ast.walk(ast.parse(text)) if getattr(n, "name", None) == name]
        except SyntaxError:
            continue
        for node in reversed([n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if all(first <= line <= (node.end_lineno or first) for line in lines):
                whole = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
                return textwrap.dedent(whole)
    raise _Missing("has no source")


def _in_words(node: Any) -> str:
    "The annotation that a definition writes as a string"
    value = getattr(node, "annotation", None) or getattr(node, "returns", None)
    text = getattr(value, "value", None)
    return text if isinstance(text, str) else ""


def _names(source: str) -> list[str]:
    "Global names that a definition uses, in the order of the alphabet"

    def walk(table: symtable.SymbolTable) -> Iterator[str]:
        top = table.get_type() == "module"
        yield from (
            s.get_name()
            for s in table.get_symbols()
            if (top or s.is_global()) and s.is_referenced()
        )
        for inner in table.get_children():
            yield from walk(inner)

    found = set(walk(symtable.symtable(source, "cell", "exec")))
    for text in map(_in_words, ast.walk(ast.parse(source))):
        try:
            found |= {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
        except SyntaxError:
            continue
    return sorted(found)


def _plain(value: Any) -> bool:
    "Whether a value can be written down and read back"
    if isinstance(value, float):
        return math.isfinite(value) and type(value) is float
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_plain, value))
    if type(value) is dict:
        return all(map(_plain, (*value.keys(), *value.values())))
    return value is None or value is ... or type(value) in (bool, int, str, bytes, complex)


def _public(modules: dict[str, Any]) -> list[tuple[str, dict]]:
    "Imported modules, those that offer names first, short names before long ones"
    own = ("__main__", "__mp_main__", "minsnr_nb.all")
    kept = [
        (name, vars(module))
        for name, module in modules.items()
        if isinstance(module, ModuleType) and name not in own and not name.startswith(Registry.OWN)
    ]
    return sorted(kept, key=lambda m: ("__all__" not in m[1], "._" in f".{m[0]}", len(m[0]), m[0]))


def _import_of(name: str, value: Any) -> str | None:
    "The line that imports a value under a name; None when there is none"
    if isinstance(value, ModuleType):
        module = value.__name__
        if module == "__main__" or module.startswith(Registry.OWN):
            return None
        return f"import {module}" if name == module else f"import {module} as {name}"
    modules = dict(sys.modules)
    home, at_home = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if isinstance(home, str) and home in modules and isinstance(at_home, str):
        if home == "__main__":
            return None
        if not home.startswith(Registry.OWN) and vars(modules[home]).get(at_home) is value:
            return _from(home, at_home, name)
    public = _public(modules)
    for module, names in public:
        if names.get(name) is value and name in names.get("__all__", [name]):
            return _from(module, name, name)
    for module, names in public:
        for key, other in list(names.items()) if "__all__" in names else ():
            if other is value:
                return _from(module, key, name)
    return None


def _from(module: str, name: str, alias: str) -> str:
    return f"from {module} import {name}" + ("" if name == alias else f" as {alias}")


def _parts_used(source: str, name: str, module: ModuleType) -> Iterator[str]:
    "Imports of a package's modules that are used through the package: `torch.nn.functional`"
    for node in ast.walk(ast.parse(source)):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts, node = [node.attr, *parts], node.value
        if isinstance(node, ast.Name) and node.id == name:
            for n in range(1, len(parts) + 1):
                inner = ".".join([module.__name__, *parts[:n]])
                if inner in sys.modules and name == module.__name__:
                    yield f"import {inner}"


class _Module:
    "A module in the making"

    def __init__(self):
        self.imports: set[str] = set()
        self.parts: dict[str, str] = {}
        self.begun: set[str] = set()

    def define(self, name: str, value: Any, space: dict) -> None:
        "Add a function or a class, after what it needs"
        base = inspect.unwrap(value)
        if base.__module__ != "__main__":
            raise _Missing(f"is made by {base.__module__}")
        source = _definition(base, space)
        self.begun |= {name, base.__name__}
        if getattr(base, "__code__", None) and "annotations" in _futures(base.__code__):
            self.imports.add("from __future__ import annotations")
        for used in _names(source):
            if isinstance(space.get(used), ModuleType):
                self.imports |= set(_parts_used(source, used, space[used]))
            self.need(used, space)
        self.parts[base.__name__] = source
        if name != base.__name__:
            self.parts[name] = f"{name} = {base.__name__}"

    def need(self, name: str, space: dict) -> None:
        "Add what a global name stands for"
        if name in self.begun or (name not in space and hasattr(builtins, name)):
            return
        self.begun.add(name)
        if name not in space:
            raise _Missing(f"uses {name!r}, which is not defined")
        value = space[name]
        if _plain(value):
            if len(text := repr(value)) > _MAX_VALUE:
                raise _Missing(f"uses {name!r}, a value of {len(text)} characters")
            self.parts[name] = f"{name} = {text}"
        elif line := _import_of(name, value):
            self.imports.add(line)
        elif isinstance(inspect.unwrap(value) if callable(value) else value, FunctionType | type):
            self._inner(name, value, space)
        else:
            raise _Missing(f"uses {name!r} ({type(value).__name__})")

    def _inner(self, name: str, value: Any, space: dict) -> None:
        try:
            self.define(name, value, space)
        except _Missing as e:
            raise _Missing(f"uses {name!r}, which {e}") from None

    def text(self) -> str:
        "The whole module"
        first = sorted(self.imports, key=lambda line: ("__future__" not in line, line))
        body = "\n\n\n".join(self.parts.values())
        return "\n".join(['"Captured from the cells of a notebook"', "", *first, "", "", body, ""])


def _futures(code: CodeType) -> list[str]:
    import __future__

    names = __future__.all_feature_names
    return [n for n in names if code.co_flags & getattr(__future__, n).compiler_flag]


def _space(entry: Any) -> dict:
    "The global names that a definition of a notebook sees"
    base = inspect.unwrap(entry)
    if isinstance(base, FunctionType):
        return base.__globals__
    for part in vars(base).values() if isinstance(base, type) else ():
        part = getattr(part, "fget", None) or getattr(part, "__func__", part)
        if isinstance(part, FunctionType) and part.__module__ == "__main__":
            if part.__code__.co_filename != "<string>":  # made by dataclass
                return part.__globals__
    return vars(sys.modules["__main__"])


def _registers(source: str) -> bool:
    "Whether a definition puts itself into a lane"
    (node,) = ast.parse(source).body
    return any(".register" in ast.unparse(d) for d in node.decorator_list)


def _add_entry(module: _Module, lane: Registry, name: str) -> None:
    "Add an entry of a lane, registered"
    base = inspect.unwrap(lane[name])
    if not isinstance(base, FunctionType | type):
        raise _Missing(f"is a {type(base).__name__} without source")
    if base.__name__ not in module.parts:
        module.define(base.__name__, lane[name], _space(lane[name]))
    if not _registers(module.parts[base.__name__]):
        line = _import_of("LANE", lane)
        if line is None:
            raise _Missing("is in a lane that no module offers")
        line = line.split(" as ")[0]
        module.imports.add(line)
        call = f"{line.split(' import ')[1]}.register({name!r})({base.__name__})"
        module.parts[f"{lane.lane} {name}"] = call


def standalone(
    wanted: Sequence[tuple[Registry, str]],  # Entries that cells define: lane, name
) -> str:  # Source of a module that defines them, and registers them when it is executed
    "Write a module from the definitions of a notebook"
    module = _Module()
    for lane, name in wanted:
        try:
            _add_entry(module, lane, name)
        except _Missing as e:
            raise ConfigError(
                f"{lane.lane} {name!r} of this notebook cannot travel with the run: it {e}; {CURE}"
            ) from None
    return module.text()
