"""Which modules of a network are its blocks, and what is put on them from outside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewstep.errors import UserError

LISTS = {"resnets", "attentions", "transformer_blocks", "single_transformer_blocks"}
"""What diffusers calls the lists that its networks keep their blocks in."""


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The residual and transformer blocks, each the innermost: of SDXL 17 residual and 70 transformer blocks."""
    for name, module in network.named_modules():
        in_a_list = len(path := name.split(".")) > 1 and path[-2] in LISTS
        if in_a_list and not any(each.split(".")[0] in LISTS for each, _ in module.named_modules()):
            yield module


def named_units(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """What of a UNet is gathered at once where ranks share weights, inner ones first, by dotted names: of SDXL 18.

    Each stack of transformer blocks with its projections, and each down, middle and up block with what is left in it.
    """
    named = [(name, module, name.split(".")) for name, module in network.named_modules()]
    stacks = [(name, module) for name, module, _ in named if hasattr(module, "transformer_blocks")]
    whole = [(name, module) for name, module, path in named if path[-2:-1] in (["down_blocks"], ["up_blocks"])]
    middle = [(name, module) for name, module, path in named if path[-1] == "mid_block"]
    return [*stacks, *whole, *middle]


def check_blocks(network: nn.Module, setting: str = "checkpointing") -> list[nn.Module]:
    """Its blocks; raises UserError, which names the setting that wants them, where there are none."""
    found = list(blocks(network))
    if not found:
        told = f"the network has no blocks, in lists called {', '.join(sorted(LISTS))}"
        raise UserError(f"{setting}: {told}; set none")
    return found


def checkpoint_blocks(network: nn.Module) -> list[nn.Module]:
    """Keeps no activations inside the blocks but computes them again in the backward pass: a third more arithmetic.

    Gradients are the same. For networks without dropout, whose random state would have to be kept with them. Gives the
    blocks; raises UserError where there are none.
    """
    found = check_blocks(network)
    for block in found:
        block.forward = partial(_recomputed, block.forward)  # not the module: names and hooks stay as they are
    return found


@contextmanager
def checkpointed(network: nn.Module) -> Iterator[None]:
    """Passes inside the context are as behind `checkpoint_blocks`; their backward pass may come later."""
    before = [vars(block).get("forward") for block in blocks(network)]
    found = checkpoint_blocks(network)
    try:
        yield
    finally:
        for block, forward in zip(found, before, strict=True):
            set_forward(block, forward)


def set_forward(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """What the block is run with from now on; None is its class's own."""
    if forward is None:
        vars(block).pop("forward", None)
    else:
        block.forward = forward


def replace_forward(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """The same inside a recomputation, if it has one."""
    if isinstance(now := vars(block).get("forward"), partial):
        forward = partial(now.func, forward or type(block).forward.__get__(block))
    set_forward(block, forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's forward pass, which is recomputed where it has a graph; hooks on the block still run once."""
    if not torch.is_grad_enabled():  # a rollout or a teacher: nothing is kept anyway
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
