"""The GAN head that sits on the critic's features (DMD2, section 4.3; sizes from the official system, spec 1.4)."""

import math

from torch import Tensor, nn


class Discriminator(nn.Module):
    """One logit per sample from features (B, C, H, W): strided convolutions down to 1x1, then a linear read-out.

    4x4 stride-2 convolutions while a side is over 4, one convolution over what is left, each with GroupNorm and SiLU,
    then 1x1 to one channel: for SDXL's (1280, 32, 32) that is 32-16-8-4-1 and 104.9 M parameters.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        stages = []
        while max(height, width) > 4:
            stages.append(nn.Conv2d(channels, channels, 4, stride=2, padding=1))
            height, width = height // 2, width // 2
        stages.append(nn.Conv2d(channels, channels, (height, width)))
        # 32 groups for 768 and 1280 channels; a group of one channel would be normalised to a constant at 1x1.
        groups = math.gcd(32, channels, max(channels // 4, 1))
        layers = [layer for stage in stages for layer in (stage, nn.GroupNorm(groups, channels), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B,), high for real; computed in the head's own dtype."""
        logits: Tensor = self.layers(features.to(next(self.parameters()).dtype))  # (B, 1, 1, 1)
        return logits.flatten()
