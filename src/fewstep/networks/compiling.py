"""Blocks that are compiled in place, by torch.compile: fewer kernels, and the same numbers but for rounding."""

import os
import time
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import MethodType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from fewstep.errors import UserError, brief
from fewstep.networks.blocks import blocks, check_blocks, replace_forward

CACHE = "TORCHINDUCTOR_CACHE_DIR"
P = ParamSpec("P")
R = TypeVar("R")
NUM_KINDS = 256  # of shapes, with and without gradient, that one class of block is compiled for; torch gives up at 8


def compile_blocks(network: nn.Module, hooked: nn.Module | None = None) -> int:
    """Compiles the blocks where they are, one shape of a class once, at their first pass; gives how many blocks.

    A block with hooks inside it, or with the module `hooked` there, on which some come later, stays as it is. Names,
    weights, hooks on blocks and recomputation stay, too. Raises UserError where the network has no blocks.
    """
    chosen = [block for block in check_blocks(network, "speed.compile") if not _is_hooked(block, hooked)]
    for block in chosen:
        # The function of the class, not the method: blocks of one class then share what was compiled, and a deep copy
        # of the block runs with its own weights.
        replace_forward(block, MethodType(_compiled(type(block).forward, _device_of(block)), block))
    return len(chosen)


def uncompile_blocks(network: nn.Module) -> None:
    """The blocks run as they did before; what was compiled stays in memory for another `compile_blocks`."""
    for block in blocks(network):
        replace_forward(block, None)


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function with blocks that run as they are, for passes of sizes that are not worth minutes."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return run


def _is_hooked(block: nn.Module, hooked: nn.Module | None) -> bool:
    inner = [module for module in block.modules() if module is not block]  # hooks on the block itself run around it
    return any(module is hooked or module._forward_hooks or module._forward_pre_hooks for module in inner)


def _device_of(block: nn.Module) -> str:
    return next((parameter.device.type for parameter in block.parameters()), "cpu")


@cache
def _compiled(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    torch._dynamo.config.cache_size_limit = NUM_KINDS  # the name that is also older torch's
    torch._dynamo.config.accumulated_cache_size_limit = 4 * NUM_KINDS
    torch._inductor.config.fallback_random = True  # dropout draws what it draws without
    # On a CPU weights and pictures would be put in another order in every block, and back: a fifth of the time.
    torch._inductor.config.layout_optimization = device != "cpu"
    return torch.compile(forward, dynamic=False)


def prepare_compiling(device: torch.device) -> Path:
    """Tries whether anything can be compiled; gives the folder that later runs find what was compiled in.

    That is TORCHINDUCTOR_CACHE_DIR, or one for the user, as torch's own is lost with /tmp. Raises UserError where
    nothing can be compiled.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.setdefault(CACHE, str(caches / "fewstep" / "compiled")))
    new = time.time_ns() % 1_000_003  # a kernel that no cache has, so that the compiler is asked
    try:
        torch.compile(lambda x: x.sin() * new, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of a compiler that is not there, or headers, or a folder; each has its own
        needs = "gcc and triton" if device.type == "cuda" else "g++ or clang++"
        told = brief(getattr(error, "inner_exception", error))
        raise UserError(
            f"speed.compile: needs {needs} and Python's headers ({told}); install them, or set none"
        ) from error
    return folder
