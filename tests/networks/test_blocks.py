"""Activation checkpointing put on from outside: the same gradients, far less kept."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.blocks import blocks, checkpoint_blocks
from fewstep.networks.features import features, x0_and_features
from fewstep.networks.settings import LoRASettings
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.roles import make_roles
from steps import in_parts
from tiny_pipelines import TINY

LORA = LoRASettings(rank=4, alpha=4.0)
X_T = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = (X_T, torch.tensor([20, 400, 999]))


@pytest.fixture
def model(tmp_path: Path) -> LatentModel:
    return LatentModel(TINY["sdxl"](tmp_path / "vocabularies"))


def kept_bytes(function) -> int:
    """What autograd keeps for the backward pass."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        function()
    return sum(kept)


def test_blocks_are_the_innermost_of_the_lists(model: LatentModel) -> None:
    kinds = [type(block).__name__ for block in blocks(model.denoiser.network)]
    assert set(kinds) == {"ResnetBlock2D", "BasicTransformerBlock"}
    counted = [type(module).__name__ for module in model.denoiser.network.modules()]
    assert all(kinds.count(kind) == counted.count(kind) for kind in set(kinds))


@pytest.mark.parametrize("layer", ["unet.mid_block", "unet.down_blocks.1", "unet.mid_block.resnets.0"])
@pytest.mark.parametrize("call", ["x0", "features", "both", "features only"])
def test_values_and_gradients_are_the_same(model: LatentModel, layer: str, call: str) -> None:
    condition = model.text_condition(["a cat", "a mat", "a hat"])

    def outputs(denoiser, x_t: Tensor) -> list[Tensor]:
        if call == "x0":
            return [denoiser(x_t, BATCH[1], condition)]
        if call == "features":
            return [features(denoiser, layer, x_t, BATCH[1], condition)]
        only = call == "features only"
        return [*x0_and_features(denoiser, layer, x_t, BATCH[1], condition, features_only_grad=only)]

    found = []
    for checkpointed in (False, True):
        denoiser, x_t = copy.deepcopy(model.denoiser).requires_grad_(True), X_T.clone().requires_grad_()
        if checkpointed:
            checkpoint_blocks(denoiser.network)
        values = outputs(denoiser, x_t)
        sum(value.square().sum() for value in values if value.requires_grad).backward()
        gradients = [p.grad if p.grad is not None else torch.zeros(()) for p in denoiser.parameters()]
        found.append([*values, x_t.grad, *gradients])
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() <= 1e-6 * plain.norm()


def test_activations_inside_the_blocks_are_not_kept(model: LatentModel) -> None:
    condition, denoiser = model.text_condition(["a cat"] * 3), copy.deepcopy(model.denoiser).requires_grad_(True)
    plain = kept_bytes(lambda: denoiser(*BATCH, condition))
    checkpoint_blocks(denoiser.network)
    assert kept_bytes(lambda: denoiser(*BATCH, condition)) < plain / 2
    copied = copy.deepcopy(denoiser)  # a copy computes with weights of its own
    nn.init.zeros_(copied.network.unet.mid_block.resnets[0].conv1.weight)
    assert not torch.equal(copied(*BATCH, condition), denoiser(*BATCH, condition))


@pytest.mark.parametrize(
    ("dtype", "independent", "parts", "lora"),
    [
        (torch.float32, False, 1, None),
        pytest.param(torch.float32, True, 2, LORA, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, 2, None, marks=pytest.mark.slow),
        (torch.bfloat16, False, 2, LORA),
    ],
)
def test_a_whole_step_with_gan_stop_embedding_and_parts_is_the_same(
    tmp_path: Path, dtype: torch.dtype, independent: bool, parts: int, lora: LoRASettings | None
) -> None:
    settings = DMD2Settings(
        student_every=2,
        student={"num_timesteps": 2, "optimizer": {"lr": 1e-3}},
        critic={"condition_on_stop": True, "samples": "cycle", "optimizer": {"lr": 1e-3}},
        gan={"student_weight": 0.1, "critic_weight": 0.1, "independent_noise": independent},
    )
    batch = {"latent": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), "caption": list("abcd")}
    found = []
    for checkpointing in ("none", "gan", "blocks"):
        settings = settings.model_copy(update={"checkpointing": checkpointing})
        torch.manual_seed(0)
        model = LatentModel(TINY["sdxl"](tmp_path / checkpointing))
        model.encode_in(dtype)
        roles = make_roles(model, 8.0, num_stops=2, dtype=dtype, checkpointing=checkpointing, lora=lora)
        method = DMD2(settings, model, roles, 10, 4, seed=0)
        metrics = [method.step(in_parts(batch, 4, parts), step) for step in range(2)]
        numbers = [value.float() for line in metrics for value in line.values()]
        found.append([*numbers, *roles.student.parameters(), *roles.critic.parameters()])
    plain, *others = found
    for ours in others:
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("independent", [False, True])
def test_gan_alone_saves_in_the_students_turn_and_leaves_the_critics_as_it_is(
    model: LatentModel, independent: bool
) -> None:
    gan = {"student_weight": 0.1, "critic_weight": 0.1, "independent_noise": independent}
    batch = {"latent": X_T, "caption": list("abc")}
    kept: dict[str, list[int]] = {}
    for checkpointing in ("none", "gan", "blocks"):
        roles = make_roles(copy.copy(model), checkpointing=checkpointing)
        settings = DMD2Settings(student_every=2, student={"num_timesteps": 2}, gan=gan, checkpointing=checkpointing)
        method = DMD2(settings, model, roles, 10, 3, seed=0)
        kept[checkpointing] = [kept_bytes(partial(method.step, in_parts(batch, 3, 1), step)) for step in (0, 1)]
        assert all(
            ("forward" in block.__dict__) == (checkpointing == "blocks") for block in blocks(roles.critic.network)
        )
    (none, nones_critic), (gan_alone, gans_critic), (blocks_, _) = kept.values()
    assert blocks_ < gan_alone < none
    assert gans_critic == nones_critic


@pytest.mark.parametrize("checkpointing", ["gan", "blocks"])
def test_a_network_without_blocks_is_refused(
    tiny_model: PixelModel, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.networks.blocks.LISTS", {"layers"})
    with pytest.raises(UserError, match="checkpointing: the network has no blocks, in lists called layers; set none"):
        make_roles(tiny_model, checkpointing=checkpointing)
