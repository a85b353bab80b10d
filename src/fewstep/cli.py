"""The command line. Heavy imports wait inside the verbs, so that --help is quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewstep.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a diffusion model into a one- to four-step generator (DMD2).",
    epilog="Example: fewstep demo",
)
data = typer.Typer(no_args_is_help=True, help="Prepare data for text-to-image runs.")
app.add_typer(data, name="data")
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Out = Annotated[Path | None, typer.Option(help="Run folder; by default runs/RECIPE.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")]
Seed = Annotated[int, typer.Option(min=0, help="Noise of image i is a function of seed and i.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


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
    """Teach, distil and judge on an embedded set: the whole job on a CPU, digits in 4 minutes or --text in 20."""
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


@app.command(epilog="Example: fewstep sample runs/digits-1step --label 3 --out threes.png")
def sample(
    path: Annotated[str, typer.Argument(help="Run folder, model folder, .safetensors file or hub id.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("samples.png"),
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 40,
    seed: Seed = 0,
    label: Annotated[int | None, typer.Option(help="Class; by default all in turn.", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Option(help="For text-to-image models.", show_default=False)] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="For a teacher: heun:18, ddim:50, dpm++:8, unipc:8.", show_default="heun:18; ddim:50 for text-to-image"
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(min=1, help="For a teacher: guidance scale, 1 is none.")] = 1.0,
    device: Device = "auto",
    config: Annotated[
        str | None, typer.Option(help="For a single file: a diffusers folder of its family.", show_default=False)
    ] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, where the model says it wrongly.", show_default=False)
    ] = None,
) -> None:
    """Draw a grid of images from a run."""
    from fewstep.commands.sample import sample

    sample(path, out, num, seed, label, prompt, sampler, guidance, device, config, prediction_type)
    typer.echo(f"wrote {out}")


@app.command(epilog="Example: fewstep evaluate runs/digits-teacher runs/digits-1step")
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Runs; the first one's data is the reference.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("evaluation"),
    features: Annotated[
        str | None,
        typer.Option(
            help="TorchScript file, `classifier` (a small one trained on the labels) or `autoencoder` (the model's).",
            show_default="classifier; autoencoder for text-to-image",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=100, help="Images per row.")] = 5000,
    num_real: Annotated[int, typer.Option(min=100, help="Real images to compare with, at most.")] = 50_000,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            help="Of teachers, repeatable: heun:18, ddim:50@3 (guided), dpm++:4, unipc:4.",
            show_default="heun:18; ddim:50 for text-to-image",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Judge runs side by side: FID with its noise floor, precision, recall, accuracy, speed."""
    from fewstep.commands.evaluate import evaluate

    evaluate(runs, out, features, num_samples, num_real, sampler or [], seed, device)


@data.command(
    epilog="Example: fewstep data latents --model models/sdxl --source laion.tar --out latents --min-side 1024"
)
def latents(
    model: Annotated[Path, typer.Option(help="Model folder with the autoencoder, or a run folder.")],
    source: Annotated[str, typer.Option(help="Captioned images: a folder, a parquet file, a WebDataset tar.")],
    out: Annotated[Path, typer.Option(help="Folder of the latents; the same command goes on after a stop.")],
    min_side: Annotated[int, typer.Option(min=0, help="Smaller side of the stored image in pixels; paper: 1024.")] = 0,
    unsafe_column: Annotated[
        str | None, typer.Option(help="Drop what is true, UNSAFE, NSFW or above --max-unsafe here, or empty.")
    ] = None,
    max_unsafe: Annotated[float, typer.Option(help="Largest score in --unsafe-column.")] = 0.5,
    aesthetic_column: Annotated[str | None, typer.Option(help="Column of aesthetic scores.")] = None,
    min_aesthetic: Annotated[
        float | None, typer.Option(help="Smallest score there; paper: 5.5 for images, 6.25 for prompts.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="By default image, png, jpg, jpeg or webp.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="By default caption, text, txt or prompt.")] = None,
    split: Annotated[str, typer.Option(help="The split to read, where there are several.")] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass of the autoencoder.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The sample of image i is a function of seed and i.")] = 0,
    device: Device = "auto",
) -> None:
    """Encode captioned images once, as latents that `data.source` takes."""
    from fewstep.commands.data import latents
    from fewstep.data.filters import Filter

    kept = Filter(min_side, unsafe_column, max_unsafe, aesthetic_column, min_aesthetic)
    latents(model, source, out, kept, image_column, caption_column, split, batch_size, seed, device)


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


def main() -> None:
    """Runs the command line; what a user can mend is one line on standard error, without a traceback."""
    try:
        app()
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
