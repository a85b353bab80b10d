"""The metrics against closed forms, other libraries, and loops that were written for this test alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fewstep.evaluation import metrics
from fewstep.evaluation.gathering import Gathered, Sums
from fewstep.evaluation.intervals import wilson_interval
from fewstep.evaluation.judge import Judge
from fewstep.evaluation.metrics import FUNCTIONS, measure
from fewstep.evaluation.report import Row, columns
from fewstep.metric_table import METRICS, Metric, cost, metrics_of


def fid(real: Tensor, fake: Tensor) -> float:
    return metrics.fid(Gathered.of(real), Gathered.of(fake))


def kid(real: Tensor, fake: Tensor) -> float:
    return metrics.kid(Gathered.of(real), Gathered.of(fake)).value


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


def few_dead_and_nearly_so(num: int, dim: int) -> Tensor:
    """Features of which one is constant, two are the same, and variances fall over 12 orders."""
    found = points(num, 1, dim) * torch.logspace(0, -6, dim, dtype=torch.float64)
    found[:, 1] = 2
    found[:, 3] = found[:, 2]
    return found


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(
    ("real", "fake"),
    [
        (points(300, 1, 20), points(200, 2, 20)),
        (points(300, 1, 20).float() + 1, points(200, 2, 20).float()),
        (points(30, 1, 80), points(25, 2, 80)),  # fewer images than features
        (points(300, 1, 80), points(3, 2, 80)),
        (few_dead_and_nearly_so(60, 12), points(50, 2, 12)),
        (few_dead_and_nearly_so(60, 12), few_dead_and_nearly_so(60, 12) + 0.1),
    ],
    ids=["many", "float32", "few", "three", "singular", "moved"],
)
def test_fid_is_that_of_scipys_root_and_of_singular_values(real: Tensor, fake: Tensor) -> None:
    """tr (S S')^(1/2) is the sum of the singular values of X Y^T over sqrt((n-1)(m-1)), X and Y without their means."""
    x, y = (of.double() - of.double().mean(0) for of in (real, fake))
    means, traces = (real.double().mean(0) - fake.double().mean(0)).square().sum(), torch.cov(x.T).trace()
    outside = (means + traces + torch.cov(y.T).trace()).item()
    by_values = torch.linalg.svdvals(x @ y.T).sum().item() / ((len(x) - 1) * (len(y) - 1)) ** 0.5
    by_root = sqrtm((torch.cov(x.T) @ torch.cov(y.T)).numpy()).trace().real
    assert fid(real, fake) == pytest.approx(outside - 2 * by_values, rel=1e-6)
    assert fid(real, fake) == pytest.approx(outside - 2 * by_root, rel=1e-6)


def test_fid_is_its_part_in_the_mean_and_a_trace() -> None:
    """By scipy's root; and what is shifted alone, all images alike, differs in the mean alone."""
    real, fake = points(300, 1, 20), points(200, 2, 20)
    (values, intervals), shift = measure(Gathered.of(real), in_groups(fake)), torch.linspace(-1, 2, 20).double()
    covariances = [torch.cov(each.T).numpy() for each in (real, fake)]
    trace = sum(map(np.trace, covariances)) - 2 * sqrtm(covariances[0] @ covariances[1]).trace().real
    means = ((real.numpy().mean(0) - fake.numpy().mean(0)) ** 2).sum()
    assert values["fid_mean"] == pytest.approx(means, rel=1e-9)
    assert values["fid"] == pytest.approx(means + trace, rel=1e-6)
    assert intervals["fid_mean"][0] < means < intervals["fid_mean"][1]
    shifted = measure(Gathered.of(real), Gathered.of(real + shift), {"features"}, intervals=False)[0]
    assert shifted["fid_mean"] == pytest.approx(shift.square().sum().item(), rel=1e-9)
    assert shifted["fid"] == pytest.approx(shifted["fid_mean"], rel=1e-6)


def test_sums_of_parts_in_any_order_are_those_of_the_whole() -> None:
    """As of ranks and of batches; less a part they are those of the rest."""
    real, fake = points(103, 1, 12).float(), points(90, 2, 12).float()
    first, *rest = (Sums.of(fake[rank::4]) for rank in (2, 0, 3, 1))
    merged = Gathered(90, {"features": [sum(rest, start=first)]})
    assert metrics.fid(Gathered.of(real), merged) == pytest.approx(fid(real, fake), rel=1e-9)
    left = Gathered(60, {"features": [Sums.of(fake) - Sums.of(fake[:30])]})
    assert metrics.fid(Gathered.of(real), left) == pytest.approx(fid(real, fake[30:]), rel=1e-9)


def test_kid_holds_no_more_of_the_larger_set_than_twice_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KID_BLOCK", 10)
    real, fake = points(500, 1), points(25, 2)
    assert kid(real, fake) == kid(real[:40], fake)


def test_the_deviation_of_kid_is_that_of_leaving_out_each_fake_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = points(20, 1), points(12, 2)
    without = torch.tensor([kid(real, torch.cat([fake[:i], fake[i + 1 :]])) for i in range(12)], dtype=torch.float64)
    wanted = (11 * without.var(correction=0)).sqrt().item()
    assert metrics.kid(Gathered.of(real), Gathered.of(fake)).deviation == pytest.approx(wanted, rel=1e-9)
    monkeypatch.setattr(metrics, "KID_BLOCK", 6)
    halves = [metrics.kid(*map(Gathered.of, each)) for each in zip(real.chunk(2), fake.chunk(2), strict=True)]
    both = metrics.kid(Gathered.of(real), Gathered.of(fake))
    assert both.deviation == pytest.approx(sum(half.deviation**2 for half in halves) ** 0.5 / 2, rel=1e-9)


def test_fid_of_axis_aligned_gaussians_is_the_closed_form() -> None:
    mean, spread = torch.tensor([1.0, -2, 0, 0, 3]).double(), torch.tensor([1.0, 2, 0.5, 3, 1]).double()
    other_mean, other_spread = torch.tensor([0.0, 1, 0, 5, 3]).double(), torch.tensor([2.0, 2, 0.1, 1, 4]).double()
    real, fake = whitened(100, 1) * spread + mean, whitened(80, 2) * other_spread + other_mean
    wanted = (mean - other_mean).square().sum() + (spread - other_spread).square().sum()
    assert fid(real, fake) == pytest.approx(wanted.item(), rel=1e-9)
    assert abs(fid(real, real)) < 1e-9


def test_the_floor_compares_two_halves_that_share_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setitem(FUNCTIONS, "kid", lambda *halves: seen.extend(half.features for half in halves) or 0.5)
    row = floor_row(pictured(points(101, 1)))
    assert (row.model, row.sampler, row.nfe, row.values["kid"], row.intervals) == ("real", None, None, 0.5, {})
    assert abs(len(seen[0]) - len(seen[1])) <= 1
    assert torch.equal(torch.cat(seen).sort(dim=0).values, points(101, 1).sort(dim=0).values)
    assert not torch.equal(torch.cat(seen), points(101, 1))


def floor_row(real: Gathered) -> Row:
    """The line of real images in a table of as many fakes."""
    return Judge(None, real, (), (), list, 4, real.count).floor


def pictured(features: Tensor, **more: object) -> Gathered:
    return replace(Gathered.of(features), pictures=torch.zeros(2, 1, 4, 4, dtype=torch.uint8), **more)


def test_the_floor_is_a_function_of_its_seed_low_but_not_zero() -> None:
    real = pictured(whitened(400, 3))
    first, again, other = (metrics.floor(real, 400, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["fid"] != other["fid"]
    assert 0 < first["fid"] < 0.5
    assert min(first["precision"], first["recall"]) > 0.8


def test_what_is_checked_in_real_images_is_of_all_of_them_with_its_interval() -> None:
    right = torch.tensor([1.0] * 9 + [0, torch.nan])[:, None]
    numbers = {"features": points(20, 1), "prompt_accuracy": right, "prompt_accuracy.shape": torch.ones(10, 1)}
    row = floor_row(pictured(points(20, 1), numbers=numbers, prompts="abcd"))
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


def columns_of(**numbers: Tensor) -> Gathered:
    return Gathered(len(next(iter(numbers.values()))), {}, {n: of[:, None] for n, of in numbers.items()})


def test_what_has_no_numbers_is_not_measured_and_no_row_of_metrics_is_needed_for_a_mean() -> None:
    """A reference of statistics alone has FIDs; the columns of scorers are means, attributes of scenes are not told."""
    statistics = Gathered(50, {name: [Sums.of(points(50, 1))] for name in ("features", "patches")})
    fake = replace(in_groups(points(55, 2)), numbers={"features": points(55, 2), "scene.shape": torch.ones(55, 1)})
    assert list(measure(statistics, fake)[0]) == ["fid", "fid_mean"]
    patches = replace(fake, groups={"patches": fake.groups["features"]}, numbers={})
    values, intervals = measure(statistics, patches)
    assert values == {"patch_fid": metrics.fid(statistics, fake)}
    assert intervals == {"patch_fid": measure(statistics, fake)[1]["fid"]}
    scores = torch.tensor([1.0, 2, torch.nan, 6])
    scored = columns_of(scorer=scores, clip=torch.tensor([0.5, 0.25, 0.0, 0.25]), empty=scores * torch.nan)
    values, intervals = measure(statistics, scored)
    assert values == {"clip": 0.25, "scorer": 3.0}
    assert intervals.keys() == values.keys()
    assert 1 <= intervals["scorer"][0] < 3 < intervals["scorer"][1] <= 6
    assert measure(statistics, scored, {"scorers"})[0] == {"scorer": 3.0}
    assert measure(statistics, scored, {"clip"}, intervals=False) == ({"clip": 0.25}, {})


def test_every_interval_is_of_the_kind_that_the_table_says() -> None:
    real = fake = replace(
        in_groups(points(60, 1)),
        groups=dict.fromkeys(("features", "patches"), in_groups(points(60, 1)).groups["features"]),
        numbers={
            "features": points(60, 1),
            "colours": torch.rand(60, 3),
            **{name: torch.ones(60, 1) for name in ("clip", "accuracy", "prompt_accuracy", "two_objects")},
        },
        prompts="abcd",
        pairs={"lpips": torch.rand(4, 3)},
    )
    kinds = {metrics.Share: "wilson", metrics.Mean: "bootstrap", metrics.Estimate: "jackknife", float: "jackknife"}
    assert {name: kinds[type(FUNCTIONS[name](real, fake))] for name in FUNCTIONS} == {
        name: METRICS[name].interval for name in FUNCTIONS
    }
    assert measure(real, fake)[1].keys() == FUNCTIONS.keys()


def test_drift_is_signed_and_of_the_fakes_less_the_reals() -> None:
    real, fake = torch.rand(50, 3), torch.rand(40, 3) * torch.tensor([0.5, 1, 2]) + torch.tensor([0.0, 0.5, 0])
    values, intervals = measure(Gathered(50, {}, {"colours": real}), Gathered(40, {}, {"colours": fake}))
    wanted = dict(zip(("brightness", "contrast", "saturation"), (fake.mean(0) - real.mean(0)).tolist(), strict=True))
    assert values == pytest.approx(wanted, rel=1e-5)
    assert values["brightness"] < 0 < values["contrast"]
    for column, name in enumerate(wanted):
        low, high = intervals[name]
        spread = (fake[:, column].var() / 40 + real[:, column].var() / 50).sqrt().item()
        assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)


def test_diversity_is_of_the_pairs_where_they_were_drawn() -> None:
    pairs = {"features": torch.tensor([[1.0, 3], [4, 6]]), "lpips": torch.tensor([[0.5, 0.5], [0.25, 0.75]])}
    fake = replace(Gathered.of(points(8, 1)), prompts="ab", pairs=pairs)
    values, intervals = measure(fake, fake, {"prompts", "lpips"})
    assert values == {"diversity": 3.5, "lpips_diversity": 0.5}
    assert intervals == {"diversity": (2, 5), "lpips_diversity": (0.5, 0.5)}  # over prompts


@pytest.mark.parametrize(
    ("name", "values"),  # from the best to the worst
    [
        ("fid", (-0.1, 0.2, 3)),
        ("ema0.9999_patch_fid", (0.2, 3)),
        ("ema0.9_recall", (0.9, 0.1)),
        ("brightness", (0.01, -0.02, 0.03)),
        ("ema0_saturation", (0.0, -0.02)),
        ("memorised", (0.0, 0.5)),
        ("latency", (0.1, 2)),
        ("lpips_diversity", (0.5, 0.1)),
        ("a_scorer", (7, -2)),
        ("my_fid", (7, 2)),
        ("image_contrast", (7, -2)),
    ],
)
def test_less_cost_is_better(name: str, values: tuple[float, ...]) -> None:
    costs = [cost(name, value) for value in values]
    assert costs == sorted(costs)
    assert len({*costs}) == len(costs)


def test_a_share_of_pairs_is_of_no_more_fakes_than_are_compared() -> None:
    counts = {name: each.cases(50_000) for name, each in METRICS.items() if each.per_fake}
    assert counts == {"precision": 10_000, "accuracy": 50_000, "memorised": 10_000}
    assert METRICS["precision"].cases(300) == 300
