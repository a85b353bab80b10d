"""Command lines in a copy of the `workshop` that a test file makes; files of other needs have a `run` of their own."""

import shutil
from pathlib import Path

import pytest

from command_line import Answer, Run
from fewstep.cli import main


@pytest.fixture
def place(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the workshop, to be damaged."""
    shutil.copytree(workshop, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "place"


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs a command line; gives exit code, standard output and standard error."""

    def command(line: str) -> Answer:
        monkeypatch.setattr("sys.argv", line.split())
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return command
