"""Judging runs side by side."""

from pathlib import Path

from fewstep.data.settings import DataSettings
from fewstep.evaluation.judge import classifier_path


def test_sources_of_the_same_name_have_classifiers_of_their_own() -> None:
    first, second = (classifier_path(DataSettings(source=f"{place}/train"), Path()) for place in "ab")
    assert first != second
