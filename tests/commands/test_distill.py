"""Distilling as a command: the teacher that is trained first."""

from pathlib import Path

import pytest

from fewstep.commands import teach as module
from fewstep.commands.distill import open_teacher
from fewstep.errors import Interrupted


def test_a_stop_in_the_teachers_run_says_how_the_students_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object, **kwargs: object) -> None:
        raise Interrupted("stopped at step 3; continue with --resume --out runs/digits-teacher")

    monkeypatch.setattr(module, "teach", stopped)
    with pytest.raises(Interrupted, match="while teaching digits-teacher; the same command goes on") as stop:
        open_teacher("digits-teacher", tmp_path)
    assert "--out" not in str(stop.value)
