"""Low-rank layers: their formula, their targets, who trains them, and what is shared."""

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.networks.blocks import checkpoint_blocks
from fewstep.networks.families.stable_diffusion import TextUNet
from fewstep.networks.lora_layers import lora_of, with_lora
from fewstep.networks.settings import LoRASettings
from low_rank import written_out
from tiny_pipelines import POOLED, unet

LORA = LoRASettings(rank=3, alpha=4.5, targets="official")
X_T, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 20.0])
TEXT = {"text": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    **POOLED,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def make_tree(settings: LoRASettings = LORA, dtype: torch.dtype = torch.float64) -> Denoiser:
    """A tiny SD's network with low-rank weights away from zero."""
    base = Denoiser(TextUNet(unet(16)), None, None).requires_grad_(False).to(dtype)
    tree = with_lora(base, settings)
    drawn = torch.Generator().manual_seed(2)
    for change in lora_of(tree.network).values():
        change.up.copy_(0.1 * torch.randn(change.up.shape, generator=drawn))
    return tree.double() if dtype == torch.float64 else tree


def gradients(tree: Denoiser, x: Tensor, names: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
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
