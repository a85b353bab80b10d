"""Size, seconds and rounding of LoRA files of SDXL at real size, rank 64, the official set of layers, without a base.

PYTHONPATH=src:benchmarks python benchmarks/lora_files.py
"""

import tempfile
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from lora_operations import SDXL

from fewstep.export.lora import write_lora
from fewstep.models.lora_files import open_lora
from fewstep.networks.families import FAMILIES
from fewstep.networks.lora import LowRank, merged
from fewstep.networks.lora_layers import find_targets

LAYOUTS = (
    ("kohya", torch.float16),
    ("kohya", torch.float32),
    ("diffusers", torch.float16),
    ("diffusers", torch.float32),
)


def mean(numbers: list[torch.Tensor]) -> float:
    return 100 * float(sum(numbers)) / len(numbers)


def main(scale: float, rank: int = 64, alpha: float = 8.0) -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel(**SDXL)
    torch.manual_seed(0)
    lora = {}
    for name in find_targets(network, "official"):
        weight = network.get_submodule(name).weight
        down = (torch.rand(rank, *weight.shape[1:]) * 2 - 1) / weight[0].numel() ** 0.5  # as it begins
        up = scale * torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2))
        lora[name] = LowRank(down, up, alpha)
    some = {name: lora[name].delta() for name in list(lora)[::40]}
    for layout, dtype in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            path, begun = Path(folder) / "x.safetensors", time.perf_counter()
            write_lora(path, lora, network, "unet", {}, layout, dtype)
            written = time.perf_counter()
            found = open_lora(path, network, FAMILIES["StableDiffusionXLPipeline"]).lora
            read, size = time.perf_counter() - written, path.stat().st_size / 1e6
        error = mean([(found[name].delta() - delta).norm() / delta.norm() for name, delta in some.items()])
        kind = f"{layout} | {dtype}".replace("torch.", "")
        print(f"| {scale:g} | {kind} | {size:.0f} | {written - begun:.1f} | {read:.1f} | {error:.3f} % |")
    for share in (0.003, 0.01, 0.03):
        for dtype in (torch.float16, torch.bfloat16):
            lost = []
            for name, delta in some.items():
                weight = torch.randn(delta.shape) * delta.norm() / delta.numel() ** 0.5 / share
                weight = weight.bfloat16().float()  # on which it was trained
                whole = merged(weight, lora[name]).to(dtype).float()
                lost.append((whole - weight - delta).norm() / delta.norm())
            print(f"merged where it is {100 * share:g} % of W, in {dtype}: wrong by {mean(lost):.1f} %")


if __name__ == "__main__":
    print("| B | layout | dtype | MB | write, s | read, s | error of the change |\n|--:|---|---|--:|--:|--:|--:|")
    for size in (1e-3, 1e-4):
        main(size)
