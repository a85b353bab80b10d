"""What ranks tell each other beside their sums, by a store: how far the first one is, and how each of them ends."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from fewstep.errors import LOST, Lost, UserError
from fewstep.runtime.launching import LAUNCHED

PATIENCE = timedelta(days=7)  # with what the first rank does alone, as a teacher's training
GOODBYE = 5.0  # seconds in which the first rank, which has the store, waits for the others to read what is there
KEYS = ("met", "all", "failed", "missed", "ended", "left")
MET, ALL, FAILED, MISSED, ENDED, LEFT = (f"fewstep/{each}" for each in KEYS)
_store: Any = None  # of this process, once it has joined others
_turns = [0]


def meet(store: Any, num: int, wait: timedelta) -> None:
    """From now on this process has the others' store; all of them are here, so that none misses who ends early."""
    global _store
    _store = store
    if store.add(MET, 1) == num:
        store.set(ALL, "")
    store.wait([ALL], wait)


def store() -> Any:
    """What ranks tell each other by."""
    return _store


def has_met() -> bool:
    """Whether this process has joined others."""
    return _store is not None


@contextmanager
def giving_up(seconds: float, told: str, missed: bool = False) -> Iterator[None]:
    """Ends the process with a line if what is inside takes longer, also where a library waits for ever.

    Of one that has `missed` another, they that started it tell the line, if they can.
    """

    def end() -> None:
        silently = missed and LAUNCHED in os.environ
        if not silently:
            print(f"fewstep: {told}", file=sys.stderr, flush=True)
        os._exit(LOST if silently else UserError.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_first(first: bool) -> None:
    """Till the first rank has come here as often, by the store, whose patience is not that of a step.

    Raises Lost if it has ended with an error instead.
    """
    _turns[0] += 1
    key = _turn(_turns[0])
    if first:
        _store.set(key, "")
        return
    _store.wait([key], PATIENCE)
    if _store.get(key):
        _store.add(LEFT, 1)
        raise Lost("the first rank has ended; --resume goes on")


def _turn(number: int) -> str:
    return f"fewstep/first/{number}"


def told_by_first(text: str, first: bool) -> str:
    """What the first rank tells all."""
    key = f"fewstep/found/{_turns[0]}"
    if first:
        _store.set(key, text)
    wait_for_first(first)
    return str(_store.get(key).decode())


def told_to_first(text: str, number: int, num: int) -> list[str]:
    """What all ranks tell the first, in their order; [] in the others."""
    _store.set(f"fewstep/text/{number}", text)
    return [] if number else [_store.get(f"fewstep/text/{each}").decode() for each in range(num)]


def fail(first: bool) -> None:
    """Has those who wait for this rank end, and those who miss it keep silent: its error is told."""
    with suppress(RuntimeError):  # of a store that is gone
        _store.set(FAILED, "")
        if first:
            _store.set(_turn(_turns[0] + 1), "ended")


def told_by_another(line: str, lost: bool = False) -> bool:
    """Whether another rank has told this line, as of a mistake that all meet, or tells what this one was lost by."""
    if _store is None:
        return False
    try:
        with giving_up(GOODBYE, line, missed=True):  # where the first rank is frozen, which has the store
            if lost and _store.check([FAILED]):
                return True
            return bool(_store.add(f"fewstep/told/{line}", 1) > 1)
    except RuntimeError:  # it is gone with the first rank, which was killed
        return False


def silent(number: int, num: int, told: str) -> list[int]:
    """The ranks that do not say, within seconds, that they miss one: those that waited for it did so as long as this.

    Ends the process with the line that is `told` if the first one, which has the store, is frozen.
    """
    lacking: list[int] = []
    with giving_up(2 * GOODBYE, told, missed=True), suppress(RuntimeError):  # of a store that is gone
        _store.set(f"{MISSED}/{number}", "")
        end = time.monotonic() + GOODBYE
        while time.monotonic() < end:
            if not (lacking := [each for each in range(num) if not _store.check([f"{MISSED}/{each}"])]):
                break
            time.sleep(0.05)
    return lacking


def leave(number: int, num: int, failed: bool) -> None:
    """The last that a rank does with others: they wait for what the first still writes, and it for their farewell.

    Of those that have `failed` it is only told that they go.
    """
    with suppress(RuntimeError):
        if number:
            if not failed:
                _store.wait([ENDED], PATIENCE)
            _store.add(LEFT, 1)
            return
        _store.set(ENDED, "")
        end = time.monotonic() + GOODBYE
        while _store.add(LEFT, 0) < num - 1 and time.monotonic() < end:
            time.sleep(0.02)
