"""What the headers of stored images say to people before anything is trained on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from fewstep.data.columns import CAPTIONS, LABELS, Stored
from fewstep.data.decoding import Unusable, opened
from fewstep.data.settings import DataSettings
from fewstep.data.tables import open_stored
from fewstep.data.texts import some
from fewstep.errors import UserError

LOOKED_AT = 1000  # headers at most, so that a look takes seconds


@dataclass(frozen=True)
class Look:
    """What a source holds, by its index and some headers."""

    num_images: int
    sizes: Counter[tuple[int, int]]
    """How often each (width, height) occurs among the images that were looked at."""
    grey: bool
    """Whether all of these are."""
    class_names: Sequence[str] | None
    """By label; numbers where the source has labels without names; None without classes."""
    counts: list[int]
    """Images of each class."""
    captioned: bool
    """Whether every image has a caption."""


def look(source: str) -> Look:
    """Looks at files that `data.source` may name; raises UserError for whatever is wrong with them."""
    stored = open_stored(DataSettings(source=source))
    stored = stored.with_labels(None) if stored.has(LABELS) else stored
    captions = stored.with_captions(None).captions if stored.has(CAPTIONS) else None
    sizes, num_grey, _ = _headers(stored)
    counts = [] if stored.labels is None else stored.labels.bincount().tolist()
    names = stored.class_names or [str(label) for label in range(len(counts))] or None
    captioned = captions is not None and None not in captions
    return Look(stored.length, sizes, num_grey == sizes.total(), names, counts, captioned)


def describe(stored: Stored, data: DataSettings, size: int, channels: int, shrink: bool, num_classes: int = 0) -> str:
    """One line: what was found at the source, and what a model of `size` pixels makes of it.

    Raises UserError if the model is smaller than most of the images, unless `shrink`.
    """
    source, (sizes, num_grey, num_clear) = data.required, _headers(stored)
    if not sizes:
        return f"{source}: {stored.length:,} images"  # whoever fetches them says what is wrong
    short = median_low(min(each) for each in sizes.elements())
    if short > size and not shrink:
        fitting = max(size, 2 ** (min(short, 64).bit_length() - 1))
        told = f"say what size is meant, for example --set model.image_size={fitting}"
        raise UserError(f"{source}: images of {_sizes(sizes)} would be shrunk to {size}x{size}; {told}")
    kind = "grey" if num_grey == sizes.total() else "grey and RGB" if num_grey else "RGB"
    looked = f" ({sizes.total():,} looked at)" if sizes.total() < stored.length else ""
    captioned = f" with captions{stored.told}" if stored.captions is not None else ""
    ground = f", what is transparent made {data.background}" if num_clear else ""
    found = f"{stored.length:,} {kind} images{captioned}, {_sizes(sizes)}{looked}{_classes(stored, num_classes)}"
    return f"{source}: {found}; {_done(sizes, num_grey, size, channels)}{ground}"


def _headers(stored: Stored) -> tuple[Counter[tuple[int, int]], int, int]:
    """How often each (width, height) occurs among the images that are looked at; how many are grey, and transparent."""
    sizes: Counter[tuple[int, int]] = Counter()
    num_grey = num_clear = 0
    for row in range(0, stored.length, -(-stored.length // LOOKED_AT)):
        try:
            with opened(stored.cells([row])[0], "") as header:
                sizes[header.size] += 1
                num_grey += header.mode[0] in "1LIF"
                num_clear += header.has_transparency_data
        except Unusable:
            continue
    return sizes, num_grey, num_clear


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    """`320x240 to 4032x3024, mostly 1024x768`."""
    ordered = sorted(sizes, key=lambda each: (each[0] * each[1], each))
    smallest, largest, common = (f"{w}x{h}" for w, h in (ordered[0], ordered[-1], sizes.most_common(1)[0][0]))
    return smallest if len(sizes) == 1 else f"{smallest} to {largest}, mostly {common}"


def _classes(stored: Stored, num_classes: int) -> str:
    """`; 2 classes: 0 cat (120), 1 dog (80); no image of class 2 owl`, of many the first and the last."""
    names = stored.class_names
    if stored.labels is None:
        return f"; its {len(names)} classes are not used (model.num_classes is 0)" if names and len(names) > 1 else ""
    counts = dict(enumerate(stored.labels.bincount(minlength=num_classes).tolist()))
    named = {label: f"{label} {names[label]}" if names else str(label) for label in counts}
    told = [f"{named[label]} ({number:,})" for label, number in counts.items() if number]
    lacking = [named[label] for label, number in counts.items() if not number]
    found = f"; {len(told)} classes: {', '.join(told if len(told) <= 10 else [*told[:3], '...', told[-1]])}"
    return found + (f"; no image of class {some(lacking)}" if lacking else "")


def _done(sizes: Counter[tuple[int, int]], num_grey: int, size: int, channels: int) -> str:
    """`resized and cropped to 64x64, made grey`."""
    resized = "resized" if any(min(each) != size for each in sizes) else ""
    cropped = "cropped" if any(width != height for width, height in sizes) else ""
    fitted = " and ".join(part for part in (resized, cropped) if part)
    coloured = {1: "made grey" if num_grey < sizes.total() else "", 3: "made RGB" if num_grey else ""}[channels]
    parts = [f"{fitted} to {size}x{size}" if fitted else "", coloured]
    return ", ".join(part for part in parts if part) or "taken as they are"


def colours_and_size(stored: Stored) -> tuple[list[tuple[int, int]], bool]:
    """The sizes (width, height) among the images that are looked at, and whether all of these are grey."""
    sizes, num_grey, _ = _headers(stored)
    return list(sizes), num_grey == sizes.total()
