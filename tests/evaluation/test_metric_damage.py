"""Metrics move the right way on known damage, and those that cannot see it stay where they are."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from fewstep.embedded.sources import digits

DAMAGE = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "metric_damage.py"))
SEEN = {
    "blur": {"fid", "kid", "precision", "recall", "density", "coverage", "accuracy", "diversity", "contrast"},
    "noise": {"fid", "kid", "contrast"},
    "tint": {"fid", "kid", "recall", "coverage", "brightness"},
    "dropped": {"fid", "kid", "recall", "coverage", "accuracy"},
    "duplicates": {"fid", "recall", "coverage", "diversity"},
    "copies": {"memorised"},
    "shuffled": {"accuracy"},
}
BLIND = {
    "dropped": {"density"},
    "duplicates": {"memorised", "saturation"},
    "copies": {"accuracy", "diversity", "brightness", "contrast"},
    "shuffled": {"fid", "kid", "precision", "recall", "density", "coverage", "memorised", "brightness", "contrast"},
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, str]]:
    return DAMAGE["judged"](DAMAGE["of_classes"](digits(), None, None, 800, 400, 120))


@pytest.mark.parametrize("damage", DAMAGE["DAMAGES"])
def test_metrics_see_what_they_should(damage: str, found: dict[str, dict[str, Any]]) -> None:
    """Of 400 digits against 800, by the features of a classifier: `+` is worse than undamaged, beyond its interval."""
    marks = {name: row[damage][-1] for name, row in found.items()}
    assert SEEN[damage] <= {name for name, sign in marks.items() if sign == "+"}
    assert not BLIND.get(damage, set()) & {name for name, sign in marks.items() if sign in "+!"}
