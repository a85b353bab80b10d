"""`fewstep demo`: the whole job on the embedded digits. Teach, distil to one and to four steps, judge.

Two processes share the work with one thread each; the teacher, while it has no company, takes both threads.
"""

import multiprocessing
import queue
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.commands.distill import distill
from fewstep.commands.evaluate import (
    GRID_IMAGES,
    THROUGHPUT_BATCH,
    classifier_path,
    describe,
    make_judge,
    open_classifier,
    publish,
    real_grid,
)
from fewstep.commands.runs import check_target, open_images, open_pixel_model
from fewstep.commands.teach import teach
from fewstep.errors import Interrupted
from fewstep.evaluation.extractors import CLASSIFIER_STEPS
from fewstep.evaluation.generation import Sampler, default_sampler, generate, images_per_second
from fewstep.evaluation.metrics import Row
from fewstep.evaluation.report import sample_grid
from fewstep.recipes.loading import load_recipe
from fewstep.recipes.schema import DistillRecipe, TeachRecipe
from fewstep.runtime.checkpoint import METRICS
from fewstep.runtime.tracking import Report, first_metric, progress_columns, read_metrics

NUM_PROCESSES = 2
CHUNK = 1250  # images per task of the evaluation
TEACHER_SAMPLERS = (Sampler("heun", 18), *(Sampler("ddim", steps) for steps in (1, 2, 4, 8)))
Recipes = dict[str, TeachRecipe | DistillRecipe]
_messages: Any = None  # in a worker: the queue on which it reports
_stopping: Any = None  # in a worker: the event that tells it to end its task


class Task(NamedTuple):
    """A function of this file that a worker calls with the arguments and a `Report`."""

    title: str
    total: int
    function: Callable[..., Any]
    arguments: tuple
    threads: int = 1


def demo(out: Path, resume: bool, overrides: Sequence[str], num_samples: int) -> None:
    """Runs the three recipes and the evaluation into `out`; with `resume` it goes on from where it was stopped."""
    recipes = demo_recipes(out, overrides)
    for name, recipe in recipes.items():
        check_target(out / name, recipe, resume)
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    messages, stopping = context.Queue(), context.Event()
    with ProcessPoolExecutor(NUM_PROCESSES, context, _start_worker, (messages, stopping)) as pool:
        run = TaskRunner(pool, messages, stopping)
        teacher, *students = recipes
        classifier = Task("classifier", CLASSIFIER_STEPS, _classify, (recipes[teacher], out))
        run([classifier, *_training(out, [teacher], recipes, threads=NUM_PROCESSES)])
        run(_training(out, students, recipes))
        torch.set_num_threads(1)
        rows, grids = judge_rows(run, out, recipes, num_samples)
    curves = {name: read_metrics(out / name / METRICS) for name in recipes}
    publish(rows, grids, curves, out, "fewstep demo: digits, 8×8", "the digits classifier")


def demo_recipes(out: Path, overrides: Sequence[str]) -> Recipes:
    """The recipes of the demo, with the same overrides in each; the students' teacher is the demo's own."""
    recipes: Recipes = {"digits-teacher": load_recipe("digits-teacher", overrides)}
    for name in ("digits-1step", "digits-4step"):
        recipe = load_recipe(name, overrides)
        recipes[name] = recipe.model_copy(update={"teacher": str(out / "digits-teacher")})
    return recipes


def _training(out: Path, names: Sequence[str], recipes: Recipes, threads: int = 1) -> list[Task]:
    return [Task(name, recipes[name].num_steps, _train, (recipes[name], out / name), threads) for name in names]


def judge_rows(run: "TaskRunner", out: Path, recipes: Recipes, num_samples: int) -> tuple[list[Row], dict[str, bytes]]:
    """The rows of the table and the grids of the page; images come from the workers, speeds from this process alone."""
    teacher, *students = recipes
    models = {name: open_pixel_model(out / name) for name in recipes}
    images = open_images(recipes[teacher].data, models[teacher].config)
    path = classifier_path(recipes[teacher].data, out)
    judge = make_judge(images, models[teacher].config, "classifier", path)
    wanted = [(teacher, sampler) for sampler in TEACHER_SAMPLERS]
    wanted += [(name, default_sampler(models[name])) for name in students]
    ranges = [range(start, min(start + CHUNK, num_samples)) for start in range(0, num_samples, CHUNK)]
    drawn = run(
        [
            Task("draw images", len(part), _generate, (out / name, sampler, part))
            for name, sampler in wanted
            for part in ranges
        ]
    )
    speeds = [images_per_second(models[name], sampler, THROUGHPUT_BATCH) for name, sampler in wanted]
    labels = models[teacher].conditioner.labels(num_samples)
    rows, grids = [judge.floor()], {"real": real_grid(images, models[teacher])}
    for index, ((name, sampler), speed) in enumerate(zip(wanted, speeds, strict=True)):
        fakes = torch.cat(drawn[index * len(ranges) : (index + 1) * len(ranges)])
        rows.append(judge.row(name, sampler, fakes, labels, speed))
        grids[f"{name}, {describe(sampler)} (nfe {sampler.nfe})"] = sample_grid(fakes[:GRID_IMAGES])
    return rows, grids


class TaskRunner:
    """Runs tasks in the pool, with one progress line per title; the first error of a task is raised here."""

    def __init__(self, pool: ProcessPoolExecutor, messages: Any, stopping: Any):
        self.pool, self.messages, self.stopping = pool, messages, stopping

    def __call__(self, tasks: Sequence[Task]) -> list[Any]:
        """The results, in the order of the tasks."""
        futures = [self.pool.submit(_run_task, index, task) for index, task in enumerate(tasks)]
        try:
            self._show(tasks, futures)
        except KeyboardInterrupt:
            raise Interrupted("stopped; continue with --resume") from None
        finally:
            if not all(future.done() for future in futures):  # stopped, or one has failed
                self.stopping.set()
                for future in futures:
                    future.cancel()
        return [future.result() for future in futures]

    def _show(self, tasks: Sequence[Task], futures: list[Future]) -> None:
        """Shows what the workers report until every task has ended or one has failed."""
        done = [0] * len(tasks)
        with progress_columns() as progress:
            totals: Counter[str] = Counter()
            for task in tasks:
                totals[task.title] += task.total
            lines = {title: progress.add_task(title, total=total, note="") for title, total in totals.items()}
            while not all(future.done() for future in futures):
                for future in futures:
                    if future.done():
                        future.result()
                with suppress(queue.Empty):
                    index, done[index], note = self.messages.get(timeout=0.2)
                    title = tasks[index].title
                    count = sum(number for number, task in zip(done, tasks, strict=True) if task.title == title)
                    progress.update(lines[title], completed=count, **({"note": note} if note else {}))


def _start_worker(messages: Any, stopping: Any) -> None:
    global _messages, _stopping
    _messages, _stopping = messages, stopping
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one stops the others


def _run_task(index: int, task: Task) -> Any:
    torch.set_num_threads(task.threads)

    def report(done: int, metrics: dict[str, float]) -> None:
        if _stopping.is_set():
            raise Interrupted("stopped")
        _messages.put((index, done, first_metric(metrics)))

    return task.function(*task.arguments, report)


def _train(recipe: TeachRecipe | DistillRecipe, run: Path, report: Report) -> None:
    def report_or_stop(done: int, metrics: dict[str, float]) -> None:
        try:
            report(done, metrics)
        except Interrupted:
            signal.raise_signal(signal.SIGINT)  # the loop writes a checkpoint before it stops

    verb: Any = teach if isinstance(recipe, TeachRecipe) else distill
    verb(recipe, run, resume=run.exists(), report=report_or_stop)


def _classify(recipe: TeachRecipe, out: Path, report: Report) -> None:
    images = open_images(recipe.data, recipe.model)
    open_classifier(images, recipe.model, classifier_path(recipe.data, out), report)


def _generate(run: Path, sampler: Sampler, indices: range, report: Report) -> Tensor:
    return generate(open_pixel_model(run), sampler, indices, report=lambda done: report(done, {}))
