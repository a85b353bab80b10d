"""One safetensors file of an SD 1.x, SD 2.x or SDXL fine-tune, in the names of the original releases."""

import json
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.loading.files import whole
from fewstep.models.loading.weights import check_names, check_stored

Weights = dict[str, Tensor]
UNET = "model.diffusion_model."
FIRST = "input_blocks.0.0.weight"
UNET_ALONE = re.compile(r"(diffusion_model\.)?(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.")
EDITORS = {9: "inpainting models", 8: "editing models (InstructPix2Pix)"}
HARMLESS = re.compile(  # averages and tables of training, flags, and what merges of the first version drag along
    r"(^|\.)model_ema\.|^(v_pred|ztsnr|betas|logvar|lvlb_weights|scale_factor|denoiser\.sigmas|embedding_manager\..*)$|"
    r"^(log_one_minus_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_|sqrt_)?alphas_cumprod(_prev)?$|"
    r"^posterior_(variance|log_variance_clipped|mean_coef[12])$|^first_stage_model\.loss\.|^(global_step|epoch)$"
)
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
TIMESTEPS = "fewstep.timesteps"  # in the header of a student's file: JSON
FAMILIES = "SD 1.x, SD 2.x and SDXL"
_LORA = "a LoRA, not a whole model (`fewstep sample BASE --lora FILE` puts it into one)"
OTHERS = {  # a piece of a name -> what holds such names
    "lora": _LORA,
    ".alpha": _LORA,
    "double_blocks.": "of the FLUX family",
    "joint_blocks.": "of the SD3 family",
    "double_stream_blocks.": "of the HiDream family",
    "control_model.": "a ControlNet",
    "edm_": "an EDM model, on continuous noise levels",
    "mid_block.": "a part of a diffusers folder; name the whole folder",
}
_BOTH, _SDXL_TEXT = {"unet": UNET, "vae": "first_stage_model."}, "conditioner.embedders."
PREFIXES = {  # of the parts in the file
    "StableDiffusionPipeline": _BOTH | {"text_encoder": "cond_stage_model."},
    "StableDiffusionXLPipeline": _BOTH | {"text_encoder": f"{_SDXL_TEXT}0.", "text_encoder_2": f"{_SDXL_TEXT}1."},
}


def header(path: Path) -> Weights:
    """Its tensors without memory, by the file's header; raises UserError unless it holds an SD or SDXL model."""
    with whole(path, "not a whole safetensors file", "fetch it again"):  # cut, a pickle under this name, no file at all
        stored = check_stored(path)
        names = {_original_name(name, stored): tensor for name, tensor in stored.items()}
        _check_family(path, names)
    return names


def read(path: Path) -> Weights:
    """All tensors of the file; raises UserError unless it is whole and holds an SD or SDXL model, and nothing else."""
    header(path)
    with whole(path, "not a whole safetensors file", "fetch it again"), safe_open(path, framework="pt") as file:
        stored = {*file.keys()}
        weights = {_original_name(name, stored): file.get_tensor(name) for name in stored}
        prefixes = tuple(PREFIXES[pipeline_name(weights)].values())
        check_names(path, (), [name for name in weights if not name.startswith(prefixes) and not HARMLESS.search(name)])
    return weights


def read_timesteps(path: Path) -> Any:
    """The student's timesteps by the file's header, unchecked; None where it says nothing of them."""
    with safe_open(path, framework="pt") as file:
        told = (file.metadata() or {}).get(TIMESTEPS, "null")
    try:
        return json.loads(told)
    except ValueError as error:
        raise UserError(f"{path}: {TIMESTEPS} {told!r} in its header is no list of numbers") from error


def _original_name(name: str, names: Container[str]) -> str:
    """The name in a whole model: ComfyUI's files of the UNet alone lack the prefix, or half of it."""
    if f"{UNET}{FIRST}" in names or not UNET_ALONE.match(name):
        return name
    return UNET + name.removeprefix("diffusion_model.")


def _check_family(path: Path, names: Mapping[str, Tensor]) -> None:
    if f"{UNET}{FIRST}" not in names or any(name.startswith("edm_") for name in names):
        found = [text for piece, text in OTHERS.items() if any(piece in name.lower() for name in names)]
        what = found[0] if found else "without the UNet of a diffusion model"
        raise UserError(f"{path}: {what}; supported are whole models of {FAMILIES}")
    if (channels := names[f"{UNET}{FIRST}"].shape[1]) in EDITORS:
        raise UserError(f"{path}: takes {channels} channels, as {EDITORS[channels]} do; name a text-to-image model")
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise UserError(f"{path}: an SDXL refiner, which goes on with pictures of another model; name a whole SDXL")


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


def scheduler_changes(path: Path, weights: Weights, prediction_type: str | None) -> dict[str, Any]:
    """What fine-tunes say of their scheduler: the prediction type in the header, and by empty tensors.

    These are `v_pred`, v-prediction, and `ztsnr`, zero terminal SNR. The user's prediction type has the last word;
    raises UserError where the file is of two minds without it.
    """
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    told = {header[key] for key in ("modelspec.prediction_type", "modelspec.predict_key") if header.get(key)}
    said = {PREDICTIONS.get(each.lower(), each) for each in told} | ({"v_prediction"} if "v_pred" in weights else set())
    if prediction_type:
        said = {prediction_type}
    if len(said) > 1 or not said <= {*PREDICTIONS.values(), "sample"}:
        advice = "choose epsilon or v_prediction (--prediction-type, in a recipe teacher_prediction_type)"
        raise UserError(f"{path}: says of its prediction type {' and '.join(sorted(said))}; {advice}")
    changes: dict[str, Any] = {"prediction_type": said.pop()} if said else {}
    return changes | ({"rescale_betas_zero_snr": True} if "ztsnr" in weights else {})


def convert(weights: Weights, part: str, model: nn.Module) -> Weights:
    """The file's tensors of a part under the names of `model`, the part in diffusers; the rest as it is."""
    from diffusers.loaders import single_file_utils as diffusers

    stem = PREFIXES[pipeline_name(weights)][part]
    own = {name: tensor for name, tensor in weights.items() if name.startswith(stem) and not HARMLESS.search(name)}
    found: Weights
    if part == "unet":
        found = diffusers.convert_ldm_unet_checkpoint(dict(own), model.config)
    elif part == "vae":
        found = diffusers.convert_ldm_vae_checkpoint(dict(own), model.config)
    elif any(name.startswith(f"{stem}model.") for name in own):
        found = diffusers.convert_open_clip_checkpoint(model, own, prefix=f"{stem}model.")
    else:
        found = diffusers.convert_ldm_clip_checkpoint(own, remove_prefix=f"{stem}transformer.")
    if not hasattr(model, "text_model"):  # what transformers keeps flat has one word less in its names
        found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
    names: Weights = found | _left_over(own, found, getattr(model.config, "num_hidden_layers", 0))
    return names


def _left_over(own: Weights, found: Weights, num_layers: int) -> Weights:
    """What the conversion did not take, by its place in memory; OpenCLIP's layers behind the last are not meant."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    return {
        name: tensor
        for name, tensor in own.items()
        if tensor.untyped_storage().data_ptr() not in taken
        and ".in_proj_" not in name  # queries, keys and values in one, which are copied
        and f".resblocks.{num_layers}." not in name
    }
