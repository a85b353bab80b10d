"""export: students for where people use models."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app


@app.command(epilog="Example: fewstep export runs/sdxl-4step --to diffusers sdxl-4step --license openrail++")
def export(
    run: Annotated[str, typer.Argument(help="RUN, RUN@STEP or RUN@best-METRIC.")],
    out: Annotated[Path, typer.Argument(help="Folder, or .safetensors file, to write.")],
    to: Annotated[str, typer.Option("--to", help="diffusers or single-file.")] = "diffusers",
    ema: Annotated[
        str | None, typer.Option(help="Average to take, where a run keeps several: 0.9999.", show_default="the first")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The weights as trained, not averaged.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 (in diffusers as variant fp16) or bfloat16.",
            show_default="float32; float16 for a single file",
        ),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest file of weights in a folder.", show_default="5GB")
    ] = None,
    license_: Annotated[
        str, typer.Option("--license", help="For the card, as the hub names them; other: the teacher's applies.")
    ] = "other",
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Folder of `fewstep evaluate` whose rows the card shows.", show_default="the run's"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there, whole.")] = False,
) -> None:
    """Write a student as a diffusers folder, or as one file for ComfyUI and A1111."""
    from fewstep.commands.exporting import ExportOptions, export

    export(run, to, out, ExportOptions(ema, raw, dtype, shard_size, license_, evaluation, overwrite))
    typer.echo(f"wrote {out}")
