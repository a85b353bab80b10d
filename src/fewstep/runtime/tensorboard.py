"""A run's numbers and pictures as TensorBoard reads them, if the recipe asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
from PIL.Image import Image

from fewstep.errors import UserError

FOLDER = "tensorboard"  # of a run


def check_tensorboard() -> None:
    """Raises UserError if the package is missing."""
    if find_spec("tensorboard") is None:
        raise UserError("tensorboard: the package is missing; pip install fewstep[tensorboard], or tensorboard=false")


class Board:
    """What a run shows; nothing without a writer."""

    def __init__(self, writer: Any = None):
        self.writer = writer

    def numbers(self, group: str, step: int, values: dict[str, float]) -> None:
        """As GROUP/NAME."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)
            self.writer.flush()  # so that a kill loses nothing

    def picture(self, name: str, step: int, picture: Image) -> None:
        if self.writer:
            self.writer.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")


@contextmanager
def open_board(run: Path, start: int, wanted: bool) -> Iterator[Board]:
    """The board of a run that goes on behind step `start`: what was shown behind it counts no more."""
    if not wanted:
        yield Board()
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / FOLDER), purge_step=start + 1) as writer:
        yield Board(writer)
