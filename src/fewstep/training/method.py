"""What the loop asks of a training algorithm, and what those of a few-step student share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.losses import finite_samples
from fewstep.diffusion.sampling import rollout
from fewstep.errors import UserError
from fewstep.models.image_model import Asked, ImageModel
from fewstep.networks.copies import write_copies
from fewstep.runtime.checkpoint import ema_folder
from fewstep.runtime.distributed import num_ranks, sums
from fewstep.runtime.ema import EMA, load_trainable, trainable_state
from fewstep.runtime.shards import all_rows
from fewstep.runtime.tracking import is_count
from fewstep.seeding import Random
from fewstep.training.optimization import Optimizer
from fewstep.training.settings import StudentSettings

Batch = dict[str, Any]
"""What an image model encodes; under "prompt" what fakes are drawn for, where that is not the real data's condition."""
Part = tuple[range, Batch]
"""Rows of a step's batch, by their numbers, and what lies in them."""
Metrics = dict[str, Tensor]
Compute = Callable[[Sequence[Part], Any, Random], Metrics]
"""From a batch in parts, what the host decides, and random numbers to a step's metrics."""


@dataclass(frozen=True)
class Term:
    """A loss of a step, one number per sample (B,), and its weight in the sum; `counts` are metrics that it has."""

    loss: Tensor
    weight: float
    counts: Metrics = field(default_factory=dict)


def of_parts(found: Sequence[Metrics]) -> Metrics:
    """The metrics of a step out of those of its equal parts on all ranks: means, but sums of what is a count."""
    stacked = {name: torch.stack([metrics[name] for metrics in found]) for name in found[0]}  # (parts,)
    own = {name: values.sum() if is_count(name) else values.mean() for name, values in stacked.items()}
    num = num_ranks()
    return own if num == 1 else {name: x if is_count(name) else x / num for name, x in sums(own).items()}


def share_of(parts: Sequence[Part]) -> float:
    """What each of the parts is of the whole batch, those of other ranks included."""
    return 1 / (len(parts) * num_ranks())


def can_learn(metrics: Metrics, parts: Sequence[Part], **num: int) -> Tensor:
    """Whether the losses are finite, and no source of samples is broken in all of them; () bool, on the device.

    `num` says of how many samples a count is where it is not of all.
    """
    finite = torch.stack([value for name, value in metrics.items() if not is_count(name)]).isfinite()
    # A source that is broken throughout leaves losses of zero, and nothing to learn from.
    every = sum(len(rows) for rows, _ in parts) * num_ranks()
    usable = [metrics[name] < num.get(name, every) for name in metrics if is_count(name)]
    return torch.stack([finite.all(), *usable]).all()


def count_broken(**samples: Tensor) -> Metrics:
    """How many of the samples (B, ...) of each source are not finite, for a `Guard`."""
    return {f"not_finite_{source}": (~finite_samples(x)).sum() for source, x in samples.items()}


class Method(ABC):
    """A training algorithm: one `step` per batch; everything random in it is a function of (seed, step).

    A step is a function of weights, batch and random numbers, `compute`, between what the host decides before it,
    `turn`, and what it counts behind it, `advance`: so a recording of `compute` can stand for it.
    """

    STATE: tuple[str, ...]
    """The attributes that a checkpoint holds; in front the module that is averaged."""
    model: Any
    """What the loop draws noise for: an `ImageModel`, or an autoencoder by itself."""
    ema: EMA
    seed: int = 0
    sharded = False
    """Whether ranks share its weights, so that all of them take part in what is drawn and judged, too."""
    num_noises: int = 1
    """How many noises per image `sample` wants: K for a student."""

    def step(self, parts: Sequence[Part], step: int, turn: Any = None, run: Compute | None = None) -> Metrics:
        """One step, at its own turn or the one that is given, by `compute` or by what runs it in another way."""
        turn = self.turn(step) if turn is None else turn
        metrics = (run or self.compute)(parts, turn, Random(self.seed, step, self.model.device))
        self.advance(turn)
        return metrics

    def turn(self, step: int) -> Hashable:
        """All that the host decides of a step beforehand; steps of one turn run the same operations."""
        return None

    @abstractmethod
    def compute(self, parts: Sequence[Part], turn: Any, random: Random) -> Metrics:
        """One update on a batch in equal parts, whose numbers do not depend on how many they are.

        Nothing that the host does here may matter to a later step. Gives 0-d tensors, which only the loop turns into
        numbers, and only when it logs: losses and norms, and counts (`is_count`): `skipped_NAME` of an update,
        `not_finite_SOURCE` of samples.
        """

    @abstractmethod
    def advance(self, turn: Any) -> None:
        """What the host counts of a step of that turn: rates, and averages, whose decays are functions of a count."""

    def settle(self, failed: bool) -> None:
        """Writes what follows from weights, where those have changed; puts away what a recording left that `failed`."""
        for name in self.STATE:
            part = getattr(self, name)
            if isinstance(part, nn.Module):
                write_copies(part, anew=failed)
            elif isinstance(part, Optimizer) and failed:
                part.clear()

    @abstractmethod
    def sample(self, noise: Tensor, first: int = 0, asked: Asked = None) -> Tensor:
        """uint8 images (B, C, H, W) number `first` and on from noise (K, B, ...), with the averaged weights.

        `asked` are their prompts or classes, in turn.
        """

    def panel(self, noise: Tensor, asked: Asked = None) -> Image | None:
        """A picture of the first of what `sample` draws beside what others make of it; None where there are none."""
        return None

    def label(self, index: int, asked: Asked = None) -> str:
        """What image `index` of `sample` is of."""
        label: str = self.model.label(index, asked)
        return label

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of the last updates: `learning_rate`, and `critic_learning_rate` where there is a critic."""
        names = [name for name in self.STATE if name.endswith("optimizer")]
        prefixes = [name.removesuffix("optimizer").removeprefix("student_") for name in names]
        rates = [getattr(self, name).learning_rate for name in names]
        return {f"{prefix}learning_rate": rate for prefix, rate in zip(prefixes, rates, strict=True)}

    @contextmanager
    def averaged_model(self, ema: str | None = None) -> Iterator[Any]:
        """The model with its first averages, or those of `ema`, inside the context alone: what is saved and judged."""
        with self.ema.applied(ema):
            yield self.model

    def saved_model(self) -> Any:
        """What is written, whichever weights it is given."""
        return self.model

    def save_model(self, folder: Path, state: dict[str, Any], frozen: Path | None = None) -> None:
        """Writes the model with the first averages in a `state`, and the others in folders beside it (`ema_folder`).

        In `frozen` lies, from the first time on, what all of them have in common. It reads no weights but those of the
        state, which are read from its files, one average at a time.
        """
        weights = state[self.STATE[0]]  # of the module that is averaged
        for ema in (None, *self.ema.others):
            averages = {name: all_rows(x) for name, x in self.ema.averages_in(state["ema"], weights, ema).items()}
            self.saved_model().save(ema_folder(folder, ema) if ema else folder, frozen, averages)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: of modules what is trained in them, so that a frozen base is not written again."""
        parts = [(name, getattr(self, name)) for name in self.STATE]
        return {n: trainable_state(part) if isinstance(part, nn.Module) else part.state_dict() for n, part in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            part = getattr(self, name)
            if isinstance(part, nn.Module):
                load_trainable(part, state[name])
            else:
                part.load_state_dict(state[name])


class StudentMethod(Method):
    """A student in training: how it is updated, sampled and judged."""

    model: ImageModel

    def __init__(self, settings: StudentSettings, model: ImageModel, student: Denoiser, num_updates: int):
        self.model, self.student = model, student
        timesteps = student_timesteps(settings, student)
        self.timesteps = timesteps.to(model.device)  # (K,) native times, decreasing
        self.times: list[float] = timesteps.tolist()  # for the host
        self.num_noises = len(self.timesteps)
        self.student_optimizer = Optimizer(student.parameters(), settings.optimizer, num_updates)
        self.ema = EMA(student, settings.ema_decay)

    def update_student(self, finite: Tensor) -> Metrics:
        """One update along the gradients that the parts have added."""
        norm, skipped = self.student_optimizer.step(finite)
        return {"student_grad_norm": norm, "skipped_student": skipped}

    def advance(self, turn: Any) -> None:
        self.student_optimizer.advance()
        # Also behind a skipped update, in which the weights stayed: an average is one over turns.
        self.ema.update()

    def sample(self, noise: Tensor, first: int = 0, asked: Asked = None) -> Tensor:
        """uint8 images number `first` and on from noise (K, B, ...) with the averaged weights."""
        condition = self.model.conditions(range(first, first + noise.shape[1]), asked)
        with self.ema.applied():
            # what training calls, too
            x0 = rollout(self.student, noise, self.timesteps, condition, stop=len(self.timesteps) - 1)
        self.model.release()  # text encoders: a small card has no room for them and for what decoding takes
        return self.model.decode(x0)

    @contextmanager
    def averaged_model(self, ema: str | None = None) -> Iterator[ImageModel]:
        """The student with its timesteps and its averaged weights, inside the context alone."""
        with self.ema.applied(ema):
            yield self.saved_model()

    def saved_model(self) -> ImageModel:
        """The student with its timesteps."""
        return self.model.student(self.student, self.times)


def student_timesteps(settings: StudentSettings, student: Denoiser) -> Tensor:
    """The K native times of the recipe, or evenly spaced ones; raises UserError if the student can't step there."""
    timesteps = student.schedule.grid(settings.num_timesteps)
    if isinstance(settings.timesteps, list):
        timesteps = torch.tensor(settings.timesteps, dtype=torch.float64)  # EDM's are noise levels, not integers
        try:
            student.schedule.check_timesteps(timesteps)
        except ValueError as error:
            raise UserError(f"student.timesteps: {error}") from error
    for t, c_out in zip(timesteps.tolist(), student.coefficients(timesteps)[1].tolist(), strict=True):
        if not math.isfinite(c_out):  # x0 = (x - sigma F) / 0
            told = "is pure noise (zero terminal SNR), from which no predicted noise gives a picture"
            raise UserError(
                f"student.timesteps: {t:g} {told}; say teacher_prediction_type=v_prediction if it predicts v"
            )
    return timesteps
