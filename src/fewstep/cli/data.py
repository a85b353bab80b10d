"""data: what prepares data."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Device, data


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


@data.command(
    epilog="Example: fewstep data pairs --teacher sdxl --num 10000 --sampler euler:50@8 --prompts p.txt --out pairs"
)
def pairs(
    teacher: Annotated[str, typer.Option(help="Run folder, model folder, .safetensors file or hub id of the teacher.")],
    num: Annotated[int, typer.Option(min=1, help="Pairs of noise and image; paper: 10000.")],
    sampler: Annotated[
        str,
        typer.Option(help="heun:18 for EDM; euler:50@8 (paper), ddim, dpm++, unipc for text to image; @: CFG."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the pairs; the same command goes on after a stop.")],
    prompts: Annotated[str | None, typer.Option(help="Prompts, in turn: a .txt, .csv, .tsv or .parquet file.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="By default prompt, caption or text.")] = None,
    classes: Annotated[str, typer.Option(help="Of a teacher with classes: turn, or uniform at random.")] = "turn",
    seed: Annotated[int, typer.Option(min=0, help="The noise of pair i is a function of seed and i.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pairs drawn at once; by default by size.")] = None,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (paper) of the teacher.")] = "float32",
    teacher_config: Annotated[str | None, typer.Option(help="For a single file: a diffusers folder or hub id.")] = None,
) -> None:
    """Draw pairs of noise and image by a teacher's sampler; under torchrun every rank makes its share."""
    from fewstep.commands.pairs import Conditions, pairs

    conditions = Conditions(prompts, prompt_column, classes)
    pairs(teacher, num, sampler, out, conditions, seed, batch_size, device, precision, teacher_config)
