"""Training step of this package beside the loop of diffusers' own example, interleaved in one process.

uv run --group bench python tools/bench_step.py --sizes S,M,L --rounds 5 --json bench.json

Both sides do the same work: gather and normalise a batch, draw noise and timesteps, forward, MSE on the noise,
backward, clip to norm 1, AdamW, moving average, read the loss. Architectures agree in channels, blocks and
attention; dropout is off. Ours is `draw_batch` + `train_step` as shipped; theirs is `UNet2DModel`,
`DDPMScheduler`, `EMAModel` and AdamW as in examples/unconditional_image_generation. Every round times every
arm once, in rotating order; a ratio is taken within a round, and its median and range are over rounds.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from minsnr_nb.config import Config
from minsnr_nb.data import ImageSet
from minsnr_nb.ema import EMA
from minsnr_nb.objective import make_objective
from minsnr_nb.schedule import SCHEDULES
from minsnr_nb.train_loop import TrainState, draw_batch, make_optimizer, train_step
from minsnr_nb.unet import unet

LR, DECAY, TIMESTEPS = 1e-4, 0.999, 1000


class Size(NamedTuple):
    "A network, its images, and how often it is run for one timing"

    shape: tuple[int, int, int]
    batch: int
    network: dict
    steps: int


SIZES = {
    "S": Size((1, 8, 8), 128, dict(ch=32, mult=(1, 2), blocks=1, attention=(4,)), 8),
    "M": Size((3, 32, 32), 64, dict(ch=32, mult=(1, 2, 2, 2), blocks=2, attention=(16,)), 1),
    "L": Size((3, 32, 32), 8, dict(ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,)), 1),
}
ARMS = [("ours", "fp32"), ("diffusers", "fp32"), ("ours", "bf16"), ("diffusers", "bf16")]
RATIOS = {
    "fp32 / fp32": (ARMS[0], ARMS[1]),
    "bf16 / bf16": (ARMS[2], ARMS[3]),
    "ours bf16 / theirs fp32": (ARMS[2], ARMS[1]),
}


def random_images(size: Size, device: str) -> ImageSet:
    "Bytes to train on"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2048, *size.shape), dtype=torch.uint8, generator=generator)
    labels = torch.zeros(len(images), dtype=torch.int64)
    return ImageSet(images.to(device), labels, ("noise",), "noise", "train")


def ours(size: Size, precision: str, device: str) -> tuple[nn.Module, Callable[[], float]]:
    "The step as `train_run` takes it"
    cfg = Config.model_validate(
        {
            "train": {"batch_size": size.batch, "precision": precision},
            "optim": {"lr": LR, "warmup_steps": 0, "clip_norm": 1.0},
        }
    )
    images = random_images(size, device)
    objective = make_objective(SCHEDULES["linear"](TIMESTEPS), "eps", "constant").to(device)
    model = unet(size.shape, **size.network).to(device)
    state = TrainState(model, EMA(model, decay=DECAY), make_optimizer(model, cfg.optim))

    def step() -> float:
        batch = draw_batch(state.step, images, objective, cfg, torch.device(device))
        return train_step(state, objective, batch, cfg).weighted.mean().item()

    return model, step


def their_network(size: Size) -> nn.Module:
    "The same architecture in diffusers' words"
    from diffusers import UNet2DModel

    net = size.network
    attends = [size.shape[1] >> i in net["attention"] for i in range(len(net["mult"]))]
    return UNet2DModel(
        sample_size=size.shape[1],
        in_channels=size.shape[0],
        out_channels=size.shape[0],
        block_out_channels=tuple(net["ch"] * m for m in net["mult"]),
        layers_per_block=net["blocks"],
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        attention_head_dim=net["ch"] * net["mult"][-1],  # one head, as in the paper
        norm_num_groups=min(32, net["ch"] // 4),
        dropout=0.0,
    )


def theirs(size: Size, precision: str, device: str) -> tuple[nn.Module, Callable[[], float]]:
    "The step of train_unconditional.py, without its data loader and logging"
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_constant_schedule
    from diffusers.training_utils import EMAModel

    images = random_images(size, device).images
    model = their_network(size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    scheduler, lr = DDPMScheduler(TIMESTEPS), get_constant_schedule(optimizer)
    ema = EMAModel(model.parameters(), decay=DECAY, use_ema_warmup=True)

    def step() -> float:
        index = torch.randint(0, len(images), (size.batch,), device=device)
        clean = images[index].float().div_(127.5).sub_(1)
        noise = torch.randn_like(clean)
        t = torch.randint(0, TIMESTEPS, (size.batch,), device=device)
        noisy = scheduler.add_noise(clean, noise, t)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.mse_loss(model(noisy, t).sample.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.item()  # also waits for the device

    return model, step


def timed(step: Callable[[], float], steps: int, clock: Callable[[], float]) -> float:
    "Seconds per step"
    start = clock()
    for _ in range(steps):
        step()
    return (clock() - start) / steps


def bench(name: str, rounds: int, device: str, clock: Callable[[], float]) -> dict:
    "Time all arms of one size"
    size, make = SIZES[name], {"ours": ours, "diffusers": theirs}
    steps = size.steps if device == "cpu" else 10 * size.steps
    arms, params = {}, {}
    for arm in ARMS:
        model, arms[arm] = make[arm[0]](size, arm[1], device)
        params[arm[0]] = sum(p.numel() for p in model.parameters())
    if abs(params["ours"] / params["diffusers"] - 1) > 0.03:
        raise SystemExit(f"{name}: the networks differ: {params}")
    for step in arms.values():
        timed(step, 2, clock)
    seconds = {arm: [] for arm in ARMS}
    for r in range(rounds):
        for arm in ARMS[r % 4 :] + ARMS[: r % 4]:
            seconds[arm].append(timed(arms[arm], steps, clock))
    rate = {" ".join(arm): round(size.batch / median(s), 2) for arm, s in seconds.items()}
    ratio = {
        key: [d / o for o, d in zip(seconds[a], seconds[b], strict=True)]
        for key, (a, b) in RATIOS.items()
    }
    raw = {" ".join(arm): s for arm, s in seconds.items()}
    return {"size": name, "params": params, "images_per_s": rate, "ratio": ratio, "seconds": raw}


def show(row: dict) -> None:
    "Print one size"
    params = " and ".join(f"{n:,}" for n in row["params"].values())
    print(
        f"\n{row['size']}: {params} parameters (ours, diffusers), batch {SIZES[row['size']].batch}"
    )
    print("  images/s   " + "   ".join(f"{k} {v}" for k, v in row["images_per_s"].items()))
    for key, r in row["ratio"].items():
        print(
            f"  {key:24} {median(r):5.2f}  [{min(r):.2f} .. {max(r):.2f}]  n = {len(r)}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="S,M,L", help="comma-separated, of S, M, L")
    parser.add_argument("--rounds", type=int, default=5, help="timings of every arm")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: time spent, not time passed; with --threads 1 on a shared machine",
    )
    parser.add_argument("--json", type=Path, help="file for every timing")
    args = parser.parse_args()
    if unknown := set(args.sizes.split(",")) - set(SIZES):
        parser.error(f"--sizes: {', '.join(sorted(unknown))}; there are: {', '.join(SIZES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    about = {
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "clock": args.clock,
        "rounds": args.rounds,
        "load": round(os.getloadavg()[0], 1),  # of other processes, if this one has just started
    }
    print("   ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rows = []
    for name in args.sizes.split(","):
        rows.append(bench(name, args.rounds, args.device, clock))
        show(rows[-1])
    if args.json:
        args.json.write_text(json.dumps({"about": about, "sizes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
