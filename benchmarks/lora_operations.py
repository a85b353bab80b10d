"""Operations of a forward and a backward pass of SDXL's UNet at real size with and without LoRA, views left out.

PYTHONPATH=src python benchmarks/lora_operations.py
"""

from collections import Counter

import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.diffusion.denoiser import Denoiser
from fewstep.models.loading.outlines import STANDARDS
from fewstep.networks.families.stable_diffusion import TextUNet
from fewstep.networks.lora_layers import lora_of, with_lora
from fewstep.networks.settings import LoRASettings


class Count(TorchDispatchMode):
    """Counts what is computed: no views, no metadata."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in ("aten::detach", "aten::empty", "aten::_unsafe_view"):
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def passes(denoiser):
    """Operations of the forward pass without gradient, and of forward and backward."""
    x = torch.zeros(1, 4, 128, 128, device="meta", dtype=torch.bfloat16)
    t = torch.zeros(1, device="meta")
    condition = {"text": torch.zeros(1, 77, 2048, device="meta"), "pooled": torch.zeros(1, 1280, device="meta")}
    condition["time_ids"] = torch.zeros(1, 6, device="meta")
    with torch.no_grad():  # the copies of the low-rank weights are written here, once per update
        denoiser.network(x, t, condition)
        with Count() as forward:
            denoiser.network(x, t, condition)
    with Count() as both:
        output = denoiser.network(x, t, condition)
        output.backward(torch.zeros_like(output))
    return forward.found, both.found


def main():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**STANDARDS["sdxl"]["network"]).to(torch.bfloat16)
    plain = Denoiser(TextUNet(unet), None, None)
    full_forward, full_both = passes(plain)
    base = plain.requires_grad_(False)
    rows = {"without": (full_forward, full_both, 0, 0)}
    for targets in ("lean", "official"):
        tree = with_lora(base, LoRASettings(rank=64, targets=targets))
        lora = lora_of(tree.network.unet)
        size = sum(each.down.numel() + each.up.numel() for each in lora.values())
        rows[targets] = (*passes(tree), len(lora), size)
    print("| SDXL, bfloat16, rank 64 | modules | weights (M) | forward | of without | with backward | of without |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    first = [rows["without"][i].total() for i in (0, 1)]
    for name, (forward, both, modules, size) in rows.items():
        f, b = forward.total(), both.total()
        print(f"| {name} | {modules} | {size / 1e6:.2f} | {f:,} | {f / first[0]:.3f} | {b:,} | {b / first[1]:.3f} |")


if __name__ == "__main__":
    main()
