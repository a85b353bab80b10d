"""The metrics against closed forms, other libraries, and loops that were written for this test alone."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fewstep.evaluation import metrics, neighbours
from fewstep.evaluation.gathering import Gathered
from fewstep.evaluation.intervals import wilson_interval
from fewstep.evaluation.judge import floor_row
from fewstep.evaluation.metrics import FUNCTIONS, interval_of, measure
from fewstep.evaluation.report import Row, columns
from fewstep.metric_table import METRICS, Metric, cost, metrics_of


def fid(real: Tensor, fake: Tensor) -> float:
    return metrics.fid(Gathered.of(real), Gathered.of(fake))


def kid(real: Tensor, fake: Tensor) -> float:
    return metrics.kid(Gathered.of(real), Gathered.of(fake)).value


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    both = Gathered.of(real), Gathered.of(fake)
    return metrics.precision(*both).value, metrics.recall(*both).value


def in_groups(features: Tensor, num_groups: int = 10) -> Gathered:
    return Gathered.of(features, num_groups)


class Given(nn.Module):
    """The features are there already."""

    num_features = 0

    def forward(self, features: Tensor) -> Tensor:
        return features


def points(num: int, seed: int, dim: int = 5) -> Tensor:
    """Correlated Gaussian points (num, dim) in float64."""
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=draws, dtype=torch.float64)
    return torch.randn(num, dim, generator=draws, dtype=torch.float64) @ mixing + seed


def whitened(num: int, seed: int, dim: int = 5) -> Tensor:
    """Points whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    centred = points(num, seed, dim) - points(num, seed, dim).mean(0)
    factor = torch.linalg.cholesky(torch.cov(centred.T))
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T


@pytest.mark.parametrize(("num", "dim", "dtype"), [(50, 2, "float64"), (300, 5, "float32"), (400, 40, "float64")])
def test_fid_and_kid_are_torchmetrics(num: int, dim: int, dtype: str) -> None:
    real, fake = (points(num, seed, dim).to(getattr(torch, dtype)) for seed in (1, 2))
    Given.num_features = dim
    for ours, metric in (
        (fid, FrechetInceptionDistance(feature=Given())),
        (kid, KernelInceptionDistance(feature=Given(), subsets=1, subset_size=num)),
    ):
        metric.set_dtype(torch.float64)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        theirs = torch.stack([*metric.compute()])[0] if ours is kid else metric.compute()
        assert ours(real, fake) == pytest.approx(theirs.item(), rel=1e-9)
        assert ours(fake, real) == pytest.approx(theirs.item(), rel=1e-9)


@pytest.mark.parametrize(("nums", "block"), [((5, 7), 1000), ((12, 9), 4), ((8, 8), 4)])
def test_kid_is_that_of_plain_loops_over_disjoint_blocks(
    nums: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "KID_BLOCK", block)
    real, fake = points(nums[0], 1), points(nums[1], 2)
    num_blocks = max(1, min(nums) // block)
    found = []
    for x, y in zip(real.tensor_split(num_blocks), fake.tensor_split(num_blocks), strict=True):
        within = [[(a @ b / 5 + 1) ** 3 for i, a in enumerate(z) for j, b in enumerate(z) if i != j] for z in (x, y)]
        across = [(a @ b / 5 + 1) ** 3 for a in x for b in y]
        found.append(sum(sum(kernel) / len(kernel) for kernel in within) - 2 * sum(across) / len(across))
    assert kid(real, fake) == pytest.approx(sum(found).item() / num_blocks, rel=1e-9)


def test_a_metric_is_a_row_and_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """With these two it is measured, has its interval and its column, and its best is the least."""
    assert FUNCTIONS.keys() == {name for name, metric in METRICS.items() if metric.needs != "clock"}
    monkeypatch.setitem(METRICS, "mean_gap", Metric("mean_gap", "lower", "jackknife"))
    monkeypatch.setitem(FUNCTIONS, "mean_gap", lambda real, fake: (real.sums().mean - fake.sums().mean).norm().item())
    values, intervals = measure(Gathered.of(points(60, 1)), in_groups(points(55, 2)), {"features"})
    gap = (points(60, 1).mean(0) - points(55, 2).mean(0)).norm().item()
    assert values["mean_gap"] == pytest.approx(gap)
    assert intervals["mean_gap"][0] < gap < intervals["mean_gap"][1]
    assert columns([Row("a", "student", 1, values)])[-1] == "mean_gap"
    assert cost("ema0.9_mean_gap", 2.0) == 2


def test_fid_of_axis_aligned_gaussians_is_the_closed_form() -> None:
    mean, spread = torch.tensor([1.0, -2, 0, 0, 3]).double(), torch.tensor([1.0, 2, 0.5, 3, 1]).double()
    other_mean, other_spread = torch.tensor([0.0, 1, 0, 5, 3]).double(), torch.tensor([2.0, 2, 0.1, 1, 4]).double()
    real, fake = whitened(100, 1) * spread + mean, whitened(80, 2) * other_spread + other_mean
    wanted = (mean - other_mean).square().sum() + (spread - other_spread).square().sum()
    assert fid(real, fake) == pytest.approx(wanted.item(), rel=1e-9)
    assert abs(fid(real, real)) < 1e-9


def by_loops(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Precision, recall, density, coverage and memorisation by loops over pairs of points."""

    def radius(of: Tensor, index: int, k: int) -> float:
        return sorted(distance(of[index], other) for j, other in enumerate(of) if j != index)[k - 1]

    def distance(a: Tensor, b: Tensor) -> float:
        return (a.double() - b.double()).norm().item()

    def share(hits: list[bool]) -> float:
        return sum(hits) / len(hits)

    near = [[distance(point, centre) for centre in real] for point in fake]
    narrow, wide = ([radius(real, i, k) for i in range(len(real))] for k in (3, 5))
    of_fakes = [radius(fake, j, 3) for j in range(len(fake))]
    return {
        "precision": share([any(d <= r for d, r in zip(row, narrow, strict=True)) for row in near]),
        "recall": share([any(near[j][i] <= of_fakes[j] for j in range(len(fake))) for i in range(len(real))]),
        "density": sum(d <= r for row in near for d, r in zip(row, wide, strict=True)) / 5 / len(fake),
        "coverage": share([any(row[i] <= wide[i] for row in near) for i in range(len(real))]),
        "memorised": share([sorted(row)[0] < sorted(row)[1] / 3 for row in near]),
    }


PAIRED = ["precision", "recall", "density", "coverage", "memorised"]


def paired(real: Tensor, fake: Tensor) -> dict[str, float]:
    both = Gathered.of(real), Gathered.of(fake)
    return {name: FUNCTIONS[name](*both).value for name in PAIRED}


@pytest.mark.parametrize("block", [1, 7, 500])
def test_what_is_told_of_all_pairs_is_that_of_plain_loops_in_blocks_of_any_size(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    real = points(40, 0, dim=2)
    fake = torch.cat([points(27, 0, dim=2) + 0.7, real[:3] + 1e-3])
    wanted = by_loops(real, fake)
    assert paired(real, fake) == pytest.approx(wanted, rel=1e-12)
    assert len({*wanted.values()}) == 5
    assert all(0 < value < 1.5 for value in wanted.values())


def test_precision_and_recall_of_equal_of_disjoint_sets_and_of_one_mode() -> None:
    first, second = points(100, 1), points(100, 1) + 1e3
    assert precision_recall(first, first) == (1, 1)
    assert precision_recall(first, second) == (0, 0)
    precision, recall = precision_recall(torch.cat([first, second]), first[:50])
    assert precision == 1
    assert recall <= 0.5


def test_the_floor_compares_two_halves_that_share_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setitem(FUNCTIONS, "fid", lambda *halves: seen.extend(half.features for half in halves) or 0.5)
    row = floor_row(pictured(points(101, 1)), frozenset())
    assert (row.model, row.sampler, row.nfe, row.values["fid"], row.intervals) == ("real", None, None, 0.5, {})
    assert abs(len(seen[0]) - len(seen[1])) <= 1
    assert torch.equal(torch.cat(seen).sort(dim=0).values, points(101, 1).sort(dim=0).values)
    assert not torch.equal(torch.cat(seen), points(101, 1))


def pictured(features: Tensor, **more: object) -> Gathered:
    return replace(Gathered.of(features), pictures=torch.zeros(2, 1, 4, 4, dtype=torch.uint8), **more)


def test_the_floor_is_a_function_of_its_seed_low_but_not_zero() -> None:
    real = pictured(whitened(400, 3))
    first, again, other = (floor_row(real, frozenset(), seed).values for seed in (0, 0, 1))
    assert first == again
    assert first["fid"] != other["fid"]
    assert 0 < first["fid"] < 0.5
    assert min(first["precision"], first["recall"]) > 0.8


def test_what_is_checked_in_real_images_is_of_all_of_them_with_its_interval() -> None:
    right = torch.tensor([1.0] * 9 + [0, torch.nan])[:, None]
    numbers = {"features": points(20, 1), "prompt_accuracy": right, "prompt_accuracy.shape": torch.ones(10, 1)}
    needs = frozenset({"features", "scenes", "prompts"})
    row = floor_row(pictured(points(20, 1), numbers=numbers, prompts="abcd"), needs, labels="abcd")
    assert row.values["prompt_accuracy"] == 0.9
    assert row.values["diversity"] == diversity(points(20, 1), 4)
    assert row.intervals.keys() == {"prompt_accuracy", "diversity"}
    assert row.intervals["prompt_accuracy"] == wilson_interval(0.9, 10)
    assert row.attributes == {"prompt_accuracy": {"shape": 1.0}}


def diversity(features: Tensor, num_prompts: int) -> float | None:
    fake = replace(Gathered.of(features), prompts=["a prompt"] * num_prompts)
    found = metrics.diversity(fake, fake)
    return found and found.value


@pytest.mark.parametrize(("num", "num_prompts"), [(12, 3), (18, 4), (16, 4), (20, 1)])
def test_diversity_is_the_mean_distance_between_two_images_of_one_prompt(num: int, num_prompts: int) -> None:
    features = points(num, 1)
    whole = num // num_prompts * num_prompts  # the last round of prompts, where it is not complete, is left out
    pairs = [(i, j) for i in range(whole) for j in range(i) if i % num_prompts == j % num_prompts]
    distances = [(features[i] - features[j]).norm().item() for i, j in pairs]
    assert diversity(features, num_prompts) == pytest.approx(sum(distances) / len(distances), rel=1e-9)


def test_images_that_follow_from_their_prompt_have_no_diversity() -> None:
    assert diversity(points(4, 1).repeat(5, 1), 4) == 0
    assert diversity(points(15, 1), 4) is None  # too few of each


@pytest.mark.parametrize(("share", "num"), [(0.0, 10), (0.0, 1797), (0.9, 1000), (1.0, 50), (0.25, 40)])
def test_the_interval_of_a_share_is_wilsons(share: float, num: int) -> None:
    reference = binomtest(round(share * num), num).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(share, num)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert 0 <= low < high <= 1


def test_the_interval_of_fid_is_as_wide_as_its_spread_over_draws() -> None:
    """Against the FIDs of 200 independent sets of fakes: 95 % of them lie within 1.96 standard deviations."""
    draws = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 3, generator=draws, dtype=torch.float64)
    sets = [torch.randn(400, 3, generator=draws, dtype=torch.float64) * 1.5 + 0.5 for _ in range(200)]
    spread = torch.tensor([fid(real, fake) for fake in sets]).std().item()
    ours = Gathered.of(real)
    intervals = torch.tensor([interval_of(fid(real, fake), metrics.fid, ours, in_groups(fake)) for fake in sets[:40]])
    assert intervals.mean(1)[0] == pytest.approx(fid(real, sets[0]))
    reach = (intervals[:, 1] - intervals[:, 0]).square().mean().sqrt() / 2
    assert reach == pytest.approx(1.96 * spread, rel=0.15)


def test_a_measure_has_what_is_needed_alone_and_intervals_where_they_are_known() -> None:
    real, fake = (
        Gathered.of(points(60, 1)),
        replace(
            in_groups(points(55, 2)),
            numbers={"features": points(55, 2), "accuracy": (torch.arange(55) < 40).float()[:, None]},
        ),
    )
    values, intervals = measure(real, fake, {"features", "classes"})
    assert list(values) == metrics_of("features", "classes")
    assert intervals.keys() == {name for name in values if METRICS[name].interval}
    assert intervals["accuracy"] == wilson_interval(40 / 55, 55)
    assert intervals["recall"] == wilson_interval(values["recall"], 60)
    parts = points(55, 2).chunk(10)
    without = [fid(points(60, 1), torch.cat([*parts[:i], *parts[i + 1 :]])) for i in range(10)]
    reach = 1.959963984540054 * (9 * torch.tensor(without, dtype=torch.float64).var(correction=0)).sqrt().item()
    assert intervals["fid"] == pytest.approx((values["fid"] - reach, values["fid"] + reach), rel=1e-9)
    assert measure(real, fake, {"classes"}, intervals=False) == ({"accuracy": 40 / 55}, {})
