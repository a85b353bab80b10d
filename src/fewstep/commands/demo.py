"""`fewstep demo`: the whole job on an embedded set. Teach, distil to one and to four steps, judge.

Two processes share the work with one thread each; what has no company takes both threads.
"""

import signal
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import chain
from pathlib import Path
from shlex import join
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from fewstep.commands.data import encode_first
from fewstep.commands.distill import JOBS as DISTILL
from fewstep.commands.drawing import draw_first
from fewstep.commands.evaluate import publish
from fewstep.commands.options import Demo
from fewstep.commands.runs import check_target, train_recipe
from fewstep.commands.teach import JOBS as TEACH
from fewstep.data.settings import DataSettings
from fewstep.embedded.sources import open_images
from fewstep.errors import Interrupted
from fewstep.evaluation.extractors import CLASSIFIER_STEPS, open_classifier
from fewstep.evaluation.judge import MAX_REAL, Judge, Means, classifier_path, make_judge
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.pretrained import open_model
from fewstep.models.sampler import (
    Sampler,
    default_sampler,
    generate,
    generate_batches,
    images_per_second,
    parse_sampler,
)
from fewstep.recipes.loading import load_recipe, recipe_names
from fewstep.recipes.schema import AnyRecipe, TeachRecipe
from fewstep.runtime.checkpoint import METRICS
from fewstep.runtime.tracking import Report, read_metrics
from fewstep.runtime.workers import NUM_PROCESSES, Task, TaskRunner, task_runner
from fewstep.stopping import advising

CHUNK = 640  # images per task of the evaluation
Recipes = dict[str, AnyRecipe]
Source = tuple[str, Sampler]
"""What the images of one row of the table are drawn from: the name of a recipe, and how."""


class Job(NamedTuple):
    """What a demo does: a teacher, its students, how the teacher is sampled, and what is judged with."""

    title: str
    teacher: str
    students: list[list[str]]  # those that are trained at the same time, and then those that start from them
    samplers: list[str]
    source: str
    num_samples: int
    speed_batch: int  # images per batch where speed is measured
    autoencoder: str | None = None  # of text-to-image: trained first, with the latents that all others train on
    num_latents: int = 20_000  # pictures


DIGITS, SHAPES = (Job(**each) for each in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")))
LATENTS, PAIRS = "shapes-latents", "digits-pairs"


def demo(order: Demo) -> None:
    """Runs the recipes of a job and the evaluation into a folder; with `resume` it goes on from where it stopped."""
    job, out = SHAPES if order.text else DIGITS, order.out or Path("runs/demo-text" if order.text else "runs/demo")
    recipes = demo_recipes(job, out, order.set_)
    for name, recipe in recipes.items():
        check_target(out / name, recipe, order.resume)
    out.mkdir(parents=True, exist_ok=True)
    with advising("continue with --resume"), task_runner() as run:
        teaching = [training(out, job.teacher, recipes, threads=NUM_PROCESSES)]
        if job.autoencoder:
            run([training(out, job.autoencoder, recipes, threads=NUM_PROCESSES)])
            run([Task("encode pictures", job.num_latents, _encode, (job, out))])
        else:
            teaching.insert(0, Task("classifier", CLASSIFIER_STEPS, _classify, (recipes[job.teacher], out)))
        run(teaching)
        torch.set_num_threads(1)
        num = order.num_samples or job.num_samples
        judge = make_judge(DataSettings(source=job.source), open_model(out / job.teacher), Means(), out, num, MAX_REAL)
        images = train_students(run, job, out, recipes, judge.prompts, num)
    judge_job(job, out, judge, images)


def train_students(
    run: TaskRunner, job: Job, out: Path, recipes: Recipes, prompts: Sequence[str], num: int
) -> dict[Source, Tensor]:
    """Trains the students of a job and draws `num` images of every row of its table, the teacher's meanwhile."""
    ranges = [range(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK)]
    sources = [(job.teacher, parse_sampler(text)) for text in job.samplers]

    def drawing(sources: Sequence[Source]) -> list[Task]:
        given = [(out / name, sampler, part, prompts) for name, sampler in sources for part in ranges]
        return [Task("draw images", len(each[2]), _generate, each) for each in given]

    first, *later = [[training(out, name, recipes) for name in group] for group in job.students]
    drawn = run([*first, *drawing(sources)])[len(first) :]
    for group in later:
        run([task._replace(threads=NUM_PROCESSES // len(group)) for task in group])
    students = [(name, default_sampler(open_model(out / name))) for group in job.students for name in group]
    drawn += run(drawing(students))
    parts = [torch.cat(drawn[start : start + len(ranges)]) for start in range(0, len(drawn), len(ranges))]
    return dict(zip([*sources, *students], parts, strict=True))


def demo_recipes(job: Job, out: Path, overrides: Sequence[str]) -> Recipes:
    """The recipes of a demo, with the same overrides, but some for one alone; they build on each other.

    `model.` is the teacher's; `init_from` is the first student's, which may name one more recipe, and `regression.`
    that one's.
    """
    student = job.students[0][0]
    start = load_recipe(student, [each for each in overrides if each.startswith("init_from")]).init_from
    start = start if start in recipe_names() and start not in chain(*job.students) else None
    latents, teacher = out / LATENTS if job.autoencoder else job.source, f"teacher={out / job.teacher}"
    built_on = {
        "teach": [f"data.source={job.source}"],
        "teach-autoencoder": [f"data.source={job.source}"],
        "teach-text": [f"data.source={latents}", f"model.autoencoder={out / str(job.autoencoder)}"],
        "distill": [f"data.source={latents}", teacher],
        "regress": [f"data.source={latents}", teacher, f"regression.pairs={out / PAIRS}"],
    }
    alone = {"model.": job.teacher, "init_from": student, "regression.": start}
    recipes: Recipes = {}
    for name in filter(None, (job.autoencoder, job.teacher, start, *chain(*job.students))):
        fitting = [
            each for each in overrides if all(name == of or not each.startswith(what) for what, of in alone.items())
        ]
        begun = [f"init_from={out / start}"] if start and name == student else []
        recipes[name] = load_recipe(name, [*fitting, *built_on[load_recipe(name).kind], *begun])
    return recipes


def training(out: Path, name: str, recipes: Recipes, threads: int = 1) -> Task:
    """The task of running one recipe, behind the one that it starts from where nothing else runs that."""
    start = getattr(recipes[name], "init_from", None)
    stages = [(recipes[each], out / each) for each in recipes if each == name or str(out / each) == start]
    return Task(name, sum(recipe.num_steps + _num_pairs(recipe) for recipe, _ in stages), _train, (stages,), threads)


def _num_pairs(recipe: AnyRecipe) -> int:
    """That are drawn first."""
    pairs: Any = getattr(recipe, "regression", None)
    return (pairs.num or 0) if pairs else 0


def judge_job(job: Job, out: Path, judge: Judge, images: dict[Source, Tensor]) -> None:
    """Judges the images of a job, measures speeds on the now quiet machine, and publishes table and page."""
    models = {name: open_model(out / name) for name, _ in images}
    rows = [judge.floor]
    for (name, sampler), fakes in images.items():
        speed = images_per_second(models[name], sampler, job.speed_batch)
        draw = partial(_again, models[name], sampler, fakes)
        rows.append(judge.row(name, sampler, draw, len(fakes), speed))
    curves = {name: read_metrics(out / name / METRICS) for name in models}
    facts = {"data": job.source, "seed": 0, "images of a model": len(next(iter(images.values())))}
    student = job.students[0][0]
    prompt = ["--prompt", judge.prompts[0]] if judge.prompts else []
    then = [join(["sample", str(out / student), *prompt]), join(["export", str(out / student), student])]
    publish(rows, curves, out, job.title, judge, facts, then)


def _train(stages: Sequence[tuple[Any, Path]], report: Report) -> None:
    done = 0
    with redirect_stdout(StringIO()):  # several would tell what they do at once
        for recipe, run in stages:
            if num := _num_pairs(recipe):
                draw_first(recipe, open_model(recipe.teacher), run.parent, _behind(done, report))
                done += num
            train_recipe(TEACH | DISTILL, recipe, run, run.exists(), _or_stop(_behind(done, report)))
            done += recipe.num_steps


def _behind(before: int, report: Report) -> Report:
    """Reports what is done behind other work."""
    return lambda done, metrics: report(before + done, metrics)


def _or_stop(report: Report) -> Report:
    def report_or_stop(done: int, metrics: dict[str, float]) -> None:
        try:
            report(done, metrics)
        except Interrupted:
            signal.raise_signal(signal.SIGINT)  # the loop writes a checkpoint before it stops

    return report_or_stop


def _classify(recipe: TeachRecipe, out: Path, report: Report) -> None:
    images = open_images(recipe.data, recipe.model)
    open_classifier(images, recipe.model, classifier_path(recipe.data, out), report)


def _encode(job: Job, out: Path, report: Report) -> None:
    encode_first(out / str(job.autoencoder), job.source, job.num_latents, out / LATENTS, report)


def _again(model: ImageModel, sampler: Sampler, drawn: Tensor, numbers: range, asked: Asked) -> Iterable[Tensor]:
    """What was drawn before, or now, of further numbers."""
    return [drawn] if numbers == range(len(drawn)) else generate_batches(model, sampler, numbers, asked=asked)


def _generate(run: Path, sampler: Sampler, indices: range, prompts: Sequence[str], report: Report) -> Tensor:
    model = open_model(run)
    return generate(model, sampler, indices, asked=prompts or None, report=lambda done: report(done, {}))
