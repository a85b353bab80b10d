"""What networks are made by, in recipes and in model folders: models on pixels, and low-rank weights beside theirs."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fewstep.settings import Few, Levels, Settings, Width

MAX_SIZE = 4096  # pixels; what a damaged file says beyond would take all memory


class LoRASettings(Settings):
    """Low-rank weights that are trained beside a frozen base (arXiv 2106.09685): W' = W + alpha / rank (B A)."""

    rank: int = Field(64, ge=1, le=1024)
    """r of B (out, r) and A (r, in)."""
    alpha: float = Field(8.0, gt=0, le=1e6)
    """The change is scaled by alpha / rank; official: 8 at rank 64."""
    targets: Literal["official", "lean"] | Annotated[list[str], Field(min_length=1, max_length=1000)] = "official"
    """Which layers: `official`, the 14 names of DMD2's script (spec, 1.8: attention, feed-forward, convolutions and
    projections, of SDXL 788), `lean`, attention and feed-forward alone (700), or a list of ends of their names."""


class PixelSettings(Settings):
    """A model on pixels in [-1, 1]; a family adds what its network and its schedule are made by."""

    image_size: int = Field(8, ge=4, le=MAX_SIZE)
    """Height and width in pixels; divisible by 2 for every level of a UNet after the first."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for RGB."""
    num_classes: int = Field(0, ge=0, le=10**6)
    """Number of class labels; 0 for an unconditional model."""
    null_class: bool = False
    """Whether there is one more class that means "no label", which guidance needs."""

    @model_validator(mode="after")
    def _has_classes(self) -> Self:
        if self.null_class and not self.num_classes:
            raise ValueError("null_class: a model without classes (num_classes 0) has none")
        return self


class PixelModelConfig(PixelSettings):
    """An EDM-preconditioned `UNet2DModel`."""

    block_out_channels: Levels = [32, 64]
    """Channels of each level; every level after the first halves the resolution."""
    attention: list[bool] = [False, False]
    """Whether each level has self-attention."""
    middle_attention: bool = False
    """Whether the block in the middle has self-attention where no level has it; where one has, it always has."""
    layers_per_block: Few = 1
    """Residual blocks per level."""
    attention_head_dim: Width = 32
    """Channels per attention head."""
    norm_num_groups: Few = 8
    """Groups of every GroupNorm; divides all channel counts."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout while the teacher trains; distillation runs without."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the data (EDM, table 1)."""
    sigma_min: float = Field(0.002, gt=0)
    """Smallest noise level (EDM, table 1)."""
    sigma_max: float = Field(80.0, gt=0)
    """Noise level of pure noise (EDM, table 1)."""

    def idle(self) -> dict[str, str]:
        """What belongs to attention, where there is none, or enough."""
        if any(self.attention):
            return {"middle_attention": "a level has attention, and so the middle"}
        return {} if self.middle_attention else {"attention_head_dim": "no level has attention"}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        levels = len(self.block_out_channels)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} is not below sigma_max {self.sigma_max:g}")
        if len(self.attention) != levels:
            raise ValueError(f"attention has {len(self.attention)} entries, block_out_channels {levels}")
        with_attention = [w for w, on in zip(self.block_out_channels, self.attention, strict=True) if on]
        with_attention += self.block_out_channels[-1:] if with_attention or self.middle_attention else []
        if any(width % self.attention_head_dim for width in with_attention):
            raise ValueError(f"attention_head_dim {self.attention_head_dim} does not divide {with_attention}")
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(f"image_size {self.image_size} can't be halved {levels - 1} times")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide {self.block_out_channels}")
        return self
