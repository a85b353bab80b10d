"""SD- and SDXL-shaped diffusers pipelines of random weights, a few thousand parameters each."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LENGTH = 20  # tokens
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
POOLED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
POOLED |= {"projection_class_embeddings_input_dim": 12 + 6 * 8}


def tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A character-level CLIP tokenizer."""
    folder.mkdir(parents=True)
    alphabet = [chr(code) for code in range(33, 127)]
    vocabulary = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH, pad_token=pad)


def text_encoder(kind: type, seed: int, **settings: object) -> CLIPTextModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 190, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": LENGTH, "projection_dim": 12}
    ends = {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    return kind(CLIPTextConfig(**sizes | ends | settings)).eval()


def autoencoder(scaling_factor: float, **extra: object) -> AutoencoderKL:
    torch.manual_seed(3)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16}
    return AutoencoderKL(**kinds, **sizes, scaling_factor=scaling_factor, **extra).eval()


def unet(text_width: int, **extra: object) -> UNet2DConditionModel:
    torch.manual_seed(4)
    sizes = {"sample_size": 8, "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 8}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes |= {"block_out_channels": (16, 32), "cross_attention_dim": text_width}
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, **sizes, **extra).eval()


def tiny_sd(folder: Path) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    encoder, tokens = text_encoder(CLIPTextModel, 1), tokenizer(folder / "vocabulary")
    return StableDiffusionPipeline(
        autoencoder(0.18215), encoder, tokens, unet(16), scheduler, None, None, requires_safety_checker=False
    )


def tiny_sdxl(folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        autoencoder(0.13025),
        text_encoder(CLIPTextModel, 1),
        text_encoder(CLIPTextModelWithProjection, 2),
        tokenizer(folder / "vocabulary"),
        tokenizer(folder / "vocabulary 2", pad="!"),
        unet(32, **POOLED),
        EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
    )


TINY = {"sd": tiny_sd, "sdxl": tiny_sdxl}
