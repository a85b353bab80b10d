"""Checkpoints are written by a thread, from a copy of the state, while training goes on."""

from __future__ import annotations  # torch is imported only where a state is copied

import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fewstep.errors import Interrupted
from fewstep.files import size
from fewstep.runtime.checkpoint import make_room, save_checkpoint, state_bytes
from fewstep.runtime.shards import stage

if TYPE_CHECKING:
    from torch import Tensor


GROUP = Path("/sys/fs/cgroup")
SaveModel = Callable[[Path, dict[str, Any]], None]
"""Writes a model folder with the weights in a state."""


def free_memory() -> int:
    """Bytes of main memory that can be had, of the machine and of the group of processes that this one is in."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
        with suppress(OSError, ValueError):  # no limit is the word "max"
            limit, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
            statistics = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(statistics["inactive_file"]))  # which gives way
        return free
    return sys.maxsize  # of a system that tells nothing


class Writer:
    """Writes the checkpoints of a run, one at a time; inside its context, at whose end the last one is whole.

    What keeps one from being written is raised by the next `save`, by `wait`, or at the end.
    """

    def __init__(self, run: Path):
        self.run = run
        self.buffers: dict[str, Tensor] = {}
        self.thread: Thread | None = None
        self.error: BaseException | None = None
        self.told = False

    def save(
        self,
        step: int,
        state: dict[str, Any],
        save_model: SaveModel,
        best: Collection[int],
    ) -> None:
        """Begins to write what `save_checkpoint` writes, once the one before is there; `save_model` gets the copy, too.

        Only the copy to main memory is waited for. It is one more beside the state itself, and is kept for the next.
        Where there is no memory for it, all is waited for.
        """
        self.wait()
        make_room(self.run, step, state)
        taken = sum(buffer.nbytes for buffer in self.buffers.values())
        if (needed := state_bytes(state) - taken) > (free := free_memory()):
            if not self.told:
                what = f"a copy of the state takes {size(needed)} of main memory, and {size(free)} are free"
                print(f"fewstep: {what}: training waits for its checkpoints", file=sys.stderr)
            self.told = True
            save_checkpoint(self.run, step, state, lambda folder: save_model(folder, state), best)
            return
        copy = stage(state, self.buffers)
        job = partial(save_checkpoint, self.run, step, copy, lambda folder: save_model(folder, copy), best)
        self.thread = Thread(target=self._write, args=(job,), name=f"checkpoint {step}")
        self.thread.start()

    def _write(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Until all is written; raises what it was that can't be."""
        if self.thread is not None:
            self.thread.join()
        self.thread, error, self.error = None, self.error, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as error:
            if raised is None or isinstance(raised, Interrupted):  # for there is no checkpoint to go on from
                raise
            print(f"fewstep: {error}", file=sys.stderr)  # and the other one ends the run
