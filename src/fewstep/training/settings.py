"""Settings that teacher training and distillation share."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from fewstep.diffusion import timesteps
from fewstep.diffusion.schedules import EDM, Flow, NoiseSchedule
from fewstep.errors import UserError
from fewstep.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]
NoiseLevelSampler = Callable[[int, Generator], Tensor]


class NoiseLevels(Settings):
    """The distribution of native times that a loss is trained on."""

    distribution: Literal["index", "lognormal", "logit_normal", "shifted"] = "index"
    """`index`: uniform over the schedule's levels (1,000 Karras levels for EDM); `lognormal`: EDM's training
    distribution; `logit_normal`, `shifted`: flow models."""
    min_index: int = Field(0, ge=0, le=999)
    """Lowest level for `index`; 0 is the least noise. DMD2 trains the student from 20 on."""
    max_index: int = Field(999, ge=0, le=999)
    """Highest level for `index`, included. DMD2 trains the student up to 980."""
    mean: float = -1.2
    """Of ln(sigma) for `lognormal`, of logit(t) for `logit_normal` (EDM, table 1)."""
    std: float = Field(1.2, gt=0)
    """Of ln(sigma) for `lognormal`, of logit(t) for `logit_normal` (EDM, table 1)."""
    shift: float = Field(1.0, gt=0)
    """Resolution shift for `shifted` (SD3, equation 23)."""

    @model_validator(mode="after")
    def _indices_fit(self) -> Self:
        if self.min_index > self.max_index:
            raise ValueError(f"min_index {self.min_index} is above max_index {self.max_index}")
        return self

    def sampler(self, schedule: NoiseSchedule, device: torch.device) -> NoiseLevelSampler:
        """A function (num, generator) -> native times (num,), for generators on `device`.

        Raises UserError if the schedule has no such times.
        """
        native = {"lognormal": EDM, "logit_normal": Flow, "shifted": Flow}.get(self.distribution, NoiseSchedule)
        if not isinstance(schedule, native):
            raise UserError(f"noise.distribution: {self.distribution} is not for the teacher's schedule; take index")
        if self.distribution == "lognormal":
            return partial(timesteps.lognormal_sigma, mean=self.mean, std=self.std)
        if self.distribution == "logit_normal":
            return partial(timesteps.logit_normal, mean=self.mean, std=self.std)
        if self.distribution == "shifted":
            return partial(timesteps.shifted_uniform, shift=self.shift)
        levels = schedule.levels.to(device)
        return partial(timesteps.uniform_level, levels=levels, min_index=self.min_index, max_index=self.max_index)


class OptimizerSettings(Settings):
    """AdamW; the defaults are DMD2's (spec, 1.6)."""

    lr: float = Field(2e-6, gt=0)
    """Peak learning rate. ImageNet-64: 2e-6, SD 1.5 stage 1: 1e-5, SDXL: 5e-7."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running means."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the rate rises linearly; the official 500 amounts to about 2 student updates on 64 GPUs."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from its peak to zero; the paper keeps it constant."""
    decay_start: float = Field(0.0, ge=0, lt=1)
    """Share of the run behind which the rate begins to fall."""
    clip_norm: float = Field(10.0, gt=0)
    """Largest global gradient norm."""
