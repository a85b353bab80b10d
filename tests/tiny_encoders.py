"""CLIP and DINOv2 folders of transformers with random weights, a few thousand parameters each."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from tiny_pipelines import LENGTH, tokenizer

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SEES = LAYERS | {"intermediate_size": 32, "image_size": 24, "patch_size": 8}


def save_clip(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> CLIPModel:
    """With its tokenizer; `settings` are of the vision tower."""
    text = LAYERS | {"vocab_size": 190, "intermediate_size": 32, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": 188, "eos_token_id": 189}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=SEES | settings, projection_dim=12)
    return _save(CLIPModel(config).to(dtype), folder, tokens=True)


def save_clip_vision(folder: Path) -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    return _save(CLIPVisionModelWithProjection(CLIPVisionConfig(**SEES, projection_dim=12)), folder)


def save_dino(folder: Path, **settings: Any) -> Dinov2Model:
    torch.manual_seed(2)
    return _save(Dinov2Model(Dinov2Config(**LAYERS | {"image_size": 28, "patch_size": 14} | settings)), folder)


def _save(network: Any, folder: Path, tokens: bool = False) -> Any:
    for parameter in network.parameters():  # larger than at the start of a training, where all pictures look the same
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.eval().save_pretrained(folder)
    if tokens:
        tokenizer(folder / "vocabulary").save_pretrained(folder)
    return network
