"""`fewstep evaluate`: judges runs side by side, on the same noise, and writes the table and the page."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fewstep.commands.options import Evaluate
from fewstep.commands.runs import check_writable, pick_device
from fewstep.errors import UserError
from fewstep.evaluation import report
from fewstep.evaluation.gathering import GRID_IMAGES
from fewstep.evaluation.judge import Judge, describe, make_judge
from fewstep.evaluation.report import Row
from fewstep.models.image_model import ImageModel
from fewstep.models.loading.pretrained import is_loadable, open_averages
from fewstep.models.sampler import Sampler, default_sampler, generate_batches, images_per_second, parse_sampler
from fewstep.networks.families import use_family
from fewstep.recipes.loading import read_run_recipe
from fewstep.runtime.checkpoint import METRICS, RECIPE, check_run
from fewstep.runtime.runs import find, run_folder
from fewstep.runtime.tracking import progress_bar, read_metrics


def evaluate(given: Evaluate) -> None:
    """Judges runs (RUN, RUN@STEP or RUN@best-METRIC) against the first one's data; writes results.json and report.html.

    Every average of a run has a row.
    """
    folders = [run_folder(run) for run in given.runs]
    check_run(folders[0])
    use_family(given.family)
    check_writable(given.out)
    asked, device = [parse_sampler(text) for text in given.samplers], pick_device(given.device)
    recipe = read_run_recipe(folders[0] / RECIPE)
    distinct = len({Path(run).name for run in given.runs}) == len(given.runs)
    names = [Path(run).name if distinct else run for run in given.runs]
    averages = [open_averages(run) for run in given.runs]
    firsts = [of[""] for of in averages]
    _check_alike(given.runs, firsts)
    firsts[0].to(device)  # where the judge's network goes, too
    judge = make_judge(recipe.data, firsts[0], given.features, folders[0].parent, given.num_samples, given.num_real)
    rows = [judge.floor]
    for run, name, of in zip(given.runs, names, averages, strict=True):
        step = "" if is_loadable(run) else f", step {find(run).step}"
        for ema, model in of.items():
            model.to(device)
            for sampler in [default_sampler(model)] if model.timesteps or not asked else asked:
                rows.append(_row(judge, f"{name}{ema}", step, model, sampler, given))
            model.to(torch.device("cpu"))  # networks of several models need not fit at once
    curves = {name: read_metrics(run / METRICS) for name, run in zip(names, folders, strict=True)}
    publish(rows, curves, given.out, f"fewstep: {', '.join(names)}", judge)


def _row(judge: Judge, name: str, step: str, model: ImageModel, sampler: Sampler, given: Evaluate) -> Row:
    """`step` is for errors."""
    if sampler.guidance_scale != 1 and model.null_condition is None:
        raise UserError(f"--sampler: {name} has no null class to guide with; leave out the @ and its scale")
    num, speed = given.num_samples, images_per_second(model, sampler)
    with progress_bar(f"{name} {describe(sampler)}", num) as show:
        asked = (range(num), given.seed, judge.prompts or None)
        images = generate_batches(model, sampler, *asked, report=lambda done: show(done, {}), name=f"{name}{step}")
        return judge.row(name, sampler, images, num, speed)


def _check_alike(runs: Sequence[str], models: Sequence[ImageModel]) -> None:
    """Raises UserError unless all models make the images and the classes of the first."""
    made = [(*model.shape, model.num_classes if model.kind == "label" else model.kind) for model in models]
    for run, other in zip(runs, made, strict=True):
        if other != made[0]:
            what = f"channels, height, width and classes are {other}, those of {runs[0]} {made[0]}"
            raise UserError(f"{run}: {what}; judge it apart")


def publish(rows: list[Row], curves: dict[str, list[dict[str, float]]], out: Path, title: str, judge: Judge) -> None:
    """Writes results.json and report.html into `out` and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(rows, out / "results.json")
    text = bool(judge.prompts)
    notes = NOTES.format(features=judge.extractor.name, checked=PROMPT_NOTES if text else CLASS_NOTES)
    notes += f" Prompts of the grids, row by row: {'; '.join(judge.prompts[:GRID_IMAGES])}." if text else ""
    asked = "prompts" if text else "classes"
    summary = f"Every model starts from the same noise and the same {asked}; green is the best of a column."
    report.write_page(rows, curves, out / "report.html", title, summary, notes)
    Console().print(report.text_table(rows))
    Console().print(f"page: {out / 'report.html'}  numbers: {out / 'results.json'}", highlight=False, soft_wrap=True)


NOTES = (
    "FID, KID, precision and recall are in the features of {features}; they don't compare with those in others. The "
    "row of the real images is the noise floor: one half of them against the other; halves are smaller than the whole "
    "set that the models are compared with, so a model can come out below it. {checked} nfe: network calls per image; "
    "guidance (@) takes two. Below a value stands its 95 % interval, of shares Wilson's, of FID a jackknife's over the "
    "generated images."
)
CLASS_NOTES = "Its accuracy is the classifier's on images that it was not trained on."
PROMPT_NOTES = (
    "Prompt accuracy: the share of pictures in which a program reads back everything that the prompt says, for prompts "
    "of one object and of two objects. Diversity: mean feature distance between two pictures of one prompt."
)
