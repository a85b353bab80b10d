"""What is told of weights when they are opened: kinds that can't be read, tensors too many or too few, NaN."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.errors import UserError

WIDE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "BOOL")  # integers are indices and counts
SCALES = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|absmax|SCB|scale_(weight|input)|(weight|input)_scale(_inv|_2)?)$")
NO_PART = re.compile(  # of CLIP's text encoders: what no part of a pipeline takes, or an index that is counted anew
    r"position_ids$|logit_scale$|attn_mask$|(^|\.)(visual|text)_projection(\.weight)?$|(^|\.)vision_model\."
)


def check_stored(path: Path) -> list[str]:
    """The names in a safetensors file, of which the header alone is read.

    Raises UserError if weights are kept in 8 bits or less, with or without scales: nothing here could multiply them.
    """
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            kind = file.get_slice(name).get_dtype()
            if kind not in WIDE or SCALES.search(name):
                raise UserError(
                    f"{path}: {name} ({kind}) is of quantised weights, which are not read; name the model in 16 or 32 "
                    "bits"
                )
    return names


def check_finite(where: object, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError, naming the tensor, where a number is not finite: one pass over them, and no copy."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
            continue
        if not tensor.isfinite().all():  # a sum of many large numbers may overflow by itself
            raise UserError(f"{where}: {name} holds NaN or infinity; fetch the model again, or name another checkpoint")


def check_names(where: object, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises UserError unless every tensor has its place; the libraries would go on with random weights, or without."""
    missing, unexpected = sorted(missing), sorted(name for name in unexpected if not NO_PART.search(name))
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors ({missing[0]}, ...); fetch the model again")
    if unexpected:
        raise UserError(
            f"{where} holds {len(unexpected)} tensors that no part takes ({unexpected[0]}, ...); it is "
            "another model's, or has additions that are not supported"
        )


def load_checked(where: object, network: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts the weights into the network; raises UserError unless names, shapes and numbers are as they should be."""
    known = {name: tensor.shape for name, tensor in network.state_dict().items()}
    check_names(where, known.keys() - weights.keys(), weights.keys() - known.keys())
    for name, shape in known.items():
        if weights[name].shape != shape:
            sizes = f"{list(weights[name].shape)} in the file, {list(shape)} by its configuration"
            raise UserError(f"{where}: has other sizes than its configuration: {name} is {sizes}")
    check_finite(where, weights.items())
    network.load_state_dict(weights, strict=False)  # without the harmless ones
