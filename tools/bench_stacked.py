"""Whether many small networks train faster stacked in one process than one after another: `python tools/bench_stacked.py`.

Both ways take the same steps of the digits MLP: gradients of the weighted loss, clip, AdamW. Stacked, the parameters of
K networks are one tensor each, and `torch.func.vmap` runs all of them at once. Timed in pairs, alternating, in CPU seconds
of one thread, so that other programs on the machine matter little.
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from minsnr_nb.data import digits
from minsnr_nb.objective import make_objective
from minsnr_nb.schedule import linear
from minsnr_nb.seeds import fixed_torch, stream
from minsnr_nb.unet import MODELS


def nets(k: int, width: int, shape: tuple) -> list[nn.Module]:
    out = []
    for seed in range(k):
        with fixed_torch(seed, "init"):
            out.append(MODELS.bind("mlp", {"width": width})(shape))
    return out


def apart(models: list[nn.Module], objective, batches: list) -> None:
    "Each network by itself, as every trial of a sweep does"
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in models]
    for batch in batches:
        for model, optimizer in zip(models, optimizers, strict=True):
            objective.loss(model, *batch)[0].mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def stacked(models: list[nn.Module], objective, batches: list) -> None:
    "All networks at once"
    params, buffers = stack_module_state(models)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, fused=True)

    def loss(p: dict, b: dict, batch: tuple) -> torch.Tensor:
        return objective.loss(lambda x, t: functional_call(models[0], (p, b), (x, t)), *batch)[
            0
        ].mean()

    step = vmap(grad_and_value(loss), in_dims=(0, 0, None))
    for batch in batches:
        grads, _ = step(params, buffers, batch)
        squares = sum(g.flatten(1).square().sum(1) for g in grads.values())
        scale = (1.0 / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for name, p in params.items():
            p.grad = grads[name] * scale.view(-1, *[1] * (p.dim() - 1))
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data, objective = digits(None, "train"), make_objective(linear(1000), "x0", "min_snr")
    for width, batch in ((32, 64), (192, 64), (192, 128)):
        draws = []
        for i in range(given.steps):
            t = (stream(i, "t").uniform(batch)[:, 0] * 1000).long()
            x0, eps = (stream(i, word).normal(batch, data.shape) for word in ("x0", "eps"))
            draws.append((x0, t, eps))
        ratios = []
        for _ in range(given.repeats):
            took = []
            for way in (apart, stacked):
                models = nets(given.networks, width, data.shape)
                start = time.process_time()
                way(models, objective, draws)
                took.append(time.process_time() - start)
            ratios.append(took[0] / took[1])
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(
            f"width {width}, batch {batch}: {given.networks} networks stacked are {middle:.2f} times as fast "
            f"[{low:.2f}, {high:.2f}], n = {len(ratios)} pairs",
            flush=True,
        )


if __name__ == "__main__":
    main()
