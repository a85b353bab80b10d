"""Tasks in processes of their own: what becomes of one is nothing to the others, and all stop together."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.runtime.workers import Failure, Task, attempt
from processes import Launch, launching, wait_for
from steps import quiet

SCRIPT = """
import errno, os, signal, sys, time
from pathlib import Path
from fewstep.errors import Interrupted, UserError
from fewstep.files import folder_lock
from fewstep.stopping import stop_request
from fewstep.runtime.workers import Failure, Task, run_apart

def give(name, report):
    for step in range(3):
        report(step, {"loss": 0.5})
    return name

def fail(name, report):
    raise ValueError("it broke")

def full(name, report):
    raise OSError(errno.ENOSPC, "No space left on device", "state.pt")

def killed(name, report):
    os.kill(os.getpid(), signal.SIGKILL)

def gone(name, report):
    os._exit(3)

def work(name, report):
    with folder_lock(Path(name)), stop_request() as stop_requested:
        (Path(name) / "begun").touch()
        try:
            while not stop_requested():
                time.sleep(0.001)
                report(1, {"loss": 0.5})
        finally:
            (Path(name) / "checkpoint").touch()
    raise Interrupted("stopped at step 1")

def ended(index, result):
    print(index, result.reason if isinstance(result, Failure) else result, flush=True)

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    tasks = [Task("line", 2, globals()[name], (str(number),)) for number, name in enumerate(sys.argv[3:])]
    try:
        print("starting", flush=True)
        print(run_apart(tasks, int(sys.argv[2]), ended))
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Launch]:
    """Starts that many tasks at a time, without torch."""
    with launching(tmp_path, SCRIPT) as run:
        yield lambda jobs, *tasks: run(str(jobs), *tasks)


def test_one_that_fails_or_is_killed_leaves_the_others_alone(start: Launch) -> None:
    process = start(2, "killed", "give", "fail", "full", "gone", "give")
    output, errors = process.communicate(timeout=60)
    reasons = {
        0: "its process was killed (SIGKILL), as where memory is short",
        2: "ValueError: it broke",
        3: "state.pt: No space left on device",
        4: "its process ended with exit code 3",
    }
    *told, last = output.splitlines()
    assert sorted(told) == [f"{index} {reasons.get(index, index)}" for index in range(6)]
    failures = {index: Failure(reason) for index, reason in reasons.items()}
    assert last == str([failures.get(index, str(index)) for index in range(6)])
    assert (process.returncode, "Traceback" in errors) == (0, False)


@pytest.mark.parametrize(("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_a_signal_ends_all_behind_a_checkpoint(
    start: Launch, tmp_path: Path, send: Callable[[int, int], None], number: int
) -> None:
    process = start(2, "work", "work", "give")
    wait_for(lambda: all((tmp_path / name / "begun").exists() for name in "01"))
    send(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + number, "")
    assert errors.splitlines()[-1] == "fewstep: stopped"
    assert "Traceback" not in errors
    for name in "01":
        assert (tmp_path / name / "checkpoint").exists()
        assert not (tmp_path / name / ".lock").exists()
    assert not (tmp_path / "2").exists()


def test_when_their_starter_is_killed_all_end_behind_a_checkpoint(start: Launch, tmp_path: Path) -> None:
    process = start(2, "work", "work")
    wait_for(lambda: all((tmp_path / name / "begun").exists() for name in "01"))
    process.kill()
    process.wait()
    wait_for(lambda: all((tmp_path / name / "checkpoint").exists() for name in "01"), 10)
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(process.pid, 0) is not None, 10)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("x: is wrong"), "x: is wrong"),
        (RuntimeError("it broke\nhere"), "RuntimeError: it broke here"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file: No space left on device"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory (asked for 2.00 GiB)"),
        (MemoryError(), "out of memory"),
    ],
)
def test_why_a_task_has_failed_is_one_line(error: Exception, reason: str) -> None:
    def fail(report: object) -> None:
        raise error

    assert attempt(Task("", 1, fail, ()), quiet) == Failure(reason)
