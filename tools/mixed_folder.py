"""Make a folder of mixed pictures to try things on: parts of scikit-learn's two photographs, in many shapes and sizes.

usage: python tools/mixed_folder.py DIR [--n 600] [--faults]
"""

import argparse
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SHAPES = [
    (4, 3),
    (3, 2),
    (16, 9),
    (1, 1),
    (2, 1),
    (17, 12),
]  # common aspects, lying; half of them stand


def picture(photos: list, rng: np.random.Generator) -> Image.Image:
    "Cut a part out of a photograph, and scale it"
    photo = photos[rng.integers(len(photos))]
    wide, high = SHAPES[rng.integers(len(SHAPES))]
    if rng.random() < 0.5:
        wide, high = high, wide
    unit = rng.uniform(0.35, 1.0) * min(photo.width / wide, photo.height / high)
    w, h = int(wide * unit), int(high * unit)
    left, top = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
    part = photo.crop((left, top, left + w, top + h))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    shorter = int(rng.integers(80, 160))
    scale = shorter / min(w, h)
    return part.resize((round(w * scale), round(h * scale)), Image.Resampling.LANCZOS)


def encoded(image: Image.Image, kind: str = "JPEG", **how: object) -> bytes:
    "The content of a file"
    image.save(file := BytesIO(), kind, **how)
    return file.getvalue()


def faults(whole: bytes, image: Image.Image) -> dict[str, bytes]:
    "Twelve files as they turn up in people's folders"
    turned = Image.Exif()
    turned[0x0112] = 6
    odd = Image.Exif()
    odd[0x0112] = 0
    deep = Image.fromarray(np.arange(6400, dtype=np.uint16).reshape(80, 80) * 10)
    alpha = image.rotate(180).convert("RGBA")
    alpha.putalpha(128)
    return {
        "empty.jpg": b"",
        "text.jpg": b"not a picture",
        "half.jpg": whole[: len(whole) // 2],
        "really_a_png.jpg": encoded(image, "PNG"),
        "print.jpg": encoded(image.convert("CMYK")),
        "few_colours.png": encoded(image.quantize(16), "PNG"),
        "sixteen_bit.png": encoded(deep, "PNG"),
        "see_through.png": encoded(alpha, "PNG"),
        "turned.jpg": encoded(image, exif=turned),
        "odd_tag.jpg": encoded(image, exif=odd),
        "dot.png": encoded(image.resize((2, 2)), "PNG"),
        "copy_of_000.jpg": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--faults", action="store_true")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)  # never into a folder that is there
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(x) for x in load_sample_images().images]
    whole = b""
    for i in range(asked.n):
        image = picture(photos, rng)
        data = encoded(image, quality=92)
        whole = whole or data
        (asked.folder / f"{i:03}.jpg").write_bytes(data)
    if asked.faults:
        for name, data in faults(whole, image).items():
            (asked.folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
