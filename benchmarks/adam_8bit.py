"""AdamW with 8-bit moments by two libraries, against torch's: seconds of an update, and the difference of 20 updates.

Run as `python benchmarks/adam_8bit.py bitsandbytes` and `torchao`, with that package installed.
"""

import importlib
import sys
import time

import torch
from torch import Tensor, nn

SHAPES = [(64, 640), (640, 64), (64, 1280), (1280, 64), (64, 320, 3, 3), (320, 64, 1, 1), (1280,), (100,)] * 5
SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}


def made(seed: int, scale: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


torch.set_num_threads(1)
start = made(0, torch.tensor(0.05))
ours, theirs = ([nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
kind = importlib.import_module(f"{sys.argv[1]}.optim").AdamW8bit
optimizers = [(ours, kind(ours, **SETTINGS)), (theirs, torch.optim.AdamW(theirs, fused=True, **SETTINGS))]
seconds: list[list[float]] = [[], []]
for number in range(1, 21):
    gradients = made(number, 10 ** -(1 + 3 * torch.rand((), generator=torch.Generator().manual_seed(number))))
    for (parameters, optimizer), taken in zip(optimizers, seconds, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        begun = time.perf_counter()
        optimizer.step()
        taken.append(time.perf_counter() - begun)
flat, reference, first = (torch.cat([x.detach().flatten() for x in each]) for each in (ours, theirs, start))
print(
    f"{len(first):,} numbers in {len(SHAPES)} tensors; {sys.argv[1]}: first update {seconds[0][0]:.2f} s, later",
    end=" ",
)
print(
    f"{1e3 * sorted(seconds[0])[10]:.0f} ms (AdamW in 32 bits {1e3 * sorted(seconds[1])[10]:.0f} ms); difference",
    end=" ",
)
error, change = (flat - reference).norm(), (reference - first).norm()
print(f"{(error / change).item():.2%} of the change, {(error / reference.norm()).item():.1e} of the weights")
