"""Command lines in this process, and what tests say of them."""

import io
import re
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


OF_EVERY_RUN = re.compile(
    r"^(\S.*: [\d,]+/[\d,]+(, .*)?|plan: .*|graphs: off, they are for CUDA|wrote .*, [\d,]+ steps|next: fewstep .*)\n",
    re.MULTILINE,
)


def fewstep(line: str, whole: bool = False) -> Answer:
    """Runs a command line, with or without the program's name; its progress and what comes next only in the `whole`."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr("sys.argv", ["fewstep", *shlex.split(line.removeprefix("fewstep "))])
        with pytest.raises(SystemExit) as ended:
            run()
    training = not whole and re.match("(fewstep )?(teach|distill) ", line)
    texts = (OF_EVERY_RUN.sub("", each.getvalue()) if training else each.getvalue() for each in (output, errors))
    return ended.value.code, *texts  # type: ignore[return-value]


def refused(answer: tuple, *fragments: str) -> None:
    """Whether a mistake of the user's was told in one line that holds the fragments."""
    code, *_, error = answer
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert all(fragment in error for fragment in fragments), error
