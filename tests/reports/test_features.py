"""Row 28: what a feature network from elsewhere gives is looked at, and so is what is kept beside the runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.embedded.sources import digits
from fewstep.errors import UserError
from fewstep.evaluation import extractors, reference
from fewstep.evaluation.extractors import Classifier, TorchScriptExtractor, open_classifier
from fewstep.evaluation.gathering import FeatureProbe, Gathered, gather
from fewstep.networks.settings import PixelModelConfig


def pixels(num: int = 4) -> Tensor:
    return torch.randint(0, 256, (num, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def means(images: Tensor) -> Tensor:
    """(B, 3)."""
    return images.float().mean(dim=(2, 3))


class FeaturesIfAsked(nn.Module):
    """As NVIDIA's Inception: probabilities unless features are asked for."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = images.float().mean(dim=(2, 3))
        return features if return_features else features.softmax(1)


class Maps(nn.Module):
    """(B, 3, 1, 1), as networks without a last flattening have it, or with `size` larger maps."""

    def __init__(self, size: int = 1):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(size)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(images.float())


class Both(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.float().mean(dim=(2, 3)), images.float().sum(dim=(2, 3))


class Named(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"pool": images.float().mean(dim=(2, 3))}


class Probabilities(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3)).softmax(1)


class LogProbabilities(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3)).log_softmax(1)


class Labels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3)).argmax(1)


class OfTheWholeBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(0, 2, 3))[None]


class AsWideAsTheBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1) @ images.float().flatten(1).T


class NotANumber(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3)) / 0.0 - images.float().mean(dim=(2, 3)) / 0.0


class Asserts(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[3] == 299
        return images.float().mean(dim=(2, 3))


class Grey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.first(images.float()).mean(dim=(2, 3))


class Wide(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))[:, :1].expand(-1, self.width)


def scripted(network: nn.Module, folder: Path) -> TorchScriptExtractor:
    torch.jit.script(network.eval()).save(folder / "net.pt")
    return TorchScriptExtractor(folder / "net.pt")


def test_features_of_4096_numbers_are_taken(tmp_path: Path) -> None:
    assert scripted(Wide(4096), tmp_path).features(pixels()).shape == (4, 4096)


@pytest.mark.parametrize("network", [FeaturesIfAsked(), Maps()], ids=["row-28-features-if-asked", "row-28-b-c-1-1"])
def test_features_are_taken(network: nn.Module, tmp_path: Path) -> None:
    torch.testing.assert_close(scripted(network, tmp_path).features(pixels()), means(pixels()))


@pytest.mark.parametrize(
    ("network", "told"),
    [
        pytest.param(Probabilities(), "gives class probabilities", id="row-28-probabilities"),
        pytest.param(LogProbabilities(), "gives class probabilities", id="row-28-log-probabilities"),
        pytest.param(Both(), "gives a tuple for 4 images, not features", id="row-28-a-tuple"),
        pytest.param(Named(), "gives a dict for 4 images, not features", id="row-28-a-dict"),
        pytest.param(Labels(), r"gives numbers \(4,\) for 4 images, not features", id="row-28-labels"),
        pytest.param(Maps(4), r"gives numbers \(4, 3, 4, 4\) for 4 images, not features", id="row-28-maps"),
        pytest.param(OfTheWholeBatch(), r"gives numbers \(1, 3\) .* as many", id="row-28-of-the-batch"),
        pytest.param(Asserts(), r"must take uint8 images \(4, 3, 8, 8\)", id="row-28-an-assertion"),
        pytest.param(Grey(), r"must take uint8 images \(4, 3, 8, 8\)", id="row-28-one-channel"),
        pytest.param(Wide(4097), r"gives numbers \(4, 4097\) .*with D up to 4096", id="row-28-too-wide"),
        pytest.param(nn.Conv2d(3, 4, 8), r"must take uint8 images \(4, 3, 8, 8\)", id="row-28-normalised-floats"),
    ],
)
def test_what_is_no_feature_is_refused_in_one_line(network: nn.Module, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"net\.pt: {told}") as error:
        scripted(network, tmp_path).features(pixels())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        pytest.param(AsWideAsTheBatch(), "as many for every image", id="row-28-a-width-of-the-batch"),
        pytest.param(NotANumber(), "photos: features of net.* are not finite", id="row-28-nan"),
    ],
)
def test_what_shows_itself_in_a_stream_is_one_line_too(network: nn.Module, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        gather(iter([pixels(4), pixels(3)]), [FeatureProbe(scripted(network, tmp_path))], 7, "photos")


# --- what is kept beside the runs -------------------------------------------------------------------------------------


def kept(path: Path) -> tuple[Gathered, bool]:
    """What is gathered, and whether it was gathered anew."""
    made = []
    found = reference.kept(path, lambda: made.append(path) or Gathered.of(means(pixels(50))))  # type: ignore[func-returns-value]
    return found, bool(made)


def rewritten(path: Path, **changes: Tensor) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | changes, path, metadata)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "another file": lambda path: path.write_text("notes"),
    "no facts": lambda path: save_file({"total": torch.zeros(3)}, path),
    "facts of another kind": lambda path: save_file({"total": torch.zeros(3)}, path, {"facts": json.dumps([1])}),
    "of another network": lambda path: rewritten(path, **{"numbers.features": torch.zeros(50, 5)}),
    "NaN": lambda path: rewritten(path, **{"total.features": torch.full((3,), torch.nan, dtype=torch.float64)}),
    "another's": lambda path: kept(path.with_name("b.safetensors"))[0] and path.with_name("b.safetensors").rename(path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_reference_is_made_again(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole, anew = kept(path)
    assert anew
    assert not kept(path)[1]
    DAMAGES[damage](path)
    found, anew = kept(path)
    assert anew
    assert torch.equal(found.sums().products, whole.sums().products)
    assert not kept(path)[1]


def test_a_classifier_with_nan_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Classifier(1, 10)
    network.head.weight.data[0, 0] = torch.nan
    monkeypatch.setattr(extractors, "train_classifier", lambda *arguments, report: network)
    for _ in range(2):
        with pytest.raises(UserError, match=r"c\.safetensors: not a classifier of these images; remove it"):
            open_classifier(digits(), PixelModelConfig(num_classes=10), tmp_path / "c.safetensors")
