"""demo, teach, distill, recipes: what makes runs, and what they are made of."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Out, Resume, Set, app
from fewstep.errors import UserError


@app.command(epilog="Example: fewstep demo --text")
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs, the table and the page.", show_default="runs/demo[-text]")
    ] = None,
    resume: Resume = False,
    set_: Set = None,
    num_samples: Annotated[
        int | None, typer.Option(min=100, help="Images per row of the table.", show_default="5000; 5120 for --text")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Text to image, on drawn shapes, instead of digits.")] = False,
) -> None:
    """Teach, distil and judge on an embedded set: the whole job on a CPU, digits in 4 minutes or --text in 25."""
    from fewstep.commands.demo import DIGITS, SHAPES, demo

    folder = out or Path("runs/demo-text" if text else "runs/demo")
    demo(SHAPES if text else DIGITS, folder, resume, set_ or [], num_samples)


@app.command(epilog="Example: fewstep teach digits-teacher --set num_steps=500")
def teach(
    recipe: Annotated[str, typer.Argument(help="Recipe name or YAML file.")],
    out: Out = None,
    resume: Resume = False,
    set_: Set = None,
) -> None:
    """Train a teacher from scratch."""
    from fewstep.commands.teach import teach
    from fewstep.recipes.loading import load_recipe

    teach(load_recipe(recipe, set_ or [], "teach"), out or Path("runs") / Path(recipe).stem, resume)


@app.command(epilog="Example: fewstep distill digits-1step --set student_every=10")
def distill(
    recipe: Annotated[str, typer.Argument(help="Recipe name or YAML file.")],
    out: Out = None,
    resume: Resume = False,
    set_: Set = None,
) -> None:
    """Distil a teacher into a few-step student."""
    from fewstep.commands.distill import distill
    from fewstep.recipes.loading import load_recipe

    distill(load_recipe(recipe, set_ or [], "distill"), out or Path("runs") / Path(recipe).stem, resume)


@app.command(epilog="Example: fewstep recipes show digits-4step")
def recipes(
    action: Annotated[str, typer.Argument(help="list, show or check.")] = "list",
    recipe: Annotated[str | None, typer.Argument(help="Recipe name or YAML file.", show_default=False)] = None,
    set_: Set = None,
) -> None:
    """List recipes, show one with the meaning of every setting, or check one."""
    from fewstep.commands.recipes import check_recipe, list_recipes, show_recipe

    if action == "list" and recipe is None:
        list_recipes()
    elif action in ("show", "check") and recipe is not None:
        (show_recipe if action == "show" else check_recipe)(recipe, set_ or [])
    else:
        raise UserError("write `fewstep recipes`, `fewstep recipes show NAME` or `fewstep recipes check NAME`")
