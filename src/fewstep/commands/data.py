"""`fewstep data`: prepares data for text-to-image runs."""

from dataclasses import asdict, fields, replace
from pathlib import Path

from pydantic import ValidationError

from fewstep.commands.options_files import Latents
from fewstep.commands.places import check_writable, tell_done
from fewstep.commands.runs import pick_device, place_of_rank
from fewstep.data.filters import Filter, load_filtered
from fewstep.data.images import content_digest
from fewstep.data.latents import describe_dropped, write_latents
from fewstep.data.settings import DataSettings
from fewstep.embedded.sources import open_captioned_images, origin
from fewstep.errors import UserError
from fewstep.models.autoencoder import Autoencoder, load_autoencoder
from fewstep.models.loading.pretrained import open_model
from fewstep.recipes.loading import read_run_recipe
from fewstep.runtime.checkpoint import RECIPE
from fewstep.runtime.distributed import place
from fewstep.runtime.runs import find
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.stopping import advising


def latents(given: Latents) -> None:
    """Encodes the images that pass the filter into a folder, or goes on with it; prints the counts.

    What can't be read and what has no caption is left out and counted.
    """
    check_writable(given.out)
    model = open_encoder(given.model, given.config)
    rank, num_ranks, device = place_of_rank(pick_device(given.device))
    model.to(device)
    filter = Filter(**{field.name: getattr(given, field.name) for field in fields(Filter)})
    columns = {name: getattr(given, name) for name in ("image_column", "caption_column", "split", "background")}
    try:
        data = DataSettings(source=given.source, **columns)
    except ValidationError as error:
        raise UserError(f"--background {given.background}: no colour; write white, #8090a0 or rgb(0, 0, 0)") from error
    if data.source != "shapes":  # all of which pass
        images, dropped = load_filtered(data, model.image_size, filter)
        files = {"content": content_digest(data) or ""}
    else:
        images, dropped, files = open_captioned_images(data, model.image_size), {}, {}
    if not images.length:
        raise UserError(f"{given.source}: no image is left; {describe_dropped(dropped)}")
    settings = {"source": origin(given.source), **files, **columns, **asdict(filter)}
    made = (images, model.encode_images, {**model.latent_space, "seed": given.seed, **settings}, given.out, dropped)
    quiet = None if rank == 0 else lambda done, metrics: None
    bar = progress_bar("encode images", -(-images.length // num_ranks), quiet)
    with advising(f"the same command goes on with {given.out}"), bar as show:
        description = write_latents(*made, given.batch_size, lambda done: show(done, {}), (rank, num_ranks))
    if "count" not in description:
        print(f"{given.out}: rank {rank} of {num_ranks} has made its share; others are not done yet")
        return
    total = images.length + sum(dropped.values())
    print(f"kept {description['count']:,} of {total:,} images; {describe_dropped(description['dropped'])}")
    tell_done(f"{given.out}, {description['count']:,} latents", f"distill RECIPE --set data.source={given.out}")


def encode_first(autoencoder: Path, source: str, num: int, out: Path, report: Report) -> None:
    """Encodes the first `num` captioned images of a source, or of several ranks each its share, or goes on with it."""
    model = open_encoder(autoencoder)
    images = open_captioned_images(DataSettings(source=source), model.image_size)
    images = replace(images, length=min(images.length, num))
    plan = {**model.latent_space, "seed": 0, "source": source}
    write_latents(images, model.encode_images, plan, out, {}, 100, lambda done: report(done, {}), place())


def open_encoder(path: Path, config: str | None = None) -> Autoencoder:
    """The autoencoder of a text-to-image model, or of a run that trained one; `config` is a single file's."""
    if (path / RECIPE).is_file() and read_run_recipe(path / RECIPE).kind == "teach-autoencoder":
        return load_autoencoder(find(path).folder)
    model = open_model(path, config)
    if model.kind != "text":
        raise UserError(f"{path}: a pixel model has no latents; name a text-to-image model")
    return Autoencoder(model.autoencoder, model.image_size)
