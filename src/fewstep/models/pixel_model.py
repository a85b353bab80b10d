"""Image models on pixels, asked for a class: a family's settings and the network that is made by them."""

from collections.abc import Sequence
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
    """x0 is the image itself, (C, H, W) in [-1, 1]; UserError unless there are as many `class_names` as classes."""

    kind: Literal["label"] = "label"
    on_pixels = True

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
        if class_names is not None and self.num_classes:
            if (given := len(class_names)) != self.num_classes:
                raise UserError(f"class_names: has {given} names, but the model has {self.num_classes} classes")
            self.class_names = list(class_names)
        self.denoiser = Denoiser(family.adapter(network), *family.schedule(config))
        self.shape = (config.channels, config.image_size, config.image_size)

    @property
    def null_condition(self) -> Condition | None:
        """The class behind the last, where there is one."""
        number = self.num_classes  # filled in on the device: a copy of it there would be waited for
        return {"label": torch.full((1,), number, device=self.device)} if self.config.null_class else None

    def draw_condition(self, given: Condition, draws: Draws) -> Condition:
        """Uniform over the classes, whatever is given, as the official system does for ImageNet."""
        return self._of(draws.randint(0, max(self.num_classes, 1)))

    def conditions(self, indices: range, asked: Asked = None) -> Condition:
        """The class numbers asked for, else every class in turn, on the model's device."""
        classes = range(max(self.num_classes, 1)) if asked is None else asked
        return self._of(torch.tensor([int(classes[index % len(classes)]) for index in indices], dtype=torch.int64))

    def encode_condition(self, batch: dict[str, Any]) -> Condition:
        return self._of(batch["label"]) if "label" in batch else {}

    def _of(self, labels: Tensor) -> Condition:
        """{"label": (B,) int64}; {} of a model without classes."""
        return {"label": labels.to(self.device)} if self.num_classes else {}

    def encode_x0(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """x0 of real data {"image": uint8 (B, C, H, W)}, on the model's device."""
        return to_pixels(batch["image"].to(self.device))

    def decode(self, x0: Tensor) -> Tensor:
        return to_images(x0)

    def decode_pixels(self, x0: Tensor) -> Tensor:
        return x0

    def description(self) -> dict[str, Any]:
        names = {"class_names": self.class_names} if self.class_names else {}
        return {"family": self.family.name, "config": self.config.model_dump(), "timesteps": self.timesteps, **names}
