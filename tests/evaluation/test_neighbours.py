"""What is told of all pairs of images against loops, with ties, copies and sets of any kind."""

import pytest
import torch
from torch import Tensor

from fewstep.evaluation import neighbours
from fewstep.evaluation.gathering import Gathered
from fewstep.evaluation.metrics import FUNCTIONS


def points(num: int, seed: int, dim: int = 2) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def by_loops(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Precision, recall, density, coverage and memorisation by loops over pairs of points."""

    def distances(some: Tensor, others: Tensor) -> list[list[float]]:
        return (some.double()[:, None] - others.double()).norm(dim=2).tolist()

    def radius(of: list[list[float]], index: int, k: int) -> float:
        return sorted(distance for j, distance in enumerate(of[index]) if j != index)[k - 1]

    def share(hits: list[bool]) -> float:
        return sum(hits) / len(hits)

    near, of_real, of_fake = distances(fake, real), distances(real, real), distances(fake, fake)
    narrow, wide = ([radius(of_real, i, k) for i in range(len(real))] for k in (3, 5))
    reach = [radius(of_fake, j, 3) for j in range(len(fake))]
    return {
        "precision": share([any(d <= r for d, r in zip(row, narrow, strict=True)) for row in near]),
        "recall": share([any(near[j][i] <= reach[j] for j in range(len(fake))) for i in range(len(real))]),
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
    real = points(40, 0)
    fake = torch.cat([points(27, 1) + 0.7, real[:3] + 1e-3])
    wanted = by_loops(real, fake)
    assert paired(real, fake) == pytest.approx(wanted, rel=1e-12)
    assert len({*wanted.values()}) == 5
    assert all(0 < value < 1.5 for value in wanted.values())


LARGE = points(60, 1, 300) + 30  # whose squares are 10^4 times their distances


@pytest.mark.parametrize(
    ("real", "fake"),
    [
        (LARGE, LARGE),
        (LARGE[:20].repeat(6, 1)[:110], LARGE[:40]),  # the real images five times and more: balls of no size
        (LARGE[:40], LARGE[:5].repeat(8, 1)),  # a generator that copies five images
        (LARGE[:40], LARGE[:1].repeat(30, 1)),
        (LARGE[:1].repeat(30, 1), LARGE[:20]),
        (points(60, 1).round(), points(50, 2).round()),  # the same distances again and again
        (points(60, 1, 8).sign(), points(50, 2, 8).sign()),
        (LARGE, torch.cat([LARGE[:30], LARGE[:30] + 1e-3])),
    ],
    ids=["equal", "repeated", "copies", "one", "constant", "grid", "corners", "near"],
)
def test_copies_are_at_no_distance_and_ties_are_inside(real: Tensor, fake: Tensor) -> None:
    assert paired(real, fake) == pytest.approx(by_loops(real, fake), rel=1e-12)
    order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(0))
    assert paired(real, fake[order]) == pytest.approx(paired(real, fake), rel=1e-12)


def test_a_copy_of_a_real_image_is_memorised_and_one_of_two_that_are_the_same_is_not() -> None:
    assert paired(LARGE, LARGE)["memorised"] == 1
    assert paired(LARGE.repeat(2, 1), LARGE)["memorised"] == 0
    assert paired(LARGE, points(60, 2, 300) + 30)["memorised"] == 0


def test_as_many_perfect_fakes_have_a_density_of_one_and_a_coverage_of_all_but_one_in_thirty_two() -> None:
    """As arXiv 2002.09797 derives it."""
    both = [paired(points(400, seed, 8), points(400, seed + 50, 8)) for seed in range(5)]
    density, coverage = (sum(each[name] for each in both) / 5 for name in ("density", "coverage"))
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.01)


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    both = Gathered.of(real), Gathered.of(fake)
    return FUNCTIONS["precision"](*both).value, FUNCTIONS["recall"](*both).value


def test_precision_and_recall_of_equal_of_disjoint_sets_and_of_one_mode() -> None:
    first, second = points(100, 1), points(100, 1) + 1e3
    assert precision_recall(first, first) == (1, 1)
    assert precision_recall(first, second) == (0, 0)
    precision, recall = precision_recall(torch.cat([first, second]), first[:50])
    assert precision == 1
    assert recall <= 0.5


def test_all_pairs_are_looked_at_once_and_those_of_the_reals_once_for_all_fakes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, whole = list[tuple[int, int]](), neighbours._squares

    def squares(rows: Tensor, columns: Tensor, origin: Tensor) -> Tensor:
        seen.append((len(rows), len(columns)))
        return whole(rows, columns, origin)

    monkeypatch.setattr(neighbours, "_squares", squares)
    monkeypatch.setattr(neighbours, "MAX_COMPARED", 50)
    real, fakes = Gathered.of(points(70, 1)), [Gathered.of(points(num, num)) for num in (30, 80)]
    for fake in fakes:
        for name in PAIRED:
            FUNCTIONS[name](real, fake)
    assert seen == [(50, 50), (30, 30), (30, 50), (50, 50), (50, 50)]
    other = Gathered.of(points(70, 2))
    assert FUNCTIONS["recall"](other, fakes[0]) == FUNCTIONS["recall"](other, Gathered.of(points(30, 30)))
