"""sample, evaluate: what looks at models."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Device, Seed, app

Singles = Annotated[bool, typer.Option(help="Write single images, too: into the folder of the grid's name, less .png.")]
Num = Annotated[
    int | None,
    typer.Option(min=1, help="Number of images.", show_default="40; of text 4, or one per prompt if there are more"),
]
Class = Annotated[
    int | None, typer.Option("--class", "--label", help="Class; by default all in turn.", show_default=False)
]
Prompt = Annotated[
    list[str] | None, typer.Option(help="For text-to-image models; repeatable, taken in turn.", show_default=False)
]
Prompts = Annotated[str | None, typer.Option(help="Prompts: a .txt, .csv, .tsv or .parquet file.", show_default=False)]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        help="A teacher's sampler steps. A student of several, evenly spaced steps can take another number, too, "
        "which it was not trained for.",
        show_default=False,
    ),
]
TeacherSampler = Annotated[
    str | None,
    typer.Option(
        help="For a teacher: heun:18, ddim:50, dpm++:8, unipc:8; with --steps the name alone.",
        show_default="heun:18; ddim:50 for text-to-image",
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(
        metavar="OTHER",
        help="A second model, on the same noise, in every other column. --steps is the first one's; --sampler and "
        "--guidance are for those that are teachers.",
        show_default=False,
    ),
]
Config = Annotated[
    str | None, typer.Option(help="For a single file: a diffusers folder of its family.", show_default=False)
]
PredictionType = Annotated[
    str | None, typer.Option(help="epsilon or v_prediction, where the model says it wrongly.", show_default=False)
]


@app.command(epilog="Example: fewstep sample runs/digits-1step --class 3 --compare runs/digits-teacher")
def sample(
    path: Annotated[str, typer.Argument(help="Run folder, model folder, .safetensors file or hub id.")],
    out: Annotated[Path, typer.Option(help="Grid to write, a PNG file.")] = Path("samples.png"),
    singles: Singles = True,
    num: Num = None,
    seed: Seed = 0,
    label: Class = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    steps: Steps = None,
    sampler: TeacherSampler = None,
    guidance: Annotated[float, typer.Option(min=1, help="For a teacher: guidance scale, 1 is none.")] = 1.0,
    compare: Compare = None,
    device: Device = "auto",
    config: Config = None,
    prediction_type: PredictionType = None,
) -> None:
    """Draw images from a model, or from two on the same noise."""
    from fewstep.commands.sample import Order, sample

    order = Order(
        path, out, num, seed, label, tuple(prompt or ()), prompts, steps, sampler, guidance, compare, singles, device
    )
    order = replace(order, config=config, prediction_type=prediction_type)
    drawn = sample(order)
    typer.echo(f"wrote {out}" + (f" and its {drawn} images to {order.folder}" if singles else ""))


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
