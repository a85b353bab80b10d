"""What one cycle of SDXL distillation costs, in forwards of its UNet at 1024x1024: counted, no weights, no GPU.

    python benchmarks/sdxl_cycle_flops.py [KEY=VALUE ...]

The real SDXL UNet runs through `DMD2.step` under fake tensors (shapes only) with torch's FLOP counter: a cycle is one
student and five critic updates, GAN, guidance, four timesteps; a rollout's stop is the average over the four. The
reference needs 46.4 with all passes in bf16 (the count in the notes on the official system).
"""

import sys

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.parameterizations import eps
from fewstep.diffusion.schedules import VP
from fewstep.networks.families.stable_diffusion import TextUNet
from fewstep.recipes.loading import load_recipe
from fewstep.seeding import Draws
from fewstep.training.dmd2 import DMD2
from fewstep.training.roles import make_roles

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class FakeSDXL:
    """What DMD2 asks of an image model, without autoencoder and text encoders."""

    shape, device, timesteps = (4, 128, 128), torch.device("cpu"), None
    bottleneck = "unet.mid_block"

    def __init__(self) -> None:
        network: nn.Module = TextUNet(UNet2DConditionModel(**SDXL))
        self.denoiser = Denoiser(network, VP.scaled_linear(), eps)
        self.null_condition = {"text": torch.zeros(1, 77, 2048), "pooled": torch.zeros(1, 1280)}

    def conditions(self, indices: range) -> Condition:
        num = len(indices)
        return {
            "text": torch.zeros(num, 77, 2048),
            "pooled": torch.zeros(num, 1280),
            "time_ids": torch.zeros(num, 6),
        }

    def encode_condition(self, batch: dict) -> Condition:
        return self.conditions(range(1))

    def draw_condition(self, real: Condition, draws: Draws) -> Condition:
        return dict(real)

    def encode_x0(self, batch: dict, draws: Draws) -> Tensor:
        return torch.zeros(1, *self.shape)


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def main() -> None:
    # the same four timesteps, without a look at them
    recipe = load_recipe("sdxl-4step", ["batch_size=1", "student.timesteps=null", *sys.argv[1:]])
    nn.Module.to = lambda self, *arguments: self  # fake tensors can't be moved, and need not be
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        model = FakeSDXL()
        roles = make_roles(model, recipe.guidance_scale)
        method = DMD2(recipe, model, roles, recipe.num_steps, 1, recipe.seed)
        x, t, condition = torch.zeros(1, *model.shape), torch.zeros(1).long(), model.conditions(range(1))
        with torch.no_grad():
            forward = count(lambda: roles.critic(x, t, condition))
        turns = {}
        for name, step in (("student's turn", 0), ("critic's turn", 1)):
            costs = []
            for stop in range(4):
                method.draw_stop = lambda step, stop=stop: stop
                costs.append(count(lambda step=step: method.step([(range(1), {})], step)) / forward)
            turns[name] = sum(costs) / 4
    cycle = turns["student's turn"] + (recipe.student_every - 1) * turns["critic's turn"]
    print(f"one forward of SDXL's UNet, one sample of 1024x1024: {forward / 1e12:.2f} TFLOP")
    for name, cost in turns.items():
        print(f"{name}: {cost:.2f} forwards")
    print(
        f"one cycle (1 student, {recipe.student_every} critic updates): {cycle:.1f} forwards (reference 46.4, goal 40)"
    )


if __name__ == "__main__":
    main()
