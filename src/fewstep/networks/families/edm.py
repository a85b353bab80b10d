"""EDM models on pixels with class labels: a `UNet2DModel` in fewstep's own folders (arXiv 2206.00364)."""

from __future__ import annotations  # diffusers is imported only where a network is made

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.parameterizations import edm
from fewstep.diffusion.schedules import EDM
from fewstep.networks.family import Family, unet_map

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class PixelUNet(nn.Module):
    """A `UNet2DModel` on EDM noise levels: time = ln(sigma)/4 (arXiv 2206.00364, table 1), optional class labels.

    x (B, C, H, W), t (B,) noise levels, condition {"label": (B,) int64} or {} -> (B, C, H, W).
    """

    feature_map = staticmethod(unet_map)

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x = x.to(self.unet.dtype)  # (B, C, H, W); t stays in float32, for bfloat16 tells few levels apart
        # class_labels None is another path through the UNet than a null class
        output: Tensor = self.unet(x, t.log() / 4, class_labels=condition.get("label"), return_dict=False)[0]
        return output


# Its "pipeline" is the model's configuration (`PixelModelConfig`), labels are the condition, and x0 is the picture.
PIXELS = Family(
    pipeline="UNet2DModel",
    part="unet",
    weights={"unet": "UNet2DModel"},
    others=(),
    check=lambda config: None,
    adapter=PixelUNet,
    conditioner=lambda config, image_size: None,
    codec=lambda autoencoder: None,
    schedule=lambda config: (EDM(config.sigma_min, config.sigma_max), edm(config.sigma_data)),
    image_size=lambda config: int(config.image_size),
    # the last encoder block, as in the official EDM runs (spec, 1.4)
    feature_layer=lambda unet: f"unet.down_blocks.{len(unet.down_blocks) - 1}",
    time_layer="unet.time_embedding",
    no_guidance={},
)
