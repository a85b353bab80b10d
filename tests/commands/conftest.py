"""Command lines in a copy of the `workshop` that a test file makes, or in the `workplace` itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import Run, Tell, fewstep
from fewstep.training import teacher_errors


@pytest.fixture(scope="module", autouse=True)
def _few_errors() -> Iterator[None]:
    """Runs measure their teacher on one batch, not on eight: a tenth of the time; what they find `training` tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_errors, "MOST_BATCHES", 1)
        yield


@pytest.fixture
def place(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the workshop, to be damaged."""
    shutil.copytree(workshop, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "place"


@pytest.fixture
def run(place: Path) -> Run:
    """Runs a command line there; gives exit code, standard output and standard error."""
    return fewstep


@pytest.fixture
def tell(workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tell:
    """Runs a command line in the work place that a test file's tests share; gives exit code and standard error."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))

    def answer(line: str) -> tuple[int, str]:
        code, _, error = fewstep(line)
        return code, error

    return answer
