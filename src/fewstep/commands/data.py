"""`fewstep data`: prepares data for text-to-image runs."""

from dataclasses import asdict
from pathlib import Path

from fewstep.commands.runs import check_writable, pick_device
from fewstep.data.filters import Filter, load_filtered
from fewstep.data.images import ImageSet
from fewstep.data.latents import describe_dropped, write_latents
from fewstep.data.settings import DataSettings
from fewstep.data.tables import files_digest
from fewstep.embedded.sources import open_captioned_images, origin
from fewstep.errors import Interrupted, UserError
from fewstep.models.autoencoder import Autoencoder, load_autoencoder
from fewstep.models.loading.pretrained import open_model
from fewstep.recipes.loading import read_run_recipe
from fewstep.runtime.checkpoint import RECIPE
from fewstep.runtime.runs import find
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
    model = open_encoder(model_path)
    model.to(pick_device(device))
    images, dropped = _open_source(source, model.image_size, filter, image_column, caption_column, split)
    if not images.length:
        raise UserError(f"{source}: no image is left; {describe_dropped(dropped)}")
    columns = {"image_column": image_column, "caption_column": caption_column, "split": split}
    files = {} if source == "shapes" else {"files": files_digest(Path(source))}
    settings = {"source": origin(source), **files, **columns, **asdict(filter)}
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


def open_encoder(path: Path) -> Autoencoder:
    """The autoencoder of a text-to-image model, or of a run that trained one."""
    if (path / RECIPE).is_file() and read_run_recipe(path / RECIPE).kind == "teach-autoencoder":
        return load_autoencoder(find(path).folder)
    model = open_model(path)
    if model.kind != "text":
        raise UserError(f"{path}: a pixel model has no latents; name a text-to-image model")
    return Autoencoder(model.autoencoder, model.image_size)


def _open_source(
    source: str, size: int, filter: Filter, image_column: str | None, caption_column: str | None, split: str
) -> tuple[ImageSet, dict[str, int]]:
    """The images that pass the filter, and how many were dropped for which reason; all of the embedded shapes pass."""
    if source == "shapes":
        return open_captioned_images(DataSettings(source=source), size), {}
    return load_filtered(source, size, filter, image_column, caption_column, split)
