"""Teacher, student, critic and head out of one model."""

import pytest
import torch

from fewstep.diffusion.denoiser import Guided
from fewstep.errors import UserError
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.features import features
from fewstep.networks.settings import PixelModelConfig
from fewstep.training.roles import make_roles

X_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = (X_T, torch.tensor([0.1, 1.0, 40.0]), {"label": torch.tensor([0, 2, 1])})


def storages(module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_copies_share_no_memory_and_only_the_teacher_is_frozen(tiny_model, guidance_scale):
    make_roles(tiny_model)  # a model that has been a teacher before is frozen; its copies must not be
    roles = make_roles(tiny_model, guidance_scale)
    teacher, student, critic = storages(roles.teacher), storages(roles.student), storages(roles.critic)
    assert teacher >= storages(tiny_model.denoiser)
    assert (teacher & student, teacher & critic, student & critic) == (set(), set(), set())
    assert not any(parameter.requires_grad for parameter in roles.teacher.parameters())
    for trained in (roles.student, roles.critic, roles.discriminator):
        assert all(parameter.requires_grad for parameter in trained.parameters())


def test_student_and_critic_start_as_the_teacher_and_the_student_moves_alone(tiny_model):
    roles = make_roles(tiny_model)
    assert roles.teacher is tiny_model.denoiser  # unguided
    expected = tiny_model.denoiser(*BATCH)
    assert all(torch.equal(role(*BATCH), expected) for role in (roles.teacher, roles.student, roles.critic))
    with torch.no_grad():
        for parameter in roles.student.parameters():
            parameter.add_(0.1)
    moved = [not torch.equal(role(*BATCH), expected) for role in (roles.teacher, roles.student, roles.critic)]
    assert moved == [False, True, False]


def test_all_roles_run_without_dropout(tiny_config):
    model = PixelModel(tiny_config.model_copy(update={"dropout": 0.5}), build_unet(tiny_config))
    model.denoiser.train()
    roles = make_roles(model)
    assert not any(m.training for role in (roles.teacher, roles.student, roles.critic) for m in role.modules())


def test_the_teacher_is_guided_with_the_null_class(tiny_model):
    teacher = make_roles(tiny_model, guidance_scale=2.5).teacher
    assert isinstance(teacher, Guided)
    x_t, t, condition = BATCH
    null = tiny_model.denoiser(x_t, t, {"label": torch.full((3,), 3)})
    conditional = tiny_model.denoiser(x_t, t, condition)
    torch.testing.assert_close(teacher(*BATCH), null + 2.5 * (conditional - null))


def test_guidance_without_a_null_class_is_a_user_error():
    config = PixelModelConfig(num_classes=3, block_out_channels=[8, 8], norm_num_groups=4)
    model = PixelModel(config, build_unet(config))
    with pytest.raises(UserError, match=r"guidance_scale.*no null class"):
        make_roles(model, guidance_scale=2.0)
    make_roles(model, guidance_scale=1.0)


@pytest.mark.parametrize("layer", ["unet.mid_blok", "unet.down_blocks", "unet.time_embedding"])
def test_a_layer_without_features_is_a_user_error_that_names_one(tiny_model, layer):
    """Not there; there but never called; called but without pixels."""
    with pytest.raises(UserError, match=r"gan.feature_layer.*unet\.down_blocks\.1"):
        make_roles(tiny_model, feature_layer=layer)


@pytest.mark.parametrize(
    ("layer", "name"), [(None, "unet.down_blocks.1"), ("unet.down_blocks.0", "unet.down_blocks.0")], ids=str
)
def test_the_head_fits_the_critics_features(tiny_model, layer, name):
    roles = make_roles(tiny_model, feature_layer=layer)
    assert roles.feature_layer == name
    feature = features(roles.critic, roles.feature_layer, *BATCH)
    logits = roles.discriminator(feature)
    gradients = torch.autograd.grad(logits.sum(), roles.critic.network.unet.conv_in.weight)[0]
    assert gradients.abs().max() > 0
