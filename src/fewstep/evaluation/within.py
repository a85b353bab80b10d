"""How far apart images of one prompt or class are, of a few of each, which are drawn apart from those of a row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from fewstep.data.shards import digest
from fewstep.evaluation.extractors import Extractor
from fewstep.evaluation.gathering import FEATURES, Numbers, fitted
from fewstep.models.image_model import Asked

EACH, MOST = 4, 32  # images of a prompt, which make six pairs, and prompts at most
LPIPS = "lpips"
Draw = Callable[[range, Asked], Iterable[Tensor]]
"""uint8 images (B, C, H, W) of these numbers, in batches, of what is asked for in turn: as `generate_batches`."""


@dataclass(frozen=True)
class Within:
    """Distances of `EACH` images of each of the `subjects`, prompts or classes."""

    subjects: Sequence[str] | Sequence[int]
    extractor: Extractor
    perceptual: Callable[[Tensor], Tensor] | None
    """LPIPS, from uint8 images (R, C, H, W) to (R (R - 1) / 2,)."""
    size: int
    """Pixels that images are brought to."""
    named: str | None = None
    """What LPIPS was opened from."""

    @property
    def identity(self) -> str:
        """A hash of what its numbers are a function of, beside the images."""
        return f"{self.extractor.identity} {self.named} {self.size} {digest([*self.subjects])}"

    def draw(self, draw: Draw, num: int, rows: range) -> Iterator[Tensor]:
        """The images of these subjects, (EACH, C, H, W) of each; their numbers follow on those of `num` images."""
        asked = [subject for subject in self.subjects for _ in range(EACH)]
        first = -(-num // len(asked)) * len(asked)  # where the subjects begin in turn
        wanted: Asked = asked  # type: ignore[assignment]
        images = chain.from_iterable(draw(range(first + EACH * rows.start, first + EACH * rows.stop), wanted))
        while group := list(islice(images, EACH)):
            yield fitted(torch.stack(group), self.size)

    def read(self, groups: Iterable[Tensor]) -> Numbers:
        """{"features": (P, pairs), "lpips": ...} of the images (EACH, C, H, W) of P subjects: Euclidean, and LPIPS."""
        found: dict[str, list[Tensor]] = {}
        for images in groups:
            features = self.extractor.features(images).cpu().double()
            found.setdefault(FEATURES, []).append(torch.pdist(features))
            if self.perceptual:
                found.setdefault(LPIPS, []).append(self.perceptual(images).cpu().double())
        return {name: torch.stack(each) for name, each in found.items()}
