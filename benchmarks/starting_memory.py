"""Main memory of each of two ranks that share weights, until the first step: of a narrow SDXL, over one network's size.

python benchmarks/starting_memory.py FOLDER bfloat16 float16: the recipe's precision, and what the file is in
"""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from diffusers import UNet2DConditionModel

from fewstep.commands import distill as distilling
from fewstep.commands import runs
from fewstep.commands.distill import distill
from fewstep.recipes.loading import load_recipe
from image_sets import picture, write_captioned
from ranks import in_ranks
from real_sizes import XL
from tiny_pipelines import TINY

STATUS = Path("/proc/self/status")
NARROW = {"block_out_channels": (64, 128, 448), "attention_head_dim": (2, 4, 7), "sample_size": 16}
NARROW |= {"cross_attention_dim": 32, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 12 + 6 * 8}


def megabytes(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3


def measured(folder: Path, precision: str) -> dict[str, float]:
    peaks = [megabytes("RssAnon")]

    def watch() -> None:
        while True:
            peaks.append(megabytes("RssAnon"))
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    found: dict[str, float] = {}
    before, divided = peaks[0], distilling.divide

    def dividing(*given: Any) -> Any:
        found["to divide"] = max(peaks) - before  # all that is not on a GPU, where there is one
        return divided(*given)

    distilling.divide = dividing

    def started(job: Any, *_: Any) -> None:
        found["to the first step"], found["kept"] = max(peaks) - before, megabytes("RssAnon") - before
        found["weights"] = 4e-6 * sum(p.numel() for p in job.method.student.parameters())

    runs.start_run = started
    settings = [f"teacher={folder / 'model'}", f"data.source={folder / 'pictures'}", "parallel.shard=full"]
    settings += ["batch_size=4", "device=cpu", f"precision={precision}", "student.ema_decay=0.999"]
    distill(load_recipe("sdxl-4step", settings), folder / "run")
    return found


def main(folder: Path, precision: str = "bfloat16", dtype: str = "float32") -> None:
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    pipeline = TINY["sdxl"](folder / "scratch")
    pipeline.unet = UNet2DConditionModel(**XL | NARROW)
    pipeline.to(getattr(torch, dtype)).save_pretrained(folder / "model")
    write_captioned(folder / "pictures", [picture(index, 32, 32) for index in range(8)], ["a cat", "a dog"] * 4)
    del pipeline
    (folder / "out").mkdir()
    for number, found in enumerate(in_ranks(2, folder / "out", measured, folder, precision)):
        weights = found.pop("weights")
        told = ", ".join(f"{name} {value:.0f} MB ({value / weights:.2f})" for name, value in found.items())
        print(f"{dtype} file, {precision}, rank {number}: {told}, of a network's {weights:.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
