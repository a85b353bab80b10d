"""Feature networks: files and folders by path, or a small classifier trained on the data's own labels."""

import hashlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from fewstep.data.images import ImageSet, batch_indices
from fewstep.errors import UserError, out_of_memory
from fewstep.evaluation.encoders import AT_ONCE, Encoder
from fewstep.evaluation.resizing import INCEPTION, Resize, clean
from fewstep.files import written_whole
from fewstep.models.image_model import ImageModel
from fewstep.models.loading.weights import check_finite
from fewstep.networks.codec import to_pixels
from fewstep.networks.fingerprint import fingerprint
from fewstep.networks.settings import PixelModelConfig
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.seeding import generator

CLASSIFIER_STEPS = 600
MAX_FEATURES = 4096  # of a covariance that a Fréchet distance can be taken of
MAX_VALUES = 2**19  # of images that an autoencoder gets at once; its activations are some 850 bytes of each
THUMBNAIL = 16  # pixels
RETURN_FEATURES = "return_features"
FAILURES = (RuntimeError, torch.jit.Error)  # of a network that takes no such images: the second is of its assertions


class Extractor(Protocol):
    """uint8 images (B, C, H, W) -> features (B, D), without gradient."""

    name: str

    def features(self, images: Tensor) -> Tensor: ...

    @property
    def identity(self) -> str:
        """A hash of what the features are a function of."""


class TorchScriptExtractor:
    """A TorchScript network on `device`: uint8 (B, 3, H, W) -> (B, D); grey images are repeated to RGB.

    Resized "legacy" it gets pictures as they are and resizes them itself, as most published numbers have it: Inception
    bilinearly, without antialiasing. Resized "clean" it gets them with 299 pixels a side in floats of 0..255
    (`resizing.clean`), which its own resizing leaves alone; a file that takes uint8 alone gets them rounded, once.
    NVIDIA's `inception-2015-12-05.pt` gives its features where its argument `return_features` is set.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu", resize: Resize = "legacy"):
        self.device, self.resize, self.width = device, resize, 0  # width of its features, known when some were made
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
            arguments = self.network.forward.schema.arguments[1:]  # without self
        except (RuntimeError, ValueError, OSError, AttributeError) as error:
            raise UserError(f"{path}: not a readable TorchScript file, nor `classifier` (--features)") from error
        self.path, self.name = path, f"{path.stem}, resized {resize}"
        required = [argument.name for argument in arguments if not argument.has_default_value()]
        self.options = {RETURN_FEATURES: True} if RETURN_FEATURES in [argument.name for argument in arguments] else {}
        if len({*required} - {RETURN_FEATURES}) != 1:
            told = f"wants {', '.join(required) or 'nothing'}; must be called with images alone, uint8 (B, 3, H, W)"
            raise self._refusal(f"{told}, and give features (B, D)")

    @cached_property
    def identity(self) -> str:
        return hashlib.blake2b(self.path.read_bytes() + self.resize.encode(), digest_size=8).hexdigest()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self._checked(part, self._given(part)) for part in images.split(AT_ONCE)])

    def _given(self, images: Tensor) -> Any:
        """What the network gives; raises UserError if it takes something else."""
        resized = clean(images) if self.resize == "clean" else images
        if resized.is_floating_point() and not self._takes_floats:
            resized = resized.round().to(torch.uint8)
        try:
            return self.network(resized.to(self.device).expand(-1, 3, -1, -1), **self.options)
        except FAILURES as error:
            if out_of_memory(error):
                raise
            taken = (len(images), 3, *resized.shape[2:])
            raise self._refusal(f"must take uint8 images {taken} and give features (B, D)") from error

    @cached_property
    def _takes_floats(self) -> bool:
        """Whether of floats it makes what it does of the same numbers in uint8: others may take them as in [-1, 1]."""
        noise = torch.randint(0, 256, (1, 3, INCEPTION, INCEPTION), generator=generator(0, "floats")).to(self.device)
        with suppress(*FAILURES, TypeError):  # of what gives a tuple more is told later
            floats, whole = (self.network(noise.to(kind), **self.options) for kind in (torch.float32, torch.uint8))
            return torch.allclose(floats, whole, rtol=1e-3, atol=1e-5)
        return False

    def _checked(self, images: Tensor, given: Any) -> Tensor:
        """Raises UserError for anything but features (B, D)."""
        what = f"numbers {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        told = f"gives {what} for {len(images)} images"
        if not (isinstance(given, Tensor) and given.dim() > 1 and given[0].numel() == given.shape[1] <= MAX_FEATURES):
            raise self._refusal(f"{told}, not features (B, D) with D up to {MAX_FEATURES}")
        found, width = given.flatten(1), given.shape[1]
        if len(found) != len(images) or width != (self.width or width):
            raise self._refusal(f"{told}: it must give as many for every image, whatever images are beside it")
        self.width, positive = width, bool((found >= 0).all())
        sums = found.sum(1) if positive else found.exp().sum(1)  # of probabilities, or of their logarithms
        if width > 1 and ((sums - 1).abs() < 1e-3).all():
            what = f"gives class probabilities, {width} numbers that sum to 1; a FID is of features"
            raise self._refusal(f"{what}: give a network that ends in the layer before its classes")
        return found

    def _refusal(self, told: str) -> UserError:
        return UserError(f"{self.path}: {told} (--features)")


def open_extractor(source: str, device: torch.device | str, resize: Resize = "legacy") -> Extractor:
    """A TorchScript file, or a folder of transformers (`KINDS`); raises UserError if it is neither."""
    path = Path(source)
    return (Encoder if path.is_dir() else TorchScriptExtractor)(path, device, resize)


class AutoencoderExtractor:
    """The means of a diffusers autoencoder's posterior, flattened: uint8 (B, 3, H, W) -> (B, C h w)."""

    name = "the autoencoder"

    def __init__(self, autoencoder: Any):
        self.autoencoder = autoencoder

    @property
    def identity(self) -> str:
        return fingerprint([self.autoencoder])

    def features(self, images: Tensor) -> Tensor:
        parts = images.split(max(1, MAX_VALUES // images[0].numel()))
        means = torch.cat([self._means(part.to(self.autoencoder.device)) for part in parts])
        if means.shape[1] > MAX_FEATURES:
            what = f"the autoencoder's {means.shape[1]:,} numbers per image are too many for a FID"
            raise UserError(f"--features: {what}; give a TorchScript file")
        return means

    def _means(self, images: Tensor) -> Tensor:
        found: Tensor = self.autoencoder.encode(to_pixels(images).to(self.autoencoder.dtype)).latent_dist.mode()
        return found.flatten(1)


class Thumbnails:
    """The pictures themselves, of `THUMBNAIL` pixels a side, in [0, 1]: uint8 (B, C, H, W) -> (B, C side side)."""

    name, identity = "thumbnails", "thumbnails"

    def features(self, images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images.float() / 255, min(THUMBNAIL, images.shape[-1])).flatten(1)


class Classifier(nn.Module):
    """A small convolutional classifier; its features are what feeds the last layer, (B, 64)."""

    name = "classifier"
    held_out_accuracy: Tensor  # the share of images, other than those of its training, that it recognises

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.register_buffer("held_out_accuracy", torch.tensor(0.0, dtype=torch.float64))
        layers: list[nn.Module] = []
        for stride, width in ((1, 32), (2, 64), (2, 64)):
            conv = nn.Conv2d(channels, width, 3, padding=1, stride=stride)
            layers += [conv, nn.BatchNorm2d(width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)

    def features(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(to_pixels(images))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of uint8 images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    @property
    def identity(self) -> str:
        return fingerprint([self])

    def check(self, images: Tensor, numbers: range) -> list[dict[str, bool]]:
        """Whether each generated image, whose classes come in turn, is recognised as its own."""
        with torch.no_grad():
            found = self(images).argmax(1).tolist()
        return [{"accuracy": label == i % self.num_classes} for i, label in zip(numbers, found, strict=True)]


def train_classifier(
    images: ImageSet,
    channels: int,
    num_classes: int,
    num_steps: int = CLASSIFIER_STEPS,
    seed: int = 0,
    report: Report = lambda step, metrics: None,
) -> Classifier:
    """Trains on 85 % of a labelled set with noise and shifts, and measures `held_out_accuracy` on the rest."""
    order = torch.randperm(images.length, generator=generator(seed, "classifier split"))
    train, held_out = order.split([int(0.85 * images.length), images.length - int(0.85 * images.length)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Classifier(channels, num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        batch = images.batch(train[batch_indices(len(train), 128, step, seed)])
        loss = cross_entropy(network(_augmented(batch["image"], generator(seed, "augment", step))), batch["label"])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step + 1, {})
    network.eval()
    held = (images.batch(part) for part in held_out.split(500))
    hits = sum(int((network(batch["image"]).argmax(1) == batch["label"]).sum()) for batch in held)
    network.held_out_accuracy.fill_(hits / len(held_out))
    return network


def _augmented(images: Tensor, draws: torch.Generator) -> Tensor:
    """Shifted by up to one pixel, with a little noise: float values in 0..255."""
    shift_y, shift_x = torch.randint(-1, 2, (2,), generator=draws).tolist()
    noise = 12 * torch.randn(images.shape, generator=draws)
    return torch.roll(images, (shift_y, shift_x), dims=(2, 3)).float() + noise


def open_classifier(
    images: ImageSet, model: ImageModel | PixelModelConfig, path: Path, report: Report | None = None
) -> Classifier:
    """The classifier at `path`; trained on the images and kept there if there is none.

    Raises UserError if the file is damaged or of other images.
    """
    if not path.exists():
        with progress_bar("classifier", CLASSIFIER_STEPS, report) as show:
            trained = train_classifier(images, model.channels, model.num_classes, report=show)
        with written_whole(path) as temporary:
            save_file(trained.state_dict(), temporary)
    network = Classifier(model.channels, model.num_classes)
    try:
        network.load_state_dict(load_file(path))
        check_finite(path, network.state_dict().items())
    except Exception as error:  # a damaged file shows itself as almost any error
        raise UserError(f"{path}: not a classifier of these images; remove it to train it again") from error
    return network.eval()
