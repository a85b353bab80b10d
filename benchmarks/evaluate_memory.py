"""Peak memory of `fewstep evaluate` above that of an interpreter with its models, whatever the number of images.

    python benchmarks/evaluate_memory.py small      50,000 images of 64x64, features 2048 wide, references as many
    python benchmarks/evaluate_memory.py large      10,000 images of 1024x1024, features and patches 512 wide

The network that draws is a convolution of the noise, the feature network a random projection of thumbnails: what is
measured is what is held of images, not networks. The reference of the large ones is a folder of as many links to a few
pictures, and a .npz of the same.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import fewstep.commands.evaluate as command
from fewstep.commands.options import Evaluate
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig

SIZES = {"small": (64, 50_000, 2048), "large": (1024, 10_000, 512)}


class Projection(nn.Module):
    """uint8 (B, 3, H, W) -> (B, D), of thumbnails."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 16 * 16, width) / 30)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2] // 16, images.shape[3] // 16
        small = images[:, :, :: max(1, height), :: max(1, width)][:, :, :16, :16]
        return (small.float().flatten(1) / 255) @ self.weight


def memory(name: str) -> int:
    """In bytes, by the kernel: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def cheap(model: PixelModel) -> PixelModel:
    """Draws what its noise is, shrunk, so that sampling costs nothing."""
    model.denoiser.forward = lambda x_t, t, condition: x_t / 200  # type: ignore[method-assign]
    return model


def main(which: str) -> None:
    side, num, width = SIZES[which]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = PixelModelConfig(image_size=side, channels=3, num_classes=0, block_out_channels=[8, 8], norm_num_groups=4)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        model = cheap(PixelModel(config, build_unet(config), [80.0]))
        Path("model").mkdir()
        model.save(Path("model"))
        torch.jit.script(Projection(width).eval()).save("net.pt")
        Path("real").mkdir()
        for index in range(8):
            pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).resize((side, side)).save(f"{index}.bmp")
        for index in range(num):
            os.link(f"{index % 8}.bmp", f"real/{index:05d}.bmp")
        command.images_per_second = lambda *arguments: 1.0
        command.open_averages = lambda *arguments: {"": model}
        torch.jit.load("net.pt")(torch.zeros(2, 3, side, side, dtype=torch.uint8))  # what libraries take at first
        before = memory("VmRSS")
        for name, more in (("folder", {"data": "real", "statistics": Path("real.npz")}), ("npz", {"data": "real.npz"})):
            start = time.perf_counter()
            given = Evaluate(runs=["model"], out=Path(name), features="net.pt", num_samples=num, device="cpu", **more)
            command.evaluate(given)
            seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
            print(f"{which} against {name}: {num:,} of {side}x{side}, {peak / 1e9:.2f} GB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "small")
