"""LPIPS from a TorchScript file and from the package, which a fake stands for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.evaluation.lpips import load_lpips

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
