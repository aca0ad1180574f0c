"A checkout's .env: taken by the command line alone, named in provenance, and never let out"

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VALUE = "a-value-nobody-may-see"


def minsnr(place, *words):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MINSNR_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    code = "import sys; from minsnr_nb.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=200)


def test_env_names_are_recorded_and_values_stay(tmp_path):
    (tmp_path / "settings.ini").write_text("[minsnr]\n")
    (tmp_path / ".env").write_text(
        f"MINSNR_VAR_THING={VALUE}\n# MINSNR_VAR_OTHER=1\nexport MINSNR_VAR_TWO='x y'\n"
    )
    done = minsnr(tmp_path, "train", ROOT / "configs/smoke.yaml", "train.steps=2")
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.split("RUN_DIR: ")[1].splitlines()[0])
    stamp = json.loads((run / "meta/provenance.json").read_text())
    assert stamp["env"]["dotenv"] == ["MINSNR_VAR_THING", "MINSNR_VAR_TWO"]
    files = [p for p in run.rglob("*") if p.is_file()]
    assert files and not [p for p in files if VALUE.encode() in p.read_bytes()]
    assert minsnr(tmp_path, "export", run, "--dest", tmp_path / "out").returncode == 0
    (run / "artifacts/plots/x.svg").write_text(f"<svg><text>{VALUE}</text></svg>")
    done = minsnr(tmp_path, "export", run, "--dest", tmp_path / "again")
    assert done.returncode == 1 and "the value of MINSNR_VAR_THING" in done.stderr
    assert VALUE not in done.stderr and not list((tmp_path / "again").glob("*"))


def test_env_the_library_does_not_read_it(tmp_path):
    (tmp_path / ".env").write_text(f"MINSNR_VAR_THING={VALUE}\n")
    (tmp_path / "settings.ini").write_text("[minsnr]\n")
    code = "import os, minsnr_nb.all; print(os.environ.get('MINSNR_VAR_THING'))"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == "None", done.stderr
