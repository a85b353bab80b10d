"""Checkpoints are written by a thread, from a copy of the state, while training goes on."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fewstep.errors import Interrupted, Lost, UserError, brief
from fewstep.files import size, writing
from fewstep.runtime.checkpoint import checkpoint_folder, checkpoints, make_room, new_checkpoint, step_name
from fewstep.runtime.distributed import (
    any_of,
    lost,
    num_ranks,
    own_store,
    rank,
    ranks_here,
    told_by_first,
)
from fewstep.runtime.ends import giving_up, told_by_another
from fewstep.runtime.manifest import Entry, entry, write_manifest
from fewstep.runtime.shards import STATE, packed, read_state, shard_name, stage, write_index, write_shard

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.runtime.sharding import Share
    from fewstep.runtime.shards import Slice

GROUP = Path("/sys/fs/cgroup")
LOOK = 0.02  # seconds between two looks for what another rank tells
PATIENCE = 10.0  # seconds for that where one may be gone
SaveModel = Callable[[Path, dict[str, Any]], None]
"""Writes a model folder with the weights in a state."""
Shards = list[dict[str, "Slice"]]


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


class Post:
    """What the threads of ranks tell each other, by a connection of their own, which nothing of training waits for."""

    def __init__(self, number: int, num: int, name: str, store: Any = None):
        self.number, self.num, self.name, self.store = number, num, name, store
        self.ending = Event()
        """Set when a rank may be gone: what is not told soon will not be."""

    @classmethod
    def of_ranks(cls) -> Self:
        """Of all that train together, with a name that no other run has had."""
        name = told_by_first(lambda: uuid.uuid4().hex[:8])
        return cls(rank(), num_ranks(), name, own_store() if num_ranks() > 1 else None)

    def tell(self, key: str, content: Any) -> None:
        """Raises Lost if nobody can hear it."""
        if self.num > 1:
            with self._line():
                self.store.set(f"fewstep/{self.name}/{key}", json.dumps(content))

    def hear(self, key: str) -> Any:
        """What another one tells, as soon as it does; raises Lost if it is gone."""
        key, waited = f"fewstep/{self.name}/{key}", 0.0
        with self._line():
            while not self.store.check([key]):  # to wait in the store would be for ever where one is gone
                time.sleep(LOOK)
                waited += LOOK * self.ending.is_set()
                if waited > PATIENCE:
                    raise lost()
            return json.loads(self.store.get(key))

    @contextmanager
    def _line(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of the store, which the first rank has
            raise lost() from error


class Writer:
    """Writes the checkpoints of a run, one at a time; inside its context, at whose end the last one is whole.

    Each rank has one, whose thread writes what is its own of the state; the first one's does the rest when all have
    told what they wrote, and tells how it ended. What keeps a checkpoint from being written is raised in all of them by
    the next `save`, by `wait`, or at the end.
    """

    def __init__(self, run: Path, post: Post | None = None):
        self.run, self.post, self.number = run, post or Post.of_ranks(), 0
        self.buffers: dict[str, Tensor] = {}
        self.thread: Thread | None = None
        self.error: BaseException | None = None
        self.told = False

    def save(self, step: int, share: Share, save_model: SaveModel, best: Collection[int]) -> None:
        """Begins to write a checkpoint, once the one before is there, of which this rank has its share; all call it.

        Only the copy to main memory is waited for. It is one more beside the state itself, and is kept for the next.
        Where a rank has no memory for it, all is waited for. `save_model` gets the state as it lies in the files.
        """
        self.wait()
        told_by_first(partial(make_room, self.run, step, share.num_bytes))
        waits = any_of(self._lacks_memory(share))
        shards = packed(share.slices if waits else stage(share.slices, self.buffers))
        num = any_of(len(shards))  # of every rank, so that each knows the numbers of its own
        shards += [{} for _ in range(num - len(shards))]
        self.number += 1
        hidden = checkpoint_folder(self.run, step).with_name(f".{step_name(step)}.{self.post.name}.tmp")
        job = partial(self._beside, step, hidden, shards)
        if not self.post.number:
            job = partial(self._first, step, hidden, shards, share, save_model, best)
        self.thread = Thread(target=self._run, args=(job,), name=f"checkpoint {step}")
        self.thread.start()
        if waits:
            self.wait()

    def _lacks_memory(self, share: Share) -> bool:
        """For the copies of all ranks of this machine; said once."""
        needed = ranks_here() * (share.own_bytes - sum(buffer.nbytes for buffer in self.buffers.values()))
        lacks = needed > (free := free_memory())
        if lacks and not self.told and not told_by_another("no memory for checkpoints"):
            what = f"a copy of the state takes {size(needed)} of main memory, and {size(free)} are free"
            print(f"fewstep: {what}: training waits for its checkpoints", file=sys.stderr)
        self.told |= lacks
        return lacks

    def _first(
        self, step: int, hidden: Path, shards: Shards, share: Share, save_model: SaveModel, best: Collection[int]
    ) -> None:
        """The first rank's: its own share, and what is made of all of them."""
        try:
            with new_checkpoint(self.run, step, hidden, share.num_bytes, best):
                told = self._of_all(step, hidden, shards)
                write_index(hidden / STATE, step, len(shards) * self.post.num, share.content)
                (hidden / "model").mkdir()
                save_model(hidden / "model", read_state(hidden / STATE))
                write_manifest(hidden, checkpoints(self.run), told)
        except Lost:  # which the others find by themselves
            raise
        except BaseException as error:
            self.post.tell(f"{self.number}/end", _line(error))
            raise
        self.post.tell(f"{self.number}/end", None)

    def _of_all(self, step: int, hidden: Path, shards: Shards) -> dict[str, Entry]:
        """What a manifest tells of every rank's files, once all are written."""
        try:
            told = self._write(step, hidden, shards)
        finally:  # nothing may be removed before all of them have ended
            others = [self.post.hear(f"{self.number}/{number}") for number in range(1, self.post.num)]
        for other in others:
            if "error" in other:
                raise UserError(other["error"])
            told |= other
        return told

    def _beside(self, step: int, hidden: Path, shards: Shards) -> None:
        """Another rank's: its own share. What is left of it the first one removes, or the next that saves."""
        try:
            told: dict[str, Any] = self._write(step, hidden, shards)
        except BaseException as error:
            told = {"error": _line(error)}
        self.post.tell(f"{self.number}/{self.post.number}", told)
        if end := self.post.hear(f"{self.number}/end"):
            raise UserError(end)

    def _write(self, step: int, hidden: Path, shards: Shards) -> dict[str, Entry]:
        """The shards of this rank; what a manifest tells of them."""
        told = {}
        with writing(checkpoint_folder(self.run, step)):
            (hidden / STATE).mkdir(parents=True, exist_ok=True)
            for number, slices in enumerate(shards, self.post.number * len(shards)):
                name = f"{STATE}/{shard_name(number)}"
                write_shard(hidden / name, step, slices)
                told[name] = entry(hidden / name)
        return told

    def _run(self, job: Callable[[], None]) -> None:
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
        gone = raised is not None and not isinstance(raised, UserError)  # another rank, it may be
        if gone:
            self.post.ending.set()
        # A store that is frozen with the first rank answers nobody.
        limit = giving_up(2 * PATIENCE, str(lost()), missed=True) if gone and self.post.number else nullcontext()
        try:
            with limit:
                self.wait()
        except Lost:
            if raised is None:
                raise
        except Exception as error:
            if raised is None or isinstance(raised, Interrupted):  # for there is no checkpoint to go on from
                raise
            print(f"fewstep: {error}", file=sys.stderr)  # and the other one ends the run


def _line(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) or not isinstance(error, Exception) else brief(error)
