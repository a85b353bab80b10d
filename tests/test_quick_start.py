"""What only reads recipes or prints help is quick: it imports neither torch nor what is built on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.cli.verbs import app

PROBE = """
import sys
from fewstep.cli import main
try:
    main()
finally:
    slow = {"torch", "diffusers", "transformers", "datasets", "sklearn", "scipy", "matplotlib"} & sys.modules.keys()
    print("imported:", *sorted(slow), file=sys.stderr)
"""
VERBS = [command.name for command in app.registered_commands]
BELOW = [
    f"{group.name} {command.name}"
    for group in app.registered_groups
    for command in group.typer_instance.registered_commands
]


def answer(line: str) -> tuple[int, str, str]:
    """Exit code and output of a process of its own, which must not have imported anything heavy; as wide as 80."""
    environment = {**os.environ, "COLUMNS": "80"}
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, *line.split()], capture_output=True, text=True, env=environment
    )
    *errors, imported = ended.stderr.splitlines()
    assert imported == "imported:"
    return ended.returncode, ended.stdout, "\n".join(errors)


@pytest.mark.parametrize("verb", ["", *VERBS, *BELOW])
def test_help_fits_a_terminal_and_shows_an_example(verb: str) -> None:
    code, output, errors = answer(f"{verb} --help")
    assert (code, errors) == (0, "")
    lines = output.strip().splitlines()
    assert len(lines) <= (
        24 + 4 * (not verb) if verb in ("", "demo", "teach", "distill", "recipes", "import edm") else 60
    )
    assert max(map(len, lines)) <= 80
    assert f"Example: fewstep {verb}".strip() in output
    assert verb != "teach" or "runs/RECIPE" in output


@pytest.mark.parametrize("line", ["recipes", "recipes show digits-4step", "recipes check digits-4step"])
def test_recipes_are_shown(line: str) -> None:
    code, output, errors = answer(line)
    assert (code, errors) == (0, "")
    assert "digits-4step" in output


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("distill digits-4stp", "did you mean 'digits-4step'?"),
        ("teach no-such-recipe", "`fewstep recipes` lists them"),
        ("distill digits-1step --set no_such=1", "no_such: unknown key"),
        ("teach digits-1step", "is for `fewstep distill digits-1step`, not for `fewstep teach`"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_at_once(line: str, fragment: str) -> None:
    code, output, error = answer(line)
    assert (code, output) == (2, "")
    assert fragment in error
    assert "\n" not in error


def test_a_page_of_a_run_is_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("kind: teach")
    Path("run/metrics.jsonl").write_text('{"step": 1, "denoising_loss": 0.5}\n')
    assert answer("report run") == (0, "wrote run/report.html\n", "")
