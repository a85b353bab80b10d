"""Files are written whole or not at all; a folder that is locked has one writer, until its process ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.files import folder_lock, write_text

HOLDER = """
import sys, time
from pathlib import Path
from fewstep.files import folder_lock

with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of the folder `run`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_told_the_folder_and_the_process(holder: subprocess.Popen, tmp_path: Path) -> None:
    wanted = rf"^{tmp_path}/run: process {holder.pid} writes there; wait for its end, or stop it$"
    with pytest.raises(UserError, match=wanted), folder_lock(tmp_path / "run"):
        pass


def test_a_killed_writer_holds_nothing(holder: subprocess.Popen, tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with folder_lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
        with pytest.raises(UserError, match=f"process {os.getpid()} writes there"), folder_lock(tmp_path / "run"):
            pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_started_program_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with child, folder_lock(tmp_path):
        child.kill()


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("disk full")

    path = tmp_path / "recipe.yaml"
    write_text(path, "first")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"recipe\.yaml: can't be written \(disk full\)"):
        write_text(path, "second")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["recipe.yaml"]
