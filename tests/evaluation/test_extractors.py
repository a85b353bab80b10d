"""Feature networks: any TorchScript file, and the classifier that the data's own labels train."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.images import ImageSet
from fewstep.embedded.sources import digits
from fewstep.errors import UserError
from fewstep.evaluation import extractors
from fewstep.evaluation.extractors import Classifier, TorchScriptExtractor, open_classifier, train_classifier
from fewstep.networks.settings import PixelModelConfig

INCEPTION = Path(__file__).parents[2] / ".." / "shared" / "data" / "inception_768.pt"


class MeanColour(nn.Module):
    """The mean of each of exactly three uint8 channels, (B, 3, 1, 1)."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return images.double().mean(dim=(2, 3), keepdim=True)


PROBABILITIES = nn.Sequential(MeanColour(), nn.Flatten(), nn.Softmax(1))  # as of classes


class Nvidias(nn.Module):
    """As NVIDIA's `inception-2015-12-05.pt`: probabilities unless it is asked for the features."""

    def forward(self, images: Tensor, return_features: bool = False, use_fp16: bool = False) -> Tensor:
        features = images.double().mean(dim=(2, 3))
        return features if return_features else features.softmax(1)


class Asking(nn.Module):
    """The same without a default."""

    def forward(self, images: Tensor, return_features: bool) -> Tensor:
        assert return_features
        return images.double().mean(dim=(2, 3))


def scripted(module: nn.Module, path: Path) -> TorchScriptExtractor:
    torch.jit.script(module).save(path)
    return TorchScriptExtractor(path)


def pixels(num: int, channels: int) -> Tensor:
    return torch.randint(0, 256, (num, channels, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "network", [MeanColour(), nn.Sequential(MeanColour(), nn.Dropout(0.9)), Nvidias(), Asking()], ids=type
)
def test_a_network_gets_uint8_rgb_in_evaluation_mode_and_gives_features(
    network: nn.Module, channels: int, tmp_path: Path
) -> None:
    extractor, images = scripted(network, tmp_path / "inception-2015-12-05.pt"), pixels(5, channels)
    assert torch.equal(extractor.features(images), images.double().mean(dim=(2, 3)).expand(5, 3))
    assert extractor.name == "inception-2015-12-05, resized legacy"
    other = scripted(PROBABILITIES, tmp_path / "other.pt")
    assert extractor.identity == TorchScriptExtractor(extractor.path).identity != other.identity


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (PROBABILITIES, "gives class probabilities, 3 numbers that sum to 1; .* in the layer before its classes"),
        (nn.Linear(4, 2), r"must take uint8 images \(2, 3, 6, 6\)"),
        (nn.Bilinear(4, 4, 1), "wants input1, input2; must be called with images alone"),
    ],
    ids=type,
)
def test_a_network_that_takes_or_gives_something_else_is_refused(network: nn.Module, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"net\.pt: {told}"):
        scripted(network, tmp_path / "net.pt").features(pixels(2, 1))


def test_a_file_that_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"garbage")
    for path in (tmp_path / "weights.pt", tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(UserError, match=f"{path}: not a readable TorchScript file"):
            TorchScriptExtractor(path)


@pytest.mark.skipif(not INCEPTION.is_file(), reason="no shared data here")
def test_the_real_inception_gives_features() -> None:
    grey = pixels(2, 1)
    found = TorchScriptExtractor(INCEPTION).features(torch.cat([pixels(2, 3), grey.expand(-1, 3, -1, -1)]))
    assert found.shape == (4, 768)
    assert found.sum(1).min() > 2
    torch.testing.assert_close(TorchScriptExtractor(INCEPTION).features(grey), found[2:], rtol=1e-3, atol=1e-4)


# --- the classifier --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(digits(), channels=1, num_classes=10, num_steps=250)  # of 600


def test_the_classifier_recognises_digits_that_are_new_to_it(trained: Classifier) -> None:
    batch = digits().batch(torch.arange(1797))
    hits = (trained(batch["image"]).argmax(1) == batch["label"]).double().mean().item()
    assert 0.95 < trained.held_out_accuracy < 1
    assert hits >= trained.held_out_accuracy - 0.02


def test_what_is_checked_is_whether_images_are_of_their_classes_in_turn(trained: Classifier) -> None:
    images = digits().fetch(torch.arange(30))
    assert torch.equal(trained.head(trained.features(images)), trained(images))
    found = [{"accuracy": label == (7 + k) % 10} for k, label in enumerate(trained(images).argmax(1).tolist())]
    assert trained.check(images, range(7, 37)) == found


def test_a_kept_classifier_comes_back_bit_for_bit_and_a_damaged_one_or_one_of_other_images_is_refused(
    trained: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractors, "train_classifier", lambda *arguments, report: trained)
    config, path, images = PixelModelConfig(channels=1, num_classes=10), tmp_path / "c.safetensors", pixels(20, 1)
    open_classifier(digits(), config, path)
    monkeypatch.setattr(extractors, "train_classifier", None)
    loaded = open_classifier(digits(), config, path)
    assert torch.equal(loaded(images), trained(images))
    assert loaded.held_out_accuracy == trained.held_out_accuracy
    assert not loaded.training
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    refused = pytest.raises(UserError, match=r"c\.safetensors: not a classifier of these images; remove it")
    with refused:
        open_classifier(digits(), PixelModelConfig(channels=3, num_classes=10), path)
    whole = path.read_bytes()
    for length in (0, 10, -100):
        path.write_bytes(whole[:length])
        with refused:
            open_classifier(digits(), config, path)


def untrained(seed: int) -> Classifier:
    """Two classes that a brightness tells apart, three steps."""
    labels = torch.arange(40) % 2
    bright = pixels(40, 3) // 2 + 120 * labels.reshape(-1, 1, 1, 1).byte()
    return train_classifier(ImageSet(bright.__getitem__, labels, 40), 3, 2, num_steps=3, seed=seed)


def test_training_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    images, before = pixels(4, 3), torch.random.get_rng_state()
    assert torch.equal(untrained(0)(images), untrained(0)(images))
    assert not torch.equal(untrained(0)(images), untrained(1)(images))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_held_out_images_are_not_trained_on() -> None:
    images, seen, trained_on = digits(), set[int](), list[set[int]]()

    def fetch(indices: Tensor) -> Tensor:
        seen.update(indices.tolist())
        return images.fetch(indices)

    def report(step: int, metrics: dict[str, float]) -> None:
        trained_on.append({*seen})
        assert step == len(trained_on)

    train_classifier(ImageSet(fetch, images.labels, images.length), 1, 10, num_steps=40, report=report)
    assert len(trained_on) == 40  # steps: more than two epochs
    assert len(trained_on[-1]) == int(0.85 * 1797)
    assert seen == set(range(1797))
