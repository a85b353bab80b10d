"""Several processes, ranks, that train one model: who they are, and the few things that they tell each other.

Each computes some rows of every batch. Sums over all of them are in all of them the same, bit for bit, so that every
rank takes the same step; what is written, the first rank writes. A process by itself is the first of one, and none of
this does anything in it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import Lost, UserError, brief
from fewstep.runtime.between import between

Result = TypeVar("Result")
BUCKET = 2**26  # numbers that travel at once
PATIENCE = timedelta(days=7)  # with what the first rank does alone, as a teacher's training
_apart: list[bool] = []
_step = [0]
_store: Any = None  # of this process, once it has joined


def num_ranks() -> int:
    """How many processes take the steps of this run."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this one; the first is 0."""
    return dist.get_rank() if _together() else 0


def ranks_here() -> int:
    """How many are on this machine, as torchrun tells it; all of them without it."""
    return min(num_ranks(), environment("LOCAL_WORLD_SIZE", num_ranks()))


def _together() -> bool:
    return not _apart and dist.is_available() and dist.is_initialized()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process works as if it were alone."""
    _apart.append(True)
    try:
        yield
    finally:
        _apart.pop()


def environment(name: str, default: int) -> int:
    """A number that torchrun sets; raises UserError for what is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a number, as torchrun sets it")
    return int(text)


def place() -> tuple[int, int]:
    """The number of this process and how many there are, as torchrun sets them."""
    number, num = environment("RANK", 0), environment("WORLD_SIZE", 1)
    if number >= num:
        raise UserError(f"RANK={number}: must be below WORLD_SIZE={num}, as torchrun sets them")
    return number, num


@contextmanager
def joined(device: torch.device, stall_minutes: float) -> Iterator[None]:
    """Inside, this process is one of those that torchrun, or `--ranks`, has started; raises UserError if they lack."""
    number, num = place()
    if num == 1 or dist.is_initialized():
        yield
        return
    if number:  # the first one tells
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        wait = timedelta(minutes=stall_minutes)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=wait)
    except (ValueError, dist.DistError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        told = f"rank {number} of {num} did not find the others at {where} ({brief(error)})"
        raise UserError(f"{told}; start all of them, with a port that is free") from error
    global _store
    _store = dist.distributed_c10d._get_default_store()
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if not _of_another(error):
            raise
        raise lost() from error
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def lost() -> Lost:
    """What is told where another rank is gone."""
    return Lost(f"another rank ended, or was silent, behind step {_step[0]}; --resume goes on")


def _of_another(error: BaseException) -> bool:
    """Whether it says that a peer is gone: by its class, or by what gloo and NCCL write."""
    words = ("gloo", "NCCL", "Connection", "Socket", "Timed out", "timeout", "peer", "store")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def told_by_another(line: str) -> bool:
    """Whether another rank has told this line before, as of a mistake that all of them meet."""
    if _store is None:
        return False
    try:
        return bool(_store.add(f"fewstep/told/{line}", 1) > 1)
    except RuntimeError:  # of the first rank, which has told its own end
        return True


def at_step(step: int) -> None:
    """The step that is told if the others end."""
    _step[0] = step


# --- sums ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Puts into each of the tensors, of one dtype and device, the sum over ranks; all have the same shapes there."""
    if num_ranks() > 1 and tensors:
        between(_add_up, [each.detach() for each in tensors])


def _add_up(tensors: Sequence[Tensor]) -> None:
    for bucket in _buckets(tensors):
        flat = torch.cat([each.flatten() for each in bucket])
        dist.all_reduce(flat)
        torch._foreach_copy_(bucket, _parts(flat, bucket))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = list[Tensor](), 0
    for each in tensors:
        if bucket and size + each.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(each)
        size += each.numel()
    yield bucket


def sums(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over ranks of small tensors, by name, in their own dtypes: one message in float64 for all of them."""
    if num_ranks() == 1 or not values:
        return values
    flat = torch.cat([each.detach().double().flatten() for each in values.values()])
    between(lambda tensors: dist.all_reduce(tensors[0]), [flat])
    parts = _parts(flat, [*values.values()])
    return {name: total.to(each.dtype) for (name, each), total in zip(values.items(), parts, strict=True)}


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([each.numel() for each in like])
    return [part.view_as(each) for part, each in zip(parts, like, strict=True)]


def gathered(x: Tensor) -> Tensor:
    """The rows (B, ...) of all ranks, in their order, of which each has equally many."""
    if num_ranks() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(num_ranks())]
    between(lambda tensors: dist.all_gather([*tensors[1:]], tensors[0]), [x.contiguous(), *parts])
    return torch.cat(parts)


# --- agreements ------------------------------------------------------------------------------------------------------


def any_of(flag: int) -> int:
    """The largest of the ranks' numbers, on the host."""
    if num_ranks() == 1:
        return flag
    told = torch.tensor(flag)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def of_first(work: Callable[[], Result], together: bool = False) -> Result | None:
    """What the first rank finds, alone, while the others wait as long as it takes, and get None.

    With `together` they do the same work beside it, as where it needs the weights that they hold.
    """
    if num_ranks() == 1:
        return work()
    found, first = None, rank() == 0
    if first:
        with apart():
            found = work()
    elif together:
        with apart(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # the first one's bars suffice
            work()
    _wait_for_first()
    return found


def first_then_others(work: Callable[[], Result]) -> Result:
    """What each finds by itself, the first rank before the others: files that it makes are there for them."""
    if num_ranks() == 1:
        return work()
    number = rank()
    if number:
        _wait_for_first()
    with apart():
        found = work()
    if not number:
        _wait_for_first()
    return found


def told_by_first(work: Callable[[], Result]) -> Result:
    """What the first rank finds, as JSON has it, in all of them; and so the UserError that keeps it from that."""
    if num_ranks() == 1:
        return work()
    key = f"fewstep/found/{_turns[0]}"
    if rank() == 0:
        try:
            with apart():
                told: dict[str, Any] = {"found": work()}
        except UserError as error:
            told = {"error": str(error)}
        _store.set(key, json.dumps(told))
    _wait_for_first()
    told = json.loads(_store.get(key))
    if "error" in told:
        raise UserError(told["error"])
    found: Result = told["found"]
    return found


def own_store() -> Any:
    """Another connection to what ranks tell each other by, for a thread: of one only one at a time can wait."""
    store, kinds = _store, cast(Any, dist)
    while isinstance(store, kinds.PrefixStore):
        store = store.underlying_store
    return kinds.TCPStore(store.host, store.port, wait_for_workers=False)


_turns = [0]


def _wait_for_first() -> None:
    """Till the first rank has come here as often: by the store, whose patience is not that of a step."""
    _turns[0] += 1
    key = f"fewstep/first/{_turns[0]}"
    if rank() == 0:
        _store.set(key, "")
    else:
        _store.wait([key], PATIENCE)
