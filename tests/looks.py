"""Catches what would make the host wait for a device: looks at a tensor's values, and shapes that depend on them."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
COPIES = ("tensor", "as_tensor", "from_numpy")  # of numbers of the host: a copy to a device that it waits for
MADE = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "zeros")  # on some device
OF_THE_HOST = ("fakes.py", ("draw_stop", "num_timesteps"))  # drawn on the CPU, for they decide what is run


class Mode(TorchDispatchMode):
    """Notes operations whose result the host needs to know."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func._overloadpacket is torch.ops.aten.index and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if by_mask or any(name in str(func) for name in OPERATIONS):
            note(self.found, str(func))
        return func(*args, **(kwargs or {}))


def note(found: list[str], what: str) -> None:
    """With the line of fewstep that did it, unless it is the host's own draw."""
    lines = [frame for frame in traceback.extract_stack() if "/fewstep/" in frame.filename.replace("\\", "/")]
    file, functions = OF_THE_HOST
    if lines and not (lines[-1].filename.endswith(file) and lines[-1].name in functions):
        found.append(f"{what} at {lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}")


@contextmanager
def looks() -> Iterator[list[str]]:
    """What was looked at inside, backward passes and optimizers included."""
    found: list[str] = []
    of_tensors, of_torch = _noting(Tensor, METHODS, found), _noting(torch, COPIES, found)
    of_torch |= _noting(torch, MADE, found, unless="device")  # else on the CPU, from where it goes to a GPU
    with Mode(found), mock.patch.multiple(Tensor, **of_tensors), mock.patch.multiple(torch, **of_torch):
        yield found


def _noting(owner: Any, names: tuple[str, ...], found: list[str], unless: str = "") -> dict[str, Any]:
    def noting(name: str) -> Any:
        original = getattr(owner, name)
        return lambda *given, **named: (unless in named or note(found, name), original(*given, **named))[1]

    return {name: noting(name) for name in names}
