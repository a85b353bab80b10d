"""Seconds of `fewstep extract` for every shape of SDXL's layers, and for all of them.

    python benchmarks/extract_seconds.py

Changes of weights are random, of a falling spectrum; times are of one thread, with and without second moments.
"""

import time
from collections import Counter

import torch
from diffusers import UNet2DConditionModel

from fewstep.export.extraction import FULL, all_layers, best_low_rank
from fewstep.models.loading.outlines import STANDARDS


def change(rows: int, columns: int) -> torch.Tensor:
    """Singular values like 1 / sqrt(k)."""
    inner = min(rows, columns)
    scale = torch.arange(1, inner + 1).float() ** -0.5
    return (torch.randn(rows, inner) * scale) @ torch.randn(inner, columns) / columns**0.5


def seconds(rows: int, columns: int, weighted: bool) -> float:
    moment = None
    if weighted:
        x = torch.randn(columns + 8, columns)
        moment = x.T @ x if columns <= FULL else x.square().sum(0)
    d = change(rows, columns)
    began = time.process_time()
    best_low_rank(d, 64, moment)
    return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        network = UNet2DConditionModel(**STANDARDS["sdxl"]["network"])
    shapes = Counter(tuple(network.get_submodule(name).weight.flatten(1).shape) for name in all_layers(network))
    seconds(64, 64, True)
    print("| out x inputs | layers | plain, s | weighted, s |\n|---|--:|--:|--:|")
    total = [0.0, 0.0]
    for (rows, columns), count in sorted(shapes.items(), key=lambda each: each[0][0] * each[0][1]):
        each = [seconds(rows, columns, weighted) for weighted in (False, True)]
        total = [whole + count * one for whole, one in zip(total, each, strict=True)]
        print(f"| {rows} x {columns} | {count} | {each[0]:.2f} | {each[1]:.2f} |", flush=True)
    print(f"| all | {sum(shapes.values())} | {total[0]:.0f} | {total[1]:.0f} |")


if __name__ == "__main__":
    main()
