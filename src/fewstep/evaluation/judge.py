"""What generated images are judged by: real ones, features, and what their class or prompt can be checked against."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.images import ImageSet, Unusable
from fewstep.data.settings import DataSettings
from fewstep.embedded import shapes
from fewstep.embedded.shape_checker import prompt_accuracy
from fewstep.embedded.sources import open_captioned_images, open_images
from fewstep.errors import UserError
from fewstep.evaluation import report
from fewstep.evaluation.extractors import (
    CLASSIFIER_STEPS,
    AutoencoderExtractor,
    Classifier,
    Extractor,
    TorchScriptExtractor,
    extract,
    load_classifier,
    save_classifier,
    train_classifier,
)
from fewstep.evaluation.metrics import (
    Row,
    diversity,
    fid,
    fid_interval,
    floor_row,
    precision_recall,
    wilson_interval,
)
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.models.sampler import Sampler
from fewstep.models.settings import PixelModelConfig
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.seeding import generator

GRID_IMAGES = 40
MAX_REAL = 50_000  # precision and recall compare all pairs
TWO_OBJECT_PROMPTS = 80  # beside the 240 of one object, as in the training pictures
MIN_CAPTIONED = 10  # images, for halves with the neighbours that precision looks at
MIN_PER_PROMPT = 4  # images, for a diversity
MAX_CLASSES = 100  # that the small classifier can learn to tell apart in its 600 steps of 128 images


@dataclass(frozen=True)
class Judge:
    """Real images and their features; `check` gives what else of a row can be told from images and features."""

    extractor: Extractor
    real_features: Tensor
    check: Callable[[Tensor, Tensor], dict[str, Any]]
    floor: Row
    """The line of the real images: half against half."""
    real_grid: bytes
    prompts: list[str]
    """Of text-to-image models: what images number 0, 1, 2, ... are drawn for, in turn."""

    def row(
        self, name: str, sampler: Sampler, images: Tensor, per_second: float | None = None, intervals: bool = True
    ) -> Row:
        """The line of the table for generated uint8 images (N, C, H, W), number 0 .. N-1 of a seed.

        `intervals` take ten more FIDs.
        """
        real, fake = self.real_features, extract(self.extractor, images)
        precision, recall = precision_recall(real, fake)
        extras = self.check(images, fake)
        known = extras.pop("intervals", {})
        if intervals:
            shares = {"precision": wilson_interval(precision, len(fake)), "recall": wilson_interval(recall, len(real))}
            extras["intervals"] = {"fid": fid_interval(real, fake), **shares, **known}
        return Row(
            name,
            describe(sampler),
            sampler.nfe,
            fid(real, fake),
            precision,
            recall,
            images_per_second=per_second,
            **extras,
        )


def describe(sampler: Sampler) -> str:
    """How the table names a sampler."""
    guided = f" @{sampler.guidance_scale:g}" if sampler.guidance_scale != 1 else ""
    return sampler.kind if sampler.kind == "student" else f"{sampler.kind} {sampler.num_steps}{guided}"


def make_class_judge(
    data: DataSettings, model: PixelModel, features: str | None, folder: Path, num_real: int = MAX_REAL
) -> Judge:
    """A judge of a pixel model on at most `num_real` real images, with a classifier where there are classes.

    The classifier is kept in `folder`. Raises UserError if there is too little to judge with, or too many classes.
    """
    config = model.config
    if features in (None, "classifier"):
        _check_classifiable(config.num_classes)
    images = open_images(data, config)
    if images.length < GRID_IMAGES:
        raise UserError(f"data.source: has {images.length} images; judging needs at least {GRID_IMAGES}")
    network = None if features in (None, "classifier") else TorchScriptExtractor(Path(str(features)), model.device)
    path = classifier_path(data, folder)
    classifier = open_classifier(images, config, path) if 0 < config.num_classes <= MAX_CLASSES else None
    extractor: Any = network or classifier
    real = images.fetch(torch.randperm(images.length, generator=generator(0, "reference"))[:num_real])
    real_features = extract(extractor, real)

    def check(fakes: Tensor, _: Tensor) -> dict[str, Any]:
        if classifier is None:
            return {}
        accuracy = classifier.accuracy(fakes, model.conditioner.labels(len(fakes)))
        return {"accuracy": accuracy, "intervals": {"accuracy": wilson_interval(accuracy, len(fakes))}}

    floor = floor_row(real_features, accuracy=classifier.held_out_accuracy if classifier else None)
    return Judge(extractor, real_features, check, floor, real_grid(images, model), [])


def _check_classifiable(num_classes: int) -> None:
    """Raises UserError where a classifier for the model's classes can't be had."""
    if not num_classes:
        raise UserError("--features classifier: the model has no classes to train one on; give a TorchScript file")
    if num_classes > MAX_CLASSES:
        raise UserError(
            f"features: the classifier serves at most {MAX_CLASSES} classes, the model has {num_classes}; give a "
            "TorchScript file such as inception-2015-12-05.pt (--features, in a recipe evaluation.features)"
        )


def make_text_judge(
    data: DataSettings, model: LatentModel, features: str | None, num_samples: int, num_real: int = MAX_REAL
) -> Judge:
    """A judge of text-to-image models, and the prompts that they are judged on.

    Of the embedded shapes these are 240 of one object and 80 of two, in turn, and the real images are drawn for them;
    else they are the captions of the real images. Raises UserError if there is too little to judge with.
    """
    if features == "classifier":
        raise UserError("features: captions are no classes to train a classifier on; give autoencoder or a file")
    network = TorchScriptExtractor(Path(features), model.device) if features not in (None, "autoencoder") else None
    extractor: Any = network or AutoencoderExtractor(model.autoencoder)
    images = open_captioned_images(data, model.image_size)
    embedded = isinstance(images.captions, shapes.Captions)
    prompts, real = _shapes_reference(num_samples) if embedded else _reference(images, num_real)
    real_features = extract(extractor, real)

    def check(images: Tensor, found: Tensor) -> dict[str, Any]:
        several = len(images) >= MIN_PER_PROMPT * len(prompts)
        asked = [prompts[index % len(prompts)] for index in range(len(images))]
        return ({"diversity": diversity(found, len(prompts))} if several else {}) | check_prompts(images, asked)

    floor = floor_row(real_features, **check(real, real_features))
    return Judge(extractor, real_features, check, floor, report.sample_grid(real[:GRID_IMAGES]), prompts)


def check_prompts(images: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """What the embedded shapes' checker says of images (N, 3, 32, 32); {} where the prompts are others."""
    scenes = [shapes.parse(prompt) for prompt in prompts]
    if None in scenes:
        return {}
    two = torch.tensor([len(scene.things) == 2 for scene in scenes if scene])
    answers: dict[str, Any] = {"attributes": {}, "intervals": {}}
    for name, chosen in (("prompt_accuracy", ~two), ("two_objects", two)):
        if chosen.any():
            shares = prompt_accuracy(images[chosen], [prompts[index] for index in chosen.nonzero()[:, 0].tolist()])
            answers[name] = shares.pop("all")
            answers["intervals"][name] = wilson_interval(answers[name], int(chosen.sum()))
            answers["attributes"][name] = shares
    return answers


def evaluation_prompts() -> list[str]:
    """The prompts that models of the embedded shapes are judged on: one object and two objects, mixed."""
    one, two = shapes.one_object_scenes(), shapes.two_object_scenes(TWO_OBJECT_PROMPTS)
    share = len(one) // len(two)
    mixed = [scene for index, last in enumerate(two) for scene in (*one[index * share : (index + 1) * share], last)]
    return [scene.caption for scene in mixed]


def _shapes_reference(num: int) -> tuple[list[str], Tensor]:
    """The evaluation prompts, and `num` pictures drawn for them in turn."""
    prompts = evaluation_prompts()
    scenes = [scene for prompt in prompts if (scene := shapes.parse(prompt))]
    return prompts, shapes.render([scenes[i % len(scenes)] for i in range(num)], generator(0, "reference"))


def _reference(images: ImageSet, num_real: int) -> tuple[list[str], Tensor]:
    """At most `num_real` of the images in random order, and their captions; without what latents leave out too."""
    found: list[dict[str, Any]] = []
    for index in torch.randperm(images.length, generator=generator(0, "reference")):
        if len(found) == num_real:
            break
        with suppress(Unusable):
            found.append(images.batch(index[None]))
    if len(found) < MIN_CAPTIONED:
        raise UserError(f"data.source: has {len(found)} images; judging needs at least {MIN_CAPTIONED}")
    return [batch["caption"][0] for batch in found], torch.cat([batch["image"] for batch in found])


def open_classifier(images: ImageSet, config: PixelModelConfig, path: Path, report: Report | None = None) -> Classifier:
    """The classifier at `path`; trained on the images and kept there if there is none."""
    if not path.exists():
        with progress_bar("classifier", CLASSIFIER_STEPS, report) as show:
            classifier = train_classifier(images, config.channels, config.num_classes, report=show)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_classifier(classifier, path)
    classifier = load_classifier(path)
    if (classifier.channels, classifier.num_classes) != (config.channels, config.num_classes):
        raise UserError(f"{path}: a classifier of other images; remove it to train one on these")
    return classifier


def classifier_path(data: DataSettings, folder: Path) -> Path:
    """Where the classifier of a data source is kept."""
    digest = hashlib.blake2b(repr(data).encode(), digest_size=4).hexdigest()  # two folders may both be called train
    return folder / f"classifier-{Path(str(data.source)).stem}-{digest}.safetensors"


def real_grid(images: ImageSet, model: PixelModel) -> bytes:
    """Real images, in the same order of classes as the generated grids where they are labelled."""
    indices = torch.arange(GRID_IMAGES)
    if images.labels is not None:
        wanted = model.conditioner.labels(GRID_IMAGES)
        of_class = [torch.where(images.labels == label)[0] for label in range(model.config.num_classes)]
        indices = torch.stack(
            [of_class[label][k // len(of_class) % len(of_class[label])] for k, label in enumerate(wanted.tolist())]
        )
    return report.sample_grid(images.fetch(indices))
