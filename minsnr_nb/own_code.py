"""Own code that a config names or a notebook defines: found, loaded as modules of its own, and captured.

`using` makes the entries of some files visible in their lanes for as long as a config is read or built;
outside of it nothing has changed, so two runs may each bring their own entry of one name. A file is
executed once in a process. What comes from a run is verified, and trusted by hash, before it is executed.
"""

import ast
import importlib.util
import inspect
import linecache
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from minsnr_nb.capture import CURE, standalone
from minsnr_nb.config import Config, Loaded
from minsnr_nb.errors import ConfigError
from minsnr_nb.guard import read_plain, secret_problem
from minsnr_nb.record.trust import MAX_CODE, OwnCode, require_trust, stored_code
from minsnr_nb.registry import Registry, keyword_model
from minsnr_nb.settings import is_record, project_root
from minsnr_nb.strict_yaml import read_yaml, write_yaml

__all__ = ["find_code", "matching_code", "using", "with_cells"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.py")
_LOADED: dict[str, list[tuple[Registry, str, Any]]] = {}  # module -> what it registered
_LIVE: dict[str, list[tuple[Registry, str, Any]]] = {}  # digest of a capture -> what was captured

Lanes = Mapping[str, Registry]


# --- finding --------------------------------------------------------------------------------------


def _place(name: str, source: Path | None) -> Path:
    "The file that a config means"
    folders = [source.parent] if source else []
    for folder in (*folders, Path.cwd(), project_root()):
        if (path := folder / name).is_file():
            return path
    where = f"beside {source} or in" if source else "in"
    raise ConfigError(f"extensions: no file {name!r} {where} {Path.cwd()}")


def _here(name: str, source: Path | None) -> OwnCode:
    "Read a file of one's own"
    path = _place(name, source)
    if not _NAME.fullmatch(path.name):
        raise ConfigError(f"extensions: {name!r}: a file of code is named like my_loss.py")
    data = read_plain(path, MAX_CODE, follow=True)
    if problem := secret_problem(data):
        raise ConfigError(
            f"extensions: {path.name}: holds {problem}; it would be kept in every run"
        )
    _refuse_beside(data, path.name, path.parent)
    return OwnCode(path.name, data, "file")


def find_code(
    names: tuple[str, ...],  # What a config says
    source: Path | None = None,  # The file that says it; None for values and overrides
) -> tuple[OwnCode, ...]:
    "Read the files of own code that a config names; those of a run from the run, and if trusted"
    if source and is_record(source.parent):
        files = stored_code(source.parent)
        if list(names) != [file.name for file in files]:
            raise ConfigError(f"{source}: extensions: not what the run's provenance says")
        require_trust(source.parent, files)
        return files
    files = tuple(_here(name, source) for name in names)
    listed = [file.name for file in files]
    if twice := next((name for name in listed if listed.count(name) > 1), None):
        raise ConfigError(f"extensions: {twice} is named twice; give the files different names")
    return files


def matching_code(
    code: tuple[OwnCode, ...],  # Of a run
    names: tuple[str, ...],  # What a config says that should be the same
    source: Path | None = None,  # The file that says it
) -> tuple[OwnCode, ...]:  # The run's
    "Make sure that a config names the code of a run, and take the run's"
    then = {file.name: file for file in code if file.origin == "file"}
    now = {Path(name).name: name for name in names}
    now = {short: name for short, name in now.items() if short in then or not _cell(code, short)}
    if then.keys() != now.keys():
        raise ConfigError(f"extensions: {sorted(then)} then, {sorted(now)} now")
    for short, name in now.items() if source is None or not is_record(source.parent) else ():
        try:
            data = read_plain(_place(name, source), MAX_CODE, follow=True)
        except ConfigError:
            continue  # the run does not need the original any more
        if data != then[short].data:
            raise ConfigError(f"extensions: {short}: has changed since the run began; fork the run")
    return code


def _cell(code: tuple[OwnCode, ...], name: str) -> bool:
    return any(file.name == name and file.origin == "cell" for file in code)


def _refuse_beside(data: bytes, name: str, folder: Path) -> None:
    "Refuse imports of files that would not be there in another place"
    tree, found = _parsed(data, name), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ConfigError(f"extensions: {name}:{node.lineno}: a relative import leads nowhere")
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {(n.split(".")[0], node.lineno) for n in names}
    known = sys.stdlib_module_names | {"minsnr_nb"}
    for top, line in sorted(found):
        if top not in known and _beside(top, folder) and top not in packages_distributions():
            raise ConfigError(
                f"extensions: {name}:{line}: imports {top}, which is no installed package and does"
                f" not travel with the run; put what it needs into {name}"
            )


def _beside(top: str, folder: Path) -> bool:
    "Whether a module lies where one works"
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return False
    places = [spec.origin] if spec and spec.origin else []
    places += list(spec.submodule_search_locations or []) if spec else []
    here = {folder.resolve(), Path.cwd().resolve(), project_root()}
    return any(here & {*Path(p).resolve().parents[:2]} for p in places)


# --- loading --------------------------------------------------------------------------------------


def _parsed(data: bytes, name: str) -> ast.Module:
    "Parse a file of code, or say on which line it is none"
    try:
        return ast.parse(data.decode("utf-8"), name)
    except UnicodeDecodeError:
        raise ConfigError(f"extensions: {name}: not UTF-8 text") from None
    except (SyntaxError, ValueError) as e:
        line = getattr(e, "lineno", None)
        raise ConfigError(f"extensions: {name}:{line or 1}: {getattr(e, 'msg', e)}") from None


def _line_of(e: BaseException, filename: str) -> int:
    "The last line of a file that an error passed through"
    line, trace = 1, e.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == filename else line
        trace = trace.tb_next
    return line


def _execute(file: OwnCode, name: str) -> None:
    "Run a file as a module of its own; its entries appear in their lanes"
    tree, filename = _parsed(file.data, file.name), f"<{file.name} {file.sha256[:16]}>"
    text = file.data.decode("utf-8")
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = filename
    try:
        exec(compile(tree, filename, "exec", dont_inherit=True), module.__dict__)
    except BaseException as e:  # a SystemExit of theirs is no end of ours
        del sys.modules[name]
        if isinstance(e, KeyboardInterrupt):
            raise
        said = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        said = str(e) if isinstance(e, ConfigError) else said
        raise ConfigError(f"extensions: {file.name}:{_line_of(e, filename)}: {said}") from None


def _entries(file: OwnCode, lanes: Lanes) -> list[tuple[Registry, str, Any]]:
    "What a file registers, found by executing it the first time"
    stem = re.sub(r"\W", "_", file.name.removesuffix(".py"))
    name = f"{Registry.OWN}{stem}_{file.sha256[:16]}"
    if name not in _LOADED:
        before = [(lane, dict(lane._own), dict(lane._own_homes)) for lane in lanes.values()]
        try:
            for lane, _, _ in before:
                lane._own, lane._own_homes = {}, {}
            _execute(file, name)
            _LOADED[name] = [(r, k, (e, name)) for r, _, _ in before for k, e in r._own.items()]
        finally:
            for lane, own, homes in before:
                lane._own, lane._own_homes = own, homes
    return _LOADED[name]


def _live(file: OwnCode) -> bool:
    "Whether the cells that a file was captured from are still here, unchanged"
    cells = _LIVE.get(file.sha256) if file.origin == "cell" else None
    if not cells or any(name not in lane or lane[name] is not e for lane, name, e in cells):
        return False
    try:
        return standalone([(lane, name) for lane, name, _ in cells]).encode() == file.data
    except ConfigError:
        return False


def _show(file: OwnCode, lanes: Lanes) -> None:
    "Make the entries of one file visible"
    for lane, name, (entry, home) in _entries(file, lanes):
        if name in lane._own:
            other = lane._own_homes[name].removeprefix(Registry.OWN).rpartition("_")[0]
            raise ConfigError(
                f"extensions: {file.name}: {lane.lane} {name!r} is also in {other}.py"
            )
        cell = lane._entries.get(name) if lane._homes.get(name) == "__main__" else None
        same = cell is None or cell.__doc__ == entry.__doc__
        if not file.stored and file.origin == "file" and not same:
            raise ConfigError(
                f"extensions: {file.name}: {lane.lane} {name!r} is also defined, differently, in a"
                " cell; choose another name, or restart the kernel"
            )
        lane._own[name], lane._own_homes[name] = entry, home


@contextmanager
def using(
    lanes: Lanes,  # Section of a config -> registry
    files: tuple[OwnCode, ...],  # Whose entries are wanted
) -> Iterator[None]:
    "See the entries of some files, and of no others, for a while"
    before = [(lane, lane._own, lane._own_homes) for lane in lanes.values()]
    try:
        for lane in lanes.values():
            lane._own, lane._own_homes = {}, {}
        for file in files:
            if not _live(file):
                _show(file, lanes)
        yield
    finally:
        for lane, own, homes in before:
            lane._own, lane._own_homes = own, homes


# --- capturing ------------------------------------------------------------------------------------


def _named(cfg: Config, lanes: Lanes) -> Iterator[tuple[Registry, str]]:
    "Every entry that a config names"
    for section, lane in lanes.items():
        value = getattr(cfg, section)
        for part in value if isinstance(value, tuple) else (value,):
            yield lane, part.name


def _shape(entry: Callable) -> tuple:
    "What must be equal in an entry and its copy"
    params = inspect.signature(entry).parameters.values()
    return [(p.name, p.kind) for p in params], keyword_model(entry).model_json_schema()


def _prove(file: OwnCode, cells: list[tuple[Registry, str, Any]], lanes: Lanes) -> None:
    "Execute a captured module by itself and compare what it registers"
    try:
        found = _entries(file, lanes)
    except ConfigError as e:
        said = str(e).removeprefix("extensions: ")
        raise ConfigError(
            f"the cells of this notebook do not work by themselves: {said}; {CURE}"
        ) from None
    copies = {(lane.lane, name): entry for lane, name, (entry, _) in found}
    for lane, name, entry in cells:
        copy = copies.get((lane.lane, name))
        if copy is None or _shape(copy) != _shape(entry):
            raise ConfigError(
                f"{lane.lane} {name!r} of this notebook is another one when it stands alone; {CURE}"
            )


def _captured(cells: list[tuple[Registry, str, Any]], taken: set[str], lanes: Lanes) -> OwnCode:
    "Write cells as one file, and try it"
    names = ("cells.py", *(f"cells_{i}.py" for i in range(2, 99)))
    text = standalone([(lane, name) for lane, name, _ in cells])
    file = OwnCode(next(n for n in names if n not in taken), text.encode(), "cell")
    if problem := secret_problem(file.data):
        raise ConfigError(f"a cell of this notebook holds {problem}; it would be kept in the run")
    _refuse_beside(file.data, "this notebook", Path.cwd())
    _prove(file, cells, lanes)
    return file


def with_cells(
    loaded: Loaded,  # From `load`
    lanes: Lanes,
) -> Loaded:  # The same, with the cells that it needs among its extensions
    "Capture what a notebook defines and a config names, so that it travels with the run"
    cfg = loaded.cfg
    had = {(r.lane, n) for f in cfg.code if _live(f) for r, n, _ in _LIVE[f.sha256]}
    with using(lanes, cfg.code):
        named = [(r, n) for r, n in _named(cfg, lanes) if (r.lane, n) not in had]
        cells = [(r, n, r[n]) for r, n in dict.fromkeys(named) if r.home(n) == "__main__"]
        if not cells:
            return loaded
        file = _captured(cells, {file.name for file in cfg.code}, lanes)
    _LIVE[file.sha256] = cells
    code = (*cfg.code, file)
    composed = read_yaml(loaded.composed)[0] | {"extensions": [f.name for f in code]}
    return loaded.model_copy(update={"cfg": cfg.with_code(code), "composed": write_yaml(composed)})
