"""What is told of weights when they are opened: kinds that can't be read, tensors too many or too few, NaN."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that are read
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool}  # indices and counts
SCALES = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|absmax|SCB|scale_(weight|input)|(weight|input)_scale(_inv|_2)?)$")
NO_PART = re.compile(  # of CLIP's text encoders: what no part of a pipeline takes, or an index that is counted anew
    r"position_ids$|logit_scale$|attn_mask$|(^|\.)(visual|text)_projection(\.weight)?$|(^|\.)vision_model\."
)
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
Named = Mapping[str, Tensor]
Files = Mapping[str, object] | None
"""The places of tensors by name, where they are of several files."""


def plain_name(name: str) -> str:
    """A tensor's name as newer versions have it: text encoders had one word more, autoencoders' attention others."""
    name = name.removeprefix("text_model.")
    old = re.search(r"attentions\.\d+\.(query|key|value|proj_attn)\.", name)
    return name.replace(f".{old[1]}.", f".{OLD_ATTENTION[old[1]]}.") if old else name


def check_stored(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file by name, without memory: its header alone is read.

    Raises UserError if weights are kept in 8 bits or less, with or without scales: nothing here could multiply them.
    """
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, for it is no dict
            stored = file.get_slice(name)
            kind = stored.get_dtype()
            if kind not in DTYPES or SCALES.search(name):
                what = "is of quantised weights, which are not read; name the model in 16 or 32 bits"
                raise UserError(f"{path}: {name} ({kind}) {what}")
            found[name] = torch.empty(stored.get_shape(), dtype=DTYPES[kind], device="meta")
    return found


def check_finite(where: object, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError, naming the tensor, where a number is not finite: one pass over them, and no copy."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
            continue
        if not tensor.isfinite().all():  # a sum of many large numbers may overflow by itself
            raise UserError(f"{where}: {name} holds NaN or infinity; fetch the model again, or name another checkpoint")


def check_names(where: object, missing: Iterable[str], unexpected: Iterable[str], files: Files = None) -> None:
    """Raises UserError unless every tensor has its place; the libraries would go on with random weights, or without."""
    missing, unexpected = sorted(missing), sorted(name for name in unexpected if not NO_PART.search(name))
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors ({missing[0]}, ...); fetch the model again")
    if unexpected:
        what = f"{len(unexpected)} tensors that no part takes ({unexpected[0]}, ...)"
        advice = "it is another model's, or has additions that are not supported"
        raise UserError(f"{(files or {}).get(unexpected[0], where)} holds {what}; {advice}")


def check_fits(where: object, needs: Named, found: Named, files: Files = None) -> None:
    """Raises UserError unless names and shapes are those of the configuration."""
    check_names(where, needs.keys() - found.keys(), found.keys() - needs.keys(), files)
    for name, tensor in needs.items():
        if found[name].shape != tensor.shape:
            sizes = f"{name} is {list(found[name].shape)} in the file, {list(tensor.shape)} by its configuration"
            raise UserError(f"{(files or {}).get(name, where)}: has other sizes than its configuration: {sizes}")


def load_checked(where: object, network: torch.nn.Module, weights: Named) -> None:
    """Puts the weights into the network; raises UserError unless names, shapes and numbers are as they should be."""
    check_fits(where, network.state_dict(), weights)
    check_finite(where, weights.items())
    network.load_state_dict(weights, strict=False)  # without the harmless ones


def stored(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of files of safetensors by name, one after the other: views of the files, which take no memory."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, for it is no dict
                yield name, file.get_tensor(name)


def fill(
    where: object,
    bare: torch.nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    files: Files = None,
) -> None:
    """Gives a network without memory these weights, known to fit, in `dtype`: tensor by tensor, none of them twice.

    None leaves them as they are, views of files if they are such.
    """
    found = {}
    for name, tensor in weights:
        check_finite((files or {}).get(name, where), [(name, tensor)])
        as_told = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        found[name] = tensor.to(as_told, copy=True) if dtype else tensor.contiguous()
    bare.load_state_dict(found, strict=False, assign=True)  # without the harmless ones
