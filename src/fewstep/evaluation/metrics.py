"""The metrics of `metric_table`: each a function of its name, from what was gathered of real and of fake images."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from fewstep.evaluation.gathering import Gathered, Share
from fewstep.metric_table import METRICS, metrics_of

Interval = tuple[float, float]
Function = Callable[[Gathered, Gathered], Share | float | None]
"""From real and fake images to a share, another number, or None where it has no meaning."""
FUNCTIONS: dict[str, Function] = {}
Z = 1.959963984540054  # of 95 % of a normal distribution
NEIGHBOURS = 3  # that a manifold's balls reach to, as in arXiv 1904.06991
MIN_PER_PROMPT = 4  # images, for a diversity
KID_BLOCK = 1000  # images, as in arXiv 1801.01401


def metric(function: Function) -> Function:
    """Puts a function into the table under its name."""
    FUNCTIONS[function.__name__] = function
    return function


def measure(
    real: Gathered, fake: Gathered, needs: Collection[str], intervals: bool = True
) -> tuple[dict[str, float], dict[str, Interval]]:
    """The metrics that need nothing but `needs`, and their 95 % intervals where one is known."""
    values: dict[str, float] = {}
    found: dict[str, Interval] = {}
    for name in metrics_of(*needs):
        value, kind = FUNCTIONS[name](real, fake), METRICS[name].interval
        if value is None:
            continue
        values[name] = value.value if isinstance(value, Share) else value
        if intervals and isinstance(value, Share) and kind == "wilson":
            found[name] = wilson_interval(value.value, value.cases)
        elif intervals and kind == "jackknife":
            found[name] = jackknife_interval(FUNCTIONS[name], real, fake)
    return values, found


def wilson_interval(share: float, cases: int) -> Interval:
    """The 95 % interval of a share p of n independent cases (Wilson 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    middle = share + Z**2 / (2 * cases)
    reach = Z * (share * (1 - share) / cases + Z**2 / (4 * cases**2)) ** 0.5
    low, high = (middle - reach) / (1 + Z**2 / cases), (middle + reach) / (1 + Z**2 / cases)
    return max(0.0, low), min(1.0, high)  # of no case and of all of them rounding would leave the interval of shares


def jackknife_interval(function: Function, real: Gathered, fake: Gathered) -> Interval:
    """95 % interval of a function of M fakes' sums, over what else might have been drawn: f -+ 1.96 s.

    s^2 = (g-1)/g sum_i (f_i - mean)^2, where f_i lacks the i-th of g groups of fakes (delete-a-group jackknife; Efron
    and Stein 1981). The reals are taken as they are, and so is a bias such as FID's, which falls with M.
    """
    num = min(map(len, fake.groups.values()))
    without = torch.tensor([function(real, fake.without(i)) for i in range(num)], dtype=torch.float64)
    reach = Z * ((num - 1) * without.var(correction=0)).sqrt().item()
    middle = float(function(real, fake))  # type: ignore[arg-type]
    return middle - reach, middle + reach


@metric
def fid(real: Gathered, fake: Gathered) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of features with means m and covariances S (arXiv 1706.08500, eq. 6).

    The trace of (S S')^(1/2) is that of (S^(1/2) S' S^(1/2))^(1/2), whose eigenvalues are real.
    """
    ours, theirs = real.sums(), fake.sums()
    shared = torch.linalg.eigvalsh(ours.root @ theirs.covariance @ ours.root).clamp_min(0).sqrt().sum()
    trace = ours.covariance.trace() + theirs.covariance.trace() - 2 * shared
    return float((ours.mean - theirs.mean).square().sum() + trace)


@metric
def kid(real: Gathered, fake: Gathered) -> float:
    """The unbiased squared MMD of the kernel (x y / D + 1)^3, the mean over disjoint blocks (arXiv 1801.01401, 4).

    Blocks have about `KID_BLOCK` of the smaller set, so that its cost grows as the number of images.
    """
    num_blocks = max(1, min(len(real.features), len(fake.features)) // KID_BLOCK)
    blocks = zip(*(each.features.tensor_split(num_blocks) for each in (real, fake)), strict=True)
    return torch.stack([_mmd(x.double(), y.double()) for x, y in blocks]).mean().item()


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    """mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j)."""
    of_x, of_y, between = (((a @ b.T / x.shape[1] + 1) ** 3) for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (of_x, of_y)]
    return within[0] + within[1] - 2 * between.mean()


@metric
def precision(real: Gathered, fake: Gathered) -> Share:
    """Of the fakes, inside the real manifold (arXiv 1904.06991, equations 1 and 2).

    A manifold is the union of balls around its points that reach to the k-th nearest neighbour.
    """
    return inside(fake.features, real.features)


@metric
def recall(real: Gathered, fake: Gathered) -> Share:
    """Of the reals, inside the fake manifold."""
    return inside(real.features, fake.features)


def inside(points: Tensor, manifold: Tensor, chunk: int = 1000) -> Share:
    """How many of points (N, D) lie in the manifold of points (M, D); `chunk` bounds the distances held."""
    points, manifold = points.double(), manifold.double()
    distances = (torch.cdist(part, manifold) for part in manifold.split(chunk))
    radii = torch.cat([each.kthvalue(NEIGHBOURS + 1, dim=1).values for each in distances])
    hits = [(torch.cdist(part, manifold) <= radii).any(dim=1) for part in points.split(chunk)]
    return Share(int(torch.cat(hits).sum()), len(points))


@metric
def diversity(real: Gathered, fake: Gathered) -> float | None:
    """Mean feature distance between two images of one prompt, whose prompts come in turn; None with few of each."""
    num, features = len(fake.prompts), fake.features
    if len(features) < MIN_PER_PROMPT * num:
        return None
    whole = features[: len(features) // num * num].double().reshape(-1, num, features.shape[1])
    return torch.stack([torch.pdist(of_prompt).mean() for of_prompt in whole.unbind(1)]).mean().item()


def checked(name: str) -> Function:
    """The share of the images in which a classifier or a checker found `name` right."""
    return lambda real, fake: fake.share(name)


FUNCTIONS |= {name: checked(name) for name in ("accuracy", "prompt_accuracy", "two_objects")}
"""Of classes, by a classifier; of images with everything as the prompt says, for prompts of one object and of two."""
