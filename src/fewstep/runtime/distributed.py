"""Several processes, ranks, that train one model: who they are, and the few things that they tell each other.

Each computes some rows of every batch. Sums over all of them are in all of them the same, bit for bit, so that every
rank takes the same step; what is written, the first rank writes. A process by itself is the first of one, and none of
this does anything in it.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import Interrupted, Lost, UserError, brief
from fewstep.runtime import ends
from fewstep.runtime.between import between
from fewstep.runtime.launching import LAUNCHED, note_step
from fewstep.stopping import end_silently

Result = TypeVar("Result")
BUCKET = 2**26  # numbers that travel at once
_apart: list[bool] = []
_step = [0]


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
    """The number of this process and how many there are, as torchrun sets them; of one by itself 0 of 1."""
    number, num = environment("RANK", 0), environment("WORLD_SIZE", 1)
    if number >= num:
        raise UserError(f"RANK={number}: must be below WORLD_SIZE={num}, as torchrun sets them")
    return (0, 1) if _apart else (number, num)


@contextmanager
def joined(device: torch.device, stall_minutes: float) -> Iterator[None]:
    """Inside, this process is one of those that torchrun, or `--ranks`, has started; raises UserError if they lack."""
    number, num = place()
    if num == 1 or dist.is_initialized():
        yield
        return
    _join(device, number, num, timedelta(minutes=stall_minutes))
    failed = missed = False
    try:
        yield
    except Exception as error:
        failed, missed = not isinstance(error, Interrupted), isinstance(error, Lost) or _of_another(error)
        if not missed:
            ends.fail(first=number == 0)
        elif not isinstance(error, Lost):
            raise lost(_silent(error, number, num)) from error
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()
        if not (missed and number):  # else the store may be frozen, with the first
            ends.leave(number, num, failed)


def _join(device: torch.device, number: int, num: int, wait: timedelta) -> None:
    """Meets the others; raises UserError, within the time, if they are not there."""
    if lacking := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        told = f"WORLD_SIZE={num}, and no {', '.join(lacking)}: torchrun sets all of them"
        raise UserError(f"{told}; start the ranks with it, or with --ranks {num}")
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    told = f"rank {number} of {num} did not find the others at {where}"
    ways = "start all of them, with a MASTER_PORT that is free"
    if number:  # the first one tells
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        end_silently()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with ends.giving_up(wait.total_seconds() + 5, f"{told}; {ways}"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=wait)
            if device.type == "cuda":
                # It ends a process without a line of ours: gloo, by which ranks ask each other in every step, is first.
                nccl: Any = dist.distributed_c10d._get_default_group()._get_backend(device)
                with suppress(AttributeError):
                    nccl._set_default_timeout(2 * wait)
            ends.meet(dist.distributed_c10d._get_default_store(), num, wait)
    except (ValueError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT={os.environ['MASTER_PORT']}: is in use here; take one that is free"
            ) from error
        raise UserError(f"{told} ({brief(error)}); {ways}") from error


def lost(who: str = "another rank ended, or was silent,") -> Lost:
    """What is told where another rank is gone."""
    return Lost(f"{who} behind step {_step[0]}; --resume goes on")


def _silent(error: BaseException, number: int, num: int) -> str:
    """Who was waited for in vain, in words; they that `--ranks` has started are named by it."""
    if LAUNCHED in os.environ or "timed out" not in str(error).lower():
        return "another rank ended"
    found = ends.silent(number, num, str(lost("rank 0 was silent")))
    return f"rank {' and '.join(map(str, found))} was silent" if found else "another rank was silent"


def _of_another(error: BaseException) -> bool:
    """Whether it says that a peer is gone: of torch.distributed's own errors, or gloo's, which are plain ones."""
    if isinstance(error, dist.DistError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    inside = any(frame.filename.startswith(os.path.dirname(dist.__file__)) for frame in frames)
    return type(error) is RuntimeError and inside and "gloo" in str(error).lower()


def at_step(step: int) -> None:
    """The step that is told if the others end, or this one."""
    _step[0] = step
    note_step(step)


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


def told_to_first(text: str) -> list[str]:
    """What all ranks tell the first, in their order; [] in the others."""
    return ends.told_to_first(text, rank(), num_ranks()) if num_ranks() > 1 else [text]


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
    ends.wait_for_first(first)
    return found


def first_then_others(work: Callable[[], Result]) -> Result:
    """What each finds by itself, the first rank before the others: files that it makes are there for them."""
    if num_ranks() == 1:
        return work()
    first = rank() == 0
    if not first:
        ends.wait_for_first(first)
    with apart():
        found = work()
    if first:
        ends.wait_for_first(first)
    return found


def told_by_first(work: Callable[[], Result]) -> Result:
    """What the first rank finds, as JSON has it, in all of them; and so the UserError that keeps it from that."""
    if num_ranks() == 1:
        return work()
    told: dict[str, Any] = {}
    if first := rank() == 0:
        try:
            with apart():
                told = {"found": work()}
        except UserError as error:
            told = {"error": str(error)}
    told = json.loads(ends.told_by_first(json.dumps(told), first))
    if "error" in told:
        raise UserError(told["error"])
    found: Result = told["found"]
    return found


def own_store() -> Any:
    """Another connection to what ranks tell each other by, for a thread: of one only one at a time can wait."""
    store, kinds = ends.store(), cast(Any, dist)
    while isinstance(store, kinds.PrefixStore):
        store = store.underlying_store
    return kinds.TCPStore(store.host, store.port, wait_for_workers=False)
