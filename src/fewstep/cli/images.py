"""sample, evaluate: what looks at models."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Device, Seed, app


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
