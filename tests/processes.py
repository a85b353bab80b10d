"""Scripts in processes of their own, which tests start, wait for and kill."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Scripts do nothing with torch, whose import takes most of their time.
IN_PLACE_OF_TORCH = "Tensor = device = object\nset_num_threads = id\n"
Launch = Callable[..., subprocess.Popen]


@contextmanager
def launching(folder: Path, script: str) -> Iterator[Launch]:
    """Starts the script on the folder and further words, once it says "starting"; each leads a group of processes."""
    started: list[subprocess.Popen] = []

    def run(*words: str, torch: bool = False) -> subprocess.Popen:
        (folder / "script.py").write_text(script)
        if not torch:
            (folder / "torch.py").write_text(IN_PLACE_OF_TORCH)  # a script's folder is where modules are found first
        command = [sys.executable, str(folder / "script.py"), str(folder), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, start_new_session=True, **pipes))
        assert started[-1].stdout.readline() == "starting\n"
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
