"""How well pictures fit their prompts, by a CLIP model in a folder of transformers (arXiv 2104.08718)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewstep.errors import UserError
from fewstep.evaluation.encoders import Encoder
from fewstep.models.loading.pipeline import without_weights
from fewstep.networks.text import check_fit, tokenize

PROMPTS_AT_ONCE = 256


class Clip(Encoder):
    """A `CLIPModel` with its tokenizer, on `device`; as an extractor its features are the pictures' embeddings (B, P).

    Raises UserError for a folder that holds none, or is damaged.
    """

    option, takes, drops = "--clip", ("clip",), ()  # keeps the text tower

    def __init__(self, folder: Path, device: torch.device | str):
        super().__init__(folder, device)
        try:
            self.tokenizer = without_weights(folder, "CLIPTokenizer")
            check_fit(self.tokenizer, self.network.config.text_config)
        except UserError as error:
            raise UserError(f"{self.option} {error}") from error
        self.texts, self.has_told = dict[str, Tensor](), False  # embeddings (P,) of length 1, on the CPU

    @torch.no_grad()
    def learn(self, prompts: Iterable[str]) -> None:
        """Embeds those that are new, once each; prints, once, that some are too long for the tower and were cut."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.texts))
        num_cut = 0
        for start in range(0, len(new), PROMPTS_AT_ONCE):
            part = new[start : start + PROMPTS_AT_ONCE]
            tokens = tokenize(self.tokenizer, part, self.network.text_model)  # (B, L)
            num_cut += sum(len(each) > tokens.shape[1] for each in self.tokenizer(part).input_ids)
            told: Any = self.network.text_model(input_ids=tokens)
            embedded = normalize(self.network.text_projection(told.pooler_output), dim=1).cpu()
            self.texts |= dict(zip(part, embedded, strict=True))
        if num_cut and not self.has_told:
            self.has_told = True
            most = self.tokenizer.model_max_length
            print(f"{num_cut:,} of {len(new):,} prompts are longer than CLIP's {most} tokens and were cut")

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of pictures' features (B, P) with the embeddings of their prompts, which come in turn."""
        self.learn(prompts)
        asked = torch.stack([self.texts[prompts[index % len(prompts)]] for index in range(len(features))])
        return (normalize(features.cpu(), dim=1) * asked).sum(1)
