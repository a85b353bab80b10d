"""What the tensors of SD and SDXL were called in the original releases, which single files and LoRA files keep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import nn

from fewstep.errors import UserError

Places = dict[str, str]
"""Dotted starts of diffusers' names -> the original ones."""
T = TypeVar("T")
NAMES: dict[str, Places] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def renamed(
    network: nn.Module, state: Mapping[str, T], prefix: str, places: Places, layers: Mapping[str, str]
) -> dict[str, T]:
    """The state dict with the starts of its names replaced by `places`, and behind them those of `layers`."""
    weights = {}
    for name, tensor in state.items():
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        if place is None:
            raise UserError(f"{type(network).__name__}: the layout of single files has no place for its {name}")
        rest = name.removeprefix(f"{place}.")
        layer = next((layer for layer in layers if rest.startswith(f"{layer}.")), "")
        weights[f"{prefix}{places[place]}.{layers.get(layer, '')}{rest.removeprefix(layer)}"] = tensor
    return weights


def of_unet(unet: Any, state: Mapping[str, T], prefix: str = "") -> dict[str, T]:
    """What diffusers calls a UNet's tensors -> their original names, behind `prefix`; raises UserError for others."""
    return renamed(unet, state, prefix, _unet_places(unet), NAMES["unet_layers"])


def _unet_places(unet: Any) -> Places:
    """The levels as one list of input blocks and one of output blocks; a block is a list of layers."""
    places = dict(NAMES["unet_starts"])
    for way, side, index in (("down", "input", 1), ("up", "output", 0)):
        for level, block in enumerate(getattr(unet, f"{way}_blocks")):
            here = f"{way}_blocks.{level}"
            for layer in range(len(block.resnets)):
                places[f"{here}.resnets.{layer}"] = f"{side}_blocks.{index}.0"
                places[f"{here}.attentions.{layer}"] = f"{side}_blocks.{index}.1"
                index += 1
            if way == "up":  # beside the last layer
                behind = 2 if hasattr(block, "attentions") else 1
                places[f"{here}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{behind}.conv"
            elif block.downsamplers:  # a block of its own
                places[f"{here}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
                index += 1
    return places
