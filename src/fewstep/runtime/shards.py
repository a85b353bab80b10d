"""A nested state as text and safetensors, nothing of which is unpickled: state/{state.json, shard-00000.safetensors}.

A shard, one per writer, holds named tensors or slices of them. Their offsets stand where `torch.distributed.checkpoint`
looks for them, so that its `HuggingFaceStorageReader` reads the folder, too.
"""

from __future__ import annotations  # torch is imported only where a state is written or read

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
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


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def stage(state: Any, buffers: dict[str, Tensor], path: str = "") -> Any:
    """A copy of a nested state in main memory, which stays as it is while training goes on.

    Its tensors are kept in `buffers` and written anew the next time: that takes an eighth of the time of new memory.
    """
    import torch

    if isinstance(state, torch.Tensor):
        buffer = buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != (
            state.shape,
            state.dtype,
            state.stride(),
        ):
            buffer = buffers[path] = torch.empty_like(state, device="cpu", requires_grad=False)
        return buffer.copy_(state.detach())
    if isinstance(state, dict):
        return {key: stage(value, buffers, f"{path}/{key}") for key, value in state.items()}
    if isinstance(state, list | tuple):
        copied = [stage(value, buffers, f"{path}/{index}") for index, value in enumerate(state)]
        return copied if isinstance(state, list) else tuple(copied)
    return state


def tensors(state: Any) -> list[Tensor]:
    """All in a nested state."""
    found: dict[str, Tensor] = {}
    flatten(state, found)
    return list(found.values())


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


def unflatten(content: Any, read: Callable[[str, list[int]], Tensor]) -> Any:
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


def write_state(folder: Path, step: int, state: Any) -> None:
    """All of it by one writer."""
    found: dict[str, Tensor] = {}
    content, shards, room = flatten(state, found), [dict[str, Slice]()], SHARD_BYTES
    for name, tensor in found.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor, [0] * tensor.ndim
        room -= tensor.nbytes
    folder.mkdir()
    for number, slices in enumerate(shards):
        write_shard(folder / shard_name(number), step, slices)
    index = {"step": step, "shards": len(shards), "state": content}
    (folder / INDEX).write_text(json.dumps(index) + "\n")


def read_state(folder: Path, only: Collection[str] = ()) -> dict[str, Any]:
    """What `write_state`, or several writers of shards, were given, with the step; of the method what is in `only`.

    The tensors are new ones; with `only`, those that no shards divide stay on the disk until they are used. Raises
    almost any error where the files are not what was written.
    """
    index = read_json(folder / INDEX)
    content, step = index["state"], index["step"]
    if only and isinstance(content.get("method"), dict):
        content = {"method": {name: part for name, part in content["method"].items() if name in only}}
    there = _slices((folder / shard_name(rank) for rank in range(index["shards"])), step)

    def read(name: str, shape: list[int]) -> Tensor:
        tensor = _whole([(get(), offsets) for get, offsets in there[name]], shape)
        return tensor if only else tensor.clone()

    return {"step": step, **unflatten(content, read)}


def _slices(paths: Iterable[Path], step: int) -> dict[str, list[tuple[Callable[[], Tensor], list[int]]]]:
    """Of every tensor how its slices are read and where they begin; ValueError if a shard is of another step."""
    from safetensors import safe_open

    opened: Any = safe_open
    found: dict[str, list[tuple[Callable[[], Tensor], list[int]]]] = {}
    for path in paths:
        if not path.is_file():  # a FIFO would be waited for
            raise ValueError(f"{path.name} is missing")
        shard = opened(path, "pt")  # mapped: no tensor takes memory until it is used
        about = shard.metadata() or {}
        if about.get("step") != str(step):
            raise ValueError(f"{path.name} is of step {about.get('step')}, not of {step}")
        offsets = json.loads(about[OFFSETS])
        for name in shard.keys():  # noqa: SIM118 (it is no dict)
            found.setdefault(name, []).append((partial(shard.get_tensor, name), offsets[name]["saved_offsets"]))
    return found


def _whole(slices: Sequence[Slice], shape: list[int]) -> Tensor:
    """The tensor of that shape that its slices make up; raises ValueError if they don't."""
    import torch

    first, _ = slices[0]
    if len(slices) == 1 and list(first.shape) == shape:
        return first
    if sum(part.numel() for part, _ in slices) < math.prod(shape):  # before memory is taken
        raise ValueError(f"slices are missing of a tensor of {shape}")
    whole, covered = first.new_empty(shape), first.new_zeros(shape, dtype=torch.bool)
    for part, offsets in slices:
        place = tuple(slice(at, at + size) for at, size in zip(offsets, part.shape, strict=True))
        if whole[place].shape != part.shape:
            raise ValueError(f"a slice of {list(part.shape)} at {offsets} is none of {shape}")
        whole[place], covered[place] = part, True
    if not covered.all():
        raise ValueError(f"slices are missing of a tensor of {shape}")
    return whole
