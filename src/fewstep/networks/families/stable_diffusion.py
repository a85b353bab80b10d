"""Stable Diffusion 1.x and 2.x, and SDXL: a UNet on the latents of an autoencoder, conditioned on CLIP's text."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.parameterizations import Parameterization, eps, v, x0
from fewstep.diffusion.schedules import VP
from fewstep.errors import UserError
from fewstep.networks.codec import Codec
from fewstep.networks.family import Family, UNetAdapter
from fewstep.networks.settings import MAX_SIZE
from fewstep.networks.text import TextConditioner, tokenize

PARAMETERIZATIONS = {"epsilon": eps, "v_prediction": v, "sample": x0}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


class TextUNet(UNetAdapter):
    """A `UNet2DConditionModel` of the SD and SDXL family on integer times 0..999.

    x (B, C, H, W), t (B,), condition {"text": (B, L, E)} and for SDXL "pooled" (B, P), "time_ids" (B, 6).
    """

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype, added = self.unet.dtype, None
        if "pooled" in condition:  # time_ids are pixels, which bfloat16 would round
            added = {"text_embeds": condition["pooled"].to(dtype), "time_ids": condition["time_ids"]}
        text = condition["text"].to(dtype)  # (B, L, E)
        output: Tensor = self.unet(x.to(dtype), t, text, added_cond_kwargs=added, return_dict=False)[0]
        return output  # (B, C, H, W)


class SDText(TextConditioner):
    """CLIP-L's last hidden state, {"text": (B, L, E)}; the null condition is the embedding of ""."""

    keeps = ("text",)

    def __init__(self, pipeline: Any, image_size: int):
        super().__init__((pipeline.tokenizer,), (pipeline.text_encoder,))

    def embed(self, prompts: list[str]) -> Condition:
        """{"text": (B, L, E)}."""
        (encoder,) = self.encoders
        # the last state has its final norm, as SD wants it
        return {"text": encoder(tokenize(self.tokenizers[0], prompts, encoder))[0]}


class SDXLText(TextConditioner):
    """CLIP-L and OpenCLIP-bigG: {"text": (B, L, E), "pooled": (B, P), "time_ids": (B, 6)}.

    `text` joins the penultimate hidden states, `pooled` is bigG's projected embedding, `time_ids` is SDXL's
    micro-conditioning for whole square images, (R, R, 0, 0, R, R) with R the size in pixels (spec, 1.1). The null
    condition is zeros, or the embedding of "" where the pipeline says so (`force_zeros_for_empty_prompt` false).
    """

    keeps = ("text", "pooled")

    def __init__(self, pipeline: Any, image_size: int):
        super().__init__((pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2))
        self.image_size, self.zero_null = image_size, bool(pipeline.config.force_zeros_for_empty_prompt)

    def embed(self, prompts: list[str]) -> Condition:
        """{"text": (B, L, E), "pooled": (B, P)}."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            output = encoder(tokenize(tokenizer, prompts, encoder), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])  # (B, L, 768), then (B, L, 1280)
        return {"text": torch.cat(hidden, dim=-1), "pooled": output[0]}  # output is bigG's, the last of the two

    def complete(self, embeddings: Condition) -> Condition:
        """Adds `time_ids`."""
        text = embeddings["text"]
        # (B, 6): original height and width, crop from top and left, target height and width; filled in where they are,
        # for a training step must not wait for a copy.
        time_ids = torch.zeros(len(text), 6, device=text.device)
        time_ids[:, :2] = time_ids[:, 4:] = float(self.image_size)
        return embeddings | {"time_ids": time_ids}

    def null_condition(self) -> Condition:
        """(1, ...) tensors for guidance; without time_ids, which stay the condition's own."""
        empty = self.embed([""])  # also where it is zeros: for the shapes
        return {key: torch.zeros_like(value) for key, value in empty.items()} if self.zero_null else empty


def vp_schedule(config: Any) -> tuple[VP, Parameterization]:
    """Schedule (of zero terminal SNR where it says so) and parameterization of a VP scheduler; UserError for others."""
    from diffusers import DDIMScheduler

    name, betas = config.get("_class_name", "scheduler"), config.get("beta_schedule")
    other = {  # that some classes can be told to be, and what they are then
        "on continuous noise levels (timestep_type)": config.get("timestep_type") == "continuous",
        "on noise levels of its own (sigma_min, sigma_max)": config.get("sigma_min") or config.get("sigma_max"),
        "on flow sigmas (use_flow_sigmas)": config.get("use_flow_sigmas"),
        "on betas of its own (snr_shift_scale)": config.get("snr_shift_scale") not in (None, 1.0),
        f"on betas of another kind ({betas})": betas not in BETAS and config.get("trained_betas") is None,
    }
    if found := [what for what, true in other.items() if true]:
        what = "without betas" if "beta_schedule" not in config else found[0]
        raise UserError(f"scheduler: a {name} {what}; supported are schedules of betas, such as DDIMScheduler's")
    if (prediction := config.get("prediction_type", "epsilon")) not in PARAMETERIZATIONS:
        raise UserError(f"scheduler: prediction_type {prediction!r}; supported are {', '.join(PARAMETERIZATIONS)}")
    ddim = DDIMScheduler.from_config(config)  # of any class, for all VP schedulers make their betas alike
    return VP(ddim.alphas_cumprod), PARAMETERIZATIONS[prediction]


def _check(pipeline: Any) -> None:
    """Refuses UNets that take more than noise, time and text, and parts that don't fit each other."""
    config, added = pipeline.unet.config, "text_time" if "text_encoder_2" in pipeline.components else None
    takes, gives, latent = config.in_channels, config.out_channels, pipeline.vae.config.latent_channels
    if not takes == gives == latent:
        what = " (inpainting and editing models take a picture, too)" if takes > gives else ""
        what += f", where the autoencoder has {latent}; name a text-to-image model"
        raise UserError(f"unet: takes {takes} channels and gives {gives}{what}")
    if config.time_cond_proj_dim is not None:
        what = "takes the guidance scale as an input (time_cond_proj_dim), as students of LCM do"
        raise UserError(f"unet: {what}; name the model that it was made from")
    others = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")
    expected = {"addition_embed_type": added, "attention_type": "default", **dict.fromkeys(others)}
    for name, wanted in expected.items():
        if config.get(name) != wanted:
            raise UserError(f"unet: {name} is {config.get(name)!r}, not {wanted!r}; name a text-to-image model")


def _image_size(default: int, pipeline: Any) -> int:
    """The UNet's `sample_size` in pixels; `default` where that is null."""
    size = pipeline.unet.config.sample_size
    if size is None:
        return default
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if not all(type(side) is int and 1 <= side * pipeline.vae_scale_factor <= MAX_SIZE for side in sides):
        raise UserError(f"unet: its sample_size {size!r} is no size of latents, for pictures up to {MAX_SIZE} pixels")
    if len({*sides}) != 1:
        raise UserError(f"unet: its sample_size {sides} is not square; only square pictures are supported")
    return int(sides[0] * pipeline.vae_scale_factor)


def _feature_layer(unet: Any) -> str:
    """The middle, as in the official system (spec, 1.4); the last encoder block of a UNet without one (BK-SDM)."""
    return "unet.mid_block" if unet.mid_block is not None else f"unet.down_blocks.{len(unet.down_blocks) - 1}"


def _codec(ignored: tuple[str, ...], vae: Any) -> Codec:
    """The codec, without what the pipeline's call would leave out when it decodes: pictures would differ there."""
    for name in ignored:
        if vae.config.get(name):
            raise UserError(f"vae: has a {name}, which this pipeline of diffusers leaves out when it decodes")
    return Codec(vae)


def _text(unet: Any, tokens: int) -> Condition:
    """{"text": (1, L, E)} of zeros."""
    return {"text": torch.zeros(1, tokens, unet.config.cross_attention_dim)}


def _text_and_size(unet: Any, tokens: int) -> Condition:
    """{"text": (1, L, E), "pooled": (1, P), "time_ids": (1, 6)} of zeros."""
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return _text(unet, tokens) | {"pooled": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}


SD = Family(
    name="StableDiffusionPipeline",
    part="unet",
    weights={"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"},
    others=("scheduler", "tokenizer"),
    check=_check,
    adapter=TextUNet,
    conditioner=SDText,
    keeps=SDText.keeps,
    example=_text,
    codec=partial(_codec, ("shift_factor", "latents_mean", "latents_std")),
    schedule=vp_schedule,
    image_size=partial(_image_size, 512),
    feature_layer=_feature_layer,
    time_layer="unet.time_embedding",
)
SDXL = replace(
    SD,
    name="StableDiffusionXLPipeline",
    weights={**SD.weights, "text_encoder_2": "CLIPTextModelWithProjection"},
    others=(*SD.others, "tokenizer_2"),
    conditioner=SDXLText,
    keeps=SDXLText.keeps,
    example=_text_and_size,
    codec=partial(_codec, ("shift_factor",)),
    image_size=partial(_image_size, 1024),
)
