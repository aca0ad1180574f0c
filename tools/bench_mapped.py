"""Batches per second of a data set that is mapped from the cache, and of the same images in memory.

Both are read side by side, batch by batch, in the order of a training; the mapped set gives its pages back as it goes, so
it never occupies more memory than a few batches. Cores and load decide the figures: compare the columns.

usage: MINSNR_DATA=DIR python tools/bench_mapped.py FOLDER [--size 64] [--batch 128] [--batches 200]
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from minsnr_nb.data import DATASETS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder")
    for name, value in (("size", 64), ("batch", 128), ("batches", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    keys = {"path": asked.folder, "size": asked.size}
    mapped = DATASETS.bind("image_folder", keys)(Path(os.environ["MINSNR_DATA"]), "train")
    memory = replace(mapped, images=mapped.images.clone())
    spent = {"mapped": 0.0, "memory": 0.0}
    for step in range(asked.batches):
        seen = {}
        for name, images in (("mapped", mapped), ("memory", memory))[:: 1 if step % 2 else -1]:
            begin = time.perf_counter()
            seen[name] = images.take(step, asked.batch, 0).x0
            spent[name] += time.perf_counter() - begin
        assert torch.equal(seen["mapped"], seen["memory"])
    rate = {k: asked.batch * asked.batches / s for k, s in spent.items()}
    size = mapped.images.numel() / 2**30
    print(f"{len(mapped)} images, {size:.2f} GiB, batches of {asked.batch}")
    print(", ".join(f"{k}: {v:.0f} images/s" for k, v in rate.items()))
    print(f"mapped / memory: {rate['mapped'] / rate['memory']:.2f}")


if __name__ == "__main__":
    main()
