"""What is done in the middle of a step and is in no recording of it, as what ranks tell each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

Work = Callable[[Sequence[Tensor]], object]
"""Reads and writes the tensors that it is given, and nothing else that a step makes."""
Cut = Callable[[Work, Sequence[Tensor]], None]
_cuts: list[Cut] = []


def between(work: Work, tensors: Sequence[Tensor]) -> None:
    """`work(tensors)`: a recording that is going on ends before it, and another goes on behind it."""
    if _cuts:
        _cuts[-1](work, tensors)
    else:
        work(tensors)


@contextmanager
def cut_by(cut: Cut) -> Iterator[None]:
    """Inside, `between` calls that, which may keep the work for later."""
    _cuts.append(cut)
    try:
        yield
    finally:
        _cuts.pop()
