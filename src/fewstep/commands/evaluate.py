"""`fewstep evaluate`: judges models side by side, on the same noise, and writes the table and the page."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from shlex import join, quote
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fewstep
from fewstep.commands.options import Evaluate
from fewstep.commands.places import check_writable, free_place, tell_done
from fewstep.commands.runs import check_alike, pick_device
from fewstep.data.images import load_images
from fewstep.data.listing import is_image, list_files
from fewstep.data.settings import DataSettings
from fewstep.errors import UserError
from fewstep.evaluation import report
from fewstep.evaluation.gathering import GRID_IMAGES, MAX_BATCH, gather
from fewstep.evaluation.judge import NUM_GROUPS, Judge, Means, describe, make_judge
from fewstep.evaluation.report import Curves, Row
from fewstep.export.card import last_part
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.hub import is_hub_id
from fewstep.models.loading.pretrained import configured, is_loadable, open_averages
from fewstep.models.sampler import Sampler, default_sampler, generate_batches, images_per_second, parse_sampler
from fewstep.networks.families import use_family
from fewstep.recipes.loading import read_run_recipe
from fewstep.runtime.checkpoint import EVALUATIONS, METRICS, RECIPE, check_run
from fewstep.runtime.runs import find, is_run, run_folder, short_name
from fewstep.runtime.tracking import progress_bar, read_metrics

RESULTS, PAGE = "results.json", "report.html"


def evaluate(given: Evaluate) -> None:
    """Judges models and folders of images against the first run's data, or --data; writes results.json and report.html.

    Every average of a run has a row.
    """
    given = replace(given, out=free_place(given.out, Path("evaluation"), holds_results, given.overwrite))
    check_writable(given.out)
    use_family(given.family)
    asked, device = [parse_sampler(text) for text in given.samplers], pick_device(given.device)
    folders = [text for text in given.runs if _is_image_folder(text)]
    sources = [text for text in given.runs if text not in folders]
    data, keep = _reference(given, sources)
    averages = [open_averages(each, given.config if each in configured(sources) else None) for each in sources]
    firsts = [of[""] for of in averages]
    check_alike(sources, firsts)
    firsts[0].to(device)  # where the judge's network goes, too
    try:
        judge = make_judge(data, firsts[0], Means(given.features), keep, given.num_samples, given.num_real)
    except UserError as error:
        of_run = [] if given.data else [run_folder(source) / RECIPE for source in sources if is_run(source)][:1]
        raise UserError(": ".join(map(str, (*of_run, error)))) from error
    short = [text if is_hub_id(text) else short_name(text) for text in given.runs]
    names = dict(zip(given.runs, short if len({*short}) == len(short) else given.runs, strict=True))
    rows = [judge.floor]
    for source, of in zip(sources, averages, strict=True):
        step = f", step {find(source).step}" if is_run(source) else ""
        for ema, model in of.items():
            model.to(device)
            for sampler in [default_sampler(model)] if model.timesteps or not asked else asked:
                rows.append(_row(judge, f"{names[source]}{ema}", step, model, sampler, given))
            model.to(torch.device("cpu"))  # networks of several models need not fit at once
    rows += [_row_of_images(judge, names[folder], folder, firsts[0], given.num_samples) for folder in folders]
    runs = {names[source]: run_folder(source) for source in sources if is_run(source)}
    curves = {name: read_metrics(run / METRICS) + read_metrics(run / EVALUATIONS) for name, run in runs.items()}
    facts = {"data": last_part(str(data.source)), "seed": given.seed, "images of a model": given.num_samples}
    students = [source for source, first in zip(sources, firsts, strict=True) if first.timesteps and is_run(source)]
    then = [f"export {quote(source)} {quote(run_folder(source).name)}" for source in students[:1]]
    title = f"fewstep: {', '.join(names.values())}"
    publish(rows, curves, given.out, title, judge, facts, then or [f"sample {quote(sources[0])}"])


def holds_results(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RESULTS, PAGE))


def _is_image_folder(text: str) -> bool:
    folder = Path(text)
    if not folder.is_dir() or is_loadable(text) or is_run(text) or (folder / "checkpoints").exists():
        return False
    return any(map(is_image, list_files(folder)))


def _reference(given: Evaluate, sources: Sequence[str]) -> tuple[DataSettings, Path]:
    """The real images, and the folder in which what is made of them is kept; raises UserError where none are named."""
    if not sources:
        raise UserError(f"{given.runs[0]}: is a folder of images; name the model beside which it is to be judged, too")
    for source in sources:
        if not is_loadable(source):
            check_run(run_folder(source))
    runs = [run_folder(source) for source in sources if is_run(source)]
    if not runs and not given.data:
        raise UserError(f"{sources[0]}: is no run, which would say what it is compared with; name images with --data")
    data = DataSettings(source=given.data) if given.data else read_run_recipe(runs[0] / RECIPE).data
    return data, runs[0].parent if runs else Path("runs")


def _row(judge: Judge, name: str, step: str, model: ImageModel, sampler: Sampler, given: Evaluate) -> Row:
    """`step` is for errors."""
    if sampler.guidance_scale != 1 and model.null_condition is None:
        raise UserError(f"--sampler: {name} has no null class to guide with; leave out the @ and its scale")
    num, speed = given.num_samples, images_per_second(model, sampler)
    with progress_bar(f"{name} {describe(sampler)}", num) as show:

        def draw(numbers: range, asked: Asked) -> Iterable[Tensor]:
            report = (lambda done: show(done, {})) if numbers.start == 0 else lambda done: None
            told: Any = {"name": f"{name}{step}", "report": report}
            return generate_batches(model, sampler, numbers, given.seed, asked, **told)

        return judge.row(name, sampler, draw, num, speed)


def _row_of_images(judge: Judge, name: str, folder: str, model: ImageModel, num: int) -> Row:
    """The first images of a folder, at most `num`, in the size and colours of the model's."""
    images = load_images(DataSettings(source=folder), model.image_size, model.channels)
    num = min(num, images.length)
    if num < GRID_IMAGES:
        raise UserError(f"{folder}: has {num} images; judging needs at least {GRID_IMAGES}")
    batches = (images.fetch(part) for part in torch.arange(num).split(MAX_BATCH))
    return judge.row_of(name, None, gather(batches, judge.of_images, num, name, NUM_GROUPS), {})


def publish(
    rows: list[Row],
    curves: Curves,
    out: Path,
    title: str,
    judge: Judge,
    facts: Mapping[str, object],
    then: Sequence[str],
) -> None:
    """Writes results.json and report.html into `out`, prints the table, and what comes next."""
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(rows, out / RESULTS)
    when = {"date": f"{datetime.now():%Y-%m-%d %H:%M}", "fewstep": fewstep.__version__, "command": command_line()}
    kind = "text" if judge.prompts else "label"
    report.write_page(rows, curves, out / PAGE, title, kind, judge.extractor.name, {**facts, **when})
    Console().print(report.text_table(rows))
    tell_done(f"{out / PAGE} and {out / RESULTS}", *then)


def command_line() -> str:
    """As it was typed, but for the folders that paths of one's own go through."""
    words = [re.sub(r"(?:(?<==)|^)(?:/|~|\.\.).*", lambda path: last_part(path[0]), word) for word in sys.argv[1:]]
    return join(["fewstep", *words])
