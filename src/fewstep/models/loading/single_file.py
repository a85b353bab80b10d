"""One safetensors file of an SD 1.x, SD 2.x or SDXL fine-tune, in the names of the original releases."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from fewstep.errors import UserError, brief

Weights = dict[str, Tensor]
UNET = "model.diffusion_model."
TIMESTEPS = "fewstep.timesteps"  # in the header of a student's file: JSON
FAMILIES = "SD 1.x, SD 2.x and SDXL"
OTHERS = {  # a piece of a name -> what holds such names
    "lora": "a LoRA, not a whole model",
    ".alpha": "a LoRA, not a whole model",
    "double_blocks.": "of the FLUX family",
    "joint_blocks.": "of the SD3 family",
    "double_stream_blocks.": "of the HiDream family",
    "control_model.": "a ControlNet",
    "mid_block.": "a part of a diffusers folder; name the whole folder",
}
PREFIXES = {  # of the parts in the file
    "StableDiffusionPipeline": {"unet": UNET, "vae": "first_stage_model.", "text_encoder": "cond_stage_model."},
    "StableDiffusionXLPipeline": {
        "unet": UNET,
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
}


def read(path: Path) -> Weights:
    """All tensors of the file; raises UserError unless it is whole and holds an SD or SDXL model."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            _check_family(path, names)
            return {name: file.get_tensor(name) for name in names}
    except UserError:
        raise
    except Exception as error:  # a cut file, a pickle under this name, no file at all
        raise UserError(f"{path}: not a whole safetensors file ({brief(error)}); fetch it again") from error


def read_timesteps(path: Path) -> list[float] | None:
    """The student's timesteps by the file's header; None where it says nothing of them."""
    with safe_open(path, framework="pt") as file:
        timesteps = json.loads((file.metadata() or {}).get(TIMESTEPS, "null"))
    return timesteps and [float(t) for t in timesteps]


def _check_family(path: Path, names: list[str]) -> None:
    if f"{UNET}input_blocks.0.0.weight" not in names:
        found = [text for piece, text in OTHERS.items() if any(piece in name.lower() for name in names)]
        what = found[0] if found else "without the UNet of a diffusion model"
        raise UserError(f"{path}: {what}; supported are whole models of {FAMILIES}")


def pipeline_name(weights: Weights) -> str:
    """The diffusers class of the file's family: SDXL alone embeds pooled text beside the time."""
    return "StableDiffusionXLPipeline" if f"{UNET}label_emb.0.0.weight" in weights else "StableDiffusionPipeline"


def base_model(weights: Weights) -> str:
    """The hub id of the release that the file was most likely tuned from, by family and width of the text."""
    if pipeline_name(weights) == "StableDiffusionXLPipeline":
        return "stabilityai/stable-diffusion-xl-base-1.0"
    widths = {tensor.shape[-1] for name, tensor in weights.items() if name.endswith("attn2.to_k.weight")}
    return "stabilityai/stable-diffusion-2-1" if 1024 in widths else "stable-diffusion-v1-5/stable-diffusion-v1-5"


def parts_in(weights: Weights) -> list[str]:
    """The parts that the file holds; fine-tunes may leave out the VAE and the text encoders."""
    prefixes = PREFIXES[pipeline_name(weights)]
    return [part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in weights)]


def scheduler_changes(weights: Weights) -> dict[str, Any]:
    """What fine-tunes say by empty tensors: `v_pred`, v-prediction; `ztsnr`, zero terminal SNR."""
    changes: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in weights else {}
    return changes | ({"rescale_betas_zero_snr": True} if "ztsnr" in weights else {})


def convert(weights: Weights, part: str, model: nn.Module) -> Weights:
    """The file's tensors of a part under the names of `model`, that part in diffusers."""
    from diffusers.loaders import single_file_utils as diffusers

    if part == "unet":
        return diffusers.convert_ldm_unet_checkpoint(weights, model.config)
    if part == "vae":
        return diffusers.convert_ldm_vae_checkpoint(weights, model.config)
    stem = PREFIXES[pipeline_name(weights)][part]
    if any(name.startswith(f"{stem}model.") for name in weights):
        found = diffusers.convert_open_clip_checkpoint(model, weights, prefix=f"{stem}model.")
    else:
        found = diffusers.convert_ldm_clip_checkpoint(weights, remove_prefix=f"{stem}transformer.")
    wrapped = hasattr(model, "text_model")  # what transformers keeps flat has one word less in its names
    return found if wrapped else {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
