"""`fewstep ablate`: recipes x seeds. What they build on is made, then their runs, side by side; a table and a plot."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import fewstep
from fewstep.commands.data import encode_first
from fewstep.commands.distill import JOBS as DISTILL
from fewstep.commands.options import Ablate
from fewstep.commands.options_files import Pairs
from fewstep.commands.pairs import pairs
from fewstep.commands.places import check_writable, tell_done
from fewstep.commands.ranks import check_ranks
from fewstep.commands.runs import FREE, check_target, read_facts, train_recipe
from fewstep.commands.teach import JOBS as TEACH
from fewstep.data.shards import ShardFolder
from fewstep.errors import Interrupted, UserError
from fewstep.evaluation.ablation import Line, Run, as_json, markdown, missing, plot, text_table
from fewstep.evaluation.judge import Means, describe
from fewstep.evaluation.kept import JUDGED, REAL, Judging, Kept, values_of, values_of_stops
from fewstep.files import folder_lock, write_text, written_whole
from fewstep.models.image_model import ImageModel
from fewstep.models.loading.pretrained import open_model
from fewstep.models.sampler import MULTISTEP, Sampler, parse_sampler
from fewstep.recipes.loading import differences, read_run_recipe
from fewstep.recipes.schema import AnyRecipe
from fewstep.recipes.studies.loading import Making, Row, Study, load_study, settings_of, study_names
from fewstep.runtime.checkpoint import METRICS, RECIPE, checkpoint_steps
from fewstep.runtime.distributed import place
from fewstep.runtime.tracking import Report, read_metrics
from fewstep.runtime.workers import Failure, Task, run_apart
from fewstep.stopping import advising

TABLE, RESULTS, PLOT = "table.md", "results.json", "plot.png"
SUFFIX = {"pairs": ".parquet", "latents": ".safetensors"}
NOT_YET = "not run yet"


def ablate(order: Ablate, study: Study | None) -> None:
    """Runs what is not there of a study, judges it, and writes the table; raises UserError if runs are missing."""
    if study is None:
        return list_studies()
    out, folder = order.out, order.out / study.name
    work = Work(study, out, check_samplers(study), order.ranks)
    check_divided(study, order.ranks)
    check_writable(out)
    check_kept(study, out)
    with folder_lock(folder), advising(f"the same command goes on with {out}"):
        try:
            failures = work.do(order.jobs or max(1, num_cores() // order.ranks))
        except Interrupted as stop:
            raise Interrupted(f"stopped; the same command goes on with {out}", stop.exit_code - 128) from stop
        lines = work.publish(failures)
    Console().print(text_table(lines))
    absent = list(missing(lines))
    print(*absent, sep="\n", end="\n" if absent else "")
    tell_done(f"{folder / TABLE}, {folder / PLOT} and {folder / RESULTS}")
    if absent:
        raise UserError(
            f"{len(absent)} of its runs are missing, as {folder / TABLE} tells; the same command tries again"
        )
    return None


def list_studies() -> None:
    """Prints the studies that come with fewstep."""
    table = Table("study", "rows x seeds", "what it compares")
    for name in study_names():
        study = load_study(name)
        table.add_row(name, f"{len(study.rows)} x {len(study.settings.seeds)}", study.settings.description)
    Console().print(table)


def check_samplers(study: Study) -> list[Sampler]:
    """Those of the teacher; raises UserError for what is none, or not for the teacher that is prepared."""
    settings = study.settings
    asked = [(settings.teacher, text, "samplers") for text in settings.samplers]
    for name, making in study.prepared.items():
        if making.how.pairs:
            asked.append((making.how.teacher, str(making.how.sampler), f"prepare: {name}"))
    found = []
    for teacher, text, where in asked:
        try:
            sampler = parse_sampler(text)
        except UserError as error:
            raise UserError(f"study {study.name}: {where}: {error}") from error
        recipe = study.prepared[teacher].recipe if teacher in study.prepared else None
        if recipe is not None and recipe.kind == "teach":
            what = "is for text-to-image models" if sampler.kind in MULTISTEP else ""
            guided = sampler.guidance_scale != 1 and not recipe.model.null_class
            if what := "guides, and the teacher has no null class" if guided else what:
                raise UserError(f"study {study.name}: {where}: {sampler} {what}; take heun:18 or ddim:50")
        found += [sampler] if where == "samplers" else []
    return found


def check_divided(study: Study, num_ranks: int) -> None:
    """Raises UserError where a run can't be divided among so many ranks."""
    recipes = {name: making.recipe for name, making in study.prepared.items() if making.recipe}
    for name, recipe in {**recipes, **{row.name: row.recipe for row in study.rows}}.items():
        try:
            check_ranks(recipe, num_ranks)
        except UserError as error:
            raise UserError(f"study {study.name}: {name}: {error}") from error


def check_kept(study: Study, out: Path) -> None:
    """Raises UserError for what lies in `out` and is not what the study would make: of another recipe or version."""
    wanted = {name: making.recipe for name, making in study.prepared.items() if making.recipe}
    wanted |= {row.folder(seed): row.seeded(seed) for row in study.rows for seed in study.settings.seeds}
    others = []
    for name, recipe in wanted.items():
        run, placed = out / name, study.placed(recipe, out)
        if not (run / RECIPE).is_file():
            check_target(run, placed, resume=True)
            continue
        if (version := read_facts(run).get("version", fewstep.__version__)) != fewstep.__version__:
            others.append(f"{run}: was made by fewstep {version}")
        own = study.placed(read_run_recipe(run / RECIPE), out)
        changed = [each for each in differences(own, placed) if each.partition(":")[0].partition(".")[0] not in FREE]
        if changed:
            raise UserError(f"{run}: has another recipe ({'; '.join(changed)}); choose another --out, or remove it")
    if others:
        more = f" (so were {len(others) - 1} more)" if len(others) > 1 else ""
        told = f"this is {fewstep.__version__}, whose numbers may be others; choose another --out, or remove it"
        raise UserError(f"{others[0]}{more}, and {told}")
    for name, making in study.prepared.items():
        _check_shards(making, out / name)


def _check_shards(making: Making, place: Path) -> None:
    """Raises UserError for pairs or latents of another number, or pairs by another sampler."""
    kept, how = _shards(making, place), making.how
    if kept:
        made, wanted = [f"{kept.num_rows} {how.kind}"], [f"{how.num} {how.kind}"]
        if how.pairs:
            made.append(str(kept.plan["sampler"]))
            wanted.append(str(parse_sampler(str(how.sampler))))
        if made != wanted:
            told = f"has {' by '.join(made)}, and the study wants {' by '.join(wanted)}"
            raise UserError(f"{place}: {told}; choose another --out, or remove it")


def _shards(making: Making, place: Path) -> ShardFolder | None:
    """The pairs or latents there."""
    kind = making.how.kind
    there = kind in SUFFIX and (place / f"{kind}.json").exists()
    return ShardFolder.open(place, kind, {}, SUFFIX[kind]) if there else None


class Model(NamedTuple):
    """What is judged: a model, by a sampler (None: its own), and where the numbers are kept."""

    source: Path
    sampler: Sampler | str | None
    kept: Kept


@dataclass(frozen=True)
class Work:
    """A study in its folder, whose teacher is judged by these samplers, and each run trained by so many processes."""

    study: Study
    out: Path
    samplers: Sequence[Sampler]
    ranks: int

    @property
    def judging(self) -> Judging:
        """By the images of the first row."""
        settings, recipe = self.study.settings, self.placed(self.study.rows[0].recipe)
        return Judging(recipe.data, Means(settings.features), self.out, settings.num_samples)

    def placed(self, recipe: Any) -> Any:
        return self.study.placed(recipe, self.out)

    def model(self, source: Path, folder: Path, sampler: Sampler | str | None) -> Model:
        by = self.judging.by(self.study.rows[0].recipe.data, sampler)
        return Model(source, sampler, Kept(folder / JUDGED, by))

    def runs(self) -> Iterator[tuple[Row, int, Model]]:
        """Each row's of the first seed, then of the next: so a study that is half done compares its rows."""
        for seed in self.study.settings.seeds:
            for row in self.study.rows:
                run = self.out / row.folder(seed)
                yield row, seed, self.model(run, run, None)

    def teacher(self) -> list[Model]:
        """It by each of its samplers, behind the real images."""
        name = self.study.settings.teacher
        if name is None:
            return []
        prepared = name.partition("@")[0] in self.study.prepared
        kept = self.out / (name.partition("@")[0] if prepared else self.study.name)
        source = self.out / name if prepared else Path(name)
        samplers: list[Sampler | str | None] = [REAL, *self.samplers] if self.samplers else [REAL, None]
        return [self.model(source, kept, sampler) for sampler in samplers]

    def do(self, jobs: int) -> dict[str, str]:
        """Makes what is not there; why runs are missing, by the names of their folders."""
        lacking = [each for each in self.runs() if not is_whole(each[2], each[0].recipe)]
        unjudged = [model for model in self.teacher() if not model.kept.read()]
        if not lacking and not unjudged:
            return {}
        self.prepare()
        torch.set_num_threads(1)  # as in the processes of the runs, so that no figure depends on the machine's cores
        if first := self.first_model():
            self.judging.judge(first)  # which keeps what all need, under a progress bar of its own
        tasks, names = list[Task](), list[str]()
        if unjudged:
            names.append(str(self.study.settings.teacher))
            tasks.append(Task(f"judge {names[0]}", len(unjudged), _judge_teacher, (unjudged, self.judging)))
        for row, seed, model in lacking:
            names.append(model.source.name)
            recipe = going_on(model.source, self.placed(row.seeded(seed)))
            tasks.append(Task(row.name, recipe.num_steps, _run, (recipe, model, self.judging), ranks=self.ranks))
        failures: dict[str, str] = {}

        def ended(index: int, result: Any) -> None:
            if isinstance(result, Failure):
                failures[names[index]] = result.reason
                print(f"fewstep: {names[index]} ({tasks[index].title}): {result.reason}", file=sys.stderr)
            self.write(self.lines(failures))

        run_apart(tasks, jobs, ended)
        return failures

    def prepare(self) -> None:
        """Makes what the runs build on, one after the other; raises UserError if that fails."""
        for name, making in self.study.prepared.items():
            if task := self.preparation(name, making):
                (result,) = run_apart([task._replace(ranks=self.ranks)], 1)
                if isinstance(result, Failure):
                    place = self.out / name
                    raise UserError(f"{place}: {result.reason.removeprefix(f'{place}: ')}; the same command goes on")

    def preparation(self, name: str, making: Making) -> Task | None:
        """What makes something that is not whole yet."""
        how, place = making.how, self.out / name

        def at(source: str | None) -> str:
            return str(self.out / str(source)) if str(source).partition("@")[0] in self.study.prepared else str(source)

        if making.recipe:
            recipe = going_on(place, self.placed(making.recipe))
            return None if is_finished(place, recipe) else Task(name, recipe.num_steps, _train, (recipe, place))
        kept, num = _shards(making, place), how.num or 0
        if kept and not kept.missing() and (how.pairs or kept.plan.get("complete")):
            return None
        if how.latents:
            return Task(name, num, _encode, (Path(at(how.autoencoder)), num, place))
        given: dict[str, Any] = {"teacher": at(how.teacher), "num": num, "sampler": how.sampler, "out": place}
        return Task(name, num, _draw_pairs, (Pairs(**given),))

    def first_model(self) -> ImageModel | None:
        """A model of the kind that is judged, where there is one before any run."""
        models, recipe = self.teacher(), self.placed(self.study.rows[0].recipe)
        source = models[0].source if models else getattr(recipe, "teacher", None)
        return open_model(source) if source else None

    def lines(self, failures: dict[str, str]) -> list[Line]:
        """Of the table, as far as its runs are there."""
        found, named = list[Line](), str(self.study.settings.teacher)
        for model in self.teacher():
            values, why = model.kept.read().get("values", {}), failures.get(named, NOT_YET)
            told = describe(model.sampler) if isinstance(model.sampler, Sampler) else "its own sampler"
            name = "real images" if model.sampler == REAL else f"{named}, {told}"
            found.append(Line(name, [Run(None, named, None, None, values, (), "" if values else why)]))
        first = self.study.rows[0].recipe
        for row in self.study.rows:
            runs = [self.run(seed, model, failures) for each, seed, model in self.runs() if each is row]
            found.append(Line(row.name, runs, row.recipe_name, settings_of(row.recipe), differences(first, row.recipe)))
        return found

    def run(self, seed: int, model: Model, failures: dict[str, str]) -> Run:
        run, record = model.source, model.kept.read()
        if not record:
            return Run(seed, run.name, missing=failures.get(run.name, NOT_YET))
        version = read_facts(run).get("version")
        return Run(seed, run.name, version, seconds_of(run), record["values"], record["stops"])

    def write(self, lines: Sequence[Line]) -> None:
        """The table and all numbers."""
        study, settings, folder = self.study, self.study.settings, self.out / self.study.name
        facts: dict[str, Any] = {"study": study.name, "description": settings.description}
        facts |= {"version": fewstep.__version__, "num_samples": settings.num_samples, "seeds": settings.seeds}
        facts |= {"features": settings.features}
        judged = f"{settings.num_samples:,} images a run" + f", by {settings.features}" * bool(settings.features)
        told = f"{judged}; mean ± standard deviation over seeds {', '.join(map(str, settings.seeds))}."
        about = [settings.description] if settings.description else []
        write_text(folder / TABLE, markdown(lines, study.name, [*about, told]))
        write_text(folder / RESULTS, json.dumps({**facts, "rows": as_json(lines)}, indent=1) + "\n")

    def publish(self, failures: dict[str, str]) -> list[Line]:
        """Writes all that is told of the study."""
        lines, study = self.lines(failures), self.study
        self.write(lines)
        if any(line.there for line in lines if line.seeded):
            with written_whole(self.out / study.name / PLOT) as hidden:
                hidden.write_bytes(plot(lines, study.settings.description or study.name))
        return lines


def num_cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_finished(run: Path, recipe: AnyRecipe) -> bool:
    """Whether it has the last checkpoint of its recipe."""
    return max(checkpoint_steps(run), default=0) >= recipe.num_steps


def is_whole(model: Model, recipe: AnyRecipe) -> bool:
    """Whether a run is finished and judged."""
    return is_finished(model.source, recipe) and bool(model.kept.read())


def going_on(run: Path, recipe: Any) -> Any:
    """The recipe that the run has, which may have been started by hand, or is to have."""
    return read_run_recipe(run / RECIPE) if (run / RECIPE).is_file() else recipe


def seconds_of(run: Path) -> float:
    """What the steps of a run took, over all its parts."""
    lines = [{"step": 0.0}, *read_metrics(run / METRICS)]
    return sum((now["step"] - last["step"]) * now.get("seconds_per_step", 0) for last, now in pairwise(lines))


def _train(recipe: AnyRecipe, run: Path, report: Report) -> None:
    with redirect_stdout(StringIO()):  # several would tell what they do at once
        train_recipe(TEACH | DISTILL, recipe, run, True, report)


def _draw_pairs(order: Pairs, report: Report) -> None:
    with redirect_stdout(StringIO()):
        pairs(order, report)


def _encode(autoencoder: Path, num: int, out: Path, report: Report) -> None:
    encode_first(autoencoder, read_run_recipe(autoencoder / RECIPE).data.required, num, out, report)


def _run(recipe: AnyRecipe, made: Model, judging: Judging, report: Report) -> None:
    """Trains a run to its end; the first rank judges it, at its last checkpoint's averaged weights."""
    if not is_finished(made.source, recipe):
        _train(recipe, made.source, report)
    if place()[0]:
        return
    report(recipe.num_steps, {})
    model = open_model(made.source)
    judge = judging.judge(model)
    if len(model.timesteps or ()) > 1:
        stops = values_of_stops(judge, model, judging.num)
        made.kept.write({"values": stops[-1], "stops": stops})
    else:
        made.kept.write({"values": values_of(judge, model, None, judging.num), "stops": []})


def _judge_teacher(models: Sequence[Model], judging: Judging, report: Report) -> None:
    model = open_model(models[0].source)
    judge = judging.judge(model)
    for done, each in enumerate(models):
        report(done, {})
        sampler = each.sampler if isinstance(each.sampler, Sampler) else None
        values = judge.floor.values if each.sampler == REAL else values_of(judge, model, sampler, judging.num)
        each.kept.write({"values": values})
