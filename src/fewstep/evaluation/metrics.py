"""Distances between two sets of images, in the features of any network."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

Interval = tuple[float, float]
Z = 1.959963984540054  # of 95 % of a normal distribution


def fid(real: Tensor, fake: Tensor) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of features (N, D) and (M, D), in float64.

    Means m and covariances S of the two sets (arXiv 1706.08500, equation 6).
    """
    identity = nn.Identity()  # the features are there already
    identity.register_buffer("num_features", torch.tensor(real.shape[1]))
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute().item()


def fid_interval(real: Tensor, fake: Tensor, num_groups: int = 10) -> Interval:
    """95 % interval of the FID of M fakes, over what else might have been drawn: FID -+ 1.96 s.

    s^2 = (g-1)/g sum_i (FID_i - mean)^2, where FID_i lacks the i-th of g groups of fakes (delete-a-group jackknife;
    Efron and Stein 1981). The reals are taken as they are, and so is FID's bias, which falls with M.
    """
    groups = fake.chunk(num_groups)
    without = [fid(real, torch.cat([*groups[:i], *groups[i + 1 :]])) for i in range(len(groups))]
    spread = torch.tensor(without, dtype=torch.float64)
    reach = Z * ((len(groups) - 1) * spread.var(correction=0)).sqrt().item()
    middle = fid(real, fake)
    return middle - reach, middle + reach


def wilson_interval(share: float, num: int) -> Interval:
    """The 95 % interval of a share of `num` independent cases (Wilson 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    middle = share + Z**2 / (2 * num)
    reach = Z * (share * (1 - share) / num + Z**2 / (4 * num**2)) ** 0.5
    return (middle - reach) / (1 + Z**2 / num), (middle + reach) / (1 + Z**2 / num)


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of fakes inside the real manifold, and of reals inside the fake one (arXiv 1904.06991, equations 1 and 2).

    A manifold is the union of balls around its points that reach to the k-th nearest neighbour; k = 3 as in the paper.
    """
    return _share_inside(fake, real, neighbours), _share_inside(real, fake, neighbours)


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int, chunk: int = 1000) -> float:
    radii = torch.cat(
        [torch.cdist(part, manifold).kthvalue(neighbours + 1, dim=1).values for part in manifold.split(chunk)]
    )
    inside = [(torch.cdist(part, manifold) <= radii).any(dim=1) for part in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


def diversity(features: Tensor, num_prompts: int) -> float:
    """Mean distance between two images of one prompt, of features (N, D) whose prompts come in turn."""
    whole = features[: len(features) // num_prompts * num_prompts].reshape(-1, num_prompts, features.shape[1])
    return torch.stack([torch.pdist(of_prompt).mean() for of_prompt in whole.unbind(1)]).mean().item()


@dataclass(frozen=True)
class Row:
    """One line of the table; `None` where a number has no meaning."""

    model: str
    sampler: str | None
    nfe: int | None
    fid: float
    precision: float
    recall: float
    accuracy: float | None = None
    """Of classes, by a classifier."""
    prompt_accuracy: float | None = None
    """Share of images with everything as the prompt says; of the embedded shapes, prompts of one object."""
    two_objects: float | None = None
    """The same for prompts of two objects."""
    diversity: float | None = None
    """Mean feature distance between two images of one prompt."""
    images_per_second: float | None = None
    attributes: dict[str, dict[str, float]] | None = None
    """Of `prompt_accuracy` and `two_objects`, attribute by attribute; not in the table."""
    intervals: dict[str, Interval] | None = None
    """95 % intervals by column, where one is known."""


def floor_row(real: Tensor, seed: int = 0, **extras: Any) -> Row:
    """The noise floor: one random half of the real features (N, D) against the other."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    first, second = real[order].chunk(2)
    return Row("real", None, None, fid(first, second), *precision_recall(first, second), **extras)
