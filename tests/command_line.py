"""What tests say of a command line that has run."""

from collections.abc import Callable

Answer = tuple[int, str, str]
"""Exit code, standard output, standard error."""
Run = Callable[[str], Answer]


def refused(answer: Answer, *fragments: str) -> None:
    code, _, error = answer
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert all(fragment in error for fragment in fragments), error
