"""A nested state as text and safetensors, nothing of which is unpickled: state/{state.json, shard-00000.safetensors}.

A shard, one per writer, holds named tensors or slices of them. Their offsets stand where `torch.distributed.checkpoint`
looks for them, so that its `HuggingFaceStorageReader` reads the folder, too.
"""

from __future__ import annotations  # torch is imported only where a state is written or read

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

STATE = "state"  # folder of a checkpoint
INDEX = "state.json"  # all of the state but what the tensors hold, and what each of these is called
OFFSETS = "DCP_SHARDING_INFO"  # of a shard: {tensor: {"saved_offsets": [...]}}
SHARD_BYTES = 2**32  # of the shards that one writer makes: as much main memory it takes to write what is on a GPU
SILENT = ("method", "adamw", "state", "averages")  # words of a path that no name needs: critic_optimizer.0.exp_avg
Slice = tuple["Tensor", Sequence[int]]
"""A part of a tensor, and where it begins in it."""


@dataclass
class Divided:
    """A tensor of which several shards have some rows each, in order; they stay on the disk until they are used."""

    parts: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(map(len, self.parts)), *self.parts[0].shape[1:])

    def rows(self, first: int, num: int) -> Tensor:
        """Some in a row: in new memory, unless one shard has them all."""
        import torch

        found, at = [self.parts[0][:0]], 0
        for part in self.parts:
            found.append(part[max(0, first - at) : max(0, first + num - at)])
            at += len(part)
        found = [each for each in found if len(each)] or found[:1]
        return found[0] if len(found) == 1 else torch.cat(found)


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def stage(slices: Mapping[str, Slice], buffers: dict[str, Tensor]) -> dict[str, Slice]:
    """Copies in main memory, which stay as they are while training goes on.

    They lie in `buffers` and are written anew the next time: that takes an eighth of the time of new memory.
    """
    import torch

    for name in buffers.keys() - slices.keys():
        del buffers[name]
    for name, (tensor, _) in slices.items():
        buffer = buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        buffer.copy_(tensor.detach())
    return {name: (buffers[name], offsets) for name, (_, offsets) in slices.items()}


def flatten(state: Any, found: dict[str, Tensor], path: tuple[str, ...] = ()) -> Any:
    """A nested state of dicts, lists, tuples, numbers, words, None and tensors as JSON; the tensors go into `found`.

    A tensor becomes {"$tensor": name, "shape": sizes}, and its strides where its numbers lie in another order; what
    JSON does not know stands under "$tuple", "$dict" (of other keys than words) or "$float" (NaN and infinities).
    """
    import torch

    def inner(value: Any, key: Any) -> Any:
        return flatten(value, found, (*path, str(key)))

    if isinstance(state, torch.Tensor):
        name = ".".join(word for word in path if word not in SILENT)
        while name in found:  # two paths may differ by such a word alone
            name += "_"
        found[name] = state
        order = {} if state.is_contiguous() else {"stride": list(torch.empty_like(state, device="meta").stride())}
        return {"$tensor": name, "shape": list(state.shape)} | order
    if isinstance(state, dict):
        if all(type(key) is str and not key.startswith("$") for key in state):
            return {key: inner(value, key) for key, value in state.items()}
        return {"$dict": [[flatten(key, found), inner(value, key)] for key, value in state.items()]}
    if isinstance(state, list | tuple):
        items = [inner(value, index) for index, value in enumerate(state)]
        return items if isinstance(state, list) else {"$tuple": items}
    if isinstance(state, float) and not math.isfinite(state):
        return {"$float": repr(state)}
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"{'.'.join(path)}: {type(state).__name__} has no place in a checkpoint")


def unflatten(content: Any, read: Callable[[str, list[int]], Any]) -> Any:
    """What `flatten` was given; `read` gives a tensor by its name and its shape."""
    if isinstance(content, list):
        return [unflatten(value, read) for value in content]
    if not isinstance(content, dict):
        return content
    if "$tensor" in content:
        tensor = read(content["$tensor"], content["shape"])
        stride = content.get("stride")
        return tensor.new_empty_strided(tensor.shape, stride).copy_(tensor) if stride else tensor
    if "$float" in content:
        return float(content["$float"])
    if "$tuple" in content:
        return tuple(unflatten(content["$tuple"], read))
    if "$dict" in content:
        return {unflatten(key, read): unflatten(value, read) for key, value in content["$dict"]}
    return {key: unflatten(value, read) for key, value in content.items()}


def write_shard(path: Path, step: int, slices: Mapping[str, Slice]) -> None:
    """The slices that one writer has; raises OSError, or SafetensorError, if they can't be written."""
    from safetensors.torch import save_file

    offsets = {name: {"saved_offsets": list(offset)} for name, (_, offset) in slices.items()}
    about = {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets), "step": str(step)}
    save_file({name: tensor.contiguous() for name, (tensor, _) in slices.items()}, path, about)


def packed(slices: Mapping[str, Slice]) -> list[dict[str, Slice]]:
    """What goes into each of the shards that one writer makes, one at least."""
    shards, room = [dict[str, Slice]()], SHARD_BYTES
    for name, (tensor, offsets) in slices.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor, offsets
        room -= tensor.nbytes
    return shards


def write_index(folder: Path, step: int, num_shards: int, content: Any) -> None:
    """What the shards of all writers make up."""
    (folder / INDEX).write_text(json.dumps({"step": step, "shards": num_shards, "state": content}) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """What the writers of shards were given, with the step; almost any error where the files are not what was written.

    All tensors stay on the disk until they are used, and those that several shards hold are `Divided`.
    """
    index = read_json(folder / INDEX)
    there = _slices((folder / shard_name(number) for number in range(index["shards"])), index["step"])
    return {"step": index["step"], **unflatten(index["state"], lambda name, shape: _joined(there[name], shape))}


def _slices(paths: Iterable[Path], step: int) -> dict[str, list[Slice]]:
    """Of every tensor its slices; ValueError if a shard is of another step."""
    from safetensors import safe_open

    opened: Any = safe_open
    found: dict[str, list[Slice]] = {}
    for path in paths:
        if not path.is_file():  # a FIFO would be waited for
            raise ValueError(f"{path.name} is missing")
        shard = opened(path, "pt")  # mapped: no tensor takes memory until it is used
        about = shard.metadata() or {}
        if about.get("step") != str(step):
            raise ValueError(f"{path.name} is of step {about.get('step')}, not of {step}")
        offsets = json.loads(about[OFFSETS])
        for name in shard.keys():  # noqa: SIM118 (it is no dict)
            found.setdefault(name, []).append((shard.get_tensor(name), offsets[name]["saved_offsets"]))
    return found


def _joined(slices: Sequence[Slice], shape: list[int]) -> Tensor | Divided:
    """The tensor of that shape that its slices make up; raises ValueError if they don't."""
    if len(slices) == 1 and list(slices[0][0].shape) == shape:
        return slices[0][0]
    ordered, at = sorted(slices, key=lambda each: list(each[1])), 0
    for part, offsets in ordered:
        if offsets != [at, *[0] * (len(shape) - 1)] or list(part.shape[1:]) != shape[1:]:
            raise ValueError(f"a slice of {list(part.shape)} at {offsets} is none of {shape}, or those before it lack")
        at += len(part)
    if at != shape[0]:
        raise ValueError(f"slices are missing of a tensor of {shape}")
    return Divided([part for part, _ in ordered])


def all_rows(tensor: Tensor | Divided) -> Tensor:
    """All of its rows."""
    return tensor.rows(0, tensor.shape[0]) if isinstance(tensor, Divided) else tensor
