"""What is kept of a set of images when the images are gone: sums of features, some features, counts, a few pictures."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.extractors import Extractor

GRID_IMAGES = 40
MAX_KEPT = 50_000  # images whose features are kept: 400 MB of Inception's 2048 in float32
MAX_BATCH = 250  # images that go through a feature network at once
Check = Callable[[Tensor, range], list[dict[str, bool]]]
"""From uint8 images (B, C, H, W) and their numbers: what is right in each of them."""


class Share(NamedTuple):
    """`hits` of so many independent `cases`."""

    hits: int
    cases: int

    @property
    def value(self) -> float:
        return self.hits / self.cases


@dataclass(frozen=True)
class Sums:
    """Number of features, their sum (D,) and the sum of their products x x^T (D, D), in float64: all that a FID is of.

    Exact for any number of images: of parts they add up to those of the whole.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Sums":
        exact = features.double()
        return cls(len(exact), exact.sum(0), exact.T @ exact)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.count + other.count, self.total + other.total, self.products + other.products)

    @cached_property
    def mean(self) -> Tensor:
        return self.total / self.count

    @cached_property
    def covariance(self) -> Tensor:
        """(D, D), of a sample: over n - 1."""
        return (self.products - self.count * self.mean.outer(self.mean)) / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric root of the covariance, (D, D)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root


@dataclass(frozen=True)
class Gathered:
    """N images, of which all of `groups` and `shares` and the first of `features` and `pictures` remain.

    The images come in random order, so that their first are a random subset.
    """

    groups: list[Sums]  # of consecutive parts of equal size, which a jackknife leaves out in turn
    features: Tensor  # (min(N, MAX_KEPT), D) as the network gave them: for what compares pairs
    pictures: Tensor  # uint8 (min(N, GRID_IMAGES), C, H, W)
    shares: Mapping[str, Share] = field(default_factory=dict)  # of what was checked in each image
    prompts: Sequence[str] = ()  # what the images were made for, in turn

    @classmethod
    def of(cls, features: Tensor) -> "Gathered":
        """Of features (N, D) alone."""
        return cls([Sums.of(features)], features, torch.empty(0))

    @cached_property
    def sums(self) -> Sums:
        return sum(self.groups[1:], start=self.groups[0])

    def without(self, index: int) -> "Gathered":
        """The sums lack one of the groups; the rest stays as it is."""
        return replace(self, groups=[*self.groups[:index], *self.groups[index + 1 :]])


def gather(
    batches: Iterable[Tensor],
    extractor: Extractor,
    num: int,
    source: str,
    num_groups: int = 1,
    check: Check = lambda images, numbers: [],
    prompts: Sequence[str] = (),
) -> Gathered:
    """Takes in uint8 images (B, C, H, W), at most `num` in all, and lets go of every batch.

    Raises UserError, naming the `source` of the images, if there are none or their features are not finite.
    """
    groups: dict[int, Sums] = {}
    features, pictures, seen = list[Tensor](), list[Tensor](), 0
    hits, cases = Counter[str](), Counter[str]()
    for images in chain.from_iterable(batch.split(MAX_BATCH) for batch in batches):
        found, numbers = _features(extractor, images, source), range(seen, seen + len(images))
        group = torch.tensor(numbers) // -(-num // num_groups)
        for index in group.unique().tolist():
            part = Sums.of(found[group == index])
            groups[index] = groups[index] + part if index in groups else part
        features.append(found[: max(0, MAX_KEPT - seen)])
        pictures.append(images[: max(0, GRID_IMAGES - seen)].clone())  # not a view, which would hold the batch
        for answer in check(images, numbers):
            hits.update({name: int(right) for name, right in answer.items()})
            cases.update(answer.keys())
        seen = numbers.stop
    if not seen:
        raise UserError(f"{source}: no images to judge")
    shares = {name: Share(hits[name], cases[name]) for name in cases}
    return Gathered([*groups.values()], torch.cat(features), torch.cat(pictures), shares, prompts)


@torch.no_grad()
def _features(extractor: Extractor, images: Tensor, source: str) -> Tensor:
    """Features (B, D) on the CPU."""
    found = extractor.features(images).cpu()
    if not found.isfinite().all():
        raise UserError(f"{source}: features of {extractor.name} are not finite; look at the images, or at --features")
    return found
