"""Teacher, student, critic and discriminator, out of one image model, or further from another run's weights."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser, Guided
from fewstep.errors import UserError
from fewstep.models.image_model import LORA, ImageModel, read_description
from fewstep.networks.blocks import check_blocks, checkpoint_blocks
from fewstep.networks.compiling import compile_blocks, uncompile_blocks
from fewstep.networks.discriminator import Discriminator
from fewstep.networks.features import features
from fewstep.networks.lora_layers import settings_of, with_lora
from fewstep.networks.precision import DTYPES, trainable
from fewstep.networks.settings import LoRASettings
from fewstep.networks.stop_embedding import condition_on_stop
from fewstep.runtime.checkpoint import load_state
from fewstep.runtime.ema import trainable_state
from fewstep.runtime.sharding import put

STOP_EMBEDDING = "network.stop_embedding.weight"  # of a critic with `condition_on_stop`, zero at first


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
    checkpointing: Literal["none", "gan", "blocks"] = "none",
    lora: LoRASettings | None = None,
    divided: bool = False,
) -> Roles:
    """Freezes the model as teacher (guided, unless the scale is 1) and copies it as student and critic.

    With `lora` these are low-rank weights beside those of the teacher: three trees of modules over the same tensors.

    All run without dropout, as in the official system. `feature_layer` is the critic's that the discriminator reads, by
    default the bottleneck. With `num_stops` the critic is told the student's timestep, of so many. In bfloat16 the
    teacher is held in it, and the copies only compute in it; the head stays in float32. Those that are to be `divided`
    among ranks are written to only then: until then the copies lie on the teacher's tensors, in float32 all of them.
    Raises UserError where the model has no null class, no such layer, or none that `lora` means.
    """
    copies = [] if lora else [*_copies(model.denoiser, dtype, divided)]  # before the teacher is cast
    base = model.denoiser.eval().requires_grad_(False)
    base = base if divided else base.to(dtype)
    student, critic = (with_lora(base, lora), with_lora(base, lora)) if lora else copies
    layer = feature_layer or model.bottleneck
    null_condition = model.null_condition if guidance_scale != 1 else None
    if guidance_scale != 1 and null_condition is None:
        advice = "teach one with null_class and class_dropout, or set 1"
        raise UserError(f"guidance_scale: the teacher has no null class; {advice}")
    # The teacher alone: the critic tracks what the student gives, without guidance.
    teacher = Guided(base, guidance_scale, null_condition) if null_condition is not None else base
    if num_stops:  # the critic alone: teacher and student know the timestep as it is
        condition_on_stop(critic.network, model.family.time_layer, num_stops)
    if checkpointing == "gan":
        check_blocks(critic.network)  # which are checkpointed where that is wanted
    elif checkpointing == "blocks":  # the teacher has no graph, so nothing of it is kept anyway
        for trained in (student, critic):
            checkpoint_blocks(trained.network)
    return Roles(teacher, student, critic, _make_discriminator(model, layer), layer)


def roles_of(recipe: Any, model: ImageModel, divided: bool = False) -> Roles:
    """As a `distill` recipe has them."""
    return make_roles(
        model,
        recipe.guidance_scale,
        recipe.gan.feature_layer,
        recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0,
        DTYPES[recipe.precision],
        recipe.checkpointing,
        recipe.lora,
        divided,
    )


def _copies(denoiser: Denoiser, dtype: torch.dtype, divided: bool) -> Iterator[Denoiser]:
    """Student and critic, which are trained in float32 weights."""
    for _ in range(2):
        same = {id(p): nn.Parameter(p.detach()) for p in denoiser.parameters()} if divided else {}
        yield trainable(copy.deepcopy(denoiser, same).eval().requires_grad_(True), dtype)


def _make_discriminator(model: ImageModel, layer: str) -> Discriminator:
    """A head for what the layer gives, found out by one pass of one sample on weights without memory."""
    bare = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.denoiser.parameters()}
    denoiser, condition = copy.deepcopy(model.denoiser, bare).to("meta"), model.conditions(range(1))
    x_t, t, feature = torch.zeros(1, *model.shape, device="meta"), torch.ones(1, device="meta"), None
    if layer in dict(denoiser.network.named_modules()):
        with torch.no_grad(), suppress(IndexError):  # a layer that the forward pass does not call
            given = {name: value.to("meta") for name, value in condition.items()}
            feature = features(denoiser, layer, x_t, t, given)
    if feature is None or feature.ndim != 4:
        raise UserError(f"gan.feature_layer: no layer {layer!r} gives (B, C, H, W) features; try {model.bottleneck!r}")
    return Discriminator(*feature.shape[1:]).to(model.device)


def compile_roles(method: Any) -> int:
    """Compiles the blocks of every network that a method has, or `Roles`, in place; gives how many blocks.

    Behind all that is put on the networks, and before any pass that counts. Raises UserError where one has no blocks.
    """
    layer = getattr(method, "feature_layer", None)
    hooked = method.critic.network.get_submodule(layer) if layer else None
    return sum(compile_blocks(network, hooked) for network in _networks_of(method))


def uncompile_roles(method: Any) -> None:
    """Undoes `compile_roles`."""
    for network in _networks_of(method):
        uncompile_blocks(network)


def _networks_of(method: Any) -> Iterator[nn.Module]:
    """Of a distillation, a regression, a teacher's training or an autoencoder's."""
    names = ("teacher", "student", "critic", "denoiser", "vae")
    return (getattr(method, name) for name in names if hasattr(method, name))


def start_from(roles: Roles, checkpoint: Path) -> None:
    """Loads student and critic from a checkpoint of `fewstep distill`; optimizers, averages and head start anew.

    A regression has no critic: it stays the teacher, as published (spec, 2). They are the weights as trained, not the
    averaged ones: the paper has no average, and the critic has tracked this student. A stop embedding that one side
    lacks is left out, or stays zero. Raises UserError if the checkpoint is of something else or another architecture,
    or of whole weights where these roles have low-rank ones, the other way round, or of other ones.
    """
    state = load_state(checkpoint).get("method", {})
    if "student" not in state:
        raise UserError(f"{checkpoint}: holds no student; name a run of `fewstep distill`")
    ours, theirs = settings_of(roles.student), read_description(checkpoint / "model").get(LORA)
    if theirs != (ours and ours.model_dump()):
        told = f"{checkpoint}: trained {_kind(theirs)}, where this recipe trains {_kind(ours and ours.model_dump())}"
        raise UserError(f"{told}; set lora as it has it, or init_from to a run that has it as here")
    for name, module in (("student", roles.student), ("critic", roles.critic)):
        if name in state:
            _load(module, state[name], f"{checkpoint}: its {name}")


def _kind(lora: Any) -> str:
    """What is trained, in words."""
    return f"a LoRA ({', '.join(f'{name} {value}' for name, value in lora.items())})" if lora else "all weights"


def _load(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """All of the weights, but for a stop embedding on one side only."""
    ours = trainable_state(module)
    shared = {name: weights[name] for name in weights.keys() & ours.keys()}
    # A second stage may begin or cease to tell the critic the stop.
    lone = (weights.keys() ^ ours.keys()) - {STOP_EMBEDDING}
    other = sorted(lone) + sorted(name for name, weight in shared.items() if weight.shape != ours[name].shape)
    if other:
        stops = "another number of timesteps" if other == [STOP_EMBEDDING] else "another architecture"
        raise UserError(f"{what} is of {stops} than this recipe's: {other[0]} differs, one of {len(other)}")
    for name, weight in shared.items():
        put(ours[name], weight)  # or this rank's rows of it
