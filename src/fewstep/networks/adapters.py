"""Adapters: from (x, native t, condition) to the call of a diffusers network."""

from diffusers import UNet2DModel
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition


class PixelUNet(nn.Module):
    """A `UNet2DModel` on EDM noise levels: time = ln(sigma)/4 (arXiv 2206.00364, table 1), optional class labels.

    x (B, C, H, W), t (B,) noise levels, condition {"label": (B,) int64} or {} -> (B, C, H, W).
    """

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.unet(x, t.log() / 4, class_labels=condition.get("label"), return_dict=False)[0]
