"""Features by forward hook: the right activation, no work behind it, no graph behind it, nothing left behind."""

import pytest
import torch
from torch import nn

from fewstep.networks.features import features, x0_and_features

LAYERS = ["unet.down_blocks.0", "unet.down_blocks.1", "unet.mid_block"]
layers = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture
def batch():
    """x_t, t and condition."""
    x_t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([0.1, 1.0, 40.0]), {"label": torch.tensor([0, 2, 3])}


def record_calls(module: nn.Module) -> list:
    """The outputs of every call of the module from now on."""
    outputs: list = []
    module.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.denoiser.modules())


def fail_in(module: nn.Module) -> None:
    def hook(module, args, output):
        raise RuntimeError("the decoder failed")

    module.register_forward_hook(hook)


@layers
def test_features_are_the_layers_hidden_states(tiny_model, batch, layer):
    expected = record_calls(tiny_model.denoiser.network.get_submodule(layer))
    tiny_model.denoiser(*batch)
    hidden = expected[0][0] if isinstance(expected[0], tuple) else expected[0]
    assert torch.equal(features(tiny_model.denoiser, layer, *batch), hidden)


@layers
def test_features_leave_the_network_behind_the_layer(tiny_model, batch, layer):
    before, behind = record_calls(tiny_model.network.conv_in), record_calls(tiny_model.network.up_blocks[0])
    features(tiny_model.denoiser, layer, *batch)
    assert (len(before), len(behind)) == (1, 0)
    x0_and_features(tiny_model.denoiser, layer, *batch)
    assert (len(before), len(behind)) == (2, 1)


@layers
@pytest.mark.parametrize("features_only_grad", [False, True])
def test_one_pass_equals_the_separate_calls(tiny_model, batch, layer, features_only_grad):
    x0, feature = x0_and_features(tiny_model.denoiser, layer, *batch, features_only_grad=features_only_grad)
    assert torch.equal(x0, tiny_model.denoiser(*batch))
    assert torch.equal(feature, features(tiny_model.denoiser, layer, *batch))


def feature_gradients(model, layer, batch, features_only_grad):
    """Gradients of the squared features at x_t and at the first layer's weight; x0 has none where only they have."""
    x_t = batch[0].clone().requires_grad_()
    x0, feature = x0_and_features(model.denoiser, layer, x_t, *batch[1:], features_only_grad=features_only_grad)
    assert (x0.requires_grad, feature.requires_grad) == (not features_only_grad, True)
    return torch.autograd.grad(feature.square().sum(), [x_t, model.network.conv_in.weight])


@layers
def test_the_features_gradient_does_not_need_the_graph_behind_them(tiny_model, batch, layer):
    expected = feature_gradients(tiny_model, layer, batch, features_only_grad=False)
    gradient = feature_gradients(tiny_model, layer, batch, features_only_grad=True)
    assert expected[0].abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))


@layers
def test_with_features_only_grad_nothing_behind_the_layer_is_kept_for_a_backward(tiny_model, batch, layer):
    def num_kept(function, *args) -> int:
        kept: list = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
            function(tiny_model.denoiser, layer, *batch, *args)
        return len(kept)

    assert num_kept(x0_and_features, True) == num_kept(features)
    assert num_kept(x0_and_features, True) < num_kept(x0_and_features, False)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("features_only_grad", [True, False])
def test_the_grad_mode_is_put_back_and_no_hook_stays_behind(tiny_model, batch, enabled, features_only_grad):
    with torch.set_grad_enabled(enabled):
        x0_and_features(tiny_model.denoiser, LAYERS[1], *batch, features_only_grad=features_only_grad)
        assert torch.is_grad_enabled() == enabled
        features(tiny_model.denoiser, LAYERS[1], *batch)
        assert torch.is_grad_enabled() == enabled
    assert hooks(tiny_model) == 0


@pytest.mark.parametrize("layer", ["conv_in", "conv_out"])
def test_an_error_before_or_behind_the_layer_leaves_neither_hook_nor_grad_mode_behind(tiny_model, batch, layer):
    fail_in(getattr(tiny_model.network, layer))
    with pytest.raises(RuntimeError, match="the decoder failed"):
        x0_and_features(tiny_model.denoiser, LAYERS[1], *batch, features_only_grad=True)
    if layer == "conv_in":
        with pytest.raises(RuntimeError, match="the decoder failed"):
            features(tiny_model.denoiser, LAYERS[1], *batch)
    assert hooks(tiny_model) == 1  # the one that failed
    assert torch.is_grad_enabled()
