"""Operations and seconds of passes of a small SDXL in bfloat16: weights cast in every pass, and copies of them.

PYTHONPATH=src python benchmarks/copies.py [DEVICE] [ROUNDS]

98 M parameters, latents of 16x16, batch 1; both take turns pass by pass, medians. On a CPU one thread and its time; on
CUDA the time of the host that starts a pass, and that of the device. Views are not counted as operations.
"""

import statistics
import sys
import time
from collections import Counter

import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.parameterizations import eps
from fewstep.diffusion.schedules import VP
from fewstep.networks.families.stable_diffusion import TextUNet
from fewstep.networks.precision import AutocastDenoiser, trainable

SIZES = {"block_out_channels": (64, 128, 256), "attention_head_dim": (2, 4, 8), "layers_per_block": 2}
SIZES |= {"transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 256, "use_linear_projection": True}
DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
VIEWS = {"t", "detach", "view", "transpose", "expand", "_unsafe_view", "unsqueeze", "split", "slice", "alias"}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def make(device):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=16, down_block_types=DOWN, up_block_types=UP, **SIZES).eval()
    return Denoiser(TextUNet(unet).to(device), VP(torch.linspace(0.99, 0.01, 1000)), eps)


def main(device, rounds):
    torch.set_num_threads(1)
    plain, held = make(device), trainable(make(device), torch.bfloat16)
    denoisers = {"cast": AutocastDenoiser(plain.network, plain.schedule, eps), "copies": held}
    given = torch.randn(1, 4, 16, 16, device=device), torch.tensor([500.0], device=device)
    condition = {"text": torch.randn(1, 77, 256, device=device)}
    cuda = device != "cpu"

    def one(denoiser, grad):
        with torch.set_grad_enabled(grad):
            x0 = denoiser(*given, condition)
        if grad:
            x0.square().sum().backward()
            denoiser.zero_grad()

    def timed(denoiser, grad):
        start = time.perf_counter() if cuda else time.process_time()
        one(denoiser, grad)
        if not cuda:
            return [time.process_time() - start]
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return [host, time.perf_counter() - start]

    print("| a pass | weights | operations | of them casts | ms" + (" of the host | ms |" if cuda else " |"))
    print("|---|---|--:|--:|--:|" + "--:|" * cuda)
    for grad in (False, True):
        for denoiser in denoisers.values():
            one(denoiser, grad)
        found = {name: [] for name in denoisers}
        for _ in range(rounds):
            for name, denoiser in denoisers.items():
                found[name].append(timed(denoiser, grad))
        for name, denoiser in denoisers.items():
            with Operations() as operations:
                one(denoiser, grad)
            num = sum(count for each, count in operations.counted.items() if each not in VIEWS)
            ms = " | ".join(f"{1000 * statistics.median(each):.1f}" for each in zip(*found[name], strict=True))
            kind = "forward and backward" if grad else "forward, no gradient"
            print(f"| {kind} | {name} | {num:,} | {operations.counted['_to_copy']:,} | {ms} |")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu", int(sys.argv[2]) if len(sys.argv) > 2 else 25)
