"""What one cycle of SDXL distillation costs, in forwards of its UNet at 1024x1024: counted, no weights, no GPU.

    python benchmarks/sdxl_cycle_flops.py [KEY=VALUE ...]

The real SDXL UNet runs through `DMD2.step` on the meta device (shapes only) with torch's FLOP counter: a cycle is one
student and five critic updates, GAN, guidance, four timesteps; a rollout's stop is the average over the four. The
reference needs 46.4 with all passes in bf16 (the count in the notes on the official system). Without settings it
counts all `ROWS`, else the recipe with those settings, and with shared noise unless they say otherwise.
"""

import sys

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.parameterizations import eps
from fewstep.diffusion.schedules import VP
from fewstep.models.loading.outlines import STANDARDS
from fewstep.networks.families import FAMILIES
from fewstep.networks.families.stable_diffusion import TextUNet
from fewstep.recipes.loading import load_recipe
from fewstep.seeding import Draws
from fewstep.training import dmd2, method
from fewstep.training.dmd2 import DMD2
from fewstep.training.roles import make_roles

CYCLE, HALF, FROZEN = "critic.samples=cycle", "gan.real_share=0.5", "gan.features=frozen"
FULL: dict[str, list[str]] = {
    "as published: the GAN's noise apart": ["gan.independent_noise=true"],
    "noise shared, a rollout per step": [],
    "`cycle`": [CYCLE],
    "`cycle`, half the reals": [CYCLE, HALF],
    "`cycle`, frozen": [CYCLE, FROZEN],
    "`cycle`, half the reals, frozen": [CYCLE, HALF, FROZEN],
    "`cycle`, `checkpointing: gan`": [CYCLE, "checkpointing=gan"],
    "`cycle`, `checkpointing: blocks`": [CYCLE, "checkpointing=blocks"],
}
LORA = [("official", 64), ("official", 16), ("lean", 64), ("lean", 16)]
ROWS = FULL | {
    f"LoRA, {targets}, rank {rank}; {name}": [f"lora.targets={targets}", f"lora.rank={rank}", *overrides]
    for targets, rank in LORA
    for name, overrides in list(FULL.items())[1:5]
}
flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]  # which torch leaves out
SAMPLES = 2  # so that one of them can bring a real


class FakeSDXL:
    """What DMD2 asks of an image model, without autoencoder and text encoders."""

    shape, device, timesteps = (4, 128, 128), torch.device("meta"), None
    bottleneck, family = "unet.mid_block", FAMILIES["StableDiffusionXLPipeline"]

    def __init__(self) -> None:
        adapter: nn.Module = TextUNet(UNet2DConditionModel(**STANDARDS["sdxl"]["network"]))
        self.denoiser = Denoiser(adapter, VP.scaled_linear(), eps)
        self.null_condition = {"text": torch.zeros(1, 77, 2048), "pooled": torch.zeros(1, 1280)}

    def conditions(self, indices: range) -> Condition:
        num = len(indices)
        return {
            "text": torch.zeros(num, 77, 2048),
            "pooled": torch.zeros(num, 1280),
            "time_ids": torch.zeros(num, 6),
        }

    def encode_condition(self, batch: dict) -> Condition:
        return self.conditions(range(len(batch["latent"])))

    def draw_condition(self, real: Condition, draws: Draws) -> Condition:
        return dict(real)

    def encode_x0(self, batch: dict, draws: Draws) -> Tensor:
        return batch["latent"]


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def forward() -> int:
    """FLOPs of one forward pass of a sample, without low-rank weights."""
    model = FakeSDXL()
    x, t, condition = torch.zeros(1, *model.shape), torch.zeros(1).long(), model.conditions(range(1))
    with torch.no_grad():
        return count(lambda: model.denoiser(x, t, condition))


def turns(overrides: list[str]) -> tuple[float, float, int]:
    """FLOPs a sample of the student's turn and of the critic's, and how many critic updates a cycle has."""
    # the same four timesteps, without a look at them
    always = [f"batch_size={SAMPLES}", "student.timesteps=null", "gan.independent_noise=false"]
    recipe = load_recipe("sdxl-4step", [*always, *overrides])
    model = FakeSDXL()
    roles = make_roles(model, recipe.guidance_scale, checkpointing=recipe.checkpointing, lora=recipe.lora)
    training = DMD2(recipe, model, roles, recipe.num_steps, SAMPLES, recipe.seed)
    for optimizer in (training.student_optimizer, training.critic_optimizer):  # which have no products
        optimizer.step = lambda finite: (torch.zeros(()), torch.zeros(()))
    parts = [(range(SAMPLES), {"latent": torch.zeros(SAMPLES, *model.shape)})]
    costs = []
    # As one more stop is one more call, the mean of these is that of all four; a cycle has all stops anyway.
    stops = (0, 3) if recipe.critic.samples == "step" else (0,)
    for stop in stops:
        training.draw_stop = lambda step, stop=stop: stop
        costs += [count(lambda step=step: training.step(parts, step)) / SAMPLES for step in (0, 1)]
    return sum(costs[::2]) / len(stops), sum(costs[1::2]) / len(stops), recipe.student_every


def main() -> None:
    # There are no generators on the meta device, and modules can't be moved away from it, nor need be.
    Draws._mine = lambda self, draw, before, shape: draw((*before, len(self.rows), *shape), device="meta")
    nn.Module.to = lambda self, *arguments: self
    dmd2.generator = lambda *arguments: torch.Generator()
    method.student_timesteps = lambda settings, student: torch.zeros(settings.num_timesteps)  # unseen
    rows = {" ".join(sys.argv[1:]): sys.argv[1:]} if sys.argv[1:] else ROWS
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        one = forward()
        print(f"one forward, one sample of 1024x1024: {one / 1e12:.2f} TFLOP")
        print("| | student's turn | critic's turn | one cycle |\n|---|--:|--:|--:|")
        for name, overrides in rows.items():
            student, critic, updates = turns(overrides)
            cycle = student + (updates - 1) * critic
            print(f"| {name} | {student / one:.2f} | {critic / one:.2f} | **{cycle / one:.1f}** |", flush=True)


if __name__ == "__main__":
    main()
