"""sample, evaluate: what looks at models."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Device, Seed, app

Class = Annotated[
    int | None,
    typer.Option("--class", "--label", metavar="N", help="Class; by default all in turn.", show_default=False),
]
Prompt = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="For text-to-image; repeatable.", show_default=False)
]
Prompts = Annotated[
    str | None, typer.Option(metavar="FILE", help="Prompts: .txt, .csv, .tsv or .parquet.", show_default=False)
]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Instead of the sampler's own, or of those of a student whose several steps are evenly spaced.",
        show_default=False,
    ),
]
TeacherSampler = Annotated[
    str | None,
    typer.Option(
        metavar="KIND:N",
        help="Of a teacher: heun, euler, ddim, dpm++, unipc.",
        show_default="heun:18; ddim:50 for text",
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(metavar="OTHER", help="A second model, on the same noise, in every other column.", show_default=False),
]
Config = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Of a file: diffusers folder of its family.", show_default=False),
]
PredictionType = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="epsilon or v_prediction, if the model is wrong.", show_default=False),
]


@app.command(epilog="Example: fewstep sample runs/digits-1step --compare runs/digits-teacher")
def sample(
    path: Annotated[str, typer.Argument(help="Run folder, model folder, .safetensors file or hub id.")],
    out: Annotated[Path, typer.Option(metavar="PNG", help="Grid to write.")] = Path("samples.png"),
    grid_only: Annotated[bool, typer.Option("--grid-only", help="Without the folder of single images.")] = False,
    num: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Images.", show_default="40; of text 4, or one per prompt")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Image i is a function of it and i.")] = 0,
    label: Class = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    steps: Steps = None,
    sampler: TeacherSampler = None,
    guidance: Annotated[float, typer.Option(metavar="S", min=1, help="Of a teacher; 1 is none.")] = 1.0,
    compare: Compare = None,
    device: Device = "auto",
    config: Config = None,
    prediction_type: PredictionType = None,
) -> None:
    """Draw images from a model, or from two on the same noise.

    Of two, --steps is for the first, --sampler and --guidance for teachers.
    """
    from fewstep.commands.sample import Order, sample

    asked = (path, out, num, seed, label, tuple(prompt or ()), prompts, steps, sampler, guidance, compare)
    order = Order(*asked, not grid_only, device, config, prediction_type)
    drawn = sample(order)
    typer.echo(f"wrote {out}" + ("" if grid_only else f" and its {drawn} images to {order.folder}"))


@app.command(epilog="Example: fewstep evaluate runs/digits-teacher runs/digits-1step")
def evaluate(
    runs: Annotated[
        list[str], typer.Argument(help="Runs, or RUN@STEP, RUN@best-fid; the first one's data is the reference.")
    ],
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
