"""`fewstep report`: one page that answers whether runs converge. Needs no torch: it is there in a second."""

import json
import os
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from fewstep.commands.options import Report
from fewstep.commands.places import check_writable, free_place
from fewstep.errors import UserError
from fewstep.evaluation.findings import find
from fewstep.evaluation.health_page import MOST_RUNS, Health, health_page
from fewstep.files import write_text
from fewstep.recipes.loading import defaults, documented, read_run_recipe
from fewstep.runtime.checkpoint import EVALUATIONS, METRICS, RECIPE, checkpoint_steps
from fewstep.runtime.runs import run_folder, up_to
from fewstep.runtime.tracking import read_metrics
from fewstep.stopping import advising

PAGE = "report.html"
LOCK = ".lock"  # there while a process holds the run; it is looked at, not taken
HIDDEN = ("kind", "description")  # of the settings: the page tells them elsewhere


def report(order: Report) -> None:
    """Writes the page, and with `watch` again until all runs are finished; nothing else in the runs is touched."""
    if len(order.runs) > MOST_RUNS:
        raise UserError(f"report: {len(order.runs)} runs; take at most {MOST_RUNS} on one page")
    names = unique_names(order.runs)
    out = page_file(order)
    check_writable(out.parent)
    with advising(f"{out} is as of the last step that it read") if order.watch else advising(""):
        for written in count():
            runs = [read_run(each, name, order.watch) for each, name in zip(order.runs, names, strict=True)]
            goes_on = order.watch and not all(run.finished for run in runs)
            write_text(out, health_page(runs, order.every if goes_on else None))
            if not written:
                print(f"wrote {out}", flush=True)
            if not goes_on:
                return
            time.sleep(order.every)


def page_file(order: Report) -> Path:
    """Where the page goes: of one run beside its numbers, where each page replaces the one before it."""
    if order.out is not None and order.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {order.out}: a page's name ends in .html")
    if order.out is None and len(order.runs) == 1:
        return up_to(order.runs[0])[0] / PAGE
    return free_place(order.out, Path(PAGE), lambda path: path.exists(), order.overwrite)


def unique_names(runs: Sequence[str]) -> list[str]:
    """The last parts of the paths, of folders of one name the whole as typed; raises UserError for one named twice."""
    folders = [run_folder(run).resolve() for run in runs]
    alike = [len({each for each in folders if each.name == folder.name}) > 1 for folder in folders]
    names = [run if whole else Path(run).resolve().name for run, whole in zip(runs, alike, strict=True)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice}: is named twice; leave one out")
    return names


def read_run(text: str, name: str, waiting: bool) -> Health:
    """What a page tells of RUN, or of RUN@STEP up to that step.

    Raises UserError for no run, what can't be read in it, and, unless `waiting`, no line of metrics yet.
    """
    run, last = up_to(text)
    recipe: Any = read_run_recipe(run / RECIPE)
    lines, evaluations = (
        [line for line in read_metrics(run / file) if last is None or line["step"] <= last]
        for file in (METRICS, EVALUATIONS)
    )
    if not lines and not waiting:
        first = f"the first comes behind step {min(recipe.log_every, recipe.num_steps)} (log_every)"
        raise UserError(f"{run / METRICS}: has no line{f' up to step {last}' if last is not None else ''} yet; {first}")
    told = {key: (value, text) for key, value, text in documented(recipe) if key not in HIDDEN}
    grids, panels = (
        [path for path in sorted((run / folder).glob(f"{'[0-9]' * 8}.png")) if last is None or int(path.stem) <= last]
        for folder in ("samples", "panels")
    )
    return Health(
        name=name,
        description=recipe.description,
        num_steps=recipe.num_steps,
        lines=lines,
        evaluations=evaluations,
        findings=find(lines, evaluations, recipe.model_dump(mode="json")) if lines else [],
        grids=grids,
        panels=panels,
        settings={key: _text(value) for key, (value, _) in told.items()},
        defaults={key: _text(value) for key, value in defaults(recipe)},
        about={key: text for key, (_, text) in told.items()},
        checkpoints=[step for step in checkpoint_steps(run) if last is None or step <= last],
        held=(run / LOCK).exists(),
        until=last,
        num_bytes=disk_bytes(run),
        written=max(path.stat().st_mtime for path in (run / METRICS, run / EVALUATIONS, run / RECIPE) if path.exists()),
    )


def _text(value: Any) -> str:
    """Of a setting, as recipes have it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def disk_bytes(folder: Path) -> int:
    """Of all files below it, each once however many links it has."""
    sizes = {}
    for above, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(above, name))
            except FileNotFoundError:  # by a run that goes on
                continue
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())
