"""What generated images are judged by: real ones, features, and what their class or prompt can be checked against."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.images import ImageSet
from fewstep.data.settings import DataSettings
from fewstep.embedded import shape_checker, shapes
from fewstep.embedded.sources import open_captioned_images, open_images
from fewstep.errors import UserError
from fewstep.evaluation import reference
from fewstep.evaluation.extractors import AutoencoderExtractor, Extractor, TorchScriptExtractor, open_classifier
from fewstep.evaluation.gathering import GRID_IMAGES, Check, CheckProbe, FeatureProbe, Gathered, Probe, gather
from fewstep.evaluation.metrics import measure
from fewstep.evaluation.reference import evaluation_prompts
from fewstep.evaluation.report import Row
from fewstep.models.image_model import ImageModel
from fewstep.models.sampler import Sampler
from fewstep.pictures import grid, num_columns, png_bytes

MAX_REAL = 50_000  # precision and recall compare all pairs
MIN_CAPTIONED = 10  # images, for halves with the neighbours that precision looks at
MAX_CLASSES = 100  # that the small classifier can learn to tell apart in its 600 steps of 128 images
GRID_COLUMNS, GRID_WIDTH = 5, 1300  # on the page, which a telephone shows, too; pixels
NUM_GROUPS = 10  # of a jackknife


@dataclass(frozen=True)
class Judge:
    """What real images left behind, and how generated ones are compared with them."""

    extractor: Extractor
    real: Gathered
    probes: Sequence[Probe]  # the first reads the features
    needs: frozenset[str]  # of the metrics: what there is here
    floor: Row  # the line of the real images: half against half
    prompts: Sequence[str] = ()  # of text-to-image models: what images number 0, 1, 2, ... are drawn for, in turn
    class_names: Sequence[str] = ()  # of other models, in turn

    def row(
        self, name: str, sampler: Sampler, batches: Iterable[Tensor], num: int, speed: float = 0, intervals: bool = True
    ) -> Row:
        """The line of the table for `num` generated uint8 images in batches (B, C, H, W), number 0 .. num-1 of a seed.

        `speed` is in images per second, 0 if it was not measured; `intervals` take ten more FIDs.
        """
        num_groups = NUM_GROUPS if intervals else 1
        fake = gather(batches, self.probes, num, name, num_groups, self.prompts)
        values, found = measure(self.real, fake, self.needs, intervals)
        values |= {"images_per_second": speed} if speed else {}
        kept = kept_of(fake, self.prompts or self.class_names)
        return Row(name, describe(sampler), sampler.nfe, values, found, *kept)

    def row_of_images(self, name: str, batches: Iterable[Tensor], num: int) -> Row:
        """The line for images whose classes and prompts nobody knows: what features alone tell of them."""
        fake = gather(batches, self.probes[:1], num, name, NUM_GROUPS)
        return Row(name, "images", None, *measure(self.real, fake, {"features"}), *kept_of(fake))


def describe(sampler: Sampler) -> str:
    """How the table names a sampler."""
    guided = f" @{sampler.guidance_scale:g}" if sampler.guidance_scale != 1 else ""
    return sampler.kind if sampler.kind == "student" else f"{sampler.kind} {sampler.num_steps}{guided}"


def kept_of(images: Gathered, labels: Sequence[str] = ()) -> tuple[dict[str, dict[str, float]], bytes]:
    """What a row has beside its numbers: the attributes of scenes that are right, and a grid with `labels` in turn."""
    attributes: dict[str, dict[str, float]] = {}
    for kind, name in product(SCENES.values(), shape_checker.ATTRIBUTES):
        if share := images.share(f"{kind}.{name}"):
            attributes.setdefault(kind, {})[name] = share.value
    shown = [labels[index % len(labels)] for index in range(len(images.pictures))] if labels else ()
    columns = num_columns(len(images.pictures), len(labels), GRID_COLUMNS)
    return attributes, png_bytes(grid(images.pictures, columns, shown, max_width=GRID_WIDTH))


def floor_row(real: Gathered, needs: frozenset[str], seed: int = 0, labels: Sequence[str] = ()) -> Row:
    """The noise floor: one random half of the features against the other; the rest is of all real images."""
    order = torch.randperm(len(real.features), generator=torch.Generator().manual_seed(seed))
    first, second = (Gathered.of(half) for half in real.features[order].chunk(2))
    values, _ = measure(first, second, {"features"}, intervals=False)
    whole, found = measure(real, real, needs - {"features"})
    return Row("real", None, None, values | whole, found, *kept_of(real, labels))


def make_judge(
    data: DataSettings, model: ImageModel, features: str | None, folder: Path, num_samples: int, num_real: int
) -> Judge:
    """A judge of models that make the images of `model`, on at most `num_real` real ones; what it needs is in `folder`.

    Raises UserError if there is too little to judge with, or nothing that tells the images' features.
    """
    if model.kind == "label":
        return _class_judge(data, model, features, folder, num_real)
    return _text_judge(data, model, features, folder, num_samples, num_real)


def _class_judge(data: DataSettings, model: ImageModel, features: str | None, folder: Path, num_real: int) -> Judge:
    """With a classifier, trained once, where there are classes, but not too many."""
    named = 0 < model.num_classes <= MAX_CLASSES
    own = features in (None, "classifier")
    if own and not named:
        what = f"the classifier serves 1 to {MAX_CLASSES} classes, the model has {model.num_classes}"
        advice = "a TorchScript file such as inception-2015-12-05.pt (--features, in a recipe evaluation.features)"
        raise UserError(f"features: {what}; give {advice}")
    images = open_images(data, model)
    if images.length < GRID_IMAGES:
        raise UserError(f"data.source: has {images.length} images; judging needs at least {GRID_IMAGES}")
    network = None if own else TorchScriptExtractor(Path(str(features)), model.device)
    classifier = open_classifier(images, model, classifier_path(data, folder)) if named else None
    extractor: Any = network or classifier
    num = min(num_real, images.length)
    path = reference.place(folder, "reference", data, reference.identity(images, data), extractor.identity, num)
    probe = FeatureProbe(extractor)
    real = reference.kept(path, lambda: gather(reference.labelled_batches(images, num), [probe], num, "data.source"))
    real = replace(real, pictures=_grid_of_classes(images, model.num_classes))
    names = images.class_names or [model.class_name(number) for number in range(model.num_classes)]
    floor = floor_row(real, frozenset(), labels=names)
    if classifier is None:
        return Judge(extractor, real, [probe], frozenset({"features"}), floor, (), names)
    floor.values["accuracy"] = classifier.held_out_accuracy.item()
    probes: list[Probe] = [probe, CheckProbe(classifier.check, classifier.identity)]
    return Judge(extractor, real, probes, frozenset({"features", "classes"}), floor, (), names)


def _grid_of_classes(images: ImageSet, num_classes: int) -> Tensor:
    """Real images, in the same order of classes as the generated grids where they are labelled; black where none is."""
    indices = torch.arange(GRID_IMAGES)
    if images.labels is not None:
        of_class = [torch.where(images.labels == label)[0].tolist() or [-1] for label in range(num_classes)]
        rounds = [(of_class[k % num_classes], k // num_classes) for k in range(GRID_IMAGES)]
        indices = torch.tensor([members[turn % len(members)] for members, turn in rounds])
    pictures = images.fetch(indices.clamp_min(0))
    return pictures * (indices >= 0)[:, None, None, None]


def _text_judge(
    data: DataSettings, model: Any, features: str | None, folder: Path, num_samples: int, num_real: int
) -> Judge:
    """Of the embedded shapes the prompts are 240 of one object and 80 of two, in turn, and the real images are drawn.

    Else they are the captions of the real images.
    """
    if features == "classifier":
        raise UserError("features: captions are no classes to train a classifier on; give autoencoder or a file")
    network = TorchScriptExtractor(Path(features), model.device) if features not in (None, "autoencoder") else None
    extractor: Any = network or AutoencoderExtractor(model.autoencoder)
    images = open_captioned_images(data, model.image_size)
    if isinstance(images.captions, shapes.Captions):
        prompts, num, known = evaluation_prompts(), num_samples, "drawn"
        batches = reference.drawn_batches(prompts, num)
    else:
        prompts, num, known = list[str](), min(num_real, images.length), reference.identity(images, data)
        batches = reference.captioned_batches(images, num, prompts)
    facts = (known, list(prompts), model.image_size, extractor.identity, num)
    path = reference.place(folder, "reference", data, *facts)
    probes: list[Probe] = [FeatureProbe(extractor), CheckProbe(check_scenes(prompts), "scenes")]
    real = reference.kept(path, lambda: gather(batches, probes, num, "data.source", 1, prompts))
    if real.count < MIN_CAPTIONED:
        raise UserError(f"data.source: has {real.count} images; judging needs at least {MIN_CAPTIONED}")
    scenes = all(shapes.parse(prompt) for prompt in real.prompts)
    needs = frozenset({"features", "prompts", *(["scenes"] if scenes else [])})
    floor = floor_row(real, needs, labels=real.prompts)
    probes = [probes[0], CheckProbe(check_scenes(real.prompts), "scenes")]  # of kept ones `prompts` is empty
    return Judge(extractor, real, probes, needs, floor, real.prompts)


SCENES = {1: "prompt_accuracy", 2: "two_objects"}
"""The metric of prompts with so many objects."""


def check_scenes(prompts: Sequence[str]) -> Check:
    """What the embedded shapes' checker says of images whose prompts come in turn; nothing where prompts are others."""

    def check(images: Tensor, numbers: range) -> list[dict[str, bool]]:
        asked = [prompts[number % len(prompts)] for number in numbers]
        scenes = [scene for prompt in asked if (scene := shapes.parse(prompt))]
        if len(scenes) < len(asked):
            return []
        kinds = [SCENES[len(scene.things)] for scene in scenes]
        answers = zip(kinds, shape_checker.check(images, asked), strict=True)
        return [{kind: all(a.values())} | {f"{kind}.{name}": a[name] for name in a} for kind, a in answers]

    return check


def classifier_path(data: DataSettings, folder: Path) -> Path:
    """Where the classifier of a data source is kept."""
    return reference.place(folder, "classifier", data)
