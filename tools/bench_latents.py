"""Images per second of the same network on pixels and in latents, and what reading the cache costs.

A U-Net is trained for a few steps on pictures of 64x64 pixels, and in the latents of an autoencoder of the config
(untrained weights take the same time), from the cache. Cores, threads and load decide the figures: compare the columns.

usage: python tools/bench_latents.py [--size 64] [--factor 8] [--steps 20] [--batch 16] [--ch 32]
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path


def timed(loop, steps: int) -> dict:
    "Seconds per step of the parts of a loop, after three steps of warming up"
    import torch

    from minsnr_nb.train_loop import draw_batch, train_step

    spent = {"data": 0.0, "step": 0.0}
    for i in range(steps + 3):
        begin = time.perf_counter()
        batch = draw_batch(loop.state.step, loop.images, loop.objective, loop.cfg, loop.device)
        middle = time.perf_counter()
        train_step(loop.state, loop.objective, batch, loop.cfg)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 3:
            spent["data"] += (middle - begin) / steps
            spent["step"] += (time.perf_counter() - middle) / steps
    return spent


def reading(latents, batch: int, times: int = 50) -> float:
    "Seconds to read a batch of posteriors"
    import torch

    rows = [torch.randint(len(latents), (batch,)) for _ in range(times)]
    begin = time.perf_counter()
    for r in rows:
        latents.raw(r)
    return (time.perf_counter() - begin) / times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, value in (
        ("size", 64),
        ("factor", 8),
        ("steps", 20),
        ("batch", 16),
        ("ch", 32),
        ("images", 256),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"MINSNR_CACHE": home, "MINSNR_MODELS": home}
        bench(asked, Path(home))


def bench(asked, home: Path) -> None:
    "Measure both and print a table"
    from minsnr_nb.images.codec import CARD, CODECS, Scale, Shelf, codec_card
    from minsnr_nb.lab import build, load, table_of
    from minsnr_nb.runner import make_loop

    data = {"name": "shapes", "size": asked.size, "n": asked.images, "n_test": 8}
    config = {"data": data, "model": {"name": "unet", "ch": asked.ch, "mult": [1, 2, 2]}}
    config |= {"train": {"batch_size": asked.batch}, "callbacks": [], "metrics": []}
    codec = CODECS.bind("kl_vae", {"factor": asked.factor})(
        (3, asked.size, asked.size), Shelf(Path, Path)
    )
    codec = replace(codec, scale=Scale((0.0,) * codec.shape[0], (1.0,) * codec.shape[0]))
    save_model(home, codec, codec_card(codec, {}), CARD, (3, asked.size, asked.size))
    labs = {
        "pixels": build(load(config).cfg),
        "latents": build(load(config | {"codec": {"name": "local://bench@1"}}).cfg),
    }
    begin = time.perf_counter()
    table_of(labs["latents"].cfg, labs["latents"].latents[0])
    print(f"encoding: {asked.images / (time.perf_counter() - begin):.0f} images/s, once")
    rows = {}
    for name, lab in labs.items():
        lab.source if name == "pixels" else lab.source.ready()
        rows[name] = timed(make_loop(lab), asked.steps)
    rate = {name: asked.batch / sum(spent.values()) for name, spent in rows.items()}
    for name, spent in rows.items():
        whole = sum(spent.values())
        print(
            f"{name:8} {rate[name]:8.1f} images/s, {1e3 * whole:8.1f} ms a step, of it data {100 * spent['data'] / whole:.1f} %"
        )
    read = reading(labs["latents"].source, asked.batch) / sum(rows["latents"].values())
    print(
        f"latents / pixels: {rate['latents'] / rate['pixels']:.1f}; reading the cache: {100 * read:.2f} % of a step"
    )


def save_model(home: Path, codec, card: str, name: str, shape: tuple) -> None:
    "Put an autoencoder among the models without a run"
    import json

    from safetensors.torch import save

    from minsnr_nb import durable

    files = {"model.safetensors": save(codec.network.state_dict()), name: card.encode()}
    files["config.resolved.yaml"] = b"{}\n"
    digests = {k: {"bytes": len(v), "sha256": durable.digest(v)} for k, v in files.items()}
    about = {"name": "bench", "version": 1, "input_shape": shape, "files": digests}
    durable.publish_files(home / "bench/1", files | {"card.json": json.dumps(about)})


if __name__ == "__main__":
    main()
