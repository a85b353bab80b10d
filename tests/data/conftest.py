"""`datasets` keeps what it converts in the test's own folder, and what is kept on disk has files of few rows."""

import datasets
import pytest

from fewstep.data import latents, pairs


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """11 rows are 4, 4 and 3, each file made in two calls or more."""
    monkeypatch.setattr(latents, "ROWS", 4)
    monkeypatch.setattr(latents, "TEXTS_PER_BATCH", 2)
    monkeypatch.setattr(pairs, "FILE_BYTES", 4 * 4 * 2 * 3 * 3)  # of pairs of the shape (2, 3, 3)
    monkeypatch.setattr(pairs, "GROUP_BYTES", 2 * 4 * 2 * 3 * 3)
