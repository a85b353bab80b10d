"""Errors that are for people: printed as one line, without a traceback."""


class UserError(Exception):
    """Something that the user can mend: says what is wrong, where, and what would be right. Exit code 2."""

    exit_code = 2


class Interrupted(UserError):
    """The user stopped a long job; says how to go on. Exit code 130, as for any program stopped by Ctrl-C."""

    exit_code = 130


def brief(error: Exception) -> str:
    """Another library's error as part of a line: its name and its first words."""
    return f"{type(error).__name__}: {' '.join(str(error).split()[:20])}"
