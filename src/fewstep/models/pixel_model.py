"""Image models on pixels: their configuration, their `UNet2DModel`, and how they are stored in a folder."""

from collections.abc import Sequence
from textwrap import shorten
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.errors import UserError
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.settings import PixelModelConfig
from fewstep.networks.codec import to_images, to_pixels
from fewstep.networks.families.edm import PIXELS
from fewstep.seeding import Draws


def build_unet(config: PixelModelConfig) -> UNet2DModel:
    """The `UNet2DModel` in ADM's layout (scale-shift time embedding, residual resampling), randomly initialised."""
    down = ["AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D" for attention in config.attention]
    up = ["AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D" for attention in reversed(config.attention)]
    same = {"block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups", "dropout"}
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.channels,
        out_channels=config.channels,
        down_block_types=down,
        up_block_types=up,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=config.norm_num_groups,
        add_attention=any(config.attention) or config.middle_attention,
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=config.num_classes + config.null_class or None,
        **config.model_dump(include=same),
    )


class PixelModel(ImageModel):
    """A pixel-space image model: x0 is the image itself, (C, H, W) in [-1, 1].

    `timesteps` are a few-step student's, None for a teacher. Raises UserError unless there are as many `class_names` as
    classes.
    """

    kind: Literal["label"] = "label"
    family = PIXELS

    def __init__(
        self,
        config: PixelModelConfig,
        unet: UNet2DModel,
        timesteps: list[float] | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.config, self.num_classes, self.channels = config, config.num_classes, config.channels
        self.image_size, self.timesteps = self.family.image_size(config), timesteps
        self.class_names = check_class_names(class_names, config.num_classes)
        self.denoiser = Denoiser(self.family.adapter(unet), *self.family.schedule(config))
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
        return {"family": "pixel", "config": self.config.model_dump(), "timesteps": self.timesteps, **names}


def check_class_names(names: Any, num_classes: int) -> list[str] | None:
    """The names as a list, None of none or of a model without classes; raises UserError unless each class has one."""
    if names is None or not num_classes:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"class_names: a list of {num_classes} names, one per class, not {shorten(repr(names), 60)}")
    if len(names) != num_classes:
        raise UserError(f"class_names: has {len(names)} names, but the model has {num_classes} classes")
    return list(names)
