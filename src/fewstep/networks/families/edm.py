"""EDM models on pixels with class labels: a `UNet2DModel` in fewstep's own folders (arXiv 2206.00364)."""

from __future__ import annotations  # diffusers is imported only where a network is made

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.parameterizations import edm
from fewstep.diffusion.schedules import EDM
from fewstep.networks.family import Family, UNetAdapter
from fewstep.networks.settings import PixelModelConfig

if TYPE_CHECKING:
    from diffusers import UNet2DModel


ADM = {"resnet_time_scale_shift": "scale_shift", "flip_sin_to_cos": True, "freq_shift": 0}  # of the time embedding
ADM |= {"downsample_type": "resnet", "upsample_type": "resnet"}


class PixelUNet(UNetAdapter):
    """A `UNet2DModel` on EDM noise levels: time = ln(sigma)/4 (arXiv 2206.00364, table 1), optional class labels.

    x (B, C, H, W), t (B,) noise levels, condition {"label": (B,) int64} or {} -> (B, C, H, W).
    """

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x = x.to(self.unet.dtype)  # (B, C, H, W); t stays in float32, for bfloat16 tells few levels apart
        # class_labels None is another path through the UNet than a null class
        output: Tensor = self.unet(x, t.log() / 4, class_labels=condition.get("label"), return_dict=False)[0]
        return output


def build_unet(config: PixelModelConfig) -> UNet2DModel:
    """The `UNet2DModel` in ADM's layout, randomly initialised."""
    from diffusers import UNet2DModel

    down = ["AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D" for attention in config.attention]
    up = ["AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D" for attention in reversed(config.attention)]
    same = {"block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups", "dropout"}
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.channels,
        out_channels=config.channels,
        down_block_types=down,
        up_block_types=up,
        attn_norm_num_groups=config.norm_num_groups,
        add_attention=any(config.attention) or config.middle_attention,
        num_class_embeds=config.num_classes + config.null_class or None,
        **ADM,
        **config.model_dump(include=same),
    )


PIXELS = Family(
    name="pixel",
    part="unet",
    settings=PixelModelConfig,
    network=build_unet,
    weights={"unet": "UNet2DModel"},
    adapter=PixelUNet,
    schedule=lambda settings: (EDM(settings.sigma_min, settings.sigma_max), edm(settings.sigma_data)),
    # the last encoder block, as in the official EDM runs (spec, 1.4)
    feature_layer=lambda unet: f"unet.down_blocks.{len(unet.down_blocks) - 1}",
    time_layer="unet.time_embedding",
)
