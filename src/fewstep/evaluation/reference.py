"""The real images that a judge compares with: gathered once, and what was gathered kept beside the runs."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.data.columns import LABELS
from fewstep.data.decoding import Unusable
from fewstep.data.images import ImageSet, load_images
from fewstep.data.latents import is_latents
from fewstep.data.listing import list_files
from fewstep.data.settings import DataSettings
from fewstep.data.shards import below, open_shard, save_shard
from fewstep.data.tables import open_stored
from fewstep.embedded import shapes
from fewstep.embedded.sources import Pictures, open_captioned_images, open_images, origin
from fewstep.errors import UserError
from fewstep.evaluation.gathering import Gathered, Sums, fitted
from fewstep.networks.fingerprint import fingerprint
from fewstep.seeding import generator

FETCH, DRAWN = 16, 32  # images at once
IN_MEMORY = 2**27  # bytes of images that are decoded once
TWO_OBJECT_PROMPTS = 80  # beside the 240 of one object, as in the training pictures


class Reals(NamedTuple):
    """Real images, of which nothing is gathered yet."""

    batches: Callable[[], Iterator[Tensor]]
    num: int
    known: str  # a hash of what the images are
    prompts: list[str]  # of each, in turn: as long as the images that came
    least: int  # images, for a judgement
    pictures: Tensor | None = None  # to show in the place of the first
    labels: Tensor | None = None  # (num,), where the images have classes


NO_REALS = Reals(lambda: iter(()), 0, "", [], 0)
"""Of which others have told what they are: a file of statistics."""


def open_at(data: DataSettings, model: Any, size: int, labelled: bool) -> ImageSet:
    """The images that a model was taught on, or others, at another size than its own; its classes where they are known.

    Raises UserError if they must be `labelled` and are not.
    """
    embedded = data.source == "digits"
    known = embedded or labelled or open_stored(data).has(LABELS)
    classes = (model.num_classes, model.class_names) if known else ()
    pictures = Pictures(model.image_size if embedded else size, model.channels, *classes)
    return _fitted(open_images(data, pictures, in_memory=IN_MEMORY), size)


def open_captioned_at(data: DataSettings, model_size: int, size: int, alone: bool) -> ImageSet:
    """Those of a text-to-image model; `alone` they need no captions."""
    if origin(data.required) == "shapes":
        return _fitted(open_captioned_images(data, model_size), size)
    if alone and not is_latents(Path(data.required)):
        return load_images(data, size, 3, in_memory=IN_MEMORY)
    return open_captioned_images(data, size, in_memory=IN_MEMORY)


def _fitted(images: ImageSet, size: int) -> ImageSet:
    return replace(images, fetch=lambda indices: fitted(images.fetch(indices), size))


def kept(path: Path, make: Callable[[], Gathered]) -> Gathered:
    """What the file holds, or what `make` gathers, which is kept there; a file that can't be read is made again."""
    if path.exists():
        with suppress(UserError, ValueError, KeyError, TypeError):
            return _load(path)
    made = make()
    sums = {name: made.sums(name) for name in made.groups}
    tensors = {f"numbers.{name}": found for name, found in made.numbers.items()} | {"pictures": made.pictures}
    tensors |= {f"total.{name}": each.total for name, each in sums.items()}
    tensors |= {f"products.{name}": each.products for name, each in sums.items()}
    save_shard(path, tensors, {"count": made.count, "prompts": list(made.prompts), "name": path.name})
    return made


def _load(path: Path) -> Gathered:
    tensors, facts = open_shard(path)
    numbers, totals, products = (below(tensors, kind) for kind in ("numbers.", "total.", "products."))
    groups: dict[str, list[Sums]] = {}
    for name, total in totals.items():
        sums, width = Sums(facts["count"], total, products[name]), numbers[name].shape[1]
        if sums.products.shape != (width, width) or not (sums.products + sums.total).isfinite().all():
            raise ValueError("damaged")
        groups[name] = [sums]
    if facts["name"] != path.name:
        raise ValueError("of other images or features")
    return Gathered(facts["count"], groups, numbers, tensors["pictures"], facts["prompts"])


def place(folder: Path, kind: str, data: DataSettings, *facts: object) -> Path:
    """Where something is kept that follows from a data source and from further facts, by their repr."""
    digest = fingerprint([], data, *facts)  # two folders may be called train
    return folder / f"{kind}-{Path(str(data.source)).stem}-{digest}.safetensors"


def identity(images: ImageSet, data: DataSettings) -> str:
    """A hash of what a set is known to be without decoding it: its files, number, labels and captions."""
    source = Path(str(data.source))
    files = map(source.joinpath, list_files(source)) if source.is_dir() else [source]
    stats = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file())
    labels = None if images.labels is None else images.labels.tolist()
    return hashlib.blake2b(repr((images.length, labels, list(images.captions or ()), stats)).encode()).hexdigest()


def random_order(images: ImageSet) -> Tensor:
    return torch.randperm(images.length, generator=generator(0, "reference"))


def labelled_batches(images: ImageSet, num: int) -> Iterator[Tensor]:
    """`num` of the images in random order."""
    return (images.fetch(part) for part in random_order(images)[:num].split(FETCH))


def captioned_batches(images: ImageSet, num: int, captions: list[str]) -> Iterator[Tensor]:
    """At most `num` of the images in random order, whose captions are appended; without what latents leave out too."""
    usable = islice(filter(None, (_usable(images, index) for index in random_order(images))), num)
    while batches := list(islice(usable, FETCH)):
        captions += [batch["caption"][0] for batch in batches]
        yield torch.cat([batch["image"] for batch in batches])


def _usable(images: ImageSet, index: Tensor) -> dict[str, Any]:
    with suppress(Unusable):
        return images.batch(index[None])
    return {}


def drawn_batches(prompts: list[str], num: int) -> Iterator[Tensor]:
    """`num` pictures of the embedded shapes, drawn for the prompts in turn."""
    scenes = [scene for prompt in prompts if (scene := shapes.parse(prompt))]
    draws = generator(0, "reference")
    for first in range(0, num, DRAWN):
        yield shapes.render([scenes[i % len(scenes)] for i in range(first, min(first + DRAWN, num))], draws)


def evaluation_prompts() -> list[str]:
    """The prompts that models of the embedded shapes are judged on: one object and two objects, mixed."""
    one, two = shapes.one_object_scenes(), shapes.two_object_scenes(TWO_OBJECT_PROMPTS)
    share = len(one) // len(two)
    mixed = [scene for index, last in enumerate(two) for scene in (*one[index * share : (index + 1) * share], last)]
    return [scene.caption for scene in mixed]
