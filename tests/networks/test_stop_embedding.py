"""A critic that is told the student's timestep is the same network until it has learned otherwise."""

import copy

import pytest
import torch

from fewstep.networks.stop_embedding import condition_on_stop
from fewstep.training.roles import make_roles

X, T, LABEL = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, 0])


@pytest.fixture
def critic(tiny_model):
    return make_roles(tiny_model, num_stops=3).critic


def with_stop(stop: int) -> dict:
    return {"label": LABEL, "stop": torch.full((4,), stop)}


def test_at_first_it_is_the_teacher(tiny_model, critic):
    expected = tiny_model.denoiser(X, T, {"label": LABEL})
    for stop in range(3):
        assert torch.equal(critic(X, T, with_stop(stop)), expected)


def test_the_embedding_is_added_to_the_time_embedding(tiny_model, critic):
    vector = torch.randn(32)
    critic.network.stop_embedding.weight.data[1] = vector
    by_hand = copy.deepcopy(tiny_model.denoiser)
    by_hand.network.unet.time_embedding.linear_2.bias.data += vector
    torch.testing.assert_close(critic(X, T, with_stop(1)), by_hand(X, T, {"label": LABEL}))
    assert torch.equal(critic(X, T, with_stop(2)), tiny_model.denoiser(X, T, {"label": LABEL}))


def test_only_the_embedding_of_the_stop_gets_a_gradient(critic):
    critic(X, T, with_stop(2)).square().sum().backward()
    norms = critic.network.stop_embedding.weight.grad.norm(dim=1)
    assert norms[2] > 0
    assert norms[:2].tolist() == [0, 0]


def test_a_network_is_told_about_itself_alone(tiny_model):
    first, second = copy.deepcopy(tiny_model.denoiser), copy.deepcopy(tiny_model.denoiser)
    for denoiser in (first, second):
        condition_on_stop(denoiser.network, "unet.time_embedding", 2)
    first.network.stop_embedding.weight.data[0] = 1.0
    assert not torch.equal(first(X, T, with_stop(0)), second(X, T, with_stop(0)))
    assert torch.equal(second(X, T, with_stop(0)), tiny_model.denoiser(X, T, {"label": LABEL}))
