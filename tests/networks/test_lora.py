"""Low-rank layers: their formula, their targets, who trains them, and what is shared."""

import copy
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.parameterizations import eps
from fewstep.diffusion.schedules import VP
from fewstep.errors import UserError
from fewstep.networks.blocks import checkpoint_blocks
from fewstep.networks.families.stable_diffusion import TextUNet
from fewstep.networks.features import features, x0_and_features
from fewstep.networks.lora import merged
from fewstep.networks.lora_layers import LoRALinear, Trained, find_targets, lora_of, settings_of, with_lora
from fewstep.networks.settings import LoRASettings
from fewstep.runtime.ema import EMA, load_trainable, trainable_state
from fewstep.training.optimization import Optimizer
from fewstep.training.settings import OptimizerSettings
from low_rank import written_out
from real_sizes import UNETS
from steps import recorded_calls
from tiny_pipelines import unet

LORA = LoRASettings(rank=3, alpha=4.5, targets="official")
X_T, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 20.0])
TEXT = {"text": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))}


def make_tree(settings: LoRASettings = LORA, dtype: torch.dtype = torch.float64) -> Denoiser:
    """A tiny SD's network with low-rank weights away from zero."""
    base = Denoiser(TextUNet(unet(16)), None, None).requires_grad_(False).to(dtype)
    tree = with_lora(base, settings)
    drawn = torch.Generator().manual_seed(2)
    for change in lora_of(tree.network).values():
        change.up.copy_(0.1 * torch.randn(change.up.shape, generator=drawn))
    return tree.double() if dtype == torch.float64 else tree


def gradients(tree: Denoiser, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output = tree.network(x, T, {"text": TEXT["text"].to(x.dtype)})
    output.backward(output.detach().cos())
    return output.detach(), {
        name.replace(".layer.", "."): parameter.grad
        for name, parameter in tree.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize(
    "targets", ["official", "lean", ["to_q"], ["to_k", "to_v"], ["to_v", "to_q", "conv_in"]], ids=str
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_the_formula(targets: str | list[str], checkpointing: bool) -> None:
    tree = make_tree(LORA.model_copy(update={"targets": targets}))
    other = written_out(tree)
    if checkpointing:
        checkpoint_blocks(tree.network)
    x = X_T.double().requires_grad_()
    output, found = gradients(tree, x)
    dx, x.grad = x.grad, None
    expected, wanted = gradients(other, x)
    torch.testing.assert_close((output, dx), (expected, x.grad), rtol=1e-9, atol=1e-12)
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * len(lora_of(tree.network))
    for name, gradient in found.items():
        assert wanted[name].norm() > 0
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(tree.network(x, T, TEXT), expected, rtol=1e-9, atol=1e-12)


def test_the_tree_shares_all_tensors_starts_as_the_base_and_trains_low_rank_weights_alone() -> None:
    base = Denoiser(TextUNet(unet(16)), None, None).requires_grad_(False)
    names = set(base.state_dict())
    tree = with_lora(base, LORA)
    own, other = dict(base.named_parameters()), dict(tree.named_parameters())
    assert all(other[name] is parameter for name, parameter in own.items())  # under the same names
    assert settings_of(tree) == LORA
    assert (settings_of(base), lora_of(base.network), set(base.state_dict())) == (None, {}, names)
    trained = {name for name, parameter in other.items() if parameter.requires_grad}
    assert trained == other.keys() - own.keys()
    assert trained == {f"network.{name}.lora_{piece}" for name in lora_of(tree.network) for piece in "AB"}
    assert all(other[name].dtype == torch.float32 for name in trained)
    with torch.no_grad():
        assert torch.equal(tree.network(X_T, T, TEXT), base.network(X_T, T, TEXT))
    gradients(tree, X_T)
    assert all(parameter.grad is None for parameter in own.values())


def test_a_is_drawn_as_peft_draws_it_and_as_the_seed_says() -> None:
    """Kaiming's uniform with a = sqrt 5: up to 1 / sqrt(inputs)."""
    torch.manual_seed(5)
    first = lora_of(make_tree(dtype=torch.float32).network)
    torch.manual_seed(5)
    second = lora_of(make_tree(dtype=torch.float32).network)
    for name, change in first.items():
        assert torch.equal(change.down, second[name].down)
        bound = change.down[0].numel() ** -0.5
        assert 0.8 * bound < change.down.abs().max() <= bound
        assert abs(change.down.mean()) < 0.3 * bound


def test_real_sizes_have_as_many_layers_as_published() -> None:
    with torch.device("meta"):
        sdxl, sd15 = (UNet2DConditionModel(**UNETS[name]) for name in ("xl_base", "v1"))
    counts = {"official": (788, 196.75), "lean": (700, 167.44)}
    for targets, (layers, millions) in counts.items():
        found = [sdxl.get_submodule(name).weight.flatten(1) for name in find_targets(sdxl, targets, 64)]
        assert len(found) == layers
        assert sum(64 * sum(weight.shape) for weight in found) / 1e6 == pytest.approx(millions, abs=0.005)
    assert len(find_targets(sd15, "official", 64)) == 278


@pytest.mark.parametrize(
    ("targets", "rank", "told"),
    [
        (["to_q", "to_kk"], 1, "lora.targets: 'to_kk' matches no layer; write to_k, "),
        (
            ["ff.net.0"],
            1,
            "lora.targets: 'ff.net.0' is no linear layer or convolution that is called; write ff.net.2, ",
        ),
        (["conv_norm_out"], 1, "lora.targets: 'conv_norm_out' is no linear layer"),
        (["q"], 1, "lora.targets: 'q' matches no layer; write "),  # an end of a name is whole words
        ("official", 17, r"lora.rank: 17 is above the 16 that down_blocks.0.resnets.0.conv1 can have"),
        (["conv_in"], 17, "lora.rank: 17 is above the 16 that conv_in can have"),
        (["conv_out"], 5, "lora.rank: 5 is above the 4 that conv_out can have"),
    ],
)
def test_targets_that_are_none_and_ranks_that_do_not_fit_are_refused(targets, rank: int, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        find_targets(unet(16), targets, rank)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["linear1", "self_attn.out_proj"])
def test_a_layer_whose_weight_is_taken_without_a_call_is_refused(target: str) -> None:
    """As PyTorch's own transformer does, in which a change beside the weight would go unseen."""
    network = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8))
    with pytest.raises(UserError, match=rf"'{target}' is no linear layer or convolution that is called; write"):
        find_targets(network, [target])
    assert find_targets(network, ["0"]) == ["0"]


def test_a_preset_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.targets: lean matches no layer of this network; write a list"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), "lean")


def test_the_layers_are_those_whose_names_end_so() -> None:
    network = unet(16)
    assert find_targets(network, ["attn2.to_k", "conv_in"], 4) == [
        "conv_in",
        *(f"{name}.transformer_blocks.0.attn2.to_k" for name in attentions(network)),
    ]


def attentions(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_modules() if name.split(".")[-2:-1] == ["attentions"]]


def update(tree: Denoiser) -> None:
    optimizer = Optimizer(tree.parameters(), OptimizerSettings(lr=1e-2), 10)
    gradients(tree, X_T)
    optimizer.step(torch.tensor(True))


WRITES = {
    "optimizer": update,
    "state": lambda tree: load_trainable(tree, {n: 0.5 * value for n, value in trainable_state(tree).items()}),
    "in place": lambda tree: [value.mul_(0.5) for value in trainable_state(tree).values()],
}


@pytest.mark.parametrize("write", WRITES)
def test_what_multiplies_follows_whoever_writes_the_weights(write: str) -> None:
    tree = make_tree(dtype=torch.float32)
    with torch.no_grad():
        before = tree.network(X_T, T, TEXT)
    WRITES[write](tree)
    with torch.no_grad():
        after = tree.network(X_T, T, TEXT)
        torch.testing.assert_close(after, written_out(tree).network(X_T, T, TEXT), rtol=1e-4, atol=1e-5)
    assert (after - before).norm() > 0.01 * before.norm()


def test_an_average_is_what_the_tree_computes_with_while_it_is_applied() -> None:
    tree = make_tree(dtype=torch.float32)
    ema = EMA(tree, [0.9, 0.5])
    with torch.no_grad():
        first = tree.network(X_T, T, TEXT)
        for value in trainable_state(tree).values():
            value.mul_(2)
        second = tree.network(X_T, T, TEXT)
        for name in (None, "0.5"):
            with ema.applied(name):
                assert torch.equal(tree.network(X_T, T, TEXT), first)
            assert torch.equal(tree.network(X_T, T, TEXT), second)
    assert not torch.equal(first, second)


def test_a_copy_of_a_tree_has_weights_of_its_own() -> None:
    tree = make_tree(dtype=torch.float32)
    with torch.no_grad():
        expected = tree.network(X_T, T, TEXT)
        copied = copy.deepcopy(tree)
        for value in trainable_state(copied).values():
            value.zero_()
        changed, kept = copied.network(X_T, T, TEXT), tree.network(X_T, T, TEXT)
    assert torch.equal(kept, expected)
    assert not torch.equal(changed, expected)


def test_weights_that_change_between_a_pass_and_its_gradients_are_an_error() -> None:
    tree = make_tree(dtype=torch.float32)
    output = tree.network(X_T, T, TEXT)
    for value in trainable_state(tree).values():
        value.mul_(2)
    with torch.no_grad():
        tree.network(X_T, T, TEXT)
    with pytest.raises(RuntimeError, match=r"modified.* inplace"):
        output.sum().backward()


def test_siblings_share_a_product_and_nothing_is_kept_behind_a_pass() -> None:
    tree = make_tree(dtype=torch.float32)
    layers = [module for module in tree.modules() if isinstance(module, Trained)]
    groups = {each.group for each in layers if isinstance(each, nn.Linear)}
    assert Counter(len(group.layers) for group in groups) == {3: 4, 2: 4, 1: len(layers_alone(tree))}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            tree.network(X_T, T, TEXT)
        assert all(group.given is None and not group.kept for group in groups)


def layers_alone(tree: Denoiser) -> list[str]:
    """Linear layers that have no siblings: q of a cross-attention, and all that is not of an attention's input."""
    found = [name for name, module in tree.named_modules() if isinstance(module, LoRALinear)]
    return [n for n in found if not n.endswith(("attn1.to_q", ".to_k", ".to_v"))]


def test_a_sibling_that_is_given_something_else_computes_it_by_itself() -> None:
    tree = make_tree()
    attention = tree.network.get_submodule("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1")
    x, other = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)
    with torch.no_grad():
        tree.network(X_T, T, TEXT)  # writes the copies
        plain = written_out(tree).network.get_submodule("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1")
        for given in ((x, x, x), (x, other, x), (x, x.clone(), other), (other, x, x)):
            for name, each in zip(("to_q", "to_k", "to_v"), given, strict=True):
                torch.testing.assert_close(getattr(attention, name)(each), getattr(plain, name)(each))


@pytest.mark.parametrize("layer", ["mid_block", "mid_block.resnets.0.conv1", "down_blocks.1.resnets.0"])
@pytest.mark.parametrize("early", [True, False])
def test_features_are_those_of_the_weights_as_they_are(layer: str, early: bool) -> None:
    """Also through a view of the network that ends behind the layer, before any whole pass."""
    tree = make_tree()
    tree = Denoiser(tree.network, VP(torch.linspace(0.99, 0.01, 1000)), eps)
    expected = features(written_out(tree), f"unet.{layer}", X_T.double(), T, TEXT)
    for value in trainable_state(tree).values():
        value.mul_(2)
    if early:
        found = features(tree, f"unet.{layer}", X_T.double(), T, TEXT)
    else:
        found = x0_and_features(tree, f"unet.{layer}", X_T.double(), T, TEXT, True)[1]
    changed = features(written_out(tree), f"unet.{layer}", X_T.double(), T, TEXT)
    torch.testing.assert_close(found, changed, rtol=1e-9, atol=1e-12)
    assert (changed - expected).norm() > 1e-3 * expected.norm()


def test_in_bfloat16_base_and_products_are_it_and_what_is_trained_is_not() -> None:
    tree = make_tree(dtype=torch.float32)
    expected, wanted = gradients(tree, X_T)
    tree.zero_grad()
    for parameter in tree.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with recorded_calls(tree.network.unet.mid_block) as calls:
        output, found = gradients(tree, X_T)
    assert {output.dtype, calls[0][1].dtype} == {torch.bfloat16}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert 1e-4 < (output - expected).norm() / expected.norm() < 0.03
    both = [torch.cat([each.flatten() for each in given.values()]) for given in (found, wanted)]
    assert functional.cosine_similarity(*both, dim=0) > 0.995


def test_merged_weights_are_what_the_tree_computes() -> None:
    tree = make_tree()
    base = Denoiser(TextUNet(unet(16)), None, None).double()
    with torch.no_grad():
        for name, change in lora_of(tree.network.unet).items():
            weight = base.network.unet.get_submodule(name).weight
            weight.copy_(merged(weight, change))
        expected = tree.network(X_T, T, TEXT)
        torch.testing.assert_close(base.network(X_T, T, TEXT), expected, rtol=1e-4, atol=1e-6)
        assert (make_tree().network(X_T, T, TEXT) - unet_alone()).norm() > 0.01 * expected.norm()


def unet_alone() -> Tensor:
    return Denoiser(TextUNet(unet(16)), None, None).double().network(X_T, T, TEXT)
