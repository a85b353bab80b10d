"""The few-step student: its settings, and what its training methods share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.sampling import rollout
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.errors import UserError
from fewstep.networks.image_model import ImageModel
from fewstep.runtime.checkpoint import ema_folder
from fewstep.runtime.ema import EMA
from fewstep.settings import Settings
from fewstep.training.settings import OptimizerSettings


class StudentSettings(Settings):
    """The few-step denoiser that is being made."""

    num_timesteps: int = Field(1, ge=1, le=1000)
    """K, the number of calls that make an image."""
    timesteps: list[float] | None = None
    """The K native times, decreasing; by default evenly spaced levels of the schedule (999, 749, 499, 249 for SDXL)."""
    backward_simulation: bool = True
    """Train on its own samples, as at inference. false is the paper's ablation "w/o backward simulation": its input is
    noised real images, each at a random one of the K times (pure noise at the first), with the real condition."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Of the student; its updates are every `student_every`-th step."""
    ema_decay: float | list[float] = 0.999
    """Of the weights that are saved and sampled, per student update; the official system has none (0). A list keeps
    several averages at once, [0.9999, 0.99995]: the first is meant where none is named; the others are saved as
    `model-ema0.99995` beside `model`, and judged as `ema0.99995_fid`. Each takes 4 bytes per weight on the device."""

    @field_validator("ema_decay", mode="before")
    @classmethod
    def _decays_fit(cls, given: Any) -> Any:
        decays = given if isinstance(given, list) else [given]
        with suppress(TypeError, ValueError):
            if decays and len({float(each) for each in decays if 0 <= float(each) < 1}) == len(decays):
                return given
        raise ValueError(f"takes a number from 0 to below 1, or a list of different ones, not {given!r}")

    @model_validator(mode="after")
    def _timesteps_fit(self) -> Self:
        times = self.timesteps
        if times is not None and len(times) != self.num_timesteps:
            raise ValueError(f"timesteps has {len(times)} entries, but num_timesteps is {self.num_timesteps}")
        if times is not None and sorted(set(times), reverse=True) != times:
            raise ValueError(f"timesteps must decrease, which {times} does not")
        return self


class StudentMethod:
    """A student in training: how it is sampled, judged, saved and resumed."""

    STATE: tuple[str, ...]
    """The attributes that a checkpoint holds."""
    model: ImageModel
    student: Denoiser
    timesteps: Tensor
    """(K,) native times, decreasing."""
    ema: EMA

    @property
    def num_noises(self) -> int:
        return len(self.timesteps)

    def sample(self, noise: Tensor, first: int = 0) -> Tensor:
        """uint8 images number `first` and on from noise (K, B, ...) with the averaged weights, classes in turn."""
        condition = self.model.numbered_condition(first, first + noise.shape[1])
        with self.ema.applied():
            x0 = rollout(self.student, noise, self.timesteps, condition, stop=len(self.timesteps) - 1)
        return self.model.decode(x0)

    @property
    def other_emas(self) -> Sequence[str]:
        return list(self.ema.others)

    @contextmanager
    def averaged_model(self, ema: str | None = None) -> Iterator[ImageModel]:
        """The student with its timesteps and its averaged weights, inside the context alone."""
        with self.ema.applied(ema):
            yield self.model.student(self.student, self.timesteps)

    def save_model(self, folder: Path) -> None:
        """Writes the student with its averaged weights and its timesteps; those of other averages beside it."""
        for ema in (None, *self.other_emas):
            with self.averaged_model(ema) as model:
                model.save(ema_folder(folder, ema) if ema else folder)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            getattr(self, name).load_state_dict(state[name])


def student_timesteps(settings: StudentSettings, schedule: NoiseSchedule) -> Tensor:
    """The K native times of the recipe, or evenly spaced ones; raises UserError if the schedule has no such times."""
    if settings.timesteps is None:
        return schedule.grid(settings.num_timesteps)
    timesteps = torch.tensor(settings.timesteps, dtype=torch.float64)
    try:
        schedule.check_timesteps(timesteps)
    except ValueError as error:
        raise UserError(f"student.timesteps: {error}") from error
    return timesteps
