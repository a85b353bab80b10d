"""The interfaces fit what comes next: an SDXL-shaped latent model on the VP schedule goes through DMD2 as it is.

The adapter and the image model here are the test's own, twenty lines; nothing in the package knows of them.
"""

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser, Guided
from fewstep.diffusion.parameterizations import eps
from fewstep.diffusion.sampling import rollout
from fewstep.diffusion.schedules import VP
from fewstep.seeding import Draws
from fewstep.training.dmd2 import DMD2
from fewstep.training.roles import make_roles
from fewstep.training.settings import DMD2Settings
from steps import whole

BATCH = 4


class TextUNet(nn.Module):
    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
        return self.unet(x, t, condition["text"], added_cond_kwargs=added, return_dict=False)[0]


class LatentModel:
    shape, device, timesteps = (4, 8, 8), torch.device("cpu"), None
    bottleneck, time_embedding = "unet.mid_block", "unet.time_embedding"
    null_condition = {"text": torch.zeros(1, 5, 16), "pooled": torch.zeros(1, 8)}  # time_ids are the condition's own

    def __init__(self) -> None:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 + 6 * 8,
        )
        self.denoiser = Denoiser(TextUNet(unet), VP.scaled_linear(), eps)

    def encode_condition(self, batch: dict[str, Tensor]) -> Condition:
        return {key: batch[key] for key in ("text", "pooled", "time_ids")}

    def encode_x0(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        return batch["latent"]

    def draw_condition(self, real: Condition, draws: Draws) -> Condition:
        return real

    def conditions(self, indices: range, asked: None = None) -> Condition:
        return self.encode_condition(captioned_latents(len(indices)))


def captioned_latents(num: int = BATCH, seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    shapes = {"latent": (4, 8, 8), "text": (5, 16), "pooled": (8,)}
    batch = {name: torch.randn(num, *shape, generator=draws) for name, shape in shapes.items()}
    return batch | {"time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(num, 6)}


@pytest.mark.parametrize(("condition_on_stop", "autocast"), [(False, False), (True, False), (True, True)])
def test_four_step_distillation_of_an_sdxl_shaped_teacher_with_guidance(
    condition_on_stop: bool, autocast: bool
) -> None:
    model = LatentModel()
    roles = make_roles(model, guidance_scale=8.0, num_stops=4 * condition_on_stop)
    assert isinstance(roles.teacher, Guided)
    settings = DMD2Settings(
        student_every=2,
        student={"num_timesteps": 4, "optimizer": {"lr": 1e-3}},
        critic={"optimizer": {"lr": 1e-3}, "condition_on_stop": condition_on_stop},
    )
    method = DMD2(settings, model, roles, num_steps=8, batch_size=BATCH, seed=0)
    assert method.timesteps.tolist() == [999, 749, 499, 249]
    before = [p.detach().clone() for p in roles.student.parameters()]
    teacher = [p.detach().clone() for p in roles.teacher.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # precision is put on from outside
        metrics = [method.step(whole(captioned_latents(seed=step), BATCH), step) for step in range(8)]
    assert all(torch.isfinite(value) for line in metrics for value in line.values())
    assert {"dm_loss", "gan_loss", "student_grad_norm"} <= set(metrics[0])
    assert not {"dm_loss", "gan_loss", "student_grad_norm"} & set(metrics[1])
    assert any(not torch.equal(a, b) for a, b in zip(before, roles.student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(teacher, roles.teacher.parameters(), strict=True))


def test_its_rollout_is_the_loop_that_diffusers_runs_with_the_lcm_scheduler() -> None:
    model, noise = LatentModel(), torch.randn(4, BATCH, 4, 8, 8)
    condition = model.encode_condition(captioned_latents())
    scheduler = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    latents = noise[0]
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            predicted = model.denoiser.network(latents, t.expand(BATCH), condition)
            latents, x0 = scheduler.step(predicted, t, latents, return_dict=False)
            if k < 3:  # the scheduler draws its own noise: put ours in its place
                abar = scheduler.alphas_cumprod[scheduler.timesteps[k + 1]]
                latents = abar.sqrt() * x0 + (1 - abar).sqrt() * noise[k + 1]
    timesteps = torch.tensor([999, 749, 499, 249])
    ours = rollout(model.denoiser, noise, timesteps, condition, stop=3)
    assert (ours - x0).norm() <= 1e-5 * x0.norm()
