"""However the process that started them ends, workers end too, behind a checkpoint."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.files import folder_lock
from processes import Launch, launching, wait_for

SCRIPT = """
import os, sys, time
from pathlib import Path
from fewstep.errors import Interrupted, UserError
from fewstep.files import folder_lock
from fewstep.stopping import stop_request
from fewstep.runtime.workers import Task, task_runner

def work(folder, report):
    with folder_lock(folder), stop_request() as stop_requested:
        (folder / "begun").touch()
        try:
            while not stop_requested():
                time.sleep(0.01)
                report(1, {})
        finally:
            (folder / "checkpoint").touch()

def die(folder, report):
    os._exit(1)

def give(folder, report):
    for step in range(3):
        report(step, {"loss": 0.5})
    return folder.name

if __name__ == "__main__":
    function = globals()[sys.argv[2]]
    tasks = [Task(name, 2, function, (Path(sys.argv[1]) / name,)) for name in "ab"]
    try:
        with task_runner() as run:
            print("starting", flush=True)
            print(run(tasks))
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Launch]:
    """Starts two workers on a task."""
    with launching(tmp_path, SCRIPT) as run:
        yield lambda task="work", torch=True: run(task, torch=torch)


def is_free(folder: Path) -> bool:
    """Whether no process holds its lock any more."""
    try:
        with folder_lock(folder):
            return True
    except UserError:
        return False


SIGNALS = [
    (send, number, torch)
    for send in (os.kill, os.killpg)
    for number in (signal.SIGTERM, signal.SIGINT)
    for torch in (True, False)
]


@pytest.mark.parametrize(
    ("send", "number", "torch"),
    [pytest.param(*each, marks=pytest.mark.slow if each[2] else ()) for each in SIGNALS],
)
def test_a_signal_ends_the_workers_behind_a_checkpoint_in_one_line(
    start: Launch, tmp_path: Path, send: Callable[[int, int], None], number: int, torch: bool
) -> None:
    process = start(torch=torch)
    wait_for(lambda: all((tmp_path / name / "begun").exists() for name in "ab"))
    send(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "fewstep: stopped; continue with --resume\n")
    assert all((tmp_path / name / "checkpoint").exists() and is_free(tmp_path / name) for name in "ab")


@pytest.mark.parametrize("torch", [pytest.param(True, marks=pytest.mark.slow), False])
def test_workers_of_a_killed_process_end_behind_a_checkpoint(start: Launch, tmp_path: Path, torch: bool) -> None:
    process = start(torch=torch)
    wait_for(lambda: all((tmp_path / name / "begun").exists() for name in "ab"))
    process.kill()
    process.wait()
    wait_for(lambda: all(is_free(tmp_path / name) for name in "ab"), 5)
    assert all((tmp_path / name / "checkpoint").exists() for name in "ab")
    with pytest.raises(ProcessLookupError):  # idle workers are gone, too
        wait_for(lambda: os.killpg(process.pid, 0) is not None, 5)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1, 0.5, 1.5])
def test_ctrl_c_while_workers_import_is_one_line(start: Launch, seconds: float) -> None:
    process = start()
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "fewstep: stopped; continue with --resume\n")


def test_results_come_in_the_order_of_the_tasks(start: Launch) -> None:
    process = start("give", torch=False)
    assert (process.communicate(timeout=60)[0], process.returncode) == ("['a', 'b']\n", 0)


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line(start: Launch) -> None:
    process = start("die")
    _, errors = process.communicate(timeout=60)
    wanted = "fewstep: a worker process was killed, or ran out of memory; continue with --resume\n"
    assert (process.returncode, errors) == (2, wanted)
