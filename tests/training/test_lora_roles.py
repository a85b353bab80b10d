"""Student and critic as low-rank weights on one base: as if each had a copy of its own."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Guided
from fewstep.errors import UserError
from fewstep.models.image_model import ImageModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.blocks import checkpoint_blocks
from fewstep.networks.families.edm import build_unet
from fewstep.networks.lora_layers import with_lora
from fewstep.networks.settings import LoRASettings, PixelModelConfig
from fewstep.networks.stop_embedding import condition_on_stop
from fewstep.runtime.ema import trainable_state
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.roles import Roles, make_roles
from low_rank import written_out
from steps import GAN, LR, whole

LORA = LoRASettings(rank=4, alpha=6.0)
BATCH, STOPS = 2, 3
TRAINED = ("student", "critic", "discriminator")
SETTINGS = {"student_every": 2, "student": {"num_timesteps": STOPS, **LR}, "critic": LR | {"condition_on_stop": True}}


@pytest.fixture
def model() -> PixelModel:
    """With self-attention, classes and a null class."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention": [False, True], "attention_head_dim": 8}
    config = PixelModelConfig(num_classes=3, null_class=True, **sizes)
    return PixelModel(config, build_unet(config))


def real_batch(step: int) -> list[tuple[range, dict[str, Tensor]]]:
    drawn = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (BATCH, 1, 8, 8), generator=drawn, dtype=torch.uint8)
    return whole({"image": image, "label": torch.randint(0, 3, (BATCH,), generator=drawn)}, BATCH)


def make_shared(model: ImageModel, checkpointing: str = "none", dtype: torch.dtype = torch.float32) -> Roles:
    """Roles on one base, whose low-rank weights are away from zero, so that A has gradients from the first step on."""
    torch.manual_seed(1)
    roles = make_roles(model, 2.0, None, STOPS, dtype, checkpointing, LORA)
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for role in (roles.student, roles.critic):
            for name, weight in trainable_state(role).items():
                weight += 0.05 * torch.randn(weight.shape, generator=drawn) * (not name.endswith("lora_A"))
    return roles


def make_separate(shared: Roles, checkpointing: str) -> Roles:
    """The same roles with three copies of the base, and low-rank layers that are written out."""
    teacher = copy.deepcopy(shared.teacher)
    student, critic = (written_out(with_lora(copy.deepcopy(shared.teacher.denoiser), LORA)) for _ in range(2))
    condition_on_stop(critic.network, "unet.time_embedding", STOPS)
    if checkpointing == "blocks":
        checkpoint_blocks(student.network)
        checkpoint_blocks(critic.network)
    for ours, theirs in ((student, shared.student), (critic, shared.critic)):
        for (_, weight), (_, value) in zip(trained(ours), trained(theirs), strict=True):
            weight.copy_(value)
    return Roles(teacher, student, critic, copy.deepcopy(shared.discriminator), shared.feature_layer)


def trained(role: nn.Module) -> list[tuple[str, Tensor]]:
    """By the names of the layers, written out or not."""
    return sorted((name.replace(".layer.", "."), value) for name, value in trainable_state(role).items())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("checkpointing", "dtype"),
    [
        *(pytest.param(how, torch.float32, marks=SLOW) for how in ("none", "gan", "blocks")),
        *(pytest.param(how, torch.float64, marks=SLOW) for how in ("none", "gan", "blocks")),
    ],
)
def test_a_shared_base_trains_like_separate_copies(model: PixelModel, checkpointing: str, dtype: torch.dtype) -> None:
    """And like low-rank layers that are written out, and trained by autograd: 20 steps, in float64 to 12 digits."""
    shared = make_shared(model, checkpointing)
    separate = make_separate(shared, checkpointing)
    for roles in (shared, separate):
        for role in (roles.teacher, roles.student, roles.critic, roles.discriminator):
            role.to(dtype)
    before = [value.clone() for value in model.denoiser.state_dict().values()]
    settings = DMD2Settings(**SETTINGS, gan=GAN, checkpointing=checkpointing)
    method, other = (DMD2(settings, model, roles, 20, BATCH, 0) for roles in (shared, separate))
    began = [value.clone() for role in TRAINED for _, value in trained(getattr(method, role))]
    for step in range(20):
        metrics, expected = method.step(real_batch(step), step), other.step(real_batch(step), step)
        torch.testing.assert_close(metrics, expected, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-6)
    tolerance = 5e-5 if dtype == torch.float32 else 1e-12
    for role in TRAINED:
        for (name, ours), (_, theirs) in zip(
            trained(getattr(method, role)), trained(getattr(other, role)), strict=True
        ):
            assert (ours - theirs).norm() <= tolerance * theirs.norm(), name
    ended = [value.clone() for role in TRAINED for _, value in trained(getattr(method, role))]
    assert not any(torch.equal(first, last) for first, last in zip(began, ended, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.denoiser.state_dict().values(), strict=True))


def test_the_base_is_there_once_and_is_the_teacher(model: PixelModel) -> None:
    """By the bytes of all storages: the base, low-rank weights, and the critic's stop embedding."""
    base = {id(each): each.nbytes for each in (*model.denoiser.parameters(), *model.denoiser.buffers())}
    roles = make_shared(model)
    assert isinstance(roles.teacher, Guided)
    assert roles.teacher.denoiser is model.denoiser
    tensors = [
        t for role in (roles.teacher, roles.student, roles.critic) for t in (*role.parameters(), *role.buffers())
    ]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    own = [sum(value.nbytes for value in trainable_state(role).values()) for role in (roles.student, roles.critic)]
    assert sum(storages.values()) == sum(base.values()) + sum(own)
    assert own[1] - own[0] == STOPS * 32 * 4
    assert not any(parameter.requires_grad for parameter in roles.teacher.parameters())
    for role in (roles.student, roles.critic):
        assert all(name.endswith(("lora_A", "lora_B", "stop_embedding.weight")) for name in trainable_state(role))
    assert not {*map(id, trained_of(roles.student))} & {*map(id, trained_of(roles.critic))}


def trained_of(role: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in role.parameters() if parameter.requires_grad]


def test_steps_in_bfloat16_are_close_to_those_in_float32(model: PixelModel) -> None:
    """With the stop embedding, guidance and GAN; what is trained stays float32, and the base as it was cast."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        roles = make_shared(model, "blocks", dtype)
        assert {parameter.dtype for parameter in trained_of(roles.critic)} == {torch.float32}
        method = DMD2(DMD2Settings(**SETTINGS, gan=GAN, checkpointing="blocks"), model, roles, 20, BATCH, 0)
        steps = [method.step(real_batch(step), step) for step in range(3)]
        found.append([{name: value.item() for name, value in metrics.items()} for metrics in steps])
        assert {parameter.dtype for parameter in model.denoiser.parameters()} == {dtype}
    for ours, theirs in zip(*found, strict=True):
        for name in ("dm_loss", "gan_loss", "denoising_loss", "gan_critic_loss", "critic_grad_norm"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=0.1), name
    assert found[0][1]["denoising_loss"] != found[1][1]["denoising_loss"]


def test_layers_that_there_are_none_of_are_told_before_anything_is_made(model: PixelModel) -> None:
    with pytest.raises(UserError, match=r"lora\.targets: 'to_x' matches no layer; write .*to_q"):
        make_roles(model, lora=LoRASettings(rank=4, targets=["to_x"]))
    with pytest.raises(UserError, match=r"lora\.rank: 64 is above the 8 that unet\..* can have; take at most that"):
        make_roles(model, lora=LoRASettings())
