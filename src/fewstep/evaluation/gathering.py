"""What is kept of a set of images when the images are gone: numbers read off each of them, sums, a few pictures."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.data.decoding import square
from fewstep.errors import UserError
from fewstep.evaluation.extractors import Extractor
from fewstep.pictures import to_picture

GRID_IMAGES = 40
MAX_KEPT = 20_000  # images whose features are kept: 160 MB of Inception's 2048 in float32; sums are of all
MAX_BATCH, MAX_BYTES = 250, 2**25  # images that go through a network at once, and their bytes
FEATURES, PATCHES, KIND = "features", "patches", "kind"
SUMMED = (FEATURES, PATCHES)  # what a Fréchet distance is taken of
Numbers = Mapping[str, Tensor]
"""By name (N, D) float32 on the CPU: a row per image, NaN where it is no case of what is counted."""
Check = Callable[[Tensor, range], list[dict[str, bool]]]
"""From uint8 images (B, C, H, W) and their numbers: what is right in each of them."""


class Probe(Protocol):
    """Reads numbers off images, of each by itself."""

    @property
    def identity(self) -> str:
        """A hash of what the numbers are a function of, beside the images."""

    def read(self, images: Tensor, numbers: range) -> Numbers:
        """Of uint8 images (B, C, H, W), number `numbers` of their set: {name: (B, D)}."""


@dataclass(frozen=True)
class FeatureProbe:
    """The features of a network, under a name; raises UserError if they are not finite."""

    extractor: Extractor
    name: str = FEATURES

    @property
    def identity(self) -> str:
        return self.extractor.identity

    @torch.no_grad()
    def read(self, images: Tensor, numbers: range) -> Numbers:
        found = self.extractor.features(images).cpu()
        if not found.isfinite().all():
            raise UserError(f"features of {self.extractor.name} are not finite; look at the images, or at --features")
        return {self.name: found}


@dataclass(frozen=True)
class CheckProbe:
    """What is right in images: a column (B, 1) of 1 and 0 per thing that is checked."""

    check: Check
    identity: str

    def read(self, images: Tensor, numbers: range) -> Numbers:
        answers = self.check(images, numbers)
        names = dict.fromkeys(name for answer in answers for name in answer)
        return {name: torch.tensor([[float(each.get(name, torch.nan))] for each in answers]) for name in names}


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

    def __sub__(self, part: "Sums") -> "Sums":
        return Sums(self.count - part.count, self.total - part.total, self.products - part.products)

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
    """N images, of which numbers, sums and the first pictures remain.

    The images come in random order, so that their first are a random subset.
    """

    count: int
    groups: Mapping[str, Sequence[Sums]]
    """Of what is `SUMMED`: consecutive parts of equal size, which a jackknife leaves out in turn."""
    numbers: Numbers = field(default_factory=dict)
    """(min(N, MAX_KEPT), D) as the probes gave them; of what is one number per image, all N."""
    pictures: Tensor = field(default_factory=lambda: torch.empty(0))  # uint8 (min(N, GRID_IMAGES), C, H, W)
    prompts: Sequence[str] = ()  # what the images were made for, in turn
    pairs: Mapping[str, Tensor] = field(default_factory=dict)
    """Distances (P, pairs) of the images of each of P prompts or classes, by what they are distances of."""
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What metrics found out on the way and use again."""

    @classmethod
    def of(cls, features: Tensor, num_groups: int = 1) -> "Gathered":
        """Of features (N, D) alone."""
        return cls(len(features), {FEATURES: list(map(Sums.of, features.chunk(num_groups)))}, {FEATURES: features})

    @property
    def features(self) -> Tensor:
        """(min(N, MAX_KEPT), D)."""
        return self.numbers[FEATURES]

    @cached_property
    def _totals(self) -> dict[str, Sums]:
        return {name: sum(of[1:], start=of[0]) for name, of in self.groups.items()}

    def sums(self, name: str = FEATURES) -> Sums:
        """Of all images."""
        return self._totals[name]

    def share(self, name: str) -> Share | None:
        """Of the images that are a case of it, those in which it is right; None where it was not looked at."""
        if name not in self.numbers:
            return None
        column = self.numbers[name][:, 0]
        cases = int((~column.isnan()).sum())
        return Share(int(column.nansum()), cases) if cases else None

    def without(self, index: int) -> "Gathered":
        """The sums lack one of the groups; the rest stays as it is."""
        return replace(self, groups={name: [*of[:index], *of[index + 1 :]] for name, of in self.groups.items()})


class Gathering:
    """Takes in what was read of at most `num` images, part by part in their order: what `Gathered` is made of.

    What is kept is laid out once, so that no second copy of it ever stands in memory. Without groups there are no sums.
    """

    def __init__(self, num: int, num_groups: int = 1):
        self.num, self.per_group, self.seen = num, -(-num // num_groups) if num_groups else 0, 0
        self.groups: dict[str, dict[int, Sums]] = {}
        self.kept: dict[str, Tensor] = {}
        self.pictures: list[Tensor] = []

    def add(self, found: Numbers, pictures: Tensor, count: int) -> None:
        """What was read of the next `count` images, and the first of them, if any."""
        numbers = torch.arange(self.seen, self.seen + count)
        for name, columns in found.items():
            if name in SUMMED and self.per_group:
                of, group = self.groups.setdefault(name, {}), numbers // self.per_group
                for index in group.unique().tolist():
                    part = Sums.of(columns[group == index])
                    of[index] = of[index] + part if index in of else part
            if name not in self.kept:
                most = min(self.num, MAX_KEPT) if columns.shape[1] > 1 else self.num
                self.kept[name] = torch.full((most, columns.shape[1]), torch.nan)
            room = self.kept[name][self.seen : self.seen + count]
            room.copy_(columns[: len(room)])
        if room_left := max(0, GRID_IMAGES - sum(map(len, self.pictures))):
            self.pictures.append(pictures[:room_left].clone())  # not a view, which would hold the batch
        self.seen += count

    def whole(self, source: str, prompts: Sequence[str] = (), pairs: Numbers | None = None) -> Gathered:
        """Raises UserError, naming the `source` of the images, if there were none."""
        if not self.seen:
            raise UserError(f"{source}: no images to judge")
        groups = {name: [*of.values()] for name, of in self.groups.items()}
        numbers = {name: kept[: self.seen] for name, kept in self.kept.items()}
        return Gathered(self.seen, groups, numbers, torch.cat(self.pictures), prompts, pairs or {})


def gather(
    batches: Iterable[Tensor],
    probes: Sequence[Probe],
    num: int,
    source: str,
    num_groups: int = 1,
    prompts: Sequence[str] = (),
) -> Gathered:
    """Takes in uint8 images (B, C, H, W), at most `num` in all, and lets go of every batch.

    Raises UserError, naming the `source` of the images, if there are none or their numbers can't be read.
    """
    taken = Gathering(num, num_groups)
    for images in split(batches):
        numbers = range(taken.seen, taken.seen + len(images))
        taken.add(read(probes, images, numbers, source), images, len(images))
    return taken.whole(source, prompts)


def split(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The images (B, C, H, W) in parts that networks take at once."""
    for batch in batches:
        yield from batch.split(max(1, min(MAX_BATCH, MAX_BYTES // batch[0].nbytes))) if len(batch) else ()


def fitted(images: Tensor, size: int) -> Tensor:
    """uint8 images (B, C, H, W) centre-cropped and resized to `size` pixels by Lanczos' filter, as files are read."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    return torch.stack([square(to_picture(each), size) for each in images])


def read(probes: Sequence[Probe], images: Tensor, numbers: range, source: str) -> Numbers:
    """What all probes read; raises UserError with the `source` in front."""
    try:
        return {name: found for probe in probes for name, found in probe.read(images, numbers).items()}
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
