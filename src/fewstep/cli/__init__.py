"""The command line: each verb takes its class of options and imports what does the work when it is called."""

import errno
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import typer

from fewstep.commands import options
from fewstep.errors import UserError, brief

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a diffusion model into a one- to four-step generator (DMD2).",
    epilog="Example: fewstep demo",
)
data = typer.Typer(no_args_is_help=True, help="Prepare data for runs.")
import_ = typer.Typer(no_args_is_help=True, help="Bring in models from elsewhere.")


def main() -> None:
    """Runs the command line; what a user can mend is one line on standard error, without a traceback."""
    try:
        app()
    except (UserError, OSError) as error:
        print(f"fewstep: {error if isinstance(error, UserError) else _of_a_file(error)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", UserError.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)


def _of_a_file(error: OSError) -> str:
    """The file, where the error names it, and what the system said."""
    what = "written" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) else "read or written"
    return f"{error.filename or 'a file'}: can't be {what} ({error.strerror or brief(error)})"


def verb(group: typer.Typer, example: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Adds a verb to a group: its options are the fields of the class that it takes, its help is its docstring."""

    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        told = get_type_hints(function)["given"]
        hints = get_type_hints(told, include_extras=True)

        def call(**given: Any) -> None:
            function(told(**given))

        parameters = []
        for each in fields(told):
            default = each.default_factory() if each.default_factory is not MISSING else each.default
            default = inspect.Parameter.empty if default is MISSING else default
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(each.name, kind, default=default, annotation=hints[each.name]))
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__, call.__doc__ = {each.name: hints[each.name] for each in fields(told)}, function.__doc__
        group.command(function.__name__, epilog=f"Example: fewstep {example}")(call)
        return function

    return add


@verb(app, "demo --text")
def demo(given: options.Demo) -> None:
    """Teach, distil and judge on an embedded set: the whole job on a CPU, digits in 4 minutes or --text in 25."""
    from fewstep.commands.demo import demo

    demo(given)


@verb(app, "teach digits-teacher --set num_steps=500")
def teach(given: options.Run) -> None:
    """Train a teacher from scratch."""
    from fewstep.recipes.loading import load_recipe

    recipe = load_recipe(given.recipe, given.set_, "teach")  # its mistakes are told before torch is imported
    from fewstep.commands.teach import teach

    teach(recipe, given.folder, given.resume)


@verb(app, "distill digits-1step --set student_every=10")
def distill(given: options.Run) -> None:
    """Distil a teacher into a few-step student."""
    from fewstep.recipes.loading import load_recipe

    recipe = load_recipe(given.recipe, given.set_, "distill")
    from fewstep.commands.distill import distill

    distill(recipe, given.folder, given.resume)


@verb(app, "recipes show digits-4step")
def recipes(given: options.Recipes) -> None:
    """List recipes, show one with the meaning of every setting, or check one."""
    from fewstep.commands.recipes import recipes

    recipes(given)


@verb(app, "sample runs/digits-1step --compare runs/digits-teacher")
def sample(given: options.Sample) -> None:
    """Draw images from a model, or from two on the same noise.

    Of two, --steps is for the first, --sampler and --guidance for teachers.
    """
    from fewstep.commands.sample import sample

    sample(given)


@verb(app, "evaluate runs/digits-teacher runs/digits-1step")
def evaluate(given: options.Evaluate) -> None:
    """Judge runs side by side: FID with its noise floor, precision, recall, accuracy, speed."""
    from fewstep.commands.evaluate import evaluate

    evaluate(given)


@verb(app, "export runs/sdxl-4step --to diffusers sdxl-4step --license openrail++")
def export(given: options.Export) -> None:
    """Write a student as a diffusers folder, or as one file for ComfyUI and A1111."""
    from fewstep.commands.exporting import export

    export(given.run, given.to, given.out, given)


app.add_typer(import_, name="import")
app.add_typer(data, name="data")


@verb(import_, "import edm edm-imagenet-64x64-cond-adm.pkl --out models/imagenet64")
def edm(given: options.ImportEdm) -> None:
    """Convert an EDM checkpoint, exactly; the code that is stored in it is not run."""
    from fewstep.commands.importing import import_edm

    import_edm(given.file, given.out)


@verb(data, "data latents --model models/sdxl --source laion.tar --out latents --min-side 1024")
def latents(given: options.Latents) -> None:
    """Encode captioned images once, as latents that `data.source` takes."""
    from fewstep.commands.data import latents

    latents(given)


@verb(data, "data pairs --teacher sdxl --num 10000 --sampler euler:50@8 --prompts p.txt --out pairs")
def pairs(given: options.Pairs) -> None:
    """Draw pairs of noise and image by a teacher's sampler; under torchrun every rank makes its share."""
    from fewstep.commands.pairs import pairs

    pairs(given)
