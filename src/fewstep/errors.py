"""Errors that are for people: printed as one line, without a traceback."""

import re

NO_MEMORY = "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED"


class UserError(Exception):
    """Something that the user can mend: says what is wrong, where, and what would be right. Exit code 2."""

    exit_code = 2


class Interrupted(UserError):
    """The user stopped a long job; says how to go on. Exit code 130 by Ctrl-C, and 143 by SIGTERM."""

    def __init__(self, text: str, number: int = 2):
        super().__init__(text)
        self.exit_code = 128 + number


LOST = 3


class Lost(UserError):
    """Another of the processes that train together is gone. Exit code 2, or 3 for `--ranks`, which then tells why."""


def brief(error: Exception) -> str:
    """Another library's error as part of a line: its name and its first words."""
    return f"{type(error).__name__}: {' '.join(str(error).split()[:20])}"


def out_of_memory(error: Exception) -> str | None:
    """What is told of an error for want of memory, a GPU's or this machine's; None of others."""
    wants = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)))
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return f"out of memory{f' (asked for {asked[1]})' if asked else ''}" if wants else None
