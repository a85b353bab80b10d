"""FID, precision and recall against closed forms and loops that were written for this test alone."""

import pytest
import scipy.linalg
import torch
from scipy.stats import binomtest
from torch import Tensor

from fewstep.evaluation import metrics
from fewstep.evaluation.metrics import diversity, fid, fid_interval, floor_row, precision_recall, wilson_interval


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


def frechet(real: Tensor, fake: Tensor) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) with scipy's matrix root."""
    root = scipy.linalg.sqrtm((torch.cov(real.T) @ torch.cov(fake.T)).numpy()).real
    trace = torch.cov(real.T).trace() + torch.cov(fake.T).trace() - 2 * root.trace()
    return ((real.mean(0) - fake.mean(0)).square().sum() + trace).item()


@pytest.mark.parametrize(("num", "dim"), [(50, 2), (300, 5), (400, 40)])
def test_fid_is_scipys(num: int, dim: int) -> None:
    real, fake = points(num, 1, dim), points(2 * num, 2, dim)
    assert fid(real, fake) == pytest.approx(frechet(real, fake), rel=1e-9)


def test_fid_of_axis_aligned_gaussians_is_the_closed_form() -> None:
    mean, spread = torch.tensor([1.0, -2, 0, 0, 3]).double(), torch.tensor([1.0, 2, 0.5, 3, 1]).double()
    other_mean, other_spread = torch.tensor([0.0, 1, 0, 5, 3]).double(), torch.tensor([2.0, 2, 0.1, 1, 4]).double()
    real, fake = whitened(100, 1) * spread + mean, whitened(80, 2) * other_spread + other_mean
    wanted = (mean - other_mean).square().sum() + (spread - other_spread).square().sum()
    assert fid(real, fake) == pytest.approx(wanted.item(), rel=1e-9)


def test_fid_of_a_set_with_itself_is_zero() -> None:
    assert abs(fid(points(100, 1), points(100, 1))) < 1e-9


def test_fid_is_symmetric_and_takes_float32() -> None:
    real, fake = points(100, 1).float(), points(90, 2).float()
    assert fid(real, fake) == pytest.approx(fid(fake, real), rel=1e-9)
    assert fid(real, fake) == pytest.approx(frechet(real.double(), fake.double()), rel=1e-9)


def share_by_loops(inside: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of points that lie in the ball of any manifold point to its k-th nearest neighbour, by loops."""
    hits = 0
    for point in inside:
        for index, centre in enumerate(manifold):
            others = [(centre - other).norm().item() for j, other in enumerate(manifold) if j != index]
            if (point - centre).norm().item() <= sorted(others)[neighbours - 1]:
                hits += 1
                break
    return hits / len(inside)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_plain_loops(neighbours: int) -> None:
    real, fake = points(40, 0, dim=2), points(30, 0, dim=2)[:30] + 0.7
    wanted = share_by_loops(fake, real, neighbours), share_by_loops(real, fake, neighbours)
    assert precision_recall(real, fake, neighbours) == wanted
    assert wanted[0] != wanted[1]
    assert all(0 < share < 1 for share in wanted)


def test_identical_sets_have_full_precision_and_recall() -> None:
    assert precision_recall(points(60, 1), points(60, 1)) == (1, 1)


def test_disjoint_sets_have_none() -> None:
    assert precision_recall(points(60, 1), points(60, 1) + 1e3) == (0, 0)


def test_a_set_on_one_mode_is_precise_and_recalls_little() -> None:
    first, second = points(100, 1), points(100, 1) + 1e3
    precision, recall = precision_recall(torch.cat([first, second]), points(100, 1)[:50])
    assert precision == 1
    assert recall <= 0.5


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_size_of_a_chunk_does_not_matter(chunk: int) -> None:
    inside, manifold = 1.5 * whitened(50, 0), whitened(64, 1)
    whole = metrics._share_inside(inside, manifold, 3)
    assert 0 < whole < 1
    assert metrics._share_inside(inside, manifold, 3, chunk) == whole


def test_the_floor_compares_two_halves_that_share_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(metrics, "fid", lambda *halves: seen.extend(halves) or 0.5)
    row = floor_row(points(101, 1), accuracy=0.9)
    assert (row.model, row.sampler, row.nfe, row.fid, row.accuracy) == ("real", None, None, 0.5, 0.9)
    assert row.images_per_second is None
    assert abs(len(seen[0]) - len(seen[1])) <= 1
    assert torch.equal(torch.cat(seen).sort(dim=0).values, points(101, 1).sort(dim=0).values)
    assert not torch.equal(torch.cat(seen), points(101, 1))


def test_the_floor_is_a_function_of_its_seed() -> None:
    real = points(80, 1)
    assert floor_row(real) == floor_row(real)
    assert floor_row(real).fid != floor_row(real, seed=1).fid


def test_the_floor_of_real_images_is_low_but_not_zero() -> None:
    real = whitened(400, 3)
    row = floor_row(real)
    assert 0 < row.fid < 0.5
    assert row.precision > 0.8
    assert row.recall > 0.8


@pytest.mark.parametrize(("num", "num_prompts"), [(12, 3), (14, 4), (8, 4), (20, 1)])
def test_diversity_is_the_mean_distance_between_two_images_of_one_prompt(num: int, num_prompts: int) -> None:
    features = points(num, 1)
    whole = num // num_prompts * num_prompts  # the last round of prompts, where it is not complete, is left out
    distances = [
        (features[i] - features[j]).norm().item()
        for i in range(whole)
        for j in range(i)
        if i % num_prompts == j % num_prompts
    ]
    assert diversity(features, num_prompts) == pytest.approx(sum(distances) / len(distances), rel=1e-9)


def test_images_that_follow_from_their_prompt_have_no_diversity() -> None:
    assert diversity(points(4, 1).repeat(5, 1), 4) == 0


@pytest.mark.parametrize(("share", "num"), [(0.0, 10), (0.9, 1000), (1.0, 50), (0.25, 40)])
def test_the_interval_of_a_share_is_wilsons(share: float, num: int) -> None:
    reference = binomtest(round(share * num), num).proportion_ci(0.95, "wilson")
    assert wilson_interval(share, num) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_the_interval_of_fid_is_as_wide_as_its_spread_over_draws() -> None:
    """Against the FIDs of 200 independent sets of fakes: 95 % of them lie within 1.96 standard deviations."""
    draws = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 3, generator=draws, dtype=torch.float64)
    sets = [torch.randn(400, 3, generator=draws, dtype=torch.float64) * 1.5 + 0.5 for _ in range(200)]
    spread = torch.tensor([fid(real, fake) for fake in sets]).std().item()
    intervals = torch.tensor([fid_interval(real, fake) for fake in sets[:40]])
    assert intervals.mean(1)[0] == pytest.approx(fid(real, sets[0]))
    reach = (intervals[:, 1] - intervals[:, 0]).square().mean().sqrt() / 2
    assert reach == pytest.approx(1.96 * spread, rel=0.15)
