"""Weights as safetensors files, tensor by tensor: one converted tensor is in memory at a time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.loading.weights import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}
Read = Callable[[str], Tensor]


def planned(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What will be written, without memory: floats in `dtype`."""
    return {
        name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device="meta")
        for name, value in tensors.items()
    }


def write_shards(
    folder: Path, stem: str, plan: dict[str, Tensor], read: Read, shard_size: str, metadata: dict[str, str]
) -> None:
    """One file, or shards with their index, named as both libraries name them; float16 is the variant `fp16`."""
    variant = ".fp16" if any(value.dtype == torch.float16 for value in plan.values()) else ""
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
