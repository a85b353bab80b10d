"""Tensors of which each rank holds some rows, its shard, as FSDP2 divides weights; all others are left as they are."""

from __future__ import annotations  # what divides weights is imported only where they are divided

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_shard(x: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(x, "full_tensor")


def mine(x: Any) -> Any:
    """This rank's rows of a shard; of what is none, itself."""
    return x.to_local() if is_shard(x) else x


def reshard(module: nn.Module) -> None:
    """Puts gathered weights away: `parameters()` gives shards then, and the next pass sees what is written to them."""
    every: Iterator[Any] = module.modules()
    for each in every:
        if hasattr(each, "reshard"):
            each.reshard()


def whole(state: Any, wanted: bool = True) -> Any:
    """A nested state with all rows of its shards, in main memory, or None of them where that is not `wanted`.

    All ranks call it alike, for they tell each other their rows, tensor by tensor.
    """
    if is_shard(state):
        full = state.full_tensor()
        return full.cpu() if wanted else None
    if isinstance(state, dict):
        return {key: whole(value, wanted) for key, value in state.items()}
    if isinstance(state, list | tuple):
        values = [whole(value, wanted) for value in state]
        return values if isinstance(state, list) else tuple(values)
    return state


@torch.no_grad()
def put(target: Any, value: Tensor) -> None:
    """Copies a whole tensor into one of its shape, or the rows of this rank; raises RuntimeError for other shapes."""
    if is_shard(target):
        target.to_local().copy_(_rows(value, target))
    else:
        target.copy_(value)


def as_shard(rows: Tensor, like: Any) -> Any:
    """This rank's rows, on whichever device, as a shard divided as `like` is; of what is none, themselves."""
    if not is_shard(like):
        return rows
    from torch.distributed.tensor import DTensor

    made: Any = DTensor  # as FSDP2 makes its own
    return made(rows, like._spec, requires_grad=False)


def cut(value: Any, like: Any) -> Any:
    """This rank's shard of a whole tensor, divided as `like` is; of what has another shape, or is none, itself."""
    if not is_shard(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    rows = torch.empty_like(like)
    put(rows, value)
    return rows


def _rows(value: Tensor, like: Any) -> Tensor:
    """Those of this rank, as `torch.chunk` divides the first dimension."""
    if value.shape != like.shape:
        raise RuntimeError(f"a tensor of {list(value.shape)} where one of {list(like.shape)} is trained")
    mesh = like.device_mesh
    most = -(-len(value) // mesh.size(mesh.ndim - 1))  # over the last dimension, that of the ranks of a machine
    first = min(len(value), mesh.get_local_rank(mesh.ndim - 1) * most)
    return value[first : first + len(like.to_local())]
