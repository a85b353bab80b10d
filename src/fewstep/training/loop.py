"""The only training loop."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from fewstep.errors import Interrupted, UserError
from fewstep.models.image_model import Asked
from fewstep.pictures import grid, num_columns, save_png
from fewstep.runtime import checkpoint
from fewstep.runtime.distributed import any_of, at_step, num_ranks, of_first, rank, told_by_first
from fewstep.runtime.graphs import CUDA, Graphs
from fewstep.runtime.runs import best_steps
from fewstep.runtime.sharding import share_of
from fewstep.runtime.tensorboard import Board, open_board
from fewstep.runtime.tracking import Allowance, Metrics, Report, StepClock, read_metrics, rewind, write_line
from fewstep.runtime.writing import Writer
from fewstep.seeding import generator
from fewstep.stopping import stop_request
from fewstep.training.batches import BatchAt, parts_ahead
from fewstep.training.guard import Guard, check_finite
from fewstep.training.method import Method
from fewstep.training.optimization import Optimizer
from fewstep.training.settings import EvaluationSettings, LoopSettings

Evaluate = Callable[[Method, int], dict[str, float]]
"""Judges the averaged weights of a method: numbers by name, a function of the weights alone; the step is for errors."""


def train(
    method: Method,
    batch_at: BatchAt,
    run: Path,
    settings: LoopSettings,
    report: Report,
    evaluate: Evaluate | None = None,
    asked: Asked = None,
) -> None:
    """Runs `method` from the run's newest checkpoint, or from the start, to `num_steps`.

    `batch_at(step, rows)` gives rows of the batch of a step; `evaluate`, if there is one, judges every
    `evaluation.every` steps, as far as the time allows, and at the end, and every judged step gets a checkpoint.
    `asked` is what grids show. Raises Interrupted, behind a checkpoint, if the user stops it, and UserError if too many
    updates are skipped.
    """
    first, guard, writer = rank() == 0, Guard(settings.max_skipped), Writer(run)
    metrics, judging = Metrics(run / checkpoint.METRICS if first else None), Allowance(settings.evaluation.time_share)
    start, num_steps = _resume(method, metrics, run), settings.num_steps
    shape = (method.num_noises, settings.grid_images, *method.model.shape)
    noise = torch.randn(shape, generator=generator(settings.seed, "grid"))  # the same in every grid: (K, N, C, H, W)
    if any_of(start == num_steps and (run / f"{checkpoint.FROZEN}.damaged").exists()):
        _save(method, metrics, writer, start, settings.evaluation)  # for no later one will have what was set aside
    every, clock = settings.evaluation.every or num_steps, StepClock(method.model.device)
    ahead = parts_ahead(batch_at, settings, start, method.model.device)
    graphs = _graphs(method, settings)
    pages = open_board(run, start, settings.tensorboard and first)
    with stop_request() as stop_requested, ahead as parts, pages as board, writer:
        for done, part in enumerate(clock.each(parts), start + 1):
            at_step(done)
            metrics.add(guard.add(method.step(part, done - 1, run=graphs)))  # stays on the device
            clock.steps += 1
            last = done == num_steps
            due = evaluate is not None and (last or done % every == 0)
            judged = due and bool(any_of(first and (last or _allowed(judging, done))))
            logged = done % settings.log_every == 0 or last
            if logged or judged or done % settings.max_skipped == 0:  # else the host does not wait for the device
                guard.check(done)
            shown = metrics.write(done, method.learning_rates | clock.read()) if logged else {}
            board.numbers("training", done, shown)
            if evaluate is not None and judged:
                with _aside(clock, graphs), judging.spending():
                    scores = of_first(partial(evaluate, method, done), method.sharded)
                    shown = _keep_scores(scores, run, done, board) | shown
            stopped = any_of(stop_requested())  # asked once, so that what is saved and what is told agree
            report(done, shown)
            if done % settings.sample_every == 0 or last:
                with _aside(clock, graphs):
                    pictures = of_first(partial(_draw, method, noise, asked), method.sharded)
                    _keep_pictures(pictures, run, done, board)
            if done % settings.checkpoint_every == 0 or last or stopped or judged:
                guard.check(done)
                with clock.aside():
                    _save(method, metrics, writer, done, settings.evaluation)
            if stopped and not last:
                raise Interrupted(f"stopped at step {done} of {num_steps}; continue with --resume --out {run}", stopped)


def _graphs(method: Method, settings: LoopSettings) -> Graphs | None:
    """What runs the steps on a GPU, unless that is switched off."""
    if settings.speed.graphs == "off":
        return None
    if method.model.device.type != "cuda":
        print("graphs: off, they are for CUDA")
        return None
    if method.sharded:
        print("graphs: off, ranks that gather weights in a step were never recorded")
        return None
    if any(isinstance(each := getattr(method, name), Optimizer) and each.eight_bit for name in method.STATE):
        print("graphs: off, adamw8bit looks at numbers in every update")
        return None
    return Graphs(method.compute, CUDA(method.model.device), method.settle, say=_tell)


def _tell(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr)


def _aside(clock: StepClock, graphs: Graphs | None) -> AbstractContextManager[None]:
    """What is not part of steps, and takes memory of its own."""
    if graphs:
        graphs.make_room()
    return clock.aside()


def _keep_scores(scores: dict[str, float] | None, run: Path, step: int, board: Board) -> dict[str, float]:
    """Writes those of a step, which the first rank has."""
    if scores is None:
        return {}
    # Before the checkpoint: a kill in between makes it judge again, and no step is kept without its scores.
    write_line(run / checkpoint.EVALUATIONS, step, scores)
    board.numbers("evaluation", step, scores)
    return scores


def _allowed(judging: Allowance, step: int) -> bool:
    """Whether an evaluation is within its share of the time; the first that is not is told."""
    if judging.allows():
        return True
    if not judging.refused:
        told = f"step {step}: not judged, for that would take more than evaluation.time_share={judging.share:g} of the"
        print(f"{told} run's time, here and further on; the last step is judged in any case", file=sys.stderr)
    judging.refused += 1
    return False


def _draw(method: Method, noise: Tensor, asked: Asked) -> dict[str, Image]:
    """The pictures of a step, by what they are."""
    pictures = {"samples": sample_grid(method, noise, asked)}
    if panel := method.panel(noise.to(method.model.device), asked):
        pictures["panels"] = panel
    method.model.release()  # autoencoder and text encoders, which only pictures use
    return pictures


def _keep_pictures(pictures: dict[str, Image] | None, run: Path, step: int, board: Board) -> None:
    """Writes those that the first rank has, in a folder of the run by what they are."""
    for folder, picture in (pictures or {}).items():
        (run / folder).mkdir(exist_ok=True)
        save_png(picture, run / folder / f"{checkpoint.step_name(step)}.png")
        board.picture(folder, step, picture)


def _save(method: Method, metrics: Metrics, writer: Writer, step: int, judging: EvaluationSettings) -> None:
    """A checkpoint of finite numbers, of which each rank writes its share while training goes on."""
    state = {"method": method.state_dict(), "metrics": metrics.state_dict()}
    share = share_of(state, rank(), num_ranks())
    check_finite({name: tensor for name, (tensor, _) in share.slices.items()}, list(state["method"]), step)
    best = best_steps(read_metrics(writer.run / checkpoint.EVALUATIONS)) if rank() == 0 else {}
    kept = [at for name, at in best.items() if judging.keeps(name)]  # beside the newest

    def save_model(folder: Path, state: dict[str, Any]) -> None:
        method.save_model(folder, state["method"], writer.run / checkpoint.FROZEN)

    writer.save(step, share, save_model, kept)


def sample_grid(method: Method, noise: Tensor, asked: Asked = None) -> Image:
    """One grid of images from noise (K, N, ...), drawn in small batches."""
    # Noise and condition of an image do not depend on the batch that it is drawn in.
    size = method.model.sampling_batch
    parts = [
        method.sample(part.to(method.model.device), first=index * size, asked=asked).cpu()
        for index, part in enumerate(torch.split(noise, size, dim=1))
    ]
    labels = [method.label(index, asked) for index in range(noise.shape[1])]
    return grid(torch.cat(parts), num_columns(len(labels), len(set(labels))), labels)


def _resume(method: Method, metrics: Metrics, run: Path) -> int:
    """The step to go on from, with the state of that step loaded, of which each rank reads what it trains."""
    name, step = told_by_first(lambda: getattr(checkpoint.newest_whole(run), "name", None)), 0
    if name is not None:
        newest = run / "checkpoints" / name
        state = checkpoint.load_state(newest)
        try:
            method.load_state_dict(state["method"])
            metrics.load_state_dict(state["metrics"], method.model.device)
            step = range(int(name) + 1)[state["step"]]
        except (KeyError, IndexError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            told = "the checkpoint is not of this run; remove it to go on from before it"
            raise UserError(f"{newest}: {told}") from error
    for path in (run / checkpoint.METRICS, run / checkpoint.EVALUATIONS):
        if path.exists() and rank() == 0:
            rewind(path, step)  # lines behind the checkpoint are written anew
    return step
