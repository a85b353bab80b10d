"""What a recipe says of a small text-to-image model that is trained from scratch."""

from typing import Literal

from pydantic import Field

from fewstep.settings import Few, Levels, Settings, UserPath


class AutoencoderConfig(Settings):
    """An `AutoencoderKL` on RGB images."""

    image_size: int = Field(32, ge=8, le=8192)
    """Height and width in pixels; divisible by 2 for every level after the first."""
    block_out_channels: Levels = [16, 32, 64]
    """Channels of each level; every level after the first halves the resolution."""
    layers_per_block: Few = 1
    """Residual blocks per level."""
    latent_channels: Few = 4
    """Channels of a latent."""
    norm_num_groups: Few = 8
    """Groups of every GroupNorm; divides all channel counts."""


class TextModelConfig(Settings):
    """A text-to-image model of SD's or SDXL's kind; its latents are its autoencoder's."""

    architecture: Literal["sdxl", "sd"] = "sdxl"
    """`sdxl`: two text encoders, pooled embedding and time_ids; `sd`: one text encoder."""
    autoencoder: UserPath = "shapes-autoencoder"
    """A run folder, or the name of an `autoencode` recipe, which is run first if its run does not exist."""
    tokenizer: UserPath | None = None
    """Folder of a CLIP tokenizer; by default one is trained on the captions."""
    num_tokens: int = Field(16, ge=4, le=4096)
    """Length of a prompt in tokens, start and end included; longer ones are cut. CLIP: 77."""
    text_width: int = Field(32, ge=8, le=16_384)
    """Hidden width of each text encoder; their weights stay random."""
    block_out_channels: Levels = [64, 128]
    """Channels of each level of the UNet; every level after the first halves the resolution."""
    layers_per_block: Few = 1
    """Residual blocks per level."""
    transformer_layers: Few = 1
    """Transformer blocks behind each residual block; as in SDXL, the first level has none."""
    attention_head_dim: int = Field(32, ge=8, le=16_384)
    """Channels per attention head."""
    norm_num_groups: Few = 16
    """Groups of every GroupNorm; divides all channel counts."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the UNet predicts; SD 1.5 and SDXL: epsilon."""
