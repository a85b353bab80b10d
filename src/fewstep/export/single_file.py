"""An SD 1.x, SD 2.x or SDXL model as one safetensors file in the names of the original releases, which UIs read."""

import json
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.embedded.small_models import SCHEDULE
from fewstep.errors import UserError
from fewstep.export.weights import planned, write_safetensors
from fewstep.files import written_whole
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pipeline import library_class
from fewstep.models.loading.single_file import TIMESTEPS, UNET, Weights
from fewstep.models.original_names import NAMES, T, of_unet, renamed
from fewstep.networks.codec import Codec
from fewstep.networks.families.stable_diffusion import vp_schedule

SCALES = (0.18215, 0.13025)
"""Of latents, in which readers of a file take SD and SDXL to be."""


def write_single_file(model: LatentModel, path: Path, metadata: dict[str, str], dtype: torch.dtype) -> None:
    """Writes the model, whole or not at all, tensor by tensor, so that it is never held twice.

    `metadata` is kept in the file's header, beside the student's timesteps and the model specification's own keys
    (github.com/Stability-AI/ModelSpec). Raises UserError if the original layout can't say what the model is.
    """
    weights = original_weights(model) | {flag: torch.empty(0) for flag in _flags(model)}
    facts = {"format": "pt"} | _specification(model, path.stem)
    if model.timesteps:
        facts[TIMESTEPS] = json.dumps(model.timesteps)
    with written_whole(path) as temporary:
        write_safetensors(temporary, planned(weights, dtype), weights.__getitem__, facts | metadata)


def original_weights(model: LatentModel) -> Weights:
    """The model's tensors, in place, under their names in the original releases."""
    pipeline = model.pipeline
    first = _text_state(pipeline.text_encoder)  # OpenAI's CLIP keeps its names
    unet = model.network
    weights = of_unet(unet, unet.state_dict(), UNET)
    weights |= _vae(pipeline.vae)
    if "text_encoder_2" in pipeline.components:
        weights |= _prefixed("conditioner.embedders.0.transformer.text_model.", first)
        return weights | _openclip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    if is_openclip(pipeline.text_encoder):
        return weights | _openclip(pipeline.text_encoder, "cond_stage_model.model.")
    return weights | _prefixed("cond_stage_model.transformer.text_model.", first)


def is_openclip(text_encoder: Any) -> bool:
    """Of SD 2.x, told by its activation: OpenAI's CLIP has `quick_gelu`."""
    return bool(text_encoder.config.hidden_act == "gelu")


def _vae(vae: Any) -> Weights:
    """Levels are counted from the image on both sides; attention is of 1x1 convolutions."""
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, way, blocks in (("encoder", "down", vae.encoder.down_blocks), ("decoder", "up", vae.decoder.up_blocks)):
        places |= {f"{side}.{name}": f"{side}.{original}" for name, original in NAMES["vae_starts"].items()}
        for number, block in enumerate(blocks):
            level = number if side == "encoder" else len(blocks) - 1 - number
            here, there = f"{side}.{way}_blocks.{number}", f"{side}.{way}.{level}"
            places[f"{here}.{way}samplers.0.conv"] = f"{there}.{way}sample.conv"
            for layer in range(len(block.resnets)):
                places[f"{here}.resnets.{layer}"] = f"{there}.block.{layer}"
    weights = renamed(vae, vae.state_dict(), "first_stage_model.", places, NAMES["vae_layers"])
    return {name: t[:, :, None, None] if ".attn_1." in name and t.ndim == 2 else t for name, t in weights.items()}


def _prefixed(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    return {prefix + name: value for name, value in values.items()}


def _text_state(encoder: nn.Module) -> Weights:
    """What transformers keeps flat has one word less in its names."""
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def _openclip(encoder: Any, prefix: str) -> Weights:
    """OpenCLIP: q, k and v in one matrix, the projection transposed."""
    state = _text_state(encoder)
    ends = {"positional_embedding": state.pop("embeddings.position_embedding.weight")}
    if "text_projection.weight" in state:
        ends["text_projection"] = state.pop("text_projection.weight").T
    for name in [name for name in state if ".q_proj." in name]:
        joined = [state.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(joined)
    places = NAMES["openclip_starts"] | {
        f"encoder.layers.{index}": f"transformer.resblocks.{index}" for index in range(encoder.config.num_hidden_layers)
    }
    return _prefixed(prefix, ends) | renamed(encoder, state, prefix, places, NAMES["openclip_layers"])


def _flags(model: LatentModel) -> list[str]:
    """Empty tensors that say v-prediction and zero terminal SNR; raises UserError for what no file can say."""
    where, vae = "which a single file can't say; export the model as a diffusers folder", model.pipeline.vae
    if Codec(vae).shift is not None:
        raise UserError(f"vae: its latents are shifted (shift_factor, latents_mean, latents_std), {where}")
    usual_scale = SCALES["text_encoder_2" in model.pipeline.components]
    if not math.isclose(vae.config.scaling_factor, usual_scale, rel_tol=1e-3):
        raise UserError(f"vae: its scaling_factor is {vae.config.scaling_factor:g}, not {usual_scale}, {where}")
    config = model.pipeline.scheduler.config
    prediction, zero_snr = config.prediction_type, bool(config.get("rescale_betas_zero_snr"))
    if prediction == "sample":
        raise UserError("prediction_type sample: a single file can't say so; export the model as a diffusers folder")
    usual = library_class("DDIMScheduler")(**SCHEDULE, rescale_betas_zero_snr=zero_snr)
    ours, theirs = (vp_schedule(scheduler.config)[0].alphas_cumprod for scheduler in (model.pipeline.scheduler, usual))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4):
        raise UserError("noise schedule: not Stable Diffusion's, which readers of a single file take; export a folder")
    return ["v_pred"] * (prediction == "v_prediction") + ["ztsnr"] * zero_snr


def _specification(model: LatentModel, title: str) -> dict[str, str]:
    pipeline = model.pipeline
    prediction = pipeline.scheduler.config.prediction_type
    version = version_of(pipeline.components, pipeline.text_encoder, prediction)
    return specification(version, prediction, model.image_size, title)


def version_of(parts: Container[str], text_encoder: Any, prediction: str) -> str:
    """What the model specification calls a release: SD 2.x has an OpenCLIP text encoder."""
    if "text_encoder_2" in parts:
        return "xl-v1-base"
    if not is_openclip(text_encoder):
        return "v1"
    return "v2-768-v" if prediction == "v_prediction" else "v2-512"


def specification(version: str, prediction: str, image_size: int, title: str, kind: str = "") -> dict[str, str]:
    """What the header says by the model specification of Stability AI; `kind` is `/lora` of one."""
    facts = {"sai_model_spec": "1.0.0", "title": title, "architecture": f"stable-diffusion-{version}{kind}"}
    facts |= {"prediction_type": "v" if prediction == "v_prediction" else "epsilon"}
    facts |= {"implementation": NAMES["repositories"][version], "resolution": f"{image_size}x{image_size}"}
    return _prefixed("modelspec.", facts)
