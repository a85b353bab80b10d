"""Command lines in this process, and what tests say of them."""

import io
import shlex
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import pytest

from fewstep.cli.verbs import run

Answer = tuple[int, str, str]
"""Exit code, standard output, standard error."""
Run = Callable[[str], Answer]
Tell = Callable[[str], tuple[int, str]]
"""From a command line to exit code and standard error."""


def fewstep(line: str) -> Answer:
    """Runs a command line, with or without the program's name."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr("sys.argv", ["fewstep", *shlex.split(line.removeprefix("fewstep "))])
        with pytest.raises(SystemExit) as ended:
            run()
    return ended.value.code, output.getvalue(), errors.getvalue()  # type: ignore[return-value]


def refused(answer: tuple, *fragments: str) -> None:
    """Whether a mistake of the user's was told in one line that holds the fragments."""
    code, *_, error = answer
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert all(fragment in error for fragment in fragments), error
