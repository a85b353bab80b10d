"""Text conditioners: prompts to a condition, as the diffusers pipelines of SD and SDXL do it."""

from __future__ import annotations  # transformers is imported only where a text model is loaded

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class SDText(nn.Module):
    """CLIP-L's last hidden state, {"text": (B, L, E)}; the null condition is the embedding of ""."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel):
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder
        self.num_cut = 0

    def forward(self, prompts: list[str]) -> Condition:
        """The condition of `prompts`; those that are too long are cut and counted in `num_cut`."""
        tokens, num_cut = tokenize(self.tokenizer, prompts)
        self.num_cut += num_cut
        return {"text": self.encoder(tokens.to(self.encoder.device))[0]}

    def null_condition(self) -> Condition:
        """(1, ...) tensors for guidance."""
        return self([""])


class SDXLText(nn.Module):
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
        super().__init__()
        self.tokenizers, self.encoders = tokenizers, nn.ModuleList(encoders)
        self.image_size = image_size
        self.num_cut = 0

    def forward(self, prompts: list[str]) -> Condition:
        """The condition of `prompts`; those that are too long are cut and counted in `num_cut`."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            tokens, num_cut = tokenize(tokenizer, prompts)
            output = encoder(tokens.to(next(encoder.parameters()).device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        self.num_cut += num_cut
        size = float(self.image_size)
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=hidden[0].device)
        return {"text": torch.cat(hidden, dim=-1), "pooled": output[0], "time_ids": time_ids.repeat(len(prompts), 1)}

    def null_condition(self) -> Condition:
        """(1, ...) tensors for guidance; without time_ids, which stay the condition's own."""
        condition = self([""])
        return {key: torch.zeros_like(condition[key]) for key in ("text", "pooled")}


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> tuple[Tensor, int]:
    """Token indices (B, L), padded and cut to the tokenizer's length, and how many prompts were cut."""
    whole = tokenizer(prompts).input_ids
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return tokens, sum(len(each) > length for each in whole)
