"""Scores of preference or beauty by a class of the user's own, MODULE:CLASS; nothing of that kind is imported here.

The class has two methods: `__init__(self, device)`, and `score(self, images, prompts)`, from uint8 (B, C, H, W) and as
many texts to numbers (B,), of which higher is better.
"""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError, brief
from fewstep.metric_table import METRICS
from fewstep.networks.families import imported

TAKEN = {*METRICS, "features", "patches", "colours", "clip", "lpips", "kind"}


def refusal(reference: str, told: str) -> UserError:
    return UserError(f"scorer {reference}: {told} (--scorer, in a recipe evaluation.scorers)")


@dataclass(frozen=True)
class Scorer:
    """A plug-in that was made; what it gives is looked at."""

    reference: str  # MODULE:CLASS
    name: str
    plugin: Any

    @property
    def identity(self) -> str:
        """A hash of its name and its file; of weights that it reads nothing is known."""
        file = inspect.getsourcefile(type(self.plugin))
        code = Path(file).read_bytes() if file and Path(file).is_file() else b""
        return hashlib.blake2b(self.reference.encode() + code, digest_size=8).hexdigest()

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32 on the CPU; raises UserError if it fails, or gives anything else than as many finite numbers."""
        try:
            given = self.plugin.score(images.clone(), prompts)  # others read the images behind it
        except Exception as error:  # whatever the class itself raises
            raise refusal(self.reference, f"fails ({brief(error)})") from error
        what = f"numbers {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        if not isinstance(given, Tensor) or given.shape != images.shape[:1]:
            told = f"gives {what} for {len(images)} images; it must give a tensor ({len(images)},)"
            raise refusal(self.reference, told)
        found = given.detach().float().cpu()
        if not found.isfinite().all():
            raise refusal(self.reference, "gives NaN or infinity")
        return found


def open_scorers(references: Sequence[str], device: torch.device | str) -> list[Scorer]:
    """All of them; raises UserError, too, if two have the same name."""
    found: dict[str, Scorer] = {}
    for reference in references:
        scorer = open_scorer(reference, device)
        if (other := found.setdefault(scorer.name, scorer)) is not scorer:
            told = f"has the same column `{scorer.name}` as {other.reference}; rename one of the classes"
            raise refusal(reference, told)
    return list(found.values())


def open_scorer(reference: str, device: torch.device | str) -> Scorer:
    """MODULE:CLASS, installed or in the current folder, made for that device; its name is the class's in lower case.

    Raises UserError, naming it, if it can't be imported or made, has no `score`, or its name is another number's.
    """
    try:
        kind = imported(reference)
    except Exception as error:  # whatever the module itself raises
        raise refusal(reference, f"can't be imported ({brief(error)}); write MODULE:CLASS") from error
    if not isinstance(kind, type) or not callable(getattr(kind, "score", None)):
        raise refusal(reference, "is no class with a method `score(images, prompts)`")
    if (name := kind.__name__.lower()) in TAKEN:
        raise refusal(reference, f"its column would be `{name}`, which there is; rename the class")
    try:
        return Scorer(reference, name, kind(device))
    except Exception as error:
        raise refusal(reference, f"can't be made by {kind.__name__}(device) ({brief(error)})") from error
