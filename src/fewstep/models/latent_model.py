"""Image models in the latent space of an autoencoder, conditioned on text: SD 1.x, 2.x and SDXL."""

from __future__ import annotations  # the pipelines are imported only where one is loaded

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Generator, Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.parameterizations import Parameterization, eps, v, x0
from fewstep.diffusion.schedules import VP
from fewstep.models.autoencoder import encode_images, latent_space
from fewstep.models.image_model import Asked, ImageModel, to_images
from fewstep.networks.adapters import TextUNet
from fewstep.networks.text import SDText, SDXLText

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline, StableDiffusionXLPipeline

EMBEDDINGS = ("text", "pooled")
Part = TypeVar("Part", bound=nn.Module)
PARAMETERIZATIONS = {"epsilon": eps, "v_prediction": v, "sample": x0}


class LatentModel(ImageModel):
    """x0 is a latent (C, H, W): the autoencoder's sample times its scaling factor. Made of a diffusers pipeline."""

    kind: Literal["text"] = "text"
    channels = 3

    def __init__(
        self, pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, timesteps: list[float] | None = None
    ):
        self.pipeline, self.timesteps = pipeline, timesteps
        self.autoencoder = pipeline.vae.eval().requires_grad_(False)
        size = pipeline.unet.config.sample_size
        self.shape: tuple[int, ...] = (pipeline.unet.config.in_channels, size, size)
        self.conditioner = make_conditioner(pipeline).eval().requires_grad_(False)
        schedule, parameterization = read_scheduler(pipeline.scheduler)
        self.denoiser = Denoiser(TextUNet(pipeline.unet).eval(), schedule, parameterization)

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.shape[-1] * self.pipeline.vae_scale_factor

    @property
    def bottleneck(self) -> str:
        """The middle of the UNet, as in the official system (spec, 1.4)."""
        return "unet.mid_block"

    @property
    def null_condition(self) -> Condition:
        with torch.no_grad():
            return self._here(self.conditioner).null_condition()

    @property
    def fingerprint(self) -> str:
        """A hash of what its samples are a function of, text encoders included."""
        return f"{super().fingerprint}-{self.conditioner.fingerprint()}"

    @property
    def latent_space(self) -> dict[str, Any]:
        """What latents on disk must agree in: the autoencoder's fingerprint, their shape, the images' size."""
        return latent_space(self.pipeline.vae, self.shape, self.image_size)  # as loaded, whatever a run encodes in

    @torch.no_grad()
    def text_condition(self, prompts: list[str]) -> Condition:
        """The condition of prompts, on the model's device."""
        return self._here(self.conditioner)(prompts)

    def encode_condition(self, batch: dict[str, Any]) -> Condition:
        """The condition of {"caption": [B strings]}, or of their embeddings {"text": ..., "pooled": ...}; else {}."""
        if "text" in batch:
            return self.conditioner.complete({k: batch[k].to(self.device) for k in EMBEDDINGS if k in batch})
        return self.text_condition(batch["caption"]) if "caption" in batch else {}

    def draw_condition(self, given: Condition, num: int, draws: Generator) -> Condition:
        """The `num` prompts, or captions of the real images, as the released 4-step SDXL run had it (spec, 1.5)."""
        return dict(given)

    def drop_condition(self, condition: Condition, probability: float, draws: Generator) -> Condition:
        """The condition with this share of the samples replaced by the null condition."""
        size = len(condition["text"])
        dropped = torch.rand(size, generator=draws, device=draws.device) < probability
        null = self.null_condition if probability else {}
        return condition | {
            key: torch.where(dropped.reshape(-1, *(1,) * (value.ndim - 1)), value, condition[key])
            for key, value in null.items()
        }

    def encode_in(self, dtype: torch.dtype) -> None:
        if dtype != torch.float32:  # copies: the pipeline keeps, and `save` writes, the weights as they were loaded
            self.autoencoder = copy.deepcopy(self.autoencoder).to(dtype)
            self.conditioner = copy.deepcopy(self.conditioner).to(dtype)

    def _here(self, part: Part) -> Part:
        """The autoencoder or the conditioner, on the denoiser's device."""
        moved = next(part.parameters()).device != self.device
        return part.to(self.device) if moved else part

    def release(self) -> None:
        """Sends autoencoder and text encoders back to the CPU, until they are used again.

        For behind what uses them once: making the roles, caching latents and embeddings, a grid of samples.
        """
        self.autoencoder.to("cpu")
        self.conditioner.to("cpu")

    def conditions(self, indices: range, asked: Asked = None) -> Condition:
        """The prompts in turn, each embedded once."""
        wanted: Sequence[Any] = [""] if asked is None else asked
        prompts = [wanted[index % len(wanted)] for index in indices]
        number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([number[prompt] for prompt in prompts], device=self.device)
        return {key: value[rows] for key, value in self.text_condition(list(number)).items()}

    def encode_x0(self, batch: dict[str, Any], draws: Generator) -> Tensor:
        """{"latent": (B, C, H, W)} as it is, or {"image": uint8 (B, 3, R, R)} encoded with noise from `draws`."""
        if "latent" in batch:
            return batch["latent"].to(self.device).float()
        noise = torch.randn(len(batch["image"]), *self.shape, generator=draws, device=draws.device)
        return self.encode_images(batch["image"], noise)

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Latents of uint8 images (B, 3, R, R) by unit noise (B, C, h, w)."""
        return encode_images(self._here(self.autoencoder), images, noise)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, C, H, W) -> uint8 images (B, 3, 8H, 8W) for SD and SDXL."""
        return to_images(self.decode_pixels(x0))

    def decode_pixels(self, x0: Tensor) -> Tensor:
        latents = (x0 / self.autoencoder.config.scaling_factor).to(self.autoencoder.dtype)
        return self._here(self.autoencoder).decode(latents, return_dict=False)[0].float()

    def save_frozen(self, folder: Path) -> None:
        """Everything of the pipeline but the trained network."""
        for name, component in self.pipeline.components.items():
            if name != self.part and component is not None:
                component.save_pretrained(folder / name)
        self.pipeline.save_config(folder)

    def description(self) -> dict[str, Any]:
        return {"family": "latent", "timesteps": self.timesteps}


def make_conditioner(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> SDText | SDXLText:
    """The text conditioner of a pipeline's own tokenizers and encoders."""
    if "text_encoder_2" in pipeline.components:
        tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        return SDXLText(tokenizers, encoders, pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    return SDText(pipeline.tokenizer, pipeline.text_encoder)


def read_scheduler(scheduler: SchedulerMixin) -> tuple[VP, Parameterization]:
    """Schedule (with zero terminal SNR where the scheduler has it) and parameterization of any VP scheduler."""
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler.from_config(scheduler.config)
    return VP(ddim.alphas_cumprod), PARAMETERIZATIONS[ddim.config.prediction_type]
