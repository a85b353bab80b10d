"""An image model without weights: as much of one as a training step asks for, for plans."""

import copy
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.models.image_model import Asked, ImageModel
from fewstep.networks.family import Family
from fewstep.seeding import Draws


class Outline(ImageModel):
    """Shapes alone: the denoiser's weights are on the meta device, what a step draws and is given on the CPU.

    `condition` is that of one sample (1, ...); `null` its null condition. `autoencoder` is without memory too, where
    there is one, and `encoders` the number of the text encoders' parameters.
    """

    kind: Literal["label", "text"] = "text"
    device: torch.device = torch.device("cpu")  # not that of its parameters

    def __init__(
        self,
        family: Family,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        condition: Condition,
        null: Condition | None,
        autoencoder: nn.Module | None = None,
        encoders: int = 0,
    ):
        self.family, self.denoiser, self.shape, self.timesteps = family, denoiser.eval(), shape, None
        self.condition, self.null, self.autoencoder, self.encoders = condition, null, autoencoder, encoders

    @classmethod
    def of(cls, model: ImageModel) -> Self:
        """What is asked of `model`, which is on the CPU, without its weights."""
        bare = {id(p): nn.Parameter(torch.empty(p.shape, device="meta")) for p in model.denoiser.parameters()}
        condition = {name: value.cpu() for name, value in model.conditions(range(1)).items()}
        return cls(model.family, copy.deepcopy(model.denoiser, bare), model.shape, condition, model.null_condition)

    def fresh(self) -> Self:
        """One to make roles of, which change what they are made of."""
        other = copy.copy(self)
        other.denoiser = copy.deepcopy(self.denoiser)
        return other

    def batch(self, num: int) -> dict[str, Any]:
        """What a step is given of so many samples: latents or pictures, and the embeddings of their prompts."""
        return {"x0": torch.zeros(num, *self.shape), **self.conditions(range(num))}

    @property
    def null_condition(self) -> Condition | None:
        return self.null and {name: value.to(self.device) for name, value in self.null.items()}

    def conditions(self, indices: range, asked: Asked = None) -> Condition:
        return {
            name: value.expand(len(indices), *value.shape[1:]).clone().to(self.device)
            for name, value in self.condition.items()
        }

    def draw_condition(self, given: Condition, draws: Draws) -> Condition:
        return dict(given)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        return {name: batch[name] for name in self.condition}

    def encode_x0(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        return batch["x0"].clone()  # type: ignore[no-any-return]

    def decode(self, x0: Tensor) -> Tensor:
        raise NotImplementedError  # nothing has a picture here

    decode_pixels = decode

    def description(self) -> dict[str, Any]:
        raise NotImplementedError
