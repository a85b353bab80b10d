"""Teacher, student, critic and discriminator, out of one image model, in one place."""

import copy
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.diffusion.denoiser import Denoiser, Guided
from fewstep.errors import UserError
from fewstep.models.image_model import ImageModel
from fewstep.networks.blocks import checkpoint_blocks
from fewstep.networks.discriminator import Discriminator
from fewstep.networks.features import features
from fewstep.networks.precision import trainable
from fewstep.networks.stop_embedding import condition_on_stop


@dataclass
class Roles:
    """Three plain modules and the head; nothing may assume that they own their weights alone."""

    teacher: Denoiser | Guided
    student: Denoiser
    critic: Denoiser
    discriminator: Discriminator
    feature_layer: str


def make_roles(
    model: ImageModel,
    guidance_scale: float = 1.0,
    feature_layer: str | None = None,
    num_stops: int = 0,
    dtype: torch.dtype = torch.float32,
    checkpointing: Literal["none", "blocks"] = "none",
) -> Roles:
    """Freezes the model as teacher (guided, unless the scale is 1) and copies it as student and critic.

    All run in evaluation mode, i.e. without dropout, as the official system does. `feature_layer` names the critic's
    layer that the discriminator reads; by default the adapter's bottleneck. With `num_stops` the critic is conditioned
    on the student's timestep, of so many. In bfloat16 the teacher is held in it, and the copies only compute in it; the
    head stays in float32. `checkpointing` of `blocks` saves memory. Raises UserError where the model has no null class,
    or no such layer.
    """
    # Before the teacher is cast: student and critic are trained in float32 weights.
    copies = (copy.deepcopy(model.denoiser).eval().requires_grad_(True) for _ in range(2))
    student, critic = (trainable(denoiser, dtype) for denoiser in copies)
    base = model.denoiser.eval().requires_grad_(False).to(dtype)
    layer = feature_layer or model.bottleneck
    teacher: Denoiser | Guided = base
    if guidance_scale != 1:
        null_condition = model.null_condition
        if null_condition is None:
            raise UserError(
                "guidance_scale: the teacher has no null class; teach one with null_class and class_dropout, or set 1"
            )
        # the critic has no guidance: it tracks what the student gives
        teacher = Guided(base, guidance_scale, null_condition)
    # The critic alone: teacher and student know the timestep as it is.
    if num_stops:
        condition_on_stop(critic.network, model.family.time_layer, num_stops)
    # The teacher has no graph, so nothing of it is kept anyway.
    if checkpointing == "blocks":
        checkpoint_blocks(student.network)
        checkpoint_blocks(critic.network)
    return Roles(teacher, student, critic, _make_discriminator(model, layer), layer)


def _make_discriminator(model: ImageModel, layer: str) -> Discriminator:
    """A head for what the layer gives, found out by one pass."""
    # of one sample: only the shape of its features counts
    x_t, t = torch.zeros(1, *model.shape, device=model.device), torch.ones(1, device=model.device)
    feature = None
    if layer in dict(model.denoiser.network.named_modules()):
        with torch.no_grad(), suppress(IndexError):  # a layer that the forward pass does not call
            feature = features(model.denoiser, layer, x_t, t, model.conditions(range(1)))
    if feature is None or feature.ndim != 4:
        raise UserError(f"gan.feature_layer: no layer {layer!r} gives (B, C, H, W) features; try {model.bottleneck!r}")
    return Discriminator(*feature.shape[1:]).to(model.device)
