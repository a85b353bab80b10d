"""A student as a LoRA file: kohya's layout, which ComfyUI, A1111, Forge, InvokeAI and diffusers read, or diffusers'."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.export.card import Provenance, lora_settings, steps_text
from fewstep.export.single_file import specification
from fewstep.export.weights import converted, planned, write_safetensors
from fewstep.files import written_whole
from fewstep.models.lora_files import write_diffusers_lora
from fewstep.models.original_names import of_unet
from fewstep.networks.lora import LoRA, LowRank

FORMATS = ("kohya", "diffusers")
BASES = {"xl-v1-base": "sdxl_base_v1-0", "v1": "sd_v1", "v2-512": "sd_v2", "v2-768-v": "sd_v2_v"}  # as kohya has them


def write_lora(
    path: Path, lora: LoRA, network: Any, part: str, told: Mapping[str, str], layout: str, dtype: torch.dtype
) -> None:
    """Writes the file whole or not at all, with `told` in its header; only names and shapes of `network` are used.

    Raises UserError for kohya's layout where the network is none of SD or SDXL.
    """
    if layout == "kohya" and not getattr(network, "config", {}).get("cross_attention_dim"):
        raise UserError("--format kohya: is a layout of SD and SDXL; for a pixel model write --format diffusers")
    with written_whole(path) as temporary:
        if layout == "diffusers":
            write_diffusers_lora(temporary, _baked(lora, dtype), part, told)
        else:
            tensors = kohya_tensors(lora, network)
            plan = planned(tensors, dtype) | {n: t.to("meta") for n, t in tensors.items() if n.endswith(".alpha")}
            write_safetensors(temporary, plan, tensors.__getitem__, {"format": "pt", **told})


def _baked(lora: LoRA, dtype: torch.dtype) -> dict[str, LowRank]:
    """With alpha = rank, in `dtype`."""
    plain = {name: change.with_alpha(change.rank) for name, change in lora.items()}
    return {
        name: replace(each, down=converted(name, each.down, dtype), up=converted(name, each.up, dtype))
        for name, each in plain.items()
    }


def kohya_tensors(lora: LoRA, network: Any) -> dict[str, Tensor]:
    """In kohya's names: of SDXL the original ones, of SD those of diffusers, as its own trainer has it.

    diffusers reads SD 1.x in no other names, and A1111 drops a layer of SDXL in any other.
    """
    places = {name: name for name in lora}
    if network.config.get("addition_embed_type") == "text_time":
        found = of_unet(network, {f"{name}.weight": name for name in lora})
        places = {name: place.removesuffix(".weight") for place, name in found.items()}
    tensors: dict[str, Tensor] = {}
    for name, change in lora.items():
        stem = "lora_unet_" + places[name].replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": change.down, f"{stem}.lora_up.weight": change.up}
        tensors[f"{stem}.alpha"] = torch.tensor(float(change.alpha))
    return tensors


def header(path: Path, lora: LoRA, made: Provenance, version: str, prediction: str, image_size: int) -> dict[str, str]:
    """What UIs look for in the header: A1111 takes a file without kohya's base version for one of SD 1.x.

    `version` is of `version_of`, and `prediction` what the base predicts.
    """
    first = next(iter(lora.values()))
    steps = f"few-step student (fewstep {made.version}): {steps_text(len(made.timesteps))}, LCM, CFG 1"
    facts = {
        "network_module": "networks.lora",
        "network_dim": f"{first.rank}",
        "network_alpha": f"{first.alpha:g}",
        "base_model_version": BASES[version],
        "v2": str(version.startswith("v2")),
        "output_name": path.stem,
        "sd_model_name": made.teacher,
        "training_comment": steps,
    }
    facts |= {"v_parameterization": "True"} if prediction == "v_prediction" else {}
    told = {f"ss_{name}": fact for name, fact in facts.items()} | {"modelspec.description": steps}
    told |= specification(version, prediction, image_size, path.stem, "/lora") | {"modelspec.license": made.license}
    return told | {"modelspec.usage_hint": lora_settings(path, made.timesteps, prediction, made.best)} | made.metadata()
