"""What generated images are judged by: real ones, features, and what their class or prompt can be checked against."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.data.images import ImageSet
from fewstep.data.settings import DataSettings
from fewstep.data.texts import load_prompts
from fewstep.embedded import shape_checker, shapes
from fewstep.errors import UserError
from fewstep.evaluation import reference
from fewstep.evaluation.clip import Clip
from fewstep.evaluation.extractors import AutoencoderExtractor, Extractor, open_classifier, open_extractor
from fewstep.evaluation.gathering import (
    GRID_IMAGES,
    KIND,
    Check,
    CheckProbe,
    FeatureProbe,
    Gathered,
    Numbers,
    Probe,
    fitted,
    gather,
)
from fewstep.evaluation.lpips import pair_distance
from fewstep.evaluation.metrics import enough, floor, measure
from fewstep.evaluation.probes import ClipProbe, ColourProbe, PatchProbe, ScorerProbe
from fewstep.evaluation.reference import NO_REALS, Reals, evaluation_prompts
from fewstep.evaluation.report import Row
from fewstep.evaluation.resizing import Resize
from fewstep.evaluation.scorers import open_scorers
from fewstep.evaluation.statistics import is_statistics, read_statistics
from fewstep.evaluation.within import MOST, Draw, Within
from fewstep.files import folder_lock
from fewstep.models.sampler import Sampler
from fewstep.pictures import grid, num_columns, png_bytes

MAX_REAL = 50_000  # precision and recall compare all pairs
MIN_CAPTIONED = 10  # images, for halves with the neighbours that precision looks at
MAX_CLASSES = 100  # that the small classifier can learn to tell apart in its 600 steps of 128 images
GRID_COLUMNS, GRID_WIDTH = 5, 1300  # on the page, which a telephone shows, too; pixels
NUM_GROUPS = 10  # of a jackknife
OF_IMAGES = ("clip", "lpips", "prompts", "scenes", "scorers")  # what metrics need that tell of single images
Asking = Callable[[Sequence[str]], list[Probe]]
"""From prompts, in turn, to what reads in an image whether it is as its own says."""


@dataclass(frozen=True)
class Means:
    """What images are judged by, as options and recipes name it."""

    features: str | None = None
    """A TorchScript file, a folder of transformers, `classifier` or `autoencoder`; None: what there is of the last."""
    resize: Resize = "legacy"
    """How images are brought to the size that the network takes."""
    clip: str | None = None
    """A folder of a CLIP model of transformers, for the CLIP score."""
    clip_prefix: str = ""
    """Before every prompt; `A photo depicts ` in the paper."""
    lpips: str | None = None
    """A TorchScript file, or `lpips` for the package, for the distance within a prompt or class."""
    scorers: Sequence[str] = ()
    """Plug-ins, as `module:Class`."""
    prompts: str | None = None
    """A file of what text-to-image models are asked for; None: the captions of the real images."""
    size: int | None = None
    """Pixels that all images, real and drawn, are brought to; None: the model's."""


@dataclass(frozen=True)
class Judge:
    """What real images left behind, and how generated ones are compared with them."""

    extractor: Extractor
    real: Gathered
    of_images: Sequence[Probe]  # read in any images
    of_drawn: Sequence[Probe]  # read in those of models, whose classes come in turn
    of_asked: Asking  # read in those whose prompts are known
    size: int  # pixels that images are brought to
    num_samples: int  # of a row, for the noise floor
    prompts: Sequence[str] = ()  # of text-to-image models: what images number 0, 1, 2, ... are drawn for, in turn
    class_names: Sequence[str] = ()  # of other models, in turn
    within: Within | None = None  # of prompts or classes, where there are some
    accuracy: float | None = None  # of the classifier, on images that it was not trained on

    @cached_property
    def floor(self) -> Row:
        """The line of the real images: of sets some of them against others; what is told of single ones is of all."""
        values, found = measure(self.real, self.real, OF_IMAGES)
        values |= {} if self.accuracy is None else {"accuracy": self.accuracy}
        known = floor(self.real, self.num_samples) | values
        return Row("real", None, None, known, found, *kept_of(self.real, self.class_names or self.real.prompts))

    def row(self, name: str, sampler: Sampler, draw: Draw, num: int, speed: float = 0, intervals: bool = True) -> Row:
        """The line of the table for images number 0 .. num-1 that `draw` draws, and some of each prompt or class.

        `speed` is in images per second, 0 if it was not measured; `intervals` take ten more FIDs.
        """
        batches = (fitted(batch, self.size) for batch in draw(range(num), self.prompts or None))
        num_groups = NUM_GROUPS if intervals else 1
        fake = gather(batches, self.probes(self.prompts, drawn=True), num, name, num_groups, self.prompts)
        if self.within:
            groups = self.within.draw(draw, num, range(len(self.within.subjects)))
            fake = replace(fake, pairs=self.within.read(groups))
        clock = {"images_per_second": speed} if speed else {}
        return self.row_of(name, sampler, fake, clock, self.prompts or self.class_names, intervals)

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.real.sums().mean)

    def probes(self, prompts: Sequence[str], drawn: bool) -> list[Probe]:
        """What reads in images, of these prompts in turn, or of a model's classes."""
        return [*self.of_images, *(self.of_drawn if drawn else ()), *self.of_asked(prompts)]

    def row_of(
        self,
        name: str,
        sampler: Sampler | None,
        fake: Gathered,
        clock: Mapping[str, float],
        labels: Sequence[str] = (),
        intervals: bool = True,
    ) -> Row:
        """The line for what was gathered; without a sampler, of images that something else made."""
        values, found = measure(self.real, fake, intervals=intervals)
        nfe = sampler.nfe if sampler else None
        return Row(name, describe(sampler), nfe, {**values, **clock}, found, *kept_of(fake, labels))


def describe(sampler: Sampler | None) -> str:
    """How the table names a sampler, or what something else made."""
    if sampler is None:
        return "images"
    guided = f" @{sampler.guidance_scale:g}" if sampler.guidance_scale != 1 else ""
    return sampler.kind if sampler.kind == "student" else f"{sampler.kind} {sampler.num_steps}{guided}"


def kept_of(images: Gathered, labels: Sequence[str] = ()) -> tuple[dict[str, dict[str, float]], bytes]:
    """What a row has beside its numbers: the attributes of scenes that are right, and a grid with `labels` in turn.

    There is no grid of statistics alone.
    """
    attributes: dict[str, dict[str, float]] = {}
    for kind, name in product(SCENES.values(), shape_checker.ATTRIBUTES):
        if share := images.share(f"{kind}.{name}"):
            attributes.setdefault(kind, {})[name] = share.value
    if not len(images.pictures):
        return attributes, b""
    shown = [labels[index % len(labels)] for index in range(len(images.pictures))] if labels else ()
    columns = num_columns(len(images.pictures), len(labels), GRID_COLUMNS)
    return attributes, png_bytes(grid(images.pictures, columns, shown, max_width=GRID_WIDTH))


class Basis(NamedTuple):
    """What models of a kind are judged by."""

    extractor: Extractor
    reals: Reals = NO_REALS
    of_drawn: Sequence[Probe] = ()
    class_names: Sequence[str] = ()
    accuracy: float | None = None  # of the classifier, on images that it was not trained on


def make_judge(data: DataSettings, model: Any, means: Means, folder: Path, num_samples: int, num_real: int) -> Judge:
    """A judge of models that make the images of `model`, on at most `num_real` real ones; what it needs is in `folder`.

    `model` is an `ImageModel`, or `Pictures` where only images are judged. Raises UserError if there is too little to
    judge with, or nothing that tells the images' features.
    """
    text, device = getattr(model, "kind", "") == "text", torch.device(model.device)
    given = load_prompts(means.prompts, field="prompts:") if means.prompts else []
    if given and not text:
        raise UserError("prompts: the model takes no text; leave them out")
    size, of_asked = means.size or model.image_size, asking(means, device)
    perceptual = pair_distance(means.lpips, device, model.channels, size) if means.lpips else None
    with folder_lock(folder, ".judge.lock", wait=True):  # of several that judge by the same, one makes what all use
        make: Any = _of_text if text else _of_classes
        basis: Basis = make(data, model, means, folder, given, num_samples, num_real)
        extractor = basis.extractor
        patched = means.features not in (None, "classifier", "autoencoder")
        of_images: list[Probe] = [FeatureProbe(extractor), *([PatchProbe(extractor)] if patched else []), ColourProbe()]
        width = feature_width(extractor, model.channels, size)
        if few := enough(num_samples, width):
            raise UserError(f"num_samples: {few} (--features)")
        if is_statistics(data.source):
            real = read_statistics(Path(data.required), extractor, width, size)
        else:
            real = _gathered(data, basis, means, folder, of_images, of_asked)
    prompts = given or real.prompts
    subjects: Any = prompts[:MOST] or range(min(MOST, model.num_classes))
    within = Within(subjects, extractor, perceptual, size, means.lpips) if subjects else None
    made = (extractor, real, of_images, basis.of_drawn, of_asked, size, num_samples)
    return Judge(*made, prompts, basis.class_names, within, basis.accuracy)


def asking(means: Means, device: torch.device) -> Asking:
    """What reads in images whether they are as their prompts say; plug-ins are asked without prompts, too."""
    clip = Clip(Path(means.clip), device) if means.clip else None
    scorers = open_scorers(means.scorers, device)

    def probes(prompts: Sequence[str]) -> list[Probe]:
        found: list[Probe] = [ScorerProbe(each, prompts) for each in scorers]
        if prompts and clip:
            found.append(ClipProbe(clip, prompts, means.clip_prefix))
        return [*found, *([CheckProbe(check_scenes(prompts), "scenes")] if prompts else [])]

    return probes


def feature_width(extractor: Extractor, channels: int, size: int) -> int:
    """The number of features, told by two pictures of noise."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, channels, size, size), generator=draws, dtype=torch.uint8)
    return extractor.features(noise).shape[1]


def _gathered(
    data: DataSettings, basis: Basis, means: Means, folder: Path, of_images: Sequence[Probe], of_asked: Asking
) -> Gathered:
    """What real images leave behind, from the folder if it is there."""
    reals = basis.reals
    identities = [each.identity for each in (*of_images, *of_asked([""]))]
    path = reference.place(folder, "reference", data, reals.known, identities, means.size, reals.num)
    kinds = [] if reals.labels is None else [Kinds(reals.labels)]
    probes = [*of_images, Answers(of_asked, reals.prompts), *kinds]
    real = reference.kept(path, lambda: gather(reals.batches(), probes, reals.num, "data.source", 1, reals.prompts))
    if real.count < reals.least:
        raise UserError(f"data.source: has {real.count} images; judging needs at least {reals.least}")
    return real if reals.pictures is None else replace(real, pictures=reals.pictures)


@dataclass(frozen=True)
class Kinds:
    """The classes of the images, for whoever takes some of each."""

    labels: Tensor  # (N,)
    identity = ""

    def read(self, images: Tensor, numbers: range) -> Numbers:
        return {KIND: self.labels[numbers.start : numbers.stop, None].float()}


@dataclass(frozen=True)
class Answers:
    """The probes of prompts that are known one by one, while their images come."""

    asking: Asking
    prompts: Sequence[str]
    identity = ""

    def read(self, images: Tensor, numbers: range) -> Numbers:
        prompts = [self.prompts[number % len(self.prompts)] for number in numbers] if self.prompts else []
        probes, here = self.asking(prompts), range(len(images))
        return {name: found for probe in probes for name, found in probe.read(images, here).items()}


def _of_classes(
    data: DataSettings, model: Any, means: Means, folder: Path, given: list[str], num_samples: int, num_real: int
) -> Basis:
    """With a classifier, trained once, where there are classes, but not too many."""
    named, own = 0 < model.num_classes <= MAX_CLASSES, means.features in (None, "classifier")
    advice = "a TorchScript file such as inception-2015-12-05.pt (--features, in a recipe evaluation.features)"
    if own and (not named or is_statistics(data.source)):
        what = f"the classifier serves 1 to {MAX_CLASSES} classes, the model has {model.num_classes}"
        what = f"{data.source} has no images to train a classifier on" if named else what
        raise UserError(f"features: {what}; give {advice}")
    network = None if own else open_extractor(str(means.features), model.device, means.resize)
    names: Sequence[str] = [model.class_name(number) for number in range(model.num_classes)]
    if network and is_statistics(data.source):
        return Basis(network, class_names=names)
    size = means.size or model.image_size
    images = reference.open_at(data, model, size, labelled=own)
    if images.length < GRID_IMAGES:
        raise UserError(f"data.source: has {images.length} images; judging needs at least {GRID_IMAGES}")
    place = classifier_path(data, folder, *([size] if size != model.image_size else []))
    classifier = open_classifier(images, model, place) if named and images.labels is not None else None
    num, pictures = min(num_real, images.length), _grid_of_classes(images, model.num_classes)
    known, names = reference.identity(images, data), images.class_names or names
    labels = None if images.labels is None else images.labels[reference.random_order(images)[:num]]
    reals = Reals(lambda: reference.labelled_batches(images, num), num, known, [], GRID_IMAGES, pictures, labels)
    extractor: Any = network or classifier
    if classifier is None:
        return Basis(extractor, reals, class_names=names)
    checks = [CheckProbe(classifier.check, classifier.identity)]
    return Basis(extractor, reals, checks, names, classifier.held_out_accuracy.item())


def _grid_of_classes(images: ImageSet, num_classes: int) -> Tensor:
    """Real images, in the same order of classes as the generated grids where they are labelled; black where none is."""
    indices = torch.arange(GRID_IMAGES)
    if images.labels is not None:
        of_class = [torch.where(images.labels == label)[0].tolist() or [-1] for label in range(num_classes)]
        rounds = [(of_class[k % num_classes], k // num_classes) for k in range(GRID_IMAGES)]
        indices = torch.tensor([members[turn % len(members)] for members, turn in rounds])
    pictures = images.fetch(indices.clamp_min(0))
    return pictures * (indices >= 0)[:, None, None, None]


def _of_text(
    data: DataSettings, model: Any, means: Means, folder: Path, given: list[str], num_samples: int, num_real: int
) -> Basis:
    """Of the embedded shapes the prompts are 240 of one object and 80 of two, in turn, and the real images are drawn.

    Else they are the captions of the real images.
    """
    features, size = means.features, means.size or model.image_size
    if features == "classifier":
        raise UserError("features: captions are no classes to train a classifier on; give autoencoder or a file")
    own = features in (None, "autoencoder")
    extractor: Any = AutoencoderExtractor(model.autoencoder) if own else None
    extractor = extractor or open_extractor(str(features), model.device, means.resize)
    if is_statistics(data.source):
        if not given:
            raise UserError(f"{data.source}: holds no captions; say with --prompts what models are asked for")
        return Basis(extractor)
    images = reference.open_captioned_at(data, model.image_size, size, bool(given))
    if isinstance(images.captions, shapes.Captions):
        scenes = given if given and all(map(shapes.parse, given)) else evaluation_prompts()
        drawn = lambda: (fitted(each, size) for each in reference.drawn_batches(scenes, num_samples))  # noqa: E731
        return Basis(extractor, Reals(drawn, num_samples, f"drawn {scenes}", scenes, MIN_CAPTIONED))
    num, prompts, known = min(num_real, images.length), list[str](), reference.identity(images, data)

    def batches() -> Iterator[Tensor]:
        if images.captions is None:
            return reference.labelled_batches(images, num)
        return reference.captioned_batches(images, num, prompts)

    return Basis(extractor, Reals(batches, num, known, prompts, MIN_CAPTIONED))


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


def classifier_path(data: DataSettings, folder: Path, *facts: object) -> Path:
    """Where the classifier of a data source is kept."""
    return reference.place(folder, "classifier", data, *facts)
