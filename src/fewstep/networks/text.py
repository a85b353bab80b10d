"""Text conditioners: prompts to a condition, as the pipelines of diffusers do it; each family has its own."""

from __future__ import annotations  # transformers is imported only where a text model is loaded

import json
from collections.abc import Callable
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition
from fewstep.errors import UserError
from fewstep.networks.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class TextConditioner(nn.Module):
    """Prompts to a condition: `embed`, whose result can be kept on disk, then `complete`."""

    __call__: Callable[..., Condition]
    keeps: tuple[str, ...]
    """The names of what `embed` gives."""

    def __init__(self, tokenizers: tuple[CLIPTokenizer, ...], encoders: tuple[nn.Module, ...]):
        super().__init__()
        self.tokenizers, self.encoders = tokenizers, nn.ModuleList(encoders)
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            check_fit(tokenizer, encoder.config)

    def forward(self, prompts: list[str]) -> Condition:
        """The condition of `prompts`; those that are too long are cut."""
        # the first half can be read from the disk instead, as it was made once
        return self.complete(self.embed(prompts))

    def embed(self, prompts: list[str]) -> Condition:
        """What the text encoders give."""
        raise NotImplementedError

    def complete(self, embeddings: Condition) -> Condition:
        """The condition of embeddings."""
        return embeddings

    def null_condition(self) -> Condition:
        """(1, ...) tensors for guidance."""
        return self([""])  # as long as any prompt: {"text": (1, L, E)}

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


def check_fit(tokenizer: CLIPTokenizer, config: Any) -> None:
    """Gives the tokenizer the length of its text encoder's, where its files say a longer one, or none.

    Raises UserError if the encoder has no embedding for some of its tokens, or it lacks most of those embedded.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    if not config.vocab_size / 2 <= len(tokenizer) <= config.vocab_size:  # an encoder may be padded, but not so much
        raise UserError(f"tokenizer: has {len(tokenizer)} tokens, its text encoder embeds {config.vocab_size}")


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str], encoder: nn.Module) -> Tensor:
    """Token indices (B, L), padded and cut to the tokenizer's length, where the encoder is; UserError for no text."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # halves of characters, as a terminal gives in another encoding
            raise UserError(f"prompt {shorten(ascii(prompt), 80)} is no UTF-8; write it in that encoding") from error
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    indices: Tensor = tokens.input_ids.to(next(encoder.parameters()).device)  # (B, L) int64
    return indices


def _vocabulary(tokenizer: CLIPTokenizer) -> str:
    """The tokenizer as text, without the state that its last call left."""
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return json.dumps([content, tokenizer.model_max_length, tokenizer.pad_token_id])
