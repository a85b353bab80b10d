"""What Ctrl-C and SIGTERM do: one line and an end without leavings at any moment, or a request where a job asks for it.

The handler raises nothing: several libraries make another error, or none, of a KeyboardInterrupt in their imports.
"""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fewstep.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"  # which progress bars hide
_cleaning: list[Callable[[], None]] = []  # of files and folders that nobody wants once this process has ended
_renaming = threading.Lock()  # held by other threads than the main one in `undisturbed`
_advice = [""]  # how to go on after a stop; the innermost job's is the last


def end_on_signals() -> None:
    """From now on a signal ends the process at once, in one line and without leavings; what is ignored stays so."""
    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, end)


def end(number: int, frame: FrameType | None = None) -> None:
    """Ends the process: no exception, which a library might swallow."""
    line = f"fewstep: {stopped(_advice[-1])}\n"
    with suppress(OSError):  # of a terminal that is gone
        os.write(2, ((SHOW_CURSOR if os.isatty(2) else "") + line).encode())
    end_quietly(number)


def end_quietly(number: int, frame: FrameType | None = None) -> None:
    """Without a line, as a worker does; the temporaries are removed."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second one changes nothing
    _renaming.acquire(timeout=5)
    for clean in list(_cleaning):
        clean()
    os._exit(128 + number)


def end_silently() -> None:
    """From now on a signal ends the process without a line, where it would with one: another process tells it."""
    for each in SIGNALS:
        if signal.getsignal(each) == end:
            signal.signal(each, end_quietly)


def stopped(advice: str) -> str:
    """What is told."""
    return f"stopped; {advice}" if advice else "stopped"


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A path whose file or folder is removed at the end, and by a signal before it."""
    with cleaned(lambda: remove(path)):
        yield path


@contextmanager
def cleaned(clean: Callable[[], None]) -> Iterator[None]:
    """Has `clean` called at the end, and by a signal before it."""
    _cleaning.append(clean)
    try:
        yield
    finally:
        clean()
        _cleaning.remove(clean)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """How to go on with the job inside, told where a signal ends it."""
    _advice.append(advice)
    try:
        yield
    except KeyboardInterrupt:  # where `end` was not put in charge
        raise Interrupted(stopped(advice)) from None
    finally:
        _advice.pop()


@contextmanager
def stop_request() -> Iterator[Callable[[], int]]:
    """Inside, a signal only sets a flag, its number, so that no step is left half-done; a second one acts at once."""
    requested: list[int] = []
    previous = {each: signal.getsignal(each) for each in SIGNALS}

    def put_back() -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        requested.append(number)
        put_back()

    try:
        for each in previous:
            signal.signal(each, handle)
        yield lambda: requested[0] if requested else 0
    finally:
        put_back()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts a signal off until the few lines inside are done."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives; `end_quietly` waits
        with _renaming:
            yield
        return
    with stop_request() as requested:
        yield
    if requested():
        signal.raise_signal(requested())
