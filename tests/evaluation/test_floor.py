"""The noise floor against perfect generators: sets drawn from the distribution that the real images are of."""

import pytest
import torch
from torch import Tensor

from fewstep.evaluation import metrics
from fewstep.evaluation.gathering import Gathered, Sums
from fewstep.evaluation.metrics import enough, floor, split

DIM = 16
SPECTRA = {"of one variance": torch.ones(DIM), "of falling variance": 1 / torch.arange(1, DIM + 1.0)}


def drawn(num: int, seed: int, spectrum: Tensor) -> Gathered:
    draws = torch.Generator().manual_seed(seed)
    return Gathered.of(torch.randn(num, DIM, generator=draws) * spectrum.sqrt())


@pytest.mark.parametrize(("spectrum", "noise"), [("of one variance", 0.04), ("of falling variance", 0.08)])
@pytest.mark.parametrize(("num_real", "num_samples"), [(400, 400), (400, 100), (400, 16), (120, 300), (32, 32)])
def test_the_floor_of_fid_is_the_mean_fid_of_perfect_generators(
    num_real: int, num_samples: int, spectrum: str, noise: float
) -> None:
    """Within the noise of these means, from as many images in the floor's smaller set as dimensions."""
    floors, fids = list[float](), list[float]()
    for seed in range(50):
        real = drawn(num_real, seed, SPECTRA[spectrum])
        floors.append(floor(real, num_samples)["fid"])
        fids += [metrics.fid(real, drawn(num_samples, 100 + 4 * seed + k, SPECTRA[spectrum])) for k in range(4)]
    assert sum(floors) / len(floors) == pytest.approx(sum(fids) / len(fids), rel=noise)


@pytest.mark.parametrize(("num_real", "num_samples"), [(400, 100), (120, 300)])
def test_the_floor_of_the_part_in_the_mean_is_that_of_two_sets_of_independent_images(
    num_real: int, num_samples: int
) -> None:
    """E |m - m'|^2 = tr S (1/M + 1/N)."""
    reals = [drawn(num_real, seed, SPECTRA["of falling variance"]) for seed in range(100)]
    floors = [floor(real, num_samples)["fid_mean"] for real in reals]
    expected = SPECTRA["of falling variance"].sum().item() * (1 / num_samples + 1 / num_real)
    assert sum(floors) / len(floors) == pytest.approx(expected, rel=0.06)


def test_the_floor_of_pairs_is_as_many_images_against_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    real = drawn(300, 0, SPECTRA["of one variance"])
    seen = list[tuple[Gathered, Gathered]]()
    monkeypatch.setitem(metrics.FUNCTIONS, "precision", lambda *both: seen.append(both) or 0.5)
    assert [floor(real, num)["precision"] for num in (40, 500)] == [0.5, 0.5]
    counts = [(len(some.features), len(others.features)) for others, some in seen]
    assert counts == [(40, 260), (150, 150)]
    for others, some in seen:
        both = torch.cat([some.features, others.features])
        assert torch.equal(both.sort(dim=0).values, real.features.sort(dim=0).values)  # and no image is in both
    monkeypatch.setattr(metrics, "MAX_COMPARED", 100)
    floor(real, 500)
    assert [len(each.features) for each in seen[-1]] == [100, 100]


@pytest.mark.parametrize("labelled", [False, True], ids=["prompts in turn", "classes in any order"])
def test_sets_of_prompts_or_classes_in_turn_have_whole_rounds_of_them(labelled: bool) -> None:
    """The mean FID of perfect generators that are asked for the same: independent draws have three times as much."""
    middles = 4 * torch.randn(8, DIM, generator=torch.Generator().manual_seed(0))

    def asked(num: int, seed: int) -> Gathered:
        draws = torch.Generator().manual_seed(seed)
        kinds = torch.arange(num) % 8
        features = middles[kinds] + torch.randn(num, DIM, generator=draws)
        if not labelled:
            return Gathered(num, {"features": [Sums.of(features)]}, {"features": features}, prompts="abcdefgh")
        order = torch.randperm(num, generator=draws)
        numbers = {"features": features[order], "kind": kinds[order, None].float()}
        return Gathered(num, {"features": [Sums.of(features)]}, numbers)

    reals = [asked(403, seed) for seed in range(10)]
    floors = [floor(real, 200)["fid"] for real in reals]
    fids = [metrics.fid(real, asked(200, 100 + 4 * k + each)) for k, real in enumerate(reals) for each in range(4)]
    assert sum(floors) / len(floors) == pytest.approx(sum(fids) / len(fids), rel=0.07)
    alone = [Gathered.of(real.features) for real in reals]
    assert sum(floor(real, 200)["fid"] for real in alone) > 3 * sum(floors)


def test_a_split_takes_some_of_each_kind_in_turn() -> None:
    kinds = torch.randint(0, 8, (403,), generator=torch.Generator().manual_seed(1))
    some, others = split(kinds, 100, torch.Generator().manual_seed(0))
    assert sorted([*some.tolist(), *others.tolist()]) == [*range(403)]
    assert torch.equal(kinds[some].bincount(minlength=8), torch.full((8,), 12))
    again, _ = split(kinds, 100, torch.Generator().manual_seed(1))
    assert {*some.tolist()} != {*again.tolist()}
    assert [len(split(torch.arange(20) % n, 10, torch.Generator())[0]) for n in (1, 8, 11, 20)] == [10, 8, 10, 10]


def test_a_floor_has_what_compares_two_sets_and_follows_from_its_seed() -> None:
    whole = drawn(200, 0, SPECTRA["of one variance"])
    numbers = {**whole.numbers, "colours": torch.rand(200, 3), "clip": torch.rand(200, 1)}
    real = Gathered(200, {**whole.groups, "patches": whole.groups["features"]}, {**numbers, "patches": whole.features})
    found = floor(real, 50)
    assert found.keys() == {*metrics.metrics_of("features", "patches", "colours")}
    assert found == floor(real, 50)
    assert found["fid"] != floor(real, 50, seed=1)["fid"]
    assert abs(found["brightness"]) < 0.2
    assert floor(Gathered(200, {"features": [Sums.of(whole.features)]}), 50) == {}  # of statistics alone


@pytest.mark.parametrize(
    ("count", "width", "told"),
    [
        (511, 2048, "511 images are too few for a FID of 2048 features; it takes 512 or more, or a layer of 768"),
        (100, 768, "100 images are too few for a FID of 768 features; it takes 192 or more, or a layer of 192"),
        (15, 64, "15 images are too few for a FID of 64 features; it takes 16 or more, or a narrower layer"),
        (512, 2048, None),
        (100, 64, None),
    ],
)
def test_too_few_images_for_the_features_are_told_with_how_many_it_takes_and_a_smaller_layer(
    count: int, width: int, told: str | None
) -> None:
    assert enough(count, width) == told


def test_a_covariance_is_singular_of_as_many_images_as_features() -> None:
    few, many = (Sums.of(torch.randn(num, 64).double()).covariance for num in (64, 65))
    assert torch.linalg.matrix_rank(few) == 63
    assert torch.linalg.matrix_rank(many) == 64


def test_below_the_limit_a_perfect_generator_is_no_nearer_than_one_that_gives_the_mean_alone() -> None:
    """In features of one variance, whose FID to a single point is its trace."""
    draws = torch.Generator().manual_seed(0)
    real = Gathered.of(torch.randn(3000, 64, generator=draws))
    below, above = (
        [metrics.fid(real, Gathered.of(torch.randn(n, 64, generator=draws))) for _ in "abc"] for n in (15, 24)
    )
    trace = real.sums().covariance.trace().item()
    assert min(below) > trace > max(above)
