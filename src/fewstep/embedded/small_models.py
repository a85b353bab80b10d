"""Text-to-image models small enough to be trained from scratch: ordinary SD and SDXL pipelines by a few sizes."""

from __future__ import annotations  # the pipelines are imported only where one is built

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fewstep.embedded.settings import AutoencoderConfig, TextModelConfig
from fewstep.models.loading.pipeline import library_class

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

MAX_VOCABULARY = 4000  # tokens of a tokenizer that is trained here
ENDS = ("bos", "eos", "pad")
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}  # SD, SDXL


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """A randomly initialised autoencoder; its scaling factor is 1 until `AutoencoderTraining` measures it."""
    levels = len(config.block_out_channels)
    return library_class("AutoencoderKL")(
        **config.model_dump(exclude={"image_size"}),
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        sample_size=config.image_size,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def build_pipeline(
    config: TextModelConfig, autoencoder: AutoencoderKL, captions: Iterable[str]
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline with a randomly initialised UNet and random text encoders around a trained autoencoder."""
    tokenizer = build_tokenizer(config, captions)
    unet = build_unet(config, autoencoder)
    scheduler = library_class("DDIMScheduler")(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type=config.prediction_type
    )
    if config.architecture == "sd":
        encoder = _text_encoder("CLIPTextModel", config, tokenizer)
        return library_class("StableDiffusionPipeline")(
            autoencoder, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
    encoders = [_text_encoder(kind, config, tokenizer) for kind in ("CLIPTextModel", "CLIPTextModelWithProjection")]
    return library_class("StableDiffusionXLPipeline")(
        autoencoder, *encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )


def build_unet(config: TextModelConfig, autoencoder: AutoencoderKL) -> UNet2DConditionModel:
    """SDXL's shape in small: cross-attention on every level but the first; for `sdxl` with pooled text and time_ids."""
    levels, width, added = len(config.block_out_channels), config.text_width, {}
    if config.architecture == "sdxl":
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        added |= {"projection_class_embeddings_input_dim": width + 6 * 8}
    channels = autoencoder.config.latent_channels
    size = autoencoder.config.sample_size // 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return library_class("UNet2DConditionModel")(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        **config.model_dump(include={"block_out_channels", "layers_per_block", "norm_num_groups"}),
        down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)],
        up_block_types=[*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"],
        transformer_layers_per_block=config.transformer_layers,
        cross_attention_dim=2 * width if config.architecture == "sdxl" else width,
        attention_head_dim=[channels // config.attention_head_dim for channels in config.block_out_channels],
        use_linear_projection=True,
        **added,
    )


def _text_encoder(kind: str, config: TextModelConfig, tokenizer: CLIPTokenizer) -> nn.Module:
    """A random CLIP text encoder: random features of the tokens, which is enough for a small vocabulary."""
    width, tokens = config.text_width, {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ENDS}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_hidden_layers": 2}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": config.num_tokens, "num_attention_heads": 2}
    encoder: nn.Module = library_class(kind)(library_class("CLIPTextConfig")(**sizes, **tokens))
    for name, weight in encoder.named_parameters():
        if "embedding" in name:
            nn.init.normal_(weight)  # CLIP's own 0.02 would drown in what attention adds
    return encoder


def build_tokenizer(config: TextModelConfig, captions: Iterable[str]) -> CLIPTokenizer:
    """The tokenizer at `config.tokenizer`, or one that is trained on the captions."""
    with tempfile.TemporaryDirectory() as folder:
        if not config.tokenizer:
            _write_vocabulary(captions, Path(folder))
        source, kind = config.tokenizer or folder, library_class("CLIPTokenizer")
        tokenizer: CLIPTokenizer = kind.from_pretrained(source, model_max_length=config.num_tokens)
    return tokenizer


def _write_vocabulary(captions: Iterable[str], folder: Path) -> None:
    """CLIP's two files: all bytes, inside and at the end of a word, then what the merges of a trained BPE make."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=MAX_VOCABULARY, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator((caption.lower() for caption in captions), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(left + right for left, right in merges)]
    vocabulary = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n")
