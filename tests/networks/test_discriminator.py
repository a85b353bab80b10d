"""The GAN head: sizes of the official system, and a logit that really depends on what it is given."""

import pytest
import torch
from torch import nn

from fewstep.networks.discriminator import Discriminator

SIZES = [(8, 1, 1), (8, 2, 2), (8, 4, 4), (18, 4, 4), (48, 7, 7), (32, 8, 8), (16, 32, 32), (8, 8, 4)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


def head_and_features(size, num=3):
    torch.manual_seed(0)
    return Discriminator(*size), torch.randn(num, *size, requires_grad=True)


@sizes
def test_every_sample_has_a_logit_of_its_own(size):
    """One logit per sample, whose gradient reaches its own features and no other sample's."""
    head, features = head_and_features(size)
    logits = head(features)
    assert logits.shape == (3,)
    gradient = torch.autograd.grad(logits[1], features)[0].flatten(1).norm(dim=1)
    assert gradient[1] > 1e-2
    assert (gradient[0], gradient[2]) == (0, 0)


@sizes
def test_the_logit_reads_every_position_and_differs_with_the_features(size):
    """A normalisation over groups of one channel at 1x1 would make the logit a constant."""
    head, features = head_and_features(size, num=16)
    logits = head(features)
    assert logits.std() > 1e-2
    gradient = torch.autograd.grad(logits[0], features)[0].abs().amax(dim=(0, 1))
    assert gradient.min() > 1e-4


@sizes
def test_the_head_learns_to_tell_two_distributions_apart(size):
    head, noise = head_and_features(size, num=16)
    fake, real = noise.detach(), noise.detach().flip(0) + torch.linspace(-2, 2, size[0]).reshape(-1, 1, 1)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(20):
        loss = nn.functional.softplus(head(fake)).mean() + nn.functional.softplus(-head(real)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert head(real).mean() > head(fake).mean() + 1


@pytest.mark.parametrize(
    ("size", "millions"),
    [((1280, 32, 32), 104.9), ((1280, 8, 8), 52.4), ((768, 8, 8), 18.9)],
    ids=["SDXL", "SD 1.5", "EDM"],
)
def test_the_head_is_the_official_one(size, millions):
    """Parameter counts and 32 groups (spec, 1.4)."""
    with torch.device("meta"):
        head = Discriminator(*size)
    assert sum(parameter.numel() for parameter in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert {module.num_groups for module in head.modules() if isinstance(module, nn.GroupNorm)} == {32}


def test_the_sdxl_head_goes_down_32_16_8_4_1():
    with torch.device("meta"):
        head, x = Discriminator(1280, 32, 32), torch.empty(2, 1280, 32, 32)
    sides = []
    for layer in head.layers:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sides.append(x.shape[-1])
    assert sides == [16, 8, 4, 1, 1]


def test_the_head_computes_in_its_own_precision():
    head, features = head_and_features((8, 4, 4))
    low = features.detach().bfloat16()
    assert torch.equal(head(low), head(low.float()))
