"""Pipelines as one file in the names of the original releases: what fine-tuners publish."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.export import single_file

Weights = dict[str, Tensor]


def original_weights(pipeline: Any) -> Weights:
    """All tensors of an SD 1.x or SDXL pipeline, or of an SD 2.x one, whose text encoder has the exact GELU.

    In the names of our export, which tests/export compares with diffusers' conversions and with released files; that
    an SD 2.x file has a projection, which no part takes, is added.
    """
    weights = single_file.original_weights(SimpleNamespace(network=pipeline.unet, pipeline=pipeline))
    if "cond_stage_model.model.ln_final.weight" in weights:
        weights["cond_stage_model.model.text_projection"] = torch.eye(pipeline.text_encoder.config.hidden_size)
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


def write_single_file(path: Path, weights: Weights, *flags: str, header: dict[str, str] | None = None) -> Path:
    """The tensors as one file; each flag is an empty tensor."""
    save_file(weights | {flag: torch.empty(0) for flag in flags}, path, header)
    return path
