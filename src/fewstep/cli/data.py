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
