"""Image models in the latent space of an autoencoder, conditioned on text; made of a pipeline of diffusers."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.errors import UserError
from fewstep.models.image_model import Asked, ImageModel
from fewstep.networks.codec import Codec, to_images
from fewstep.networks.families import FAMILIES
from fewstep.networks.settings import MAX_SIZE
from fewstep.runtime.graphs import never_in_a_graph
from fewstep.seeding import Draws

AT_ONCE = 2**16  # numbers of latents through the autoencoder: one of SDXL, whose decoding takes 2.4 GB in bfloat16
Part = TypeVar("Part", bound=nn.Module)


def at_once(shape: Sequence[int]) -> int:
    """How many pictures of latents of that shape (C, h, w) the autoencoder takes at once."""
    return max(1, AT_ONCE // math.prod(shape))


def _cast(part: Part, dtype: torch.dtype) -> Part:
    """A copy in `dtype`, cast tensor by tensor: no second one in float32 comes before it."""
    copies = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in part.parameters()}
    return copy.deepcopy(part, copies).to(dtype)  # of buffers, which are small


class LatentModel(ImageModel):
    """x0 is a latent (C, h, w), as the family's codec makes it of the autoencoder's sample.

    `base_model` is the id on the hub that it came from, or what it is a student of. Raises UserError for what the
    pipeline's files say and its family does not know.
    """

    kind: Literal["text"] = "text"
    channels = 3

    def __init__(
        self,
        pipeline: Any,
        timesteps: list[float] | None = None,
        image_size: int | None = None,
        base_model: str | None = None,
    ):
        self.pipeline, self.timesteps, self.family = pipeline, timesteps, FAMILIES[type(pipeline).__name__]
        self.base_model = base_model
        self.family.check(pipeline)
        self.autoencoder = pipeline.vae.eval().requires_grad_(False)
        self.image_size = image_size or self.family.image_size(pipeline)
        if not 1 <= self.image_size <= MAX_SIZE:
            raise UserError(f"image_size {self.image_size}: pictures have up to {MAX_SIZE} pixels a side")
        self.shape = self.codec.shape(self.image_size)
        self.conditioner = self.family.conditioner(pipeline, self.image_size).eval().requires_grad_(False)
        adapter = self.family.adapter(getattr(pipeline, self.part)).eval()
        self.denoiser = Denoiser(adapter, *self.family.schedule(pipeline.scheduler.config))

    @property
    def codec(self) -> Codec:
        """Of the autoencoder as it is now: in the dtype and where it is used."""
        return self.family.codec(self.autoencoder)

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
        # as loaded, whatever a run encodes in
        return self.family.codec(self.pipeline.vae).latent_space(self.image_size)

    @torch.no_grad()
    def text_condition(self, prompts: list[str]) -> Condition:
        """The condition of prompts, on the model's device."""
        return self._here(self.conditioner)(prompts)

    def encode_condition(self, batch: dict[str, Any]) -> Condition:
        """The condition of {"caption": [B strings]}, or of their embeddings {"text": ..., ...}; else {}."""
        if kept := {name: batch[name].to(self.device) for name in self.conditioner.keeps if name in batch}:
            return self.conditioner.complete(kept)
        return self.text_condition(batch["caption"]) if "caption" in batch else {}

    def draw_condition(self, given: Condition, draws: Draws) -> Condition:
        """The prompts, or captions of the real images, as the released 4-step SDXL run had it (spec, 1.5)."""
        return dict(given)

    def encode_in(self, dtype: torch.dtype) -> None:
        if dtype != torch.float32:  # copies: the pipeline keeps, and `save` writes, the weights as they were loaded
            self.autoencoder, self.conditioner = _cast(self.autoencoder, dtype), _cast(self.conditioner, dtype)

    def _here(self, part: Part) -> Part:
        """The autoencoder or the conditioner, on the denoiser's device."""
        never_in_a_graph("autoencoder and text encoders come and go; keep latents and embeddings")
        moved = next(part.parameters()).device != self.device
        return part.to(self.device) if moved else part

    def release(self) -> None:
        """Behind what uses autoencoder and text encoders once: roles, caches of latents, a grid of samples."""
        self.autoencoder.to("cpu")
        self.conditioner.to("cpu")

    def conditions(self, indices: range, asked: Asked = None) -> Condition:
        """The prompts in turn, each embedded once."""
        wanted: Sequence[Any] = [""] if asked is None else asked
        prompts = [wanted[index % len(wanted)] for index in indices]
        number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([number[prompt] for prompt in prompts], device=self.device)
        return {key: value[rows] for key, value in self.text_condition(list(number)).items()}

    def encode_x0(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """{"latent": (B, C, H, W)} as it is, or {"image": uint8 (B, 3, R, R)} encoded with noise from `draws`."""
        if "latent" in batch:
            latent: Tensor = batch["latent"].to(self.device)
            return latent.float()
        return self.encode_images(batch["image"], draws.randn(*self.shape))

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Latents of uint8 images (B, 3, R, R) by unit noise (B, C, h, w)."""
        self._here(self.autoencoder)
        pairs = zip(images.split(self._at_once), noise.split(self._at_once), strict=True)
        return torch.cat([self.codec.encode(*each) for each in pairs])

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        return torch.cat([to_images(self.decode_pixels(each)) for each in x0.split(self._at_once)])

    @property
    def _at_once(self) -> int:
        return at_once(self.shape)

    def decode_pixels(self, x0: Tensor) -> Tensor:
        self._here(self.autoencoder)
        return self.codec.decode(x0)

    def save_frozen(self, folder: Path) -> None:
        super().save_frozen(folder)
        for name, component in self.pipeline.components.items():
            if name != self.part and component is not None:
                component.save_pretrained(folder / name)
        self.pipeline.save_config(folder)

    def description(self) -> dict[str, Any]:
        base = {"base_model": self.base_model} if self.base_model else {}
        return {"family": "latent", "timesteps": self.timesteps, "image_size": self.image_size} | base
