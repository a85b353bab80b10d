"""Text conditioners: prompts to a condition, as the diffusers pipelines of SD and SDXL do it."""

from __future__ import annotations  # transformers is imported only where a text model is loaded

import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition
from fewstep.networks.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class TextConditioner(nn.Module):
    """Prompts to a condition in two parts: `embed`, whose result can be kept on disk, and `complete`."""

    def __init__(self, tokenizers: tuple[CLIPTokenizer, ...], encoders: tuple[nn.Module, ...]):
        super().__init__()
        self.tokenizers, self.encoders = tokenizers, nn.ModuleList(encoders)

    def forward(self, prompts: list[str]) -> Condition:
        """The condition of `prompts`; those that are too long are cut."""
        return self.complete(self.embed(prompts))

    def embed(self, prompts: list[str]) -> Condition:
        """What the text encoders give."""
        raise NotImplementedError

    def complete(self, embeddings: Condition) -> Condition:
        """The condition of embeddings."""
        return embeddings

    @property
    def max_length(self) -> int:
        """Tokens of a prompt, with its start and end."""
        return int(self.tokenizers[0].model_max_length)

    def too_long(self, prompts: list[str]) -> Tensor:
        """Which prompts are cut (B,), for they have more than `max_length` tokens."""
        return torch.tensor([len(each) > self.max_length for each in self.tokenizers[0](prompts).input_ids])

    def fingerprint(self) -> str:
        """A hash of all that `embed` depends on: tokenizers and weights."""
        return fingerprint(self.encoders, type(self).__name__, *map(_vocabulary, self.tokenizers))


class SDText(TextConditioner):
    """CLIP-L's last hidden state, {"text": (B, L, E)}; the null condition is the embedding of ""."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel):
        super().__init__((tokenizer,), (encoder,))

    def embed(self, prompts: list[str]) -> Condition:
        """{"text": (B, L, E)}."""
        (encoder,) = self.encoders
        return {"text": encoder(tokenize(self.tokenizers[0], prompts).to(_device(encoder)))[0]}

    def null_condition(self) -> Condition:
        """(1, ...) tensors for guidance."""
        return self([""])


class SDXLText(TextConditioner):
    """CLIP-L and OpenCLIP-bigG: {"text": (B, L, E), "pooled": (B, P), "time_ids": (B, 6)}; null is zeros.

    `text` joins the penultimate hidden states, `pooled` is bigG's projected embedding, `time_ids` is SDXL's
    micro-conditioning for whole square images, (R, R, 0, 0, R, R) with R the size in pixels (spec, 1.1).
    """

    def __init__(
        self,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        image_size: int,
    ):
        super().__init__(tokenizers, encoders)
        self.image_size = image_size

    def embed(self, prompts: list[str]) -> Condition:
        """{"text": (B, L, E), "pooled": (B, P)}."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            output = encoder(tokenize(tokenizer, prompts).to(_device(encoder)), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return {"text": torch.cat(hidden, dim=-1), "pooled": output[0]}

    def complete(self, embeddings: Condition) -> Condition:
        """Adds `time_ids`."""
        size = float(self.image_size)
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=embeddings["text"].device)
        return embeddings | {"time_ids": time_ids.repeat(len(embeddings["text"]), 1)}

    def null_condition(self) -> Condition:
        """(1, ...) tensors for guidance; without time_ids, which stay the condition's own."""
        return {key: torch.zeros_like(value) for key, value in self.embed([""]).items()}


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token indices (B, L), padded and cut to the tokenizer's length."""
    length = tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _vocabulary(tokenizer: CLIPTokenizer) -> str:
    """The tokenizer as text, without the state that its last call left."""
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return json.dumps([content, tokenizer.model_max_length, tokenizer.pad_token_id])


def _device(encoder: nn.Module) -> torch.device:
    return next(encoder.parameters()).device
