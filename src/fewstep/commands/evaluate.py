"""`fewstep evaluate`: judges models side by side, on the same noise, and writes the table and the page."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from shlex import join, quote
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

import fewstep
from fewstep.commands.options import Evaluate
from fewstep.commands.places import check_writable, free_place, tell_done
from fewstep.commands.runs import check_alike, pick_device, place_of_rank
from fewstep.data.settings import DataSettings
from fewstep.data.texts import load_prompts
from fewstep.embedded.sources import Pictures, origin
from fewstep.errors import UserError
from fewstep.evaluation import report
from fewstep.evaluation.judge import NUM_GROUPS, Judge, Means, describe, make_judge
from fewstep.evaluation.others import Others, check_pictures, is_images, open_others, pictures_at
from fewstep.evaluation.report import Curves, Row
from fewstep.evaluation.rows import Entry, RowFiles, clear, wait_for
from fewstep.evaluation.statistics import SUFFIX, is_statistics, write_statistics
from fewstep.export.card import last_part
from fewstep.files import folder_lock
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.hub import is_hub_id
from fewstep.models.loading.pretrained import configured, is_loadable, open_averages
from fewstep.models.sampler import (
    Sampler,
    default_sampler,
    generate_batches,
    generate_stops,
    images_per_second,
    parse_sampler,
)
from fewstep.networks.families import use_family
from fewstep.recipes.loading import read_run_recipe
from fewstep.runtime.checkpoint import EVALUATIONS, METRICS, RECIPE, check_run
from fewstep.runtime.runs import find, is_run, run_folder, short_name
from fewstep.runtime.tracking import progress_bar, read_metrics
from fewstep.stopping import advising

RESULTS, PAGE = "results.json", "report.html"
PATIENCE = 600.0  # seconds in which a file of another rank must come


class Job(NamedTuple):
    """A model and the rows that it draws, or rows of images without one."""

    model: ImageModel | None
    rows: list[RowFiles]


def evaluate(given: Evaluate) -> None:
    """Judges models and images against the first run's data, or --data; writes results.json and report.html.

    Every average of a run has a row. Goes on with what a stopped command has made. Of several ranks each makes its
    share of the files, and the first the table.
    """
    given = replace(given, out=free_place(given.out, Path("evaluation"), holds_results, given.overwrite))
    check_writable(given.out)
    use_family(given.family)
    asked = [parse_sampler(text) for text in given.samplers]
    of_images = [text for text in given.runs if _is_images(text)]
    sources = [text for text in given.runs if text not in of_images]
    _check(given, sources, of_images)
    rank, num_ranks, device = place_of_rank(pick_device(given.device))
    data, runs = _reference(given, sources)
    averages = [open_averages(each, given.config if each in configured(sources) else None) for each in sources]
    firsts = [of[""] for of in averages]
    check_alike(sources, firsts)
    if given.stops and all(len(each.timesteps or ()) < 2 for each in firsts):
        raise UserError("--stops: is of students of several steps, and there is none here; leave it out")
    judge, opened = _judge(given, data, runs, sources, firsts, of_images, device)
    short = [text if is_hub_id(text) else short_name(text) for text in given.runs]
    names = dict(zip(given.runs, short if len({*short}) == len(short) else given.runs, strict=True))
    curves = {names[each]: read_metrics(run / METRICS) + read_metrics(run / EVALUATIONS) for each, run in runs.items()}
    jobs = list[Job]()
    for source, of in zip(sources, averages, strict=True):
        step = f", step {find(source).step}" if source in runs else ""
        for ema, model in of.items():
            jobs.append(Job(model, _rows_of(given, judge, f"{names[source]}{ema}", step, model, asked)))
    jobs += [Job(None, [RowFiles(_made(judge, names[each.source], each), given.out)]) for each in opened]
    _check_places(jobs)
    if given.statistics and rank == 0:
        write_statistics(given.statistics, judge.real, judge.extractor, judge.size, last_part(str(data.source)))
    students = [source for source, first in zip(sources, firsts, strict=True) if first.timesteps and source in runs]
    then = [f"export {quote(source)} {quote(runs[source].name)}" for source in students[:1]]
    then = then or [f"sample {quote(source)}" for source in sources[:1]]
    with folder_lock(given.out, f".{rank}.lock"), advising(f"the same command goes on with {given.out}"):
        fill(jobs, device, rank, num_ranks)
        if rank:
            print(f"{given.out}: rank {rank} of {num_ranks} has made its share")
            return
        if lacking := wait_for([rows for job in jobs for rows in job.rows], PATIENCE):
            told = f"{lacking} files of other ranks are not there yet; the same command goes on with those that are"
            raise UserError(f"{given.out}: {told}")
        rows = [judge.floor, *table_rows(jobs, judge, device, given.batch_size)]
        title, facts = f"fewstep: {', '.join(names.values())}", _facts(given, data, judge)
        publish(rows, curves, given.out, title, judge, facts, then)
        clear(given.out)


def holds_results(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RESULTS, PAGE))


def _is_images(text: str) -> bool:
    """Not a run's folder, nor one of runs, whose images are its grids."""
    if is_loadable(text) or is_run(text) or (Path(text) / "checkpoints").exists():
        return False
    return is_images(text) and not any(Path(text).glob(f"*/{RECIPE}"))


def _check(given: Evaluate, sources: Sequence[str], of_images: Sequence[str]) -> None:
    """Raises UserError for options that do not go together."""
    if given.clip_prefix and not given.clip:
        raise UserError("--clip-prefix: goes before prompts in CLIP; name its folder with --clip, or leave it out")
    if given.lpips and not sources:
        told = "is of several images of one prompt or class, which are drawn for it; no model is here that could"
        raise UserError(f"--lpips: {told}; leave it out")
    if given.resize not in ("legacy", "clean"):
        raise UserError(f"--resize {given.resize!r}: write legacy or clean")
    if given.statistics and (given.statistics.suffix != SUFFIX or is_statistics(given.data)):
        raise UserError(f"--statistics {given.statistics}: is a {SUFFIX} file that is made of images (--data)")
    if not sources and not given.data:
        raise UserError(f"{of_images[0]}: images, and no run that would say what they are compared with; give --data")


def _check_places(jobs: Sequence[Job]) -> None:
    """Raises UserError where two rows would leave their images in one folder."""
    plans: dict[Path, Mapping[str, Any]] = {}
    for rows in (rows for job in jobs for rows in job.rows if rows.keep_images):
        if plans.setdefault(rows.images, rows.plan) != rows.plan:
            raise UserError(
                f"--keep-images: two rows would go to {rows.images}; rename one of them, or judge them apart"
            )


def _reference(given: Evaluate, sources: Sequence[str]) -> tuple[DataSettings, dict[str, Path]]:
    """The real images, and the folders of those that are runs; raises UserError where no images are named."""
    for source in sources:
        if not is_loadable(source):
            check_run(run_folder(source))
    runs = {source: run_folder(source) for source in sources if is_run(source)}
    if not runs and not given.data:
        raise UserError(f"{sources[0]}: is no run, which would say what it is compared with; name images with --data")
    if given.data:
        return DataSettings(source=given.data), runs
    return read_run_recipe(next(iter(runs.values())) / RECIPE).data, runs


def _judge(
    given: Evaluate,
    data: DataSettings,
    runs: Mapping[str, Path],
    sources: Sequence[str],
    firsts: Sequence[ImageModel],
    of_images: Sequence[str],
    device: torch.device,
) -> tuple[Judge, list[Others]]:
    """The judge, and the images that something else made; raises UserError for what is not alike."""
    model: Any = firsts[0] if firsts else replace(pictures_at(of_images[0], given.size), device=device)
    whose = sources[0] if sources else of_images[0]
    pictures = Pictures(model.image_size, model.channels)
    recipes = [run / RECIPE for run in runs.values()]
    own = [read_run_recipe(recipe).data.source for recipe in recipes]
    foreign = given.data and not is_statistics(given.data) and origin(given.data) not in map(origin, filter(None, own))
    for each in [*([given.data] if foreign else []), *of_images]:
        check_pictures(str(each), pictures, given.size, whose)
    text = getattr(model, "kind", "") == "text"
    prompts = load_prompts(given.prompts, field="--prompts") if given.prompts else []
    brought = replace(pictures, image_size=given.size or pictures.image_size)
    opened = [open_others(each, brought, given.num_samples, prompts) for each in of_images]
    if prompts and not text and not opened:
        raise UserError("--prompts: the model takes no text; leave it out")
    if given.clip and not text and not any(each.prompts for each in opened):
        raise UserError("--clip: compares pictures with prompts, and there are none here; name them with --prompts")
    means = Means(**{name: getattr(given, name) for name in Means.__dataclass_fields__})
    if firsts:
        firsts[0].to(device)  # where the judge's network goes, too
    try:
        asked = replace(means, prompts=given.prompts if text else None)
        keep = recipes[0].parent.parent if recipes else Path("runs")  # beside the first run
        return make_judge(data, model, asked, keep, given.num_samples, given.num_real), opened
    except UserError as error:
        of_run = [] if given.data else recipes[:1]
        raise UserError(": ".join(map(str, (*of_run, error)))) from error


def _rows_of(
    given: Evaluate, judge: Judge, name: str, step: str, model: ImageModel, asked: list[Sampler]
) -> list[RowFiles]:
    """A row per sampler; of a student of several steps, where it is asked for, also one per earlier stop."""
    num = len(model.timesteps or ())
    samplers = [default_sampler(model)] if num or not asked else asked
    entries = [_drawn(given, judge, name, step, model, each) for each in samplers]
    if not given.stops or num < 2:
        return [RowFiles(each, given.out, given.keep_images) for each in entries]
    titles = {k: f"{name}, stop {k} of {num}" for k in range(1, num)}
    stops = [_drawn(given, judge, title, step, model, Sampler("student", k)) for k, title in titles.items()]
    earlier = [RowFiles(each, given.out, given.keep_images) for each in stops]

    def draw_stops(numbers: range, asked: Asked) -> Iterable[list[Tensor]]:
        return generate_stops(model, numbers, given.seed, asked, entries[0].batch, f"{name}{step}")

    last = replace(entries[0], draw_stops=draw_stops)
    return [RowFiles(last, given.out, given.keep_images, earlier), *earlier]


def _drawn(given: Evaluate, judge: Judge, name: str, step: str, model: ImageModel, sampler: Sampler) -> Entry:
    """A row of a model's; `step` is for errors."""
    if sampler.guidance_scale != 1 and model.null_condition is None:
        raise UserError(f"--sampler: {name} has no null class to guide with; leave out the @ and its scale")
    batch = given.batch_size or model.sampling_batch

    def draw(numbers: range, asked: Asked) -> Iterable[Tensor]:
        return generate_batches(model, sampler, numbers, given.seed, asked, batch, name=f"{name}{step}")

    weights = [model.fingerprint, model.latent_space, model.timesteps]
    plan = {"model": weights, "seed": given.seed, "device": given.device, "version": fewstep.__version__}
    probes, size = judge.probes(judge.prompts, drawn=True), model.channels * model.image_size**2
    made = (draw, given.num_samples, plan, probes, judge.size, batch, size, judge.width)
    return Entry(name, sampler, *made, judge.prompts, judge.within)


def _made(judge: Judge, name: str, images: Others) -> Entry:
    """A row of images that something else made."""
    plan, probes = {"images": images.identity, "version": fewstep.__version__}, judge.probes(images.prompts, False)
    made = (images.draw, len(images.order), plan, probes, judge.size, 1, 3 * judge.size**2, judge.width)
    return Entry(name, None, *made, images.prompts)


def fill(jobs: Sequence[Job], device: torch.device, rank: int, num_ranks: int) -> None:
    """Makes what lacks of a rank's share."""
    silent = None if rank == 0 else lambda done, metrics: None
    for _, rows in on_device(jobs, device):
        told, total = f"{rows.entry.name} {describe(rows.entry.sampler)}", rows.share(rank, num_ranks)
        with progress_bar(told, total, silent) as show:
            rows.fill(lambda done: show(done, {}), rank, num_ranks)


def on_device(jobs: Sequence[Job], device: torch.device) -> Iterator[tuple[ImageModel | None, RowFiles]]:
    """All rows, each while its model is there; then that is on the CPU again: several need not fit at once."""
    for model, files in jobs:
        if model:
            model.to(device)
        yield from ((model, rows) for rows in files)
        if model:
            model.to(torch.device("cpu"))


def table_rows(jobs: Sequence[Job], judge: Judge, device: torch.device, batch_size: int | None) -> Iterator[Row]:
    """The rows of the table, with the clock that is read now, when nothing else is drawn."""
    for model, rows in on_device(jobs, device):
        name, sampler, clock = rows.entry.name, rows.entry.sampler, dict[str, float]()
        if model and sampler:
            clock["images_per_second"] = images_per_second(model, sampler, batch_size or 0)
            clock["latency"] = 1 / images_per_second(model, sampler, 1)
        rows.write_captions()
        labels = rows.entry.prompts or (judge.class_names if model else ())
        yield judge.row_of(name, sampler, rows.gathered(NUM_GROUPS), clock, labels)


def _facts(given: Evaluate, data: DataSettings, judge: Judge) -> dict[str, object]:
    """What was judged, and how, for the page."""
    count = f"{judge.real.count:,}" if judge.real.count else "unknown"
    facts = {"data": last_part(str(data.source)), "real images": count, "seed": given.seed}
    facts |= {"images of a model": given.num_samples, "pixels": judge.size}
    told = f"{len(judge.prompts):,} of {last_part(given.prompts)}" if given.prompts else "captions of the real images"
    facts |= {"prompts": told} if judge.prompts else {}
    return facts | ({"before every prompt in CLIP": repr(given.clip_prefix)} if given.clip_prefix else {})


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
