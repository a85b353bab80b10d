"""Sums, features and counts of a stream of images are those of the whole set, and the images are let go."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation import gathering, metrics
from fewstep.evaluation.gathering import CheckProbe, FeatureProbe, Gathered, gather

SIDE, DIM = 6, 12
PROJECTION = torch.randint(-3, 4, (SIDE * SIDE, DIM), generator=torch.Generator().manual_seed(9)).float()  # exact
EXTRACTOR = SimpleNamespace(name="projection", features=lambda images: images.flatten(1).float() @ PROJECTION)
PROBE = FeatureProbe(EXTRACTOR)


def images(num: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (num, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("batch_size", [1, 7, 103, 500])
def test_what_a_stream_leaves_is_what_the_whole_set_gives(batch_size: int) -> None:
    """In any batches: FID to 1e-9, all else exactly."""
    real, fake = images(300), images(103, 1) // 2
    whole = metrics.fid(Gathered.of(EXTRACTOR.features(real)), Gathered.of(EXTRACTOR.features(fake)))
    ours = gather(real.split(64), [PROBE], 300, "real")
    found = gather(fake.split(batch_size), [PROBE], 103, "fake", num_groups=10)
    features = EXTRACTOR.features(fake)
    assert metrics.fid(ours, found) == pytest.approx(whole, rel=1e-9)
    assert torch.equal(found.features, features)
    assert torch.equal(found.pictures, fake[:40])
    for group, part in zip(found.groups["features"], features.double().chunk(10), strict=True):
        assert group.count == len(part)
        assert torch.equal(group.total, part.sum(0))
        assert torch.equal(group.products, part.T @ part)
    assert torch.equal(found.without(3).sums().total, features.double().sum(0) - found.groups["features"][3].total)
    torch.testing.assert_close(found.sums().covariance, torch.cov(features.double().T))


def test_the_images_of_a_stream_are_let_go() -> None:
    """However many there are, no more than two batches are alive beside the one that is being made."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def stream() -> Iterator[Tensor]:
        for seed in range(40):
            batch = images(50, seed)
            made.append(weakref.ref(batch))
            alive.append(sum(each() is not None for each in made))
            yield batch

    def check(batch: Tensor, numbers: range) -> list[dict[str, bool]]:
        return [{"even": number % 2 == 0} for number in numbers]

    found = gather(stream(), [PROBE, CheckProbe(check, "even")], 2000, "source")
    assert max(alive) <= 3
    assert found.sums().count == 2000
    assert found.share("even") == (1000, 2000)
    assert found.share("odd") is None
    assert found.pictures.untyped_storage().nbytes() == 40 * SIDE * SIDE


def test_beyond_a_bound_only_the_sums_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "MAX_KEPT", 120)
    found = gather(images(300).split(50), [PROBE], 300, "source")
    assert torch.equal(found.features, EXTRACTOR.features(images(300)[:120]))
    assert found.features.untyped_storage().nbytes() == 120 * DIM * 4
    assert torch.equal(found.sums().total, EXTRACTOR.features(images(300)).double().sum(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_or_none_at_all_are_told_with_their_source(value: float) -> None:
    broken = SimpleNamespace(name="net", features=lambda images: images.flatten(1) * torch.tensor(value))
    with pytest.raises(UserError, match="student@500: features of net are not finite"):
        gather(images(10).split(5), [FeatureProbe(broken)], 10, "student@500")
    with pytest.raises(UserError, match=r"data\.source: no images"):
        gather([], [PROBE], 0, "data.source")
