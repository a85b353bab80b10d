"""How well pictures fit their prompts, by a CLIP model in a folder of transformers (arXiv 2104.08718)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from fewstep.errors import UserError
from fewstep.models.loading.files import check_files
from fewstep.models.loading.pipeline import library_class, load_part, without_weights
from fewstep.networks.fingerprint import fingerprint
from fewstep.networks.text import check_fit, tokenize

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the pictures of all CLIPs
NETWORK = "config.json"


class Clip:
    """A `CLIPModel` with its tokenizer, on `device`; as an extractor its features are the pictures' embeddings (B, P).

    Raises UserError for a folder that holds none, or is damaged.
    """

    name = "CLIP"

    def __init__(self, folder: Path, device: torch.device):
        if not (folder / NETWORK).is_file():
            raise UserError(f"--clip {folder}: no folder of a CLIP model of transformers (it has no {NETWORK})")
        check_files(folder, [path.name for path in folder.iterdir()])
        self.network = load_part(library_class("CLIPModel"), folder).eval().to(device)
        self.tokenizer = without_weights(folder, "CLIPTokenizer")
        check_fit(self.tokenizer, self.network.config.text_config)
        self.mean, self.std = (torch.tensor(each, device=device).reshape(3, 1, 1) for each in (MEAN, STD))
        self.size: int = self.network.config.vision_config.image_size

    @property
    def identity(self) -> str:
        return fingerprint([self.network])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Of uint8 square pictures (B, C, H, W), resized as CLIP's processor does it."""
        pixels = images.to(self.mean.device).expand(-1, 3, -1, -1).float()
        resized = interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).round().clamp(0, 255)
        given: Any = self.network.vision_model(pixel_values=(resized / 255 - self.mean) / self.std)
        found: Tensor = self.network.visual_projection(given.pooler_output)
        return found

    @torch.no_grad()
    def score(self, features: Tensor, prompts: Sequence[str]) -> float:
        """The mean cosine of pictures' features (N, P), whose prompts come in turn, with those prompts'."""
        tokens = tokenize(self.tokenizer, list(prompts), self.network.text_model)
        told: Any = self.network.text_model(input_ids=tokens)
        texts = normalize(self.network.text_projection(told.pooler_output), dim=1).cpu()  # (M, P)
        asked = texts[torch.arange(len(features)) % len(prompts)]
        return (normalize(features, dim=1) * asked).sum(1).mean().item()
