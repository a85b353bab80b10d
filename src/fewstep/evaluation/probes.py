"""What is read off images beside the features of the whole: patches, colours, CLIP scores, and plug-ins' scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data.shards import digest
from fewstep.evaluation.clip import Clip
from fewstep.evaluation.extractors import Extractor
from fewstep.evaluation.gathering import PATCHES, FeatureProbe, Numbers
from fewstep.evaluation.resizing import INCEPTION
from fewstep.evaluation.scorers import Scorer

CLIP, COLOURS = "clip", "colours"
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a grey, ITU-R BT.601
MAX_VALUES = 2**24  # of pictures that are made floats at once, 64 MB


@dataclass(frozen=True)
class PatchProbe:
    """Features (B, D) of the middle `size` x `size` pixels, as they are: what a patch FID is of (arXiv 2402.13929).

    The corner is at round((H - size) / 2), halves to the even, where torchvision's `CenterCrop` has it. There are none
    of pictures with a side of `size` pixels or less.
    """

    extractor: Extractor
    size: int = INCEPTION

    @property
    def identity(self) -> str:
        return f"{self.extractor.identity} {self.size}"

    def read(self, images: Tensor, numbers: range) -> Numbers:
        if min(images.shape[2:]) <= self.size:
            return {}
        top, left = (round((side - self.size) / 2) for side in images.shape[2:])
        patches = images[:, :, top : top + self.size, left : left + self.size]
        return FeatureProbe(self.extractor, PATCHES).read(patches, numbers)


@dataclass(frozen=True)
class ColourProbe:
    """(B, 3) in [0, 1]: brightness, contrast and saturation of each picture.

    With grey = 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601): mean of grey; deviation of grey (over n); and the mean of
    max - min over the channels, 0 for grey pictures.
    """

    identity = "colours"

    def read(self, images: Tensor, numbers: range) -> Numbers:
        parts = images.split(max(1, MAX_VALUES // images[0].numel()))
        return {COLOURS: torch.cat([colours(part.float() / 255) for part in parts]).cpu()}


def colours(pixels: Tensor) -> Tensor:
    """Of pictures (B, C, H, W) in [0, 1]: see `ColourProbe`."""
    weights = torch.tensor(LUMA, device=pixels.device)
    rgb = pixels.expand(-1, 3, -1, -1)
    grey = torch.einsum("bchw,c->bhw", rgb, weights).flatten(1)
    spread = (rgb.amax(1) - rgb.amin(1)).flatten(1)  # (B, H W)
    return torch.stack([grey.mean(1), grey.std(1, correction=0), spread.mean(1)], dim=1)


@dataclass(frozen=True)
class ClipProbe:
    """The CLIP score (B, 1): cosine of picture number i with `prefix` and prompt number i, which come in turn.

    As CLIPScore has it, without its factor of 2.5 and its cut at 0 (arXiv 2104.08718); its prefix is "A photo depicts".
    """

    clip: Clip
    prompts: Sequence[str]
    prefix: str = ""

    @property
    def identity(self) -> str:
        return digest([self.clip.identity, self.prefix, *self.prompts])

    def read(self, images: Tensor, numbers: range) -> Numbers:
        start = f"{self.prefix.rstrip()} " if self.prefix.strip() else ""
        asked = [start + self.prompts[number % len(self.prompts)] for number in numbers]
        if any(prompt not in self.clip.texts for prompt in asked):
            self.clip.learn(start + prompt for prompt in self.prompts)  # all at once, or those that have come since
        return {CLIP: self.clip.score(self.clip.features(images), asked)[:, None]}


@dataclass(frozen=True)
class ScorerProbe:
    """What a plug-in gives for each picture and its prompt, which come in turn: (B, 1), under the plug-in's name."""

    scorer: Scorer
    prompts: Sequence[str] = ("",)

    @property
    def identity(self) -> str:
        return digest([self.scorer.identity, *self.prompts])

    def read(self, images: Tensor, numbers: range) -> Numbers:
        asked = [self.prompts[number % len(self.prompts)] for number in numbers] if self.prompts else [""] * len(images)
        return {self.scorer.name: self.scorer.score(images, asked)[:, None]}
