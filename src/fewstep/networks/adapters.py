"""Adapters: from (x, native t, condition) to the call of a diffusers network, in the dtype of its weights."""

from diffusers import UNet2DConditionModel, UNet2DModel
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
        x = x.to(self.unet.dtype)
        return self.unet(x, t.log() / 4, class_labels=condition.get("label"), return_dict=False)[0]


class TextUNet(nn.Module):
    """A `UNet2DConditionModel` of the SD and SDXL family on integer times 0..999.

    x (B, C, H, W), t (B,), condition {"text": (B, L, E)} and for SDXL "pooled" (B, P), "time_ids" (B, 6).
    """

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype, added = self.unet.dtype, None
        if "pooled" in condition:  # time_ids are pixels, which bfloat16 would round
            added = {"text_embeds": condition["pooled"].to(dtype), "time_ids": condition["time_ids"]}
        return self.unet(x.to(dtype), t, condition["text"].to(dtype), added_cond_kwargs=added, return_dict=False)[0]
