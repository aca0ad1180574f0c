"Statements about the package as a whole: names, imports, lanes, schema."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, minsnr

LIGHT = [
    "",
    "config",
    "registry",
    "durable",
    "guard",
    "settings",
    "run_layout",
    "record.provenance",
    "record.events",
    "cli",
]


def test_package_star_import_brings_only_our_public_names():
    import minsnr_nb.all as everything

    names: dict = {}
    exec("from minsnr_nb.all import *", names)
    names.pop("__builtins__")
    assert sorted(names) == sorted(everything.__all__) and not [
        n for n in names if n.startswith("_")
    ]
    for name, value in names.items():
        home = getattr(value, "__module__", None) or type(value).__module__
        assert home.startswith("minsnr_nb") or name == "LANES", f"{name} comes from {home}"


@pytest.mark.parametrize("name", [*LIGHT, "papermill"])  # papermill loads our engine
def test_package_light_modules_do_not_import_torch(name):
    module = f"minsnr_nb.{name}".rstrip(".") if name != "papermill" else name
    code = f"import sys, {module}; sys.exit(sum(m in sys.modules for m in ('torch', 'pandas', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_package_list_prints_the_table_of_the_lane():
    from minsnr_nb.minsnr_loss import WEIGHTINGS

    out = minsnr("list", "weightings").stdout
    for row in WEIGHTINGS.table():
        assert row["name"] in out and row["summary"] in out and row["keywords"] in out


def test_package_schema_file_is_current():
    from minsnr_nb.lab import config_schema
    from minsnr_nb.sweep.plan import study_schema

    for name, schema in (("schema", config_schema()), ("study.schema", study_schema())):
        written = json.loads((ROOT / f"configs/{name}.json").read_text())
        assert written == json.loads(json.dumps(schema)), name


CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "cifar" not in p.name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_package_shipped_configs_are_valid_and_buildable(path: Path):
    from minsnr_nb.lab import build, load
    from minsnr_nb.sweep.plan import read_plan

    text, study = path.read_text(), "\nsweep:" in path.read_text()
    plan = read_plan(path) if study else None
    cfg = load(*(plan.sources(plan.trials[0]) if plan else (path,))).cfg
    if (
        cfg.data.name != "image_folder"
    ):  # those of your own pictures are built on a page, with pictures
        build(cfg)
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema="), "editors complete by this line"
    wanted = "study.schema.json" if study else "schema.json"
    assert (path.parent / first.split("=")[1]).resolve() == ROOT / "configs" / wanted


def test_package_every_config_key_has_a_reader():
    "A key that nothing reads is a defect: each field of each section occurs in the package's code"
    from minsnr_nb.config import (
        Config,
        EvalSection,
        ObjectiveSection,
        OptimSection,
        ScheduleLane,
        TrainSection,
    )

    code = "".join(
        p.read_text()
        for p in (ROOT / "minsnr_nb").glob("*.py")
        if p.name not in ("config.py", "_modidx.py")
    )
    sections = {
        "": Config,
        "eval": EvalSection,
        "objective": ObjectiveSection,
        "optim": OptimSection,
    }
    sections |= {"schedule": ScheduleLane, "train": TrainSection}
    for section, model in sections.items():
        for key in model.model_fields:
            where = [f"{section}.{key}", f"cfg.{key}", f"optim.{key}", f'["{key}"]', f'"{key}"']
            assert any(w in code for w in where), f"nothing reads {section}.{key}"
