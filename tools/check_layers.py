"""Check what a module may know: imports point to lower numbers, heavy libraries load late, one module writes,
no text that was read is run.

usage: python tools/check_layers.py [ROOT]
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from _report import PLAIN, main

LIGHT = ("config", "registry", "run_layout", "events", "cli")  # imported by every command
RUNS = {"eval", "exec", "compile", "__import__"}
MAY_RUN = {"own_code"}  # what somebody has trusted, by its hash
YAML_LOADERS = {"unsafe_load", "full_load", "load_all", "unsafe_load_all", "full_load_all"}
LATE = {"matplotlib", "sklearn", "torchvision", "scipy", "pandas", "PIL", "tqdm", "ipywidgets"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
WRITES = {"write_text", "write_bytes", "unlink", "rmdir", "rename", "mkdir", "touch", "rmtree"}
OS_WRITES = {"replace", "remove", "makedirs", "truncate", "ftruncate", "link", "symlink", "write"}


def layers(root: Path) -> dict[str, float]:
    "Every module and its number"
    numbered = (re.fullmatch(r"(\d\d)_(\w+)", p.stem) for p in (root / "nbs").glob("*.ipynb"))
    return {m[2]: int(m[1]) for m in numbered if m} | PLAIN


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    "Line and dotted name of everything imported, at any depth"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["minsnr_nb" if node.level else "", node.module]))
            names = [f"{base}.{a.name}" for a in node.names] if base == "minsnr_nb" else [base]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and _called(node)[1] == "import_module" and node.args:
            if isinstance(name := getattr(node.args[0], "value", None), str):
                yield node.lineno, f"minsnr_nb{name}" if name.startswith(".") else name


def _called(node: ast.Call) -> tuple[str, str]:
    "Owner and name of what is called: `os.replace(...)` is ('os', 'replace')"
    if isinstance(node.func, ast.Attribute):
        return getattr(node.func.value, "id", ""), node.func.attr
    return "", getattr(node.func, "id", "")


def upward(name: str, tree: ast.AST, layer: dict[str, float]) -> Iterator[str]:
    "Imports of a module that stands higher, or beside"
    for line, target in imports(tree):
        other = target.removeprefix("minsnr_nb.").split(".")[0]
        if not target.startswith("minsnr_nb.") or other not in layer or other == name:
            continue
        if layer[other] >= layer[name]:
            yield f"{line}: imports {other} ({layer[other]:g}), which is not below {layer[name]:g}"


def early(tree: ast.Module) -> Iterator[str]:
    "Heavy libraries imported before anyone asked for them, and pickles at any time"
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for line, target in imports(statement):
                if target.split(".")[0] in LATE:
                    yield f"{line}: imports {target} at the top; do it in the function that needs it"
    for line, target in imports(tree):
        if target.split(".")[0] in PICKLES:
            yield f"{line}: imports {target}: no pickle anywhere"


def writes(tree: ast.AST) -> Iterator[str]:
    "Calls that change files"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, name = _called(node)
        values = [*node.args, *(k.value for k in node.keywords)]
        texts = [v.value for v in values if isinstance(getattr(v, "value", None), str)]
        opens = name in ("open", "fdopen") and any(
            re.fullmatch("[rbt]*[wax+][rbt+]*", t) for t in texts
        )
        if opens or name in WRITES or (owner == "os" and name in OS_WRITES):
            yield f"{node.lineno}: {owner + '.' if owner else ''}{name}: only durable changes files"
        if owner == "torch" and name in ("save", "load"):
            yield f"{node.lineno}: torch.{name} is a pickle; use safetensors"


def unsafe(tree: ast.AST) -> Iterator[str]:
    "Calls that turn text from a file into code"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, name = _called(node)
        constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
        if (isinstance(node.func, ast.Name) and name in RUNS and not constant) or (
            name == "import_module" and not constant
        ):
            yield f"{node.lineno}: {name}: nothing is run or imported by a name that was read"
        if owner == "yaml" and name in YAML_LOADERS:
            yield f"{node.lineno}: yaml.{name}: read_yaml is the strict reader"
        for word in node.keywords:
            if (
                word.arg in ("allow_pickle", "shell")
                and getattr(word.value, "value", None) is not False
            ):
                yield f"{node.lineno}: {word.arg}: must stay False"
        if owner == "os" and name in ("system", "popen"):
            yield f"{node.lineno}: os.{name}: hand subprocess a list of words"


def heavy(root: Path) -> Iterator[str]:
    "Modules behind every command that bring torch with them"
    modules = [m for m in ("__init__", *LIGHT) if (root / f"minsnr_nb/{m}.py").exists()]
    if _loaded(root, modules):  # one process for all, and one for each only when there is trouble
        for module in modules:
            if trouble := _loaded(root, [module]):
                yield f"minsnr_nb/{module}.py: {trouble}"


def _loaded(root: Path, modules: list[str]) -> str:
    "Import in a fresh process and say what is wrong with that"
    code = "".join(f"import minsnr_nb.{m}\n".replace(".__init__", "") for m in modules)
    code += "import sys; sys.exit(3 if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        return f"cannot be imported: {done.stderr.splitlines()[-1]}"
    return "importing it imports torch" if done.returncode else ""


def findings(root: Path) -> Iterator[str]:
    layer = layers(root)
    for path in sorted((root / "minsnr_nb").glob("*.py")):
        name, tree = path.stem, ast.parse(path.read_text("utf-8"))
        if name.startswith("_"):
            continue
        if name not in layer:
            yield f"minsnr_nb/{path.name}: no notebook of that name, and not in tools/_report.py"
            continue
        found = [*upward(name, tree, layer), *early(tree)]
        found += unsafe(tree) if name not in MAY_RUN else []
        found += writes(tree) if name != "durable" else []
        yield from (f"minsnr_nb/{path.name}:{line}" for line in found)
    yield from heavy(root)


if __name__ == "__main__":
    main(findings)
