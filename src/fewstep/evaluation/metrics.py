"""The metrics of `metric_table`: each a function of its name, from what was gathered of real and of fake images."""

import math
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from fewstep.evaluation.gathering import FEATURES, KIND, PATCHES, Gathered, Share, Sums
from fewstep.evaluation.intervals import (
    Estimate,
    Mean,
    bootstrap_interval,
    jackknife_deviation,
    normal_interval,
    wilson_interval,
)
from fewstep.evaluation.neighbours import Compared, compared
from fewstep.evaluation.scorers import TAKEN
from fewstep.metric_table import MAX_COMPARED, METRICS, Interval, metrics_of
from fewstep.seeding import generator

Found = Share | Mean | Estimate | float
Function = Callable[[Gathered, Gathered], Found | None]
"""From real and fake images to what its value and interval are of; None where there is nothing to tell it from."""
FUNCTIONS: dict[str, Function] = {}
MIN_PER_PROMPT, MAX_PER_PROMPT = 4, 1000  # images, for a diversity
KID_BLOCK = 1000  # images, as in arXiv 1801.01401
COLOURS = ("brightness", "contrast", "saturation")
BETWEEN_SETS = ("features", "patches", "colours")
"""What metrics need that compare two sets: of two sets of real images they are the noise floor."""
SUMMED_AT_ONCE = 1000  # rows whose float64 copies are held
SPLITS = 4  # of a floor's FIDs: a single one is off by 5 to 40 %, their mean by half of that
LAYERS = (2048, 768, 192, 64)  # of Inception: features that a FID can be of
LEAST_SHARE = 0.25  # of a width


def metric(function: Function) -> Function:
    """Puts a function into the table under its name."""
    FUNCTIONS[function.__name__] = function
    return function


def measure(
    real: Gathered, fake: Gathered, needs: Collection[str] | None = None, intervals: bool = True
) -> tuple[dict[str, float], dict[str, Interval]]:
    """The metrics that need nothing but `needs` (None: all) and for which there are numbers, and their 95 % intervals.

    Columns that are not in the table ("scorers") are measured by their mean. `intervals` take ten more FIDs.
    """
    names = list(METRICS) if needs is None else metrics_of(*needs)
    functions = {name: FUNCTIONS[name] for name in names if name in FUNCTIONS}
    if needs is None or "scorers" in needs:
        functions |= {name: partial(mean_of, name) for name in scorers(fake)}
    found = {name: each for name, function in functions.items() if (each := function(real, fake)) is not None}
    values = {name: each if isinstance(each, float) else each.value for name, each in found.items()}
    if not intervals:
        return values, {}
    known = {name: interval_of(each, functions[name], real, fake) for name, each in found.items()}
    return values, {name: interval for name, interval in known.items() if interval}


def interval_of(found: Found, function: Function, real: Gathered, fake: Gathered) -> Interval | None:
    """Of a share Wilson's, of a mean a bootstrap's, of the rest a jackknife's; None of a single case.

    A jackknife leaves out parts of the fakes in turn. The reals are taken as they are, and so is a bias such as FID's,
    which falls with the number of fakes.
    """
    if isinstance(found, Share):
        return wilson_interval(found.value, found.cases)
    if isinstance(found, Mean):
        return bootstrap_interval(found) if len(found.of) > 1 else None
    if isinstance(found, float):
        parts = range(min(map(len, fake.groups.values()), default=0))
        without = [function(real, fake.without(index)) for index in parts] if len(parts) > 1 else []
        found = Estimate(found, jackknife_deviation(torch.tensor(without, dtype=torch.float64)))
    return normal_interval(found.value, found.deviation) if math.isfinite(found.deviation) else None


def scorers(images: Gathered) -> list[str]:
    """The columns of one number per image that no row of the table knows, nor an attribute of one (`scene.shape`)."""
    numbers = images.numbers.items()
    return [name for name, of in numbers if of.shape[1] == 1 and name not in TAKEN and "." not in name]


# --- distances between two sets --------------------------------------------------------------------------------------


@metric
def fid(real: Gathered, fake: Gathered) -> float | None:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of features with means m and covariances S (arXiv 1706.08500, eq. 6).

    The trace of (S S')^(1/2) is that of (S^(1/2) S' S^(1/2))^(1/2), whose eigenvalues are real.
    """
    return _frechet_of(FEATURES, real, fake)


@metric
def fid_mean(real: Gathered, fake: Gathered) -> float | None:
    """|m - m'|^2 of FID's features, its first part: what all images have in common, such as a drift of the whole."""
    there = FEATURES in real.groups and FEATURES in fake.groups
    return _between_means(real.sums(), fake.sums()) if there else None


@metric
def patch_fid(real: Gathered, fake: Gathered) -> float | None:
    """FID of pieces of larger images at their own size, which sees what resizing hides (arXiv 2402.13929)."""
    return _frechet_of(PATCHES, real, fake)


def _frechet_of(name: str, real: Gathered, fake: Gathered) -> float | None:
    return _frechet(real.sums(name), fake.sums(name)) if name in real.groups and name in fake.groups else None


def _between_means(ours: Sums, theirs: Sums) -> float:
    return float((ours.mean - theirs.mean).square().sum())


def _frechet(ours: Sums, theirs: Sums) -> float:
    values = torch.linalg.eigvalsh(ours.root @ theirs.covariance @ ours.root)  # ascending
    rank = min(ours.count, theirs.count) - 1  # at most: of few images the rest is rounding, which roots blow up
    shared = values[-rank:].clamp_min(0).sqrt().sum()
    trace = ours.covariance.trace() + theirs.covariance.trace() - 2 * shared
    return _between_means(ours, theirs) + float(trace)


@metric
def kid(real: Gathered, fake: Gathered) -> Estimate | None:
    """The unbiased squared MMD of the kernel (x y / D + 1)^3, the mean over disjoint blocks (arXiv 1801.01401, 4).

    Blocks have about `KID_BLOCK` of the smaller set and at most twice as many of the larger, of which the first
    `MAX_COMPARED` are taken. Its deviation is a jackknife's, which leaves out one fake at a time.
    """
    if FEATURES not in real.numbers or FEATURES not in fake.numbers:
        return None
    both = [each.features[:MAX_COMPARED] for each in (real, fake)]
    num_blocks = max(1, min(map(len, both)) // KID_BLOCK)
    taken = (each[: 2 * KID_BLOCK * num_blocks].tensor_split(num_blocks) for each in both)
    blocks = [_mmd(x.double(), y.double()) for x, y in zip(*taken, strict=True)]
    values, variances = zip(*blocks, strict=True)
    return Estimate(sum(values) / num_blocks, sum(variances) ** 0.5 / num_blocks)


def _mmd(x: Tensor, y: Tensor) -> tuple[float, float]:
    """mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j), and its variance without a y each."""
    of_x, of_y, between = (((a @ b.T / x.shape[1] + 1) ** 3) for a, b in ((x, x), (y, y), (x, y)))
    n, m = between.shape
    within = (of_x.sum() - of_x.trace()) / (n * (n - 1))
    pairs, across = of_y.sum(1) - of_y.diagonal(), between.sum(0)  # (M,): what each y has a share in
    whole = within + pairs.sum() / (m * (m - 1)) - 2 * across.sum() / (n * m)
    without = within + (pairs.sum() - 2 * pairs) / ((m - 1) * (m - 2)) - 2 * (across.sum() - across) / (n * (m - 1))
    return whole.item(), jackknife_deviation(without) ** 2


def among(name: str, real: Gathered, fake: Gathered) -> Share | Mean | None:
    """Who is near whom: a field of `Compared`, which says what each is."""
    found: Share | Mean | None = getattr(compared(real, fake), name, None)
    return found


def drift(column: int, real: Gathered, fake: Gathered) -> Mean | None:
    """Mean of the fakes less that of the reals of a column of `COLOURS`, in [-1, 1]."""
    if "colours" not in real.numbers or "colours" not in fake.numbers:
        return None
    return Mean(fake.numbers["colours"][:, column], real.numbers["colours"][:, column])


FUNCTIONS |= {name: partial(among, name) for name in Compared.__dataclass_fields__}
FUNCTIONS |= {name: partial(drift, column) for column, name in enumerate(COLOURS)}


# --- what is told of images one by one, or of those of one prompt ----------------------------------------------------


def mean_of(name: str, real: Gathered, fake: Gathered) -> Mean | None:
    """Of a column, over the images in which it is a number."""
    found = fake.numbers[name][:, 0] if name in fake.numbers else torch.empty(0)
    found = found[~found.isnan()]
    return Mean(found) if len(found) else None


def checked(name: str, real: Gathered, fake: Gathered) -> Share | None:
    """The share of the images in which a classifier or a checker found `name` right."""
    return fake.share(name)


@metric
def diversity(real: Gathered, fake: Gathered) -> Mean | None:
    """Mean feature distance between two images of one prompt or class; None with few of each.

    Of the pairs that were drawn for it, else of the images themselves, whose prompts come in turn.
    """
    if FEATURES in fake.pairs:
        return within(FEATURES, real, fake)
    num, features = len(fake.prompts), fake.numbers.get(FEATURES, torch.empty(0))
    if len(features) < MIN_PER_PROMPT * num or not num:
        return None
    whole = features[: min(len(features) // num, MAX_PER_PROMPT) * num]
    return Mean(torch.stack([torch.pdist(whole[prompt::num].double()).mean() for prompt in range(num)]))


def within(name: str, real: Gathered, fake: Gathered) -> Mean | None:
    """Mean distance of the pairs of a prompt, over prompts."""
    return Mean(fake.pairs[name].double().mean(1)) if name in fake.pairs else None


FUNCTIONS |= {name: partial(checked, name) for name in ("accuracy", "prompt_accuracy", "two_objects")}
"""Of classes, by a classifier; of images with everything as the prompt says, for prompts of one object and of two."""
FUNCTIONS |= {"clip": partial(mean_of, "clip"), "lpips_diversity": partial(within, "lpips")}


# --- how many images ------------------------------------------------------------------------------------------------


def floor(real: Gathered, num_samples: int, seed: int = 0) -> dict[str, float]:
    """What a perfect generator of `num_samples` = M images would score: real images against other real ones.

    FIDs are of M' = min(M, n/2) random ones of the n that are kept against the other N - M', the mean of a few draws,
    times (1/M + 1/N) / (1/M' + 1/(N - M')): with many images their bias is in proportion to 1/M + 1/N. On simulated
    Gaussians of D dimensions that is within 5 % of the mean FID of perfect generators where M' is D or more, and down
    to 13 % too low at D/2 if M' is not M (`tests/evaluation/test_floor.py`). All else is as it is, of M' images against
    n - M', or as many as `MAX_COMPARED`. Empty where no numbers were kept.

    As the fakes are of classes or prompts in turn, so are the M': whole rounds of them, which vary less from set to set
    than independent draws.
    """
    values, draws = dict[str, float](), generator(seed, "floor")
    for names, of in ((("fid", "fid_mean"), FEATURES), (("patch_fid",), PATCHES)):
        if of in real.numbers and of in real.groups:
            found = [_floor_fids(real, of, num_samples, draws) for _ in range(SPLITS)]
            values |= {name: sum(each) / SPLITS for name, each in zip(names, zip(*found, strict=True), strict=False)}
    some, others = dict[str, Tensor](), dict[str, Tensor]()
    for name in {FEATURES, "colours"} & real.numbers.keys():
        halves = split(_kinds(real, len(real.numbers[name])), num_samples, generator(seed, "half"))
        some[name], others[name] = (real.numbers[name][half[:MAX_COMPARED]] for half in halves)
    first, second = (Gathered(max(map(len, each.values()), default=0), {}, each) for each in (others, some))
    return measure(first, second, BETWEEN_SETS, intervals=False)[0] | values


def _floor_fids(real: Gathered, name: str, num_samples: int, draws: torch.Generator) -> tuple[float, float]:
    """FID of one split, and the part of it that is in the mean."""
    kept, whole = real.numbers[name], real.sums(name)
    rows, _ = split(_kinds(real, len(kept)), num_samples, draws)
    parts = rows.split(SUMMED_AT_ONCE)
    some = sum((Sums.of(kept[part]) for part in parts), start=Sums.of(kept[:0]))
    others = whole - some
    scale = (1 / num_samples + 1 / whole.count) / (1 / len(rows) + 1 / others.count)
    return _frechet(others, some) * scale, _between_means(others, some) * scale


def _kinds(real: Gathered, kept: int) -> Tensor:
    """What the kept images are of: class, or prompt in turn (kept,)."""
    if KIND in real.numbers:
        return real.numbers[KIND][:kept, 0]
    return torch.arange(kept) % max(1, len(real.prompts))


def split(kinds: Tensor, num_samples: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """The numbers of `num_samples` random images, but half of them at most, and of the rest; kinds (N,).

    Of all kinds in turn, in whole rounds if there is one or more.
    """
    order = torch.randperm(len(kinds), generator=draws)
    by_kind = kinds[order].argsort(stable=True)
    first = torch.searchsorted(kinds[order[by_kind]], kinds[order[by_kind]])  # of the same kind
    turns = torch.empty_like(order).index_put((by_kind,), torch.arange(len(order)) - first)
    order = order[turns.argsort(stable=True)]
    num, several = min(num_samples, len(kinds) // 2), len(kinds.unique())
    num -= num % several if several <= num else 0
    return order[:num], order[num:]


def enough(count: int, width: int) -> str | None:
    """A line that says how many images are needed where `count` are too few for features of that width, else None.

    Below a quarter of the width: there a perfect generator, of independent features of one variance, is farther from
    the reals by FID (1.1 times their total variance) than one that always gives their mean (1.0).
    """
    needed = math.ceil(LEAST_SHARE * width)
    if count >= needed:
        return None
    smaller = [layer for layer in LAYERS if layer < width and count >= LEAST_SHARE * layer]
    layer = f"a layer of {smaller[0]}" if smaller else "a narrower layer"
    return f"{count} images are too few for a FID of {width} features; it takes {needed} or more, or {layer}"
