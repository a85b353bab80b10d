"""Tensors of which each rank holds some rows, its shard, as FSDP2 divides weights; all others are left as they are."""

from __future__ import annotations  # what divides weights is imported only where they are divided

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.runtime.shards import Divided, Slice, all_rows, flatten


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


@dataclass
class Share:
    """What one rank writes of a state: some tensors, or the rows that it alone has."""

    content: Any
    """All of the state but what tensors hold, as JSON."""
    slices: dict[str, Slice]
    num_bytes: int
    """Of the tensors of all ranks."""

    @property
    def own_bytes(self) -> int:
        return sum(tensor.nbytes for tensor, _ in self.slices.values())


def share_of(state: Any, number: int, num: int) -> Share:
    """That of one of `num` ranks, which all have the same state but for the rows of shards: each part has one writer.

    Of tensors that all have each goes to the rank with the fewest bytes; machines that have the same shards take turns.
    """
    found: dict[str, Tensor] = {}
    content, slices, loads = flatten(state, found), dict[str, Slice](), [0] * num
    for turn, (name, tensor) in enumerate(found.items()):
        if is_shard(tensor):
            if (slice_ := _local(tensor, turn)) is not None:
                slices[name] = slice_
            continue
        writer = loads.index(min(loads))
        loads[writer] += tensor.nbytes
        if writer == number:
            slices[name] = tensor, [0] * tensor.ndim
    return Share(content, slices, sum(tensor.numel() * tensor.element_size() for tensor in found.values()))


def _local(tensor: Any, turn: int) -> Slice | None:
    """The rows of a shard that this rank writes, in its turn where other machines have the same; None where none."""
    mesh, rows = tensor.device_mesh, mine(tensor)
    ours = mesh.ndim == 1 or turn % mesh.size(0) == mesh.get_local_rank(0)
    return (rows, [_first_row(tensor), *[0] * (rows.ndim - 1)]) if ours and len(rows) else None


@torch.no_grad()
def put(target: Any, value: Tensor | Divided) -> None:
    """Copies a tensor, or the rows of it that this rank has, into one of its shape; RuntimeError for other shapes."""
    if value.shape != target.shape:
        raise RuntimeError(f"a tensor of {list(value.shape)} where one of {list(target.shape)} is trained")
    own = mine(target)
    if is_shard(target):
        first, num = _first_row(target), len(own)
        value = value.rows(first, num) if isinstance(value, Divided) else value[first : first + num]
    own.copy_(all_rows(value))


def as_shard(rows: Tensor, like: Any) -> Any:
    """This rank's rows, on whichever device, as a shard divided as `like` is; of what is none, themselves."""
    if not is_shard(like):
        return rows
    from torch.distributed.tensor import DTensor

    made: Any = DTensor  # as FSDP2 makes its own
    return made(rows, like._spec, requires_grad=False)


def placed(value: Any, like: Any) -> Any:
    """New memory with a tensor of the shape of `like`, divided and placed as that is; other tensors as they are."""
    if not isinstance(value, Tensor | Divided):
        return value
    if value.shape != like.shape:
        return all_rows(value).clone()
    own = torch.empty_like(like)
    put(own, value)
    return own


def _first_row(shard: Any) -> int:
    """Of this rank, as `torch.chunk` divides the first dimension over the ranks of a machine, the mesh's last one."""
    mesh, num = shard.device_mesh, len(shard)
    most = -(-num // mesh.size(mesh.ndim - 1))
    return int(min(num, mesh.get_local_rank(mesh.ndim - 1) * most))
