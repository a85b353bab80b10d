"""`fewstep data`: prepares data for text-to-image runs."""

from dataclasses import asdict
from pathlib import Path

from fewstep.commands.runs import check_writable, open_model, pick_device
from fewstep.data.filters import Filter, load_filtered
from fewstep.data.latents import describe_dropped, write_latents
from fewstep.errors import Interrupted, UserError
from fewstep.networks.latent_model import LatentModel
from fewstep.runtime.tracking import progress_bar


def latents(
    model_path: Path,
    source: str,
    out: Path,
    filter: Filter,
    image_column: str | None,
    caption_column: str | None,
    split: str,
    batch_size: int,
    seed: int,
    device: str,
) -> None:
    """Encodes the images of `source` that pass the filter into the folder `out`, or goes on with it; prints the counts.

    What can't be read and what has no caption is left out and counted.
    """
    check_writable(out)
    model = open_model(model_path)
    if not isinstance(model, LatentModel):
        raise UserError(f"{model_path}: a pixel model has no latents; name a text-to-image model")
    model.autoencoder.to(pick_device(device))
    images, dropped = load_filtered(source, model.image_size, filter, image_column, caption_column, split)
    if not images.length:
        raise UserError(f"{source}: no image is left; {describe_dropped(dropped)}")
    columns = {"image_column": image_column, "caption_column": caption_column, "split": split}
    settings = {"source": str(Path(source).absolute()), **columns, **asdict(filter)}
    try:
        with progress_bar("encode images", images.length) as show:
            description = write_latents(
                images,
                model.encode_images,
                model.latent_space,
                out,
                seed,
                settings,
                dropped,
                batch_size,
                lambda done: show(done, {}),
            )
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the same command goes on with {out}") from None
    total = images.length + sum(dropped.values())
    print(f"kept {description['count']:,} of {total:,} images; {describe_dropped(description['dropped'])}")
