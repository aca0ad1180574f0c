"Flipped bytes and truncations."

import json
import random
from contextlib import contextmanager

from minsnr_nb.errors import MinsnrError
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.generations import find_checkpoint
from minsnr_nb.record.strict_json import read_log

from .lab import Lab, scratch

UNSEALED = (
    "config.yaml",
    "config.resolved.yaml",
    "config_resolved.yaml",
    "run_manifest.json",
    "meta/provenance.json",
)
UNSEALED += (
    "metrics.json",
    "logs/metrics.jsonl",
    "MANIFEST.json",
    "model.safetensors",
    "optim.safetensors",
    "state.json",
)
SEALED = UNSEALED + (
    "meta/status.json",
    "meta/attempts/0001.json",
    "ckpts/last/CURRENT.json",
    "logs/events.jsonl",
    "meta/seal.json",
    "meta/manifest.json",
)


@contextmanager
def changed(path, data):
    "Other content for a while"
    before, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)
        path.chmod(mode)


def _cuts(size: int, rng, n: int) -> list[int]:
    every = [*range(0, size, 4096), *range(max(0, size - 512), size)]
    return every if len(every) <= n else rng.sample(every, n)


def corruption(lab: Lab, n: int) -> tuple[bool, str]:
    "Every flipped byte and every truncation is found; a damaged checkpoint gives way to the one before"
    rng, missed, tried, fallbacks = random.Random(6), [], 0, 0
    with scratch() as root:
        run = lab.whole(root)
        newest = run.ckpts_last / json.loads((run.ckpts_last / "CURRENT.json").read_text())["dir"]
        seal = (run.path / "meta/seal.json").read_bytes()
        for sealed, names in ((True, SEALED), (False, UNSEALED)):
            if not sealed:
                (run.path / "meta/seal.json").unlink()
            for name in names:
                path = newest / name if (newest / name).exists() else run.path / name
                data = path.read_bytes()
                flips = [rng.randrange(len(data)) for _ in range(n)]
                trials = [
                    data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
                    for i in flips
                ]
                trials += [data[:i] for i in _cuts(len(data), rng, n)]
                for bad in trials:
                    tried += 1
                    with changed(path, bad):
                        if all(c.ok for c in check_run(run.path)):
                            missed.append((name, sealed))
                        if path.parent == newest:
                            found, told = find_checkpoint(run)
                            fallbacks += bool(found and found.path != newest and told)
                            if found is None or found.path == newest or not told:
                                missed.append((name, "no fallback"))
        (run.path / "meta/seal.json").write_bytes(seal)
        lines = run.metrics_path.read_bytes().splitlines(keepends=True)
        for _ in range(n):
            at = rng.randrange(len(lines) - 1)
            bad = lines[at].replace(b":", b"", 1)
            with changed(run.metrics_path, b"".join([*lines[:at], bad, *lines[at + 1 :]])):
                try:
                    list(read_log(run.metrics_path))
                    missed.append("a damaged line")
                except MinsnrError as e:
                    if f"metrics.jsonl:{at + 1}:" not in str(e):
                        missed.append(str(e))
    return (
        not missed,
        f"{tried} flips and cuts, {fallbacks} fallbacks, {n} damaged lines, {len(missed)} missed {missed[:1] or ''}",
    )
