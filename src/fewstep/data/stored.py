"""Images as they are stored, and what their headers say to people before anything is trained on them."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from PIL import Image
from torch import Tensor

from fewstep.errors import UserError

LOOKED_AT = 1000  # headers at most, so that a look takes seconds
BROKEN = (OSError, TypeError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
"""What PIL and its decoders raise on damaged files."""
Cells = Callable[[list[int]], list[Any]]
"""{"bytes": or None, "path": of the file, or in an archive} of each of the rows."""


@dataclass(frozen=True)
class Stored:
    """Undecoded images by row; class indices (N,) int64 with the names of the classes, and captions, or None."""

    cells: Cells
    length: int
    labels: Tensor | None = None
    class_names: Sequence[str] | None = None
    captions: Sequence[str] | None = None


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


def look(source: str) -> Look:
    """Looks at files that `data.source` may name; raises UserError for whatever is wrong with them."""
    from fewstep.data.edm_zip import is_edm_set, open_edm_set
    from fewstep.data.settings import DataSettings
    from fewstep.data.tables import open_table, read_captions, read_labels

    path, captioned = Path(source), False
    if is_edm_set(path):
        stored = open_edm_set(path)
    else:
        table, cells = open_table(DataSettings(source=source))
        captioned = bool({"caption", "text", "txt", "prompt"} & set(table.column_names))
        captioned = captioned and None not in read_captions(table, None, path)
        labelled = bool({"label", "labels", "class", "cls"} & set(table.column_names))
        stored = Stored(cells, len(table), *read_labels(table, None, path, labelled))
    sizes, num_grey = _look(stored)
    counts = [] if stored.labels is None else stored.labels.bincount().tolist()
    names = stored.class_names or [str(label) for label in range(len(counts))] or None
    return Look(stored.length, sizes, num_grey == sizes.total(), names, counts, captioned)


def open_cell(cell: Any) -> Image.Image:
    """The picture with only its header read; raises one of BROKEN."""
    return Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))


def describe(stored: Stored, source: str, size: int, channels: int, shrink: bool) -> str:
    """One line: what was found at `source`, and what a model of `size` pixels makes of it.

    Raises UserError if the model is smaller than most of the images, unless `shrink`.
    """
    sizes, num_grey = _look(stored)
    if not sizes:
        return f"{source}: {stored.length:,} images"  # whoever fetches them says what is wrong
    short = median_low(min(each) for each in sizes.elements())
    if short > size and not shrink:
        fitting = max(size, 2 ** (min(short, 64).bit_length() - 1))
        told = f"say what size is meant, for example --set model.image_size={fitting}"
        raise UserError(f"{source}: images of {_sizes(sizes)} would be shrunk to {size}x{size}; {told}")
    kind = "grey" if num_grey == sizes.total() else "grey and RGB" if num_grey else "RGB"
    looked = f" ({sizes.total():,} looked at)" if sizes.total() < stored.length else ""
    captioned = " with captions" if stored.captions is not None else ""
    found = f"{stored.length:,} {kind} images{captioned}, {_sizes(sizes)}{looked}{_classes(stored)}"
    return f"{source}: {found}; {_done(sizes, num_grey, size, channels)}"


def _look(stored: Stored) -> tuple[Counter[tuple[int, int]], int]:
    """How often each (width, height) occurs among the images that are looked at, and how many of them are grey."""
    sizes: Counter[tuple[int, int]] = Counter()
    num_grey = 0
    for row in range(0, stored.length, -(-stored.length // LOOKED_AT)):
        try:
            with open_cell(stored.cells([row])[0]) as header:
                sizes[header.size] += 1
                num_grey += header.mode[0] in "1LIF"
        except BROKEN:
            continue
    return sizes, num_grey


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    """`320x240 to 4032x3024, mostly 1024x768`."""
    ordered = sorted(sizes, key=lambda each: (each[0] * each[1], each))
    smallest, largest, common = (f"{w}x{h}" for w, h in (ordered[0], ordered[-1], sizes.most_common(1)[0][0]))
    return smallest if len(sizes) == 1 else f"{smallest} to {largest}, mostly {common}"


def _classes(stored: Stored) -> str:
    """`; 2 classes: 0 cat (120), 1 dog (80)`, of many the first and the last."""
    names = stored.class_names
    if stored.labels is None:
        return f"; its {len(names)} classes are not used (model.num_classes is 0)" if names and len(names) > 1 else ""
    told = [
        " ".join(part for part in (str(label), names[label] if names else "", f"({number:,})") if part)
        for label, number in enumerate(stored.labels.bincount().tolist())
    ]
    return f"; {len(told)} classes: {', '.join(told if len(told) <= 10 else [*told[:3], '...', told[-1]])}"


def _done(sizes: Counter[tuple[int, int]], num_grey: int, size: int, channels: int) -> str:
    """`resized and cropped to 64x64, made grey`."""
    resized = "resized" if any(min(each) != size for each in sizes) else ""
    cropped = "cropped" if any(width != height for width, height in sizes) else ""
    fitted = " and ".join(part for part in (resized, cropped) if part)
    coloured = {1: "made grey" if num_grey < sizes.total() else "", 3: "made RGB" if num_grey else ""}[channels]
    parts = [f"{fitted} to {size}x{size}" if fitted else "", coloured]
    return ", ".join(part for part in parts if part) or "taken as they are"
