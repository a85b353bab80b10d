"""A command in several processes of this machine, which train together, with one line for an error."""

import ctypes
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from fewstep.errors import LOST, UserError

GRACE = 20.0  # seconds in which ranks find out by themselves that another one has ended
ENDING = 10.0  # and in which they end when they are told to
LAUNCHED = "FEWSTEP_LAUNCHED"  # a folder, in which each rank has a file with its step, and each line that one tells
COMMAND = [sys.executable, "-m", "fewstep"]
Process = subprocess.Popen[bytes]


def launch(arguments: Sequence[str], num_ranks: int) -> int:
    """Runs `fewstep ARGUMENTS` so many times, each told its number as torchrun tells it; gives the exit code.

    A signal is passed on to all of them. Where one has ended with an error the others are ended, too, within a minute.
    """
    with TemporaryDirectory() as place:
        told = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, **meeting_place(), LAUNCHED: place}
        ranks = [_start(arguments, {**told, "RANK": number, "LOCAL_RANK": number}) for number in range(num_ranks)]
        return _code(_run(ranks), lambda number: _step_of(Path(place), number))


def first_to_tell(place: Path, line: str) -> bool:
    """Whether no other rank that was started with this one has told the line."""
    try:
        (place / hashlib.sha256(line.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


_noted: list[int] = []  # the file of this rank, once it is open


def note_step(step: int) -> None:
    """The step of this rank, where they that started it find it if it is lost."""
    if (place := os.environ.get(LAUNCHED)) is None:
        return
    if not _noted:
        _noted.append(os.open(Path(place) / os.environ["RANK"], os.O_WRONLY | os.O_CREAT))
    os.pwrite(_noted[0], f"{step}\n".encode(), 0)


def _step_of(place: Path, number: int) -> str:
    """The step that a rank was in, in words; nothing of one that had none yet."""
    with suppress(OSError):
        return f" in step {(place / str(number)).read_text().splitlines()[0]}"
    return ""


def _run(ranks: list[Process]) -> list[int | None]:
    def pass_on(signal_number: int, frame: FrameType | None) -> None:
        for process in ranks:
            with suppress(ProcessLookupError):
                process.send_signal(signal_number)

    before = {each: signal.signal(each, pass_on) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(ranks)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for process in ranks:
            process.kill()


def meeting_place() -> dict[str, str]:
    """Where ranks of this machine find each other, as torchrun tells it."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(door.getsockname()[1])}


def _start(arguments: Sequence[str], told: dict[str, Any]) -> Process:
    quiet = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // told["WORLD_SIZE"]))}
    # In a session of its own: Ctrl-C then reaches it once, from here.
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=quiet | os.environ | {name: str(value) for name, value in told.items()},
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    with suppress(OSError, AttributeError):  # of systems that are not Linux
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(ranks: list[Process]) -> list[int | None]:
    """The exit codes of all by themselves; None of those that are made to end, long after one has failed."""
    deadline = None
    while any(process.poll() is None for process in ranks):
        if deadline is None and any(process.poll() for process in ranks):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            codes = [process.poll() for process in ranks]
            _end(ranks)
            return codes
        time.sleep(0.05)
    return [process.returncode for process in ranks]


def _end(ranks: list[Process]) -> None:
    for process in ranks:
        process.terminate()
    end = time.monotonic() + ENDING
    while any(process.poll() is None for process in ranks) and time.monotonic() < end:
        time.sleep(0.05)
    for process in ranks:
        process.kill()


def _code(codes: list[int | None], step_of: Callable[[int], str]) -> int:
    """That of all; names a rank that could not tell its own end, and its step, and says so where none could."""
    causes = {number: code for number, code in enumerate(codes) if code not in (0, LOST)}
    told = "the same command with --resume goes on"
    if known := next((code for code in causes.values() if code and code > 0), 0):
        return known  # which it has told
    killed = next(((number, -code) for number, code in causes.items() if code), None)
    if killed:
        raise UserError(f"rank {killed[0]} was killed{step_of(killed[0])} (signal {killed[1]}); {told}")
    if causes:
        silent = min(causes)
        raise UserError(f"rank {silent} was silent{step_of(silent)} (parallel.stall_minutes); {told}")
    if any(codes):
        raise UserError(f"the ranks lost each other (parallel.stall_minutes); {told}")
    return 0
