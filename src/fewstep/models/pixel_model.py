"""Image models on pixels, asked for a class: a family's settings and the network that is made by them."""

from collections.abc import Sequence
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.errors import UserError
from fewstep.models.image_model import Asked, ImageModel
from fewstep.networks.codec import to_images, to_pixels
from fewstep.networks.families.edm import PIXELS
from fewstep.networks.family import Family
from fewstep.networks.settings import PixelSettings
from fewstep.seeding import Draws


class PixelModel(ImageModel):
    """A pixel-space image model: x0 is the image itself, (C, H, W) in [-1, 1].

    `timesteps` are a few-step student's, None for a teacher. Raises UserError unless there are as many `class_names` as
    classes.
    """

    kind: Literal["label"] = "label"

    def __init__(
        self,
        config: PixelSettings,
        network: nn.Module,
        timesteps: list[float] | None = None,
        class_names: Sequence[str] | None = None,
        family: Family = PIXELS,
    ):
        self.config, self.num_classes, self.channels = config, config.num_classes, config.channels
        self.image_size, self.timesteps, self.family = config.image_size, timesteps, family
        self.class_names = check_class_names(class_names, config.num_classes)
        self.denoiser = Denoiser(family.adapter(network), *family.schedule(config))
        self.shape = (config.channels, config.image_size, config.image_size)

    @property
    def null_condition(self) -> Condition | None:
        """The class behind the last, where there is one."""
        return {"label": torch.tensor([self.num_classes], device=self.device)} if self.config.null_class else None

    def draw_condition(self, given: Condition, draws: Draws) -> Condition:
        """Uniform over the classes, whatever is given, as the official system does for ImageNet."""
        return self._of(draws.randint(0, max(self.num_classes, 1)))

    def conditions(self, indices: range, asked: Asked = None) -> Condition:
        """The class numbers asked for, else every class in turn, on the model's device."""
        classes = range(max(self.num_classes, 1)) if asked is None else asked
        return self._of(torch.tensor([int(classes[index % len(classes)]) for index in indices], dtype=torch.int64))

    def encode_condition(self, batch: dict[str, Any]) -> Condition:
        """The condition of real data {"label": (B,)}, on the model's device."""
        return self._of(batch["label"]) if "label" in batch else {}

    def _of(self, labels: Tensor) -> Condition:
        """{"label": (B,) int64}; {} of a model without classes."""
        return {"label": labels.to(self.device)} if self.num_classes else {}

    def encode_x0(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """x0 of real data {"image": uint8 (B, C, H, W)}, on the model's device."""
        return to_pixels(batch["image"].to(self.device))

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, C, H, W) -> uint8 images, clipped and rounded."""
        return to_images(x0)

    def decode_pixels(self, x0: Tensor) -> Tensor:
        return x0

    def description(self) -> dict[str, Any]:
        names = {"class_names": self.class_names} if self.class_names else {}
        return {"family": self.family.name, "config": self.config.model_dump(), "timesteps": self.timesteps, **names}


def check_class_names(names: Any, num_classes: int) -> list[str] | None:
    """The names as a list, None of none or of a model without classes; raises UserError unless each class has one."""
    if names is None or not num_classes:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"class_names: a list of {num_classes} names, one per class, not {shorten(repr(names), 60)}")
    if len(names) != num_classes:
        raise UserError(f"class_names: has {len(names)} names, but the model has {num_classes} classes")
    return list(names)
