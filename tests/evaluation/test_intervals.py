"""Intervals against scipy, closed forms, and the spread over draws."""

import pytest
import torch
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from fewstep.evaluation import intervals, metrics
from fewstep.evaluation.gathering import Gathered
from fewstep.evaluation.intervals import Mean, bootstrap_interval, wilson_interval
from fewstep.evaluation.metrics import interval_of


def fid(real: Tensor, fake: Tensor) -> float:
    return metrics.fid(Gathered.of(real), Gathered.of(fake))


@pytest.mark.parametrize(("share", "num"), [(0.0, 10), (0.0, 1797), (0.9, 1000), (1.0, 50), (0.25, 40)])
def test_the_interval_of_a_share_is_wilsons(share: float, num: int) -> None:
    reference = binomtest(round(share * num), num).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(share, num)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert 0 <= low <= share <= high <= 1


def test_the_interval_of_fid_is_as_wide_as_its_spread_over_draws() -> None:
    """Against the FIDs of 200 independent sets of fakes: 95 % of them lie within 1.96 standard deviations."""
    draws = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 3, generator=draws, dtype=torch.float64)
    sets = [torch.randn(400, 3, generator=draws, dtype=torch.float64) * 1.5 + 0.5 for _ in range(200)]
    spread = torch.tensor([fid(real, fake) for fake in sets]).std().item()
    ours = Gathered.of(real)
    intervals = torch.tensor(
        [interval_of(fid(real, fake), metrics.fid, ours, Gathered.of(fake, 10)) for fake in sets[:40]]
    )
    assert intervals.mean(1)[0] == pytest.approx(fid(real, sets[0]))
    reach = (intervals[:, 1] - intervals[:, 0]).square().mean().sqrt() / 2
    assert reach == pytest.approx(1.96 * spread, rel=0.15)


def test_the_interval_of_kid_is_as_wide_as_its_spread_over_draws() -> None:
    draws = torch.Generator().manual_seed(0)
    real = Gathered.of(torch.randn(200, 3, generator=draws))
    sets = [Gathered.of(torch.randn(100, 3, generator=draws) * 1.3 + 0.3) for _ in range(150)]
    found = [metrics.kid(real, fake) for fake in sets]
    spread = torch.tensor([each.value for each in found]).std().item()
    deviation = torch.tensor([each.deviation for each in found]).square().mean().sqrt()
    assert deviation == pytest.approx(spread, rel=0.15)


def test_a_bootstrap_is_that_of_scipy_follows_from_its_seed_and_is_drawn_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = torch.rand(80, generator=torch.Generator().manual_seed(0)).square()
    ours = bootstrap_interval(Mean(numbers))
    theirs = bootstrap((numbers.numpy(),), lambda x, axis: x.mean(axis), method="percentile", random_state=0)
    low, high = map(float, theirs.confidence_interval)
    assert ours == pytest.approx((low, high), abs=0.1 * (high - low))
    assert ours == bootstrap_interval(Mean(numbers))
    assert ours != bootstrap_interval(Mean(numbers), seed=1)
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 500)
    assert bootstrap_interval(Mean(numbers)) == pytest.approx(ours, abs=0.1 * (high - low))


def test_a_difference_has_the_spread_of_both_sets() -> None:
    draws = torch.Generator().manual_seed(0)
    first, second = torch.randn(300, generator=draws), torch.randn(100, generator=draws) * 2
    low, high = bootstrap_interval(Mean(first, second))
    middle, spread = (first.mean() - second.mean()).item(), (first.var() / 300 + second.var() / 100).sqrt().item()
    assert (low, high) == pytest.approx((middle - 1.96 * spread, middle + 1.96 * spread), abs=0.2 * spread)


def test_a_single_number_has_no_interval() -> None:
    one = Gathered.of(torch.rand(5, 3))
    assert interval_of(Mean(torch.ones(1)), metrics.diversity, one, one) is None
    assert interval_of(1.0, metrics.fid, one, one) is None  # nor has what was gathered in one group
