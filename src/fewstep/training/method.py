"""What the loop asks of a training algorithm."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.models.image_model import Asked

Batch = dict[str, Any]
"""What an image model encodes; under "prompt" what fakes are drawn for, where that is not the real data's condition."""
Metrics = dict[str, Tensor]


class TrainedModel(Protocol):
    """An `ImageModel`, or an autoencoder by itself."""

    shape: tuple[int, ...]

    @property
    def sampling_batch(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def release(self) -> None: ...


class Method(Protocol):
    """A training algorithm: one `step` per batch; everything random in it is a function of (seed, step, rank)."""

    @property
    def model(self) -> TrainedModel:
        """What the loop draws noise for."""

    @property
    def num_noises(self) -> int:
        """How many noises per image `sample` wants: K for a student, 1 for a teacher."""

    def step(self, batch: Batch, step: int) -> Metrics:
        """One update; returns 0-d tensors, which only the loop turns into numbers, and only when it logs."""

    def sample(self, noise: Tensor, first: int = 0, asked: Asked = None) -> Tensor:
        """uint8 images (B, C, H, W) number `first` and on from noise (K, B, ...), with the averaged weights.

        `asked` are their prompts or classes, in turn.
        """

    @property
    def other_emas(self) -> Sequence[str]:
        """The averages that are kept beside the first, by name; most methods have none."""

    def averaged_model(self, ema: str | None = None) -> AbstractContextManager[Any]:
        """The image model with the averaged weights, inside the context alone: what is saved and judged.

        They are the first, or those of one of `other_emas`.
        """

    def save_model(self, folder: Path, frozen: Path | None = None) -> None:
        """Writes the averaged weights as a model folder, and `other_emas` in folders beside it (`ema_folder`).

        In `frozen` lies, from the first time on, what all of them have in common.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
