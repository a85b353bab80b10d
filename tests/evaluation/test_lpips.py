"""LPIPS from a TorchScript file and from the package, which a fake stands for."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.evaluation import lpips
from fewstep.evaluation.lpips import load_lpips, pair_distance

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "lpips_squeeze.pt"
needs_shared = pytest.mark.skipif(not REAL.is_file(), reason="no shared data here")
CPU = torch.device("cpu")


class Squares(nn.Module):
    """A distance with a weight: w mean (x - y)^2, (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        assert first.shape[1] == 3
        return self.weight * (first - second).square().mean(dim=[1, 2, 3])


class Rows(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).mean(dim=[1, 2])


class Both(Squares):
    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return first.mean(dim=[1, 2, 3]), second.mean(dim=[1, 2, 3])


class Asserts(Squares):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        assert first.shape[2] == 64
        return (first - second).mean(dim=[1, 2, 3])


class NotANumber(Squares):
    """At pictures that are the same."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        distance = (first - second).square().mean(dim=[1, 2, 3])
        return distance / distance


def pictures(channels: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    both = torch.rand(2, 4, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return both[0].requires_grad_(), both[1]


def script(module: nn.Module, path: Path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_torchscript_file_is_called_on_three_channels_and_stays_frozen(channels: int, tmp_path: Path) -> None:
    distance = load_lpips(script(Squares(), tmp_path / "d.pt"), None, CPU, channels, 8)
    first, second = pictures(channels)
    found = distance(first, second)
    torch.testing.assert_close(found, 3 * (first - second).square().mean(dim=(1, 2, 3)))
    (gradient,) = torch.autograd.grad(found.sum(), first)
    torch.testing.assert_close(gradient, 6 * (first - second).detach() / first[0].numel())
    assert not distance(*pictures(channels)[1:] * 2).requires_grad


def test_pictures_are_resized_first_where_it_is_asked_for(tmp_path: Path) -> None:
    distance = load_lpips(script(Squares(), tmp_path / "d.pt"), 16, CPU, 3, 8)
    first, second = pictures()
    both = (nn.functional.interpolate(x, (16, 16), mode="bilinear", align_corners=False) for x in (first, second))
    expected = 3 * (next(both) - next(both)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(distance(first, second), expected)
    assert (expected - load_lpips(str(tmp_path / "d.pt"), None, CPU, 3, 8)(first, second)).abs().min() > 0.1


def test_the_package_is_vgg_and_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    class LPIPS(Squares):
        def __init__(self, **options: object) -> None:
            super().__init__()
            assert options == {"net": "vgg", "verbose": False}

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return super().forward(first, second)[:, None, None, None]  # as the package gives it

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    distance = load_lpips("lpips", None, CPU, 3, 8)
    first, second = pictures()
    torch.testing.assert_close(distance(first, second), 3 * (first - second).square().mean(dim=(1, 2, 3)))


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"regression\.lpips: .*pip install lpips.*TorchScript file"):
        load_lpips("lpips", None, CPU, 3, 8)


def test_what_is_no_distance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"regression\.lpips: .*absent.pt: not a readable TorchScript file"):
        load_lpips(str(tmp_path / "absent.pt"), None, CPU, 3, 8)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match=r"text\.pt: not a readable TorchScript file"):
        load_lpips(str(tmp_path / "text.pt"), None, CPU, 3, 8)
    with pytest.raises(UserError, match=r"rows\.pt: must give one number per picture, not \(2, 8\)"):
        load_lpips(script(Rows(), tmp_path / "rows.pt"), None, CPU, 3, 8)
    with pytest.raises(UserError, match=r"conv\.pt: does not take two batches of pictures of 8 pixels; .*lpips_size"):
        load_lpips(script(nn.Bilinear(4, 4, 1), tmp_path / "conv.pt"), None, CPU, 3, 8)


@needs_shared
def test_the_real_file_is_a_distance_with_gradient() -> None:
    distance = load_lpips(str(REAL), None, CPU, 3, 64)
    first, second = pictures(size=64)
    assert distance(first, first).abs().max() < 1e-6
    found = distance(first, second)
    assert found.min() > 0.05
    torch.testing.assert_close(found, distance(second, first))
    (gradient,) = torch.autograd.grad(found.sum(), first)
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    slope = (distance(first + step, second) - distance(first - step, second)) / 2
    torch.testing.assert_close(slope.detach(), (gradient * step).flatten(1).sum(1), rtol=0.05, atol=1e-6)


# --- pairs of one prompt ----------------------------------------------------------------------------------------------


def bytes_of(num: int, channels: int, size: int) -> Tensor:
    random = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (num, channels, size, size), generator=random, dtype=torch.uint8)


def two_by_two(distance: Callable[[Tensor, Tensor], Tensor], images: Tensor) -> list[float]:
    """In the order of `torch.pdist`, each pair by itself."""
    pixels = images.double() / 255 * 2 - 1
    pairs = [(i, j) for i in range(len(images)) for j in range(i + 1, len(images))]
    return [distance(pixels[i : i + 1].float(), pixels[j : j + 1].float()).item() for i, j in pairs]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("most", [1, 500, 2**22])
def test_pairs_are_those_of_a_loop_in_parts_of_any_size(
    channels: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lpips, "MAX_VALUES", most)
    source, images = script(Squares(), tmp_path / "d.pt"), bytes_of(5, channels, 8)
    found = pair_distance(source, CPU, channels, 8)(images)
    assert not found.requires_grad
    rows = images.expand(-1, 3, -1, -1).double().flatten(1) / 127.5 - 1
    torch.testing.assert_close(found.double(), 3 * torch.pdist(rows).square() / rows.shape[1], rtol=1e-5, atol=0)


@needs_shared
def test_pairs_of_the_real_file_are_those_of_a_loop() -> None:
    network, images = torch.jit.load(REAL), bytes_of(4, 3, 32)
    images[3] = images[0]
    found = pair_distance(str(REAL), CPU, 3, 32)(images)
    torch.testing.assert_close(found, torch.tensor(two_by_two(network, images)), rtol=1e-4, atol=1e-6)
    assert found[2] < 1e-6 < 0.05 < found[0]
    with pytest.raises(UserError, match=r"--lpips .* evaluation\.lpips\): .*squeeze\.pt: .*of 8 pixels; leave it out"):
        pair_distance(str(REAL), CPU, 3, 8)


def test_what_is_no_distance_is_refused_by_the_name_of_the_setting(tmp_path: Path) -> None:
    for source, told in (
        (str(tmp_path / "absent.pt"), "not a readable TorchScript file"),
        (script(Rows(), tmp_path / "rows.pt"), r"must give one number per picture, not \(2, 8\)"),
        (script(Both(), tmp_path / "both.pt"), "must give one number per picture, not a tuple"),
        (script(Asserts(), tmp_path / "asserts.pt"), "does not take two batches of pictures of 8 pixels"),
        (script(NotANumber(), tmp_path / "nan.pt"), "gives NaN or infinity"),
    ):
        for load in (
            lambda source: pair_distance(source, CPU, 3, 8),
            lambda source: load_lpips(source, None, CPU, 3, 8),
        ):
            with pytest.raises(
                UserError, match=rf"^(--lpips \(in a recipe evaluation|regression)\.lpips\)?: [^\n]*{told}"
            ):
                load(source)
