"""`fewstep evaluate`: judges runs side by side, on the same noise, and writes the table and the page."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.commands.runs import check_writable, open_images, open_pixel_model, pick_device
from fewstep.data.images import ImageSet
from fewstep.errors import UserError
from fewstep.evaluation import report
from fewstep.evaluation.extractors import (
    CLASSIFIER_STEPS,
    Classifier,
    Extractor,
    TorchScriptExtractor,
    extract,
    load_classifier,
    save_classifier,
    train_classifier,
)
from fewstep.evaluation.generation import Sampler, default_sampler, generate, images_per_second, parse_sampler
from fewstep.evaluation.metrics import Row, fid, floor_row, precision_recall
from fewstep.networks.pixel_model import PixelModel, PixelModelConfig
from fewstep.recipes.loading import read_run_recipe
from fewstep.recipes.schema import DataSettings
from fewstep.runtime.checkpoint import METRICS, RECIPE, check_run
from fewstep.runtime.tracking import Report, progress_bar, read_metrics
from fewstep.seeding import generator

GRID_IMAGES = 40
THROUGHPUT_BATCH = 250
MAX_REAL = 50_000  # precision and recall compare all pairs


@dataclass(frozen=True)
class Judge:
    """Real images, the features that distances are taken in, and the classifier where there are labels."""

    extractor: Extractor
    classifier: Classifier | None
    real_features: Tensor

    def row(self, name: str, sampler: Sampler, images: Tensor, labels: Tensor, per_second: float) -> Row:
        """The line of the table for generated uint8 images (N, C, H, W)."""
        features = extract(self.extractor, images)
        accuracy = self.classifier.accuracy(images, labels) if self.classifier else None
        distance = fid(self.real_features, features)
        precision, recall = precision_recall(self.real_features, features)
        return Row(name, describe(sampler), sampler.nfe, distance, precision, recall, accuracy, per_second)

    def floor(self) -> Row:
        """The line of the real images: half against half, and the classifier's accuracy on images new to it."""
        return floor_row(self.real_features, self.classifier.held_out_accuracy if self.classifier else None)


def describe(sampler: Sampler) -> str:
    """How the table names a sampler."""
    return sampler.kind if sampler.kind == "student" else f"{sampler.kind} {sampler.num_steps}"


def make_judge(
    images: ImageSet, config: PixelModelConfig, features: str, path: Path, num_real: int = MAX_REAL
) -> Judge:
    """A judge on at most `num_real` real images; the classifier is loaded from `path`, or trained and kept there."""
    if features == "classifier" and not config.num_classes:
        raise UserError("--features classifier: the model has no classes to train one on; give a TorchScript file")
    if images.length < GRID_IMAGES:
        raise UserError(f"data.source: has {images.length} images; judging needs at least {GRID_IMAGES}")
    network = None if features == "classifier" else TorchScriptExtractor(Path(features))
    classifier = open_classifier(images, config, path) if config.num_classes else None
    extractor: Any = network or classifier
    real = images.fetch(torch.randperm(images.length, generator=generator(0, "reference"))[:num_real])
    return Judge(extractor, classifier, extract(extractor, real))


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
    return folder / f"classifier-{Path(data.source).stem}-{digest}.safetensors"


def evaluate(
    runs: Sequence[Path],
    out: Path,
    features: str,
    num_samples: int,
    num_real: int,
    samplers: Sequence[str],
    seed: int,
    device: str,
) -> None:
    """Judges the newest checkpoint of every run against the first run's data; writes results.json and report.html."""
    for run in runs:
        check_run(run)
    check_writable(out)
    asked, on_device = [parse_sampler(text) for text in samplers], pick_device(device)
    recipe, models = read_run_recipe(runs[0] / RECIPE), [open_pixel_model(run) for run in runs]
    _check_alike(runs, models)
    images = open_images(recipe.data, models[0].config)
    judge = make_judge(images, models[0].config, features, classifier_path(recipe.data, runs[0].parent), num_real)
    rows, grids = [judge.floor()], {"real": real_grid(images, models[0])}
    names = [run.name if len({other.name for other in runs}) == len(runs) else str(run) for run in runs]
    for name, model in zip(names, models, strict=True):
        model.to(on_device)
        for sampler in [default_sampler(model)] if model.timesteps else asked:
            title = f"{name} {describe(sampler)}"
            with progress_bar(title, num_samples) as progress:
                fakes = generate(model, sampler, range(num_samples), seed, report=lambda done: progress(done, {}))
            speed = images_per_second(model, sampler, THROUGHPUT_BATCH)
            rows.append(judge.row(name, sampler, fakes, model.conditioner.labels(num_samples), speed))
            grids[title] = report.sample_grid(fakes[:GRID_IMAGES])
    curves = {name: read_metrics(run / METRICS) for name, run in zip(names, runs, strict=True)}
    publish(rows, grids, curves, out, f"fewstep: {', '.join(names)}", features)


def _check_alike(runs: Sequence[Path], models: Sequence[PixelModel]) -> None:
    """Raises UserError unless all models make the images and the classes of the first."""
    made = [(*model.shape, model.config.num_classes) for model in models]
    for run, other in zip(runs, made, strict=True):
        if other != made[0]:
            raise UserError(
                f"{run}: channels, height, width and classes are {other}, those of {runs[0]} {made[0]}; judge it apart"
            )


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


def publish(
    rows: list[Row], grids: dict[str, bytes], curves: dict[str, list[dict]], out: Path, title: str, features: str
) -> None:
    """Writes results.json and report.html into `out` and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(rows, out / "results.json")
    notes = (
        f"FID, precision and recall in the features of {features}; not comparable with FIDs in other features. "
        "The row of the real images is the noise floor: one half of them against the other; halves are smaller than "
        "the whole set that the models are compared with, so a model can come out below it. Its accuracy is the "
        "classifier's on images that it was not trained on. nfe: network calls per image."
    )
    summary = "Every model starts from the same noise and the same classes; green is the best of a column."
    report.write_page(rows, grids, curves, out / "report.html", title, summary, notes)
    Console().print(report.text_table(rows))
    Console().print(f"page: {out / 'report.html'}  numbers: {out / 'results.json'}", highlight=False, soft_wrap=True)
