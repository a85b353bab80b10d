"""What only reads recipes or prints help is quick: it imports neither torch nor what is built on it."""

import subprocess
import sys

import pytest

from fewstep.cli import app

VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]
GROUPS = [
    f"{group.name} {command.name or command.callback.__name__}"
    for group in app.registered_groups
    for command in group.typer_instance.registered_commands
]
PROBE = """
import sys
from fewstep.cli import main
try:
    main()
finally:
    slow = {"torch", "diffusers", "transformers", "datasets", "sklearn", "scipy", "matplotlib"} & sys.modules.keys()
    print("imported:", *sorted(slow), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        *((f"{verb} --help", 0) for verb in [*VERBS, *GROUPS]),
        ("recipes", 0),
        ("recipes show digits-4step", 0),
        ("recipes check digits-4step", 0),
        ("distill no-such-recipe", 2),
        ("teach no-such-recipe", 2),
        ("distill digits-1step --set no_such=1", 2),
    ],
)
def test_the_answer_needs_no_heavy_import(line: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", PROBE, *line.split()], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1] == "imported:"
