"""CPU seconds of a cycle of DMD2 (1 student, 5 critic updates) of a small SDXL, LoRA against full fine-tuning.

PYTHONPATH=src python benchmarks/lora_seconds.py [ROUNDS]

One thread, float32, batch 1, guidance, GAN, backward simulation of 4 steps, condition_on_stop; the variants take turns
cycle by cycle in one process, and every round draws the same stops for all. Medians of CPU time, and of the ratio to
full fine-tuning in the same round.
"""

import random
import statistics
import sys
import time

import torch
from diffusers import AutoencoderKL

from fewstep.embedded.settings import TextModelConfig
from fewstep.embedded.small_models import build_pipeline
from fewstep.models.latent_model import LatentModel
from fewstep.networks.settings import LoRASettings
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.roles import make_roles

SMALL = {"block_out_channels": [96, 192, 384], "layers_per_block": 2, "transformer_layers": 1}  # latents of 32x32
SMALL |= {"text_width": 64, "num_tokens": 77}
SETTINGS = {
    "student_every": 5,
    "student": {"num_timesteps": 4, "timesteps": [999, 749, 499, 249], "ema_decay": 0},
    "critic": {"condition_on_stop": True},
    "gan": {"student_weight": 5e-3, "critic_weight": 1e-2},
}
VARIANTS = {
    "full": (None, "step"),
    "lean r16": ({"rank": 16, "alpha": 16, "targets": "lean"}, "step"),
    "official r16": ({"rank": 16, "alpha": 16, "targets": "official"}, "step"),
    "lean r64": ({"rank": 64, "alpha": 64, "targets": "lean"}, "step"),
    "lean r16, cycle": ({"rank": 16, "alpha": 16, "targets": "lean"}, "cycle"),
}


def make(lora, samples):
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 64}
    model = LatentModel(build_pipeline(TextModelConfig(**SMALL), AutoencoderKL(**kinds, **sizes), ["a cat"]))
    critic = SETTINGS["critic"] | {"samples": samples}
    roles = make_roles(model, 8.0, num_stops=4, lora=LoRASettings(**lora) if lora else None)
    return DMD2(DMD2Settings(**SETTINGS | {"critic": critic}), model, roles, 1000, 1, seed=0)


def main(rounds):
    torch.set_num_threads(1)
    methods = {name: make(*how) for name, how in VARIANTS.items()}
    size = sum(p.numel() for p in methods["full"].student.parameters()) / 1e6
    text = methods["full"].model.text_condition(["a cat"])
    batch = {"latent": torch.randn(1, *methods["full"].model.shape), "text": text["text"], "pooled": text["pooled"]}
    for method in methods.values():
        method.step([(range(1), batch)], 0)  # warms up
    seconds = {name: [] for name in methods}
    print(f"{size:.1f} M parameters, torch {torch.__version__}")
    for each in range(1, rounds + 1):
        for name in random.Random(each).sample(list(methods), len(methods)):
            start = time.process_time()
            for step in range(5 * each, 5 * each + 5):
                methods[name].step([(range(1), batch)], step)
            seconds[name].append(time.process_time() - start)
        table(methods, seconds)


def table(methods, seconds):
    """Prints what there is so far."""
    print(f"\n{len(seconds['full'])} rounds\n\n| cycle | trained (M) | median CPU s | of full, median | min to max |")
    print("|---|--:|--:|--:|--:|")
    for name, found in seconds.items():
        ratios = [ours / full for ours, full in zip(found, seconds["full"], strict=True)]
        trained = sum(p.numel() for p in methods[name].student.parameters() if p.requires_grad) / 1e6
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"| {name} | {trained:.2f} | {statistics.median(found):.2f} | {statistics.median(ratios):.3f} | {spread} |"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
