"""The only training loop."""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field

from fewstep.data.pictures import grid, save_png
from fewstep.errors import Interrupted, UserError
from fewstep.runtime.checkpoint import METRICS, checkpoints, load_state, save_checkpoint, step_name
from fewstep.runtime.tracking import Metrics, Report, stop_request
from fewstep.seeding import generator
from fewstep.settings import Settings
from fewstep.training.method import Batch, Method

GRID_ROWS, GRID_COLUMNS = 4, 10


class LoopSettings(Settings):
    """How long a run is and what it writes on the way."""

    num_steps: int = Field(1000, ge=1)
    """Steps; for distillation these are critic updates, as in the paper's counts."""
    batch_size: int = Field(64, ge=1)
    """Samples per step."""
    log_every: int = Field(50, ge=1)
    """Steps per line of metrics.jsonl."""
    sample_every: int = Field(1000, ge=1)
    """Steps per sample grid."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps per checkpoint; the newest two are kept."""


def train(
    method: Method, batch_at: Callable[[int], Batch], run: Path, settings: LoopSettings, seed: int, report: Report
) -> None:
    """Runs `method` from the run's newest checkpoint, or from the start, to `num_steps`.

    `batch_at(step)` gives the batch of a step. Raises Interrupted, behind a checkpoint, if the user stops it.
    """
    metrics = Metrics(run / METRICS)
    start = _resume(method, metrics, run)
    noise = torch.randn(
        (method.num_noises, GRID_ROWS * GRID_COLUMNS, *method.model.shape), generator=generator(seed, "grid")
    ).to(method.model.device)
    (run / "samples").mkdir(exist_ok=True)
    with stop_request() as stop_requested:
        for step in range(start, settings.num_steps):
            metrics.add(method.step(batch_at(step), step))
            done = step + 1
            last, stopped = done == settings.num_steps, stop_requested()
            report(done, metrics.write(done) if done % settings.log_every == 0 or last else {})
            if done % settings.sample_every == 0 or last:
                save_png(grid(method.sample(noise), GRID_COLUMNS), run / "samples" / f"{step_name(done)}.png")
                method.model.release()
            if done % settings.checkpoint_every == 0 or last or stopped:
                state = {"method": method.state_dict(), "metrics": metrics.state_dict()}
                save_checkpoint(run, done, state, method.save_model)
            if stopped and not last:
                raise Interrupted(f"stopped at step {done} of {settings.num_steps}; continue with --resume --out {run}")


def _resume(method: Method, metrics: Metrics, run: Path) -> int:
    """The step to go on from, with the state of that step loaded."""
    found = checkpoints(run)
    if not found:
        metrics.rewind(0)
        return 0
    state = load_state(found[-1])
    try:
        method.load_state_dict(state["method"])
        metrics.load_state_dict(state["metrics"], method.model.device)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{found[-1]}: the checkpoint is not of this run; remove it to go on from before it") from error
    metrics.rewind(state["step"])
    return state["step"]
