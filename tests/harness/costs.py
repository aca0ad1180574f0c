"What the care costs."

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from minsnr_nb.config import Config, dump
from minsnr_nb.record.directory import status_record
from minsnr_nb.record.events import EventLog
from minsnr_nb.record.index import run_rows

from .lab import Lab, scratch


def costs(lab: Lab, n: int) -> tuple[bool, str]:
    "Append at most 50 us, creation at most 250 ms, on the disk of the machine"
    root = Path(tempfile.mkdtemp(prefix="minsnr-harness-"))
    try:
        made = []
        for _ in range(5):
            start = time.perf_counter()
            run = lab.create(root)
            made.append(time.perf_counter() - start)
        values, appended = {f"train/mse/bin{i}": i / 7 for i in range(8)}, []
        with EventLog(run) as log:
            for i in range(n):
                start = time.perf_counter()
                log.log(i, "train", values)
                appended.append(time.perf_counter() - start)
    finally:
        shutil.rmtree(root)
    us, ms = 1e6 * statistics.median(appended), 1e3 * statistics.median(made)
    return us <= 50 and ms <= 250, f"append {us:.0f} us, creation {ms:.0f} ms (medians)"


def index(lab: Lab, n: int) -> tuple[bool, str]:
    "Ten thousand runs: cold < 10 s, warm < 0.5 s; a rebuilt index equals one kept up to date"
    with scratch() as root:
        text, final = (
            dump(Config()),
            {f"probe/x0/bin{i}": i / 7 for i in range(30)} | {"eval/fd@x": 1.5},
        )
        for i in range(n):
            run = root / f"p{i % 5}" / f"2026-11-20_09-30-00_nogit_{i:04x}"
            (run / "meta/attempts").mkdir(parents=True)
            lr = f"lr: {1e-4 + i * 1e-8:.8f}"
            (run / "config.resolved.yaml").write_text(
                text.replace("seed: 0\n", f"seed: {i}\n").replace("lr: 0.001", lr)
            )
            (run / "meta/status.json").write_text(json.dumps(status_record("completed", 10, 10)))
            (run / "metrics.json").write_text(json.dumps({"final": final}))
            (run / "meta/provenance.json").write_text("{}")
        start = time.perf_counter()
        rows = run_rows(root)
        cold = time.perf_counter() - start
        start = time.perf_counter()
        again = run_rows(root)
        warm = time.perf_counter() - start
        for row in rows[:: n // 10]:
            path = Path(row["path"])
            (path / "meta/status.json").write_text(json.dumps(status_record("failed", 3, 10)))
        shutil.rmtree(rows[1]["path"])
        kept = run_rows(root)
        (root / ".index.sqlite").unlink()
        same = kept == run_rows(root) and again == rows and len(kept) == n - 1 and kept != rows
    scale = max(1.0, n / 10_000)
    ok = same and cold < 10 * scale and warm < 0.5 * scale
    return (
        ok,
        f"{n} runs: cold {cold:.1f} s, warm {warm:.2f} s, rebuilt {'equal' if same else 'DIFFERENT'}",
    )
