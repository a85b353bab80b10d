"""Weights from file to file, tensor by tensor: no network is built, and one converted tensor is in memory at a time."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.errors import UserError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
Read = Callable[[str], Tensor]


def convert_part(
    source: Path,
    target: Path,
    dtype: torch.dtype,
    shard_size: str,
    metadata: dict[str, str],
    replaced: Mapping[str, Tensor],
    report: Callable[[], None],
) -> None:
    """Writes the safetensors of the folder `source` into `target`, floats as `dtype`, in shards of `shard_size`.

    File names are those of diffusers and transformers; float16 makes the `fp16` variant. Tensors in `replaced` take
    the place of those of their name; `report` is called per tensor. Raises UserError if a file is damaged.
    """
    plan, places = {}, {}
    for file in weight_files(source):
        with open_weights(file) as handle:
            for name in handle.keys():  # noqa: SIM118, for it is no dict
                plan[name], places[name] = _planned(handle.get_slice(name), dtype), file
    if other := [name for name, value in replaced.items() if name not in plan or value.shape != plan[name].shape]:
        raise UserError(f"{source}: the weights as trained don't fit it: {other[0]}, one of {len(other)}")

    def read(name: str) -> Tensor:
        report()
        if name in replaced:
            return replaced[name]
        with open_weights(places[name]) as handle:  # anew, for what was read stays in memory as long as it is open
            return handle.get_tensor(name)

    stem = re.split(r"[.-]", next(iter(places.values())).name)[0]
    write_shards(target, stem, dict(sorted(plan.items())), read, shard_size, metadata)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of one part of a model."""
    return sorted(folder.glob("*.safetensors"))


def open_weights(file: Path) -> Any:
    """The file, memory-mapped; raises UserError if it is damaged."""
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: the weights are damaged; name another checkpoint") from error


def count_tensors(folder: Path) -> int:
    """How many `convert_part` will write."""
    count = 0
    for file in weight_files(folder):
        with open_weights(file) as handle:
            count += len(handle.keys())
    return count


def _planned(stored: Any, dtype: torch.dtype) -> Tensor:
    """A tensor without memory, of the shape and type that will be written."""
    own = DTYPES[stored.get_dtype()]
    return torch.empty(stored.get_shape(), dtype=dtype if own.is_floating_point else own, device="meta")


def write_shards(
    folder: Path, stem: str, plan: dict[str, Tensor], read: Read, shard_size: str, metadata: dict[str, str]
) -> None:
    """One file, or shards with their index, named as diffusers and transformers name them."""
    half = any(value.dtype == torch.float16 for value in plan.values())
    variant = ".fp16" if half else ""
    pattern = f"{stem}{variant}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(plan, filename_pattern=pattern, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: plan[name] for name in names}, read, {"format": "pt", **metadata})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(path: Path, plan: Mapping[str, Tensor], read: Read, metadata: dict[str, str]) -> None:
    """A safetensors file of the tensors that `read` gives, one after the other, in the types and shapes of `plan`.

    8 bytes of header length, the header as JSON, the tensors back to back (the library's own writer holds all of them,
    twice). As there, wider types stand first, so that every tensor is aligned.
    """
    ordered = sorted(plan, key=lambda name: (-plan[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in ordered:
        start, end = end, end + plan[name].nbytes
        shape = list(plan[name].shape)
        header[name] = {"dtype": CODES[plan[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            value = converted(name, read(name), plan[name].dtype)
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, contiguous; raises UserError where float16 holds it as infinite."""
    result = value.detach().to(dtype).contiguous()
    if dtype == torch.float16 and result.numel() and any(bound.isinf() for bound in result.aminmax()):
        raise UserError(f"--dtype float16: {name} holds numbers beyond its 65504; take bfloat16 or float32")
    return result
