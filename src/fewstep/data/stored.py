"""Images as they are stored, with the columns beside them, and what their headers say to people before training."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from fewstep.data.decoding import Cell, Unusable, opened
from fewstep.data.texts import find_column
from fewstep.errors import UserError

LOOKED_AT = 1000  # headers at most, so that a look takes seconds
LABELS = ("label", "labels", "class", "cls")
CAPTIONS = ("caption", "text", "txt", "prompt")


@dataclass(frozen=True)
class Stored:
    """Undecoded images by row; class indices (N,) int64 with the names of the classes, and captions, or None."""

    path: Path
    cells: Callable[[list[int]], list[Cell]]
    length: int
    columns: Mapping[str, Callable[[], Sequence[Any]]] = field(default_factory=dict)
    """What stands beside the images, by column; read when it is asked for."""
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of the classes, by the column of their indices."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where a column was found, if people may wonder."""
    labels: Tensor | None = None
    class_names: Sequence[str] | None = None
    captions: Sequence[str] | None = None
    told: str = ""
    """Where the captions were found."""

    def has(self, usual: Sequence[str]) -> bool:
        """Whether there is one of these columns."""
        return bool(set(usual) & {name.lower() for name in self.columns})

    def column(self, name: str) -> Sequence[Any]:
        """By its name; `json.punsafe` is a field of the JSON that stands beside each image. Raises UserError."""
        outer, _, inner = name.partition(".")
        if name in self.columns or outer not in self.columns:
            return self.columns[find_column([*self.columns], name, (), "column", self.path)]()
        cells = [cell if isinstance(cell, dict) else {} for cell in self.columns[outer]()]
        names = [f"{outer}.{key}" for key in dict.fromkeys(key for cell in cells for key in cell)]
        if name not in names:
            raise UserError(f"{self.path}: has no column {name!r}; it has {', '.join([*self.columns, *names[:20]])}")
        return [cell.get(inner) for cell in cells]

    def find(self, wanted: str | None, usual: Sequence[str], setting: str) -> str:
        """The column asked for, or the first usual one; raises UserError."""
        if wanted and wanted.partition(".")[0] in self.columns:
            return wanted
        return find_column([*self.columns], wanted, usual, setting, self.path)


def read_labels(stored: Stored, column: str | None) -> tuple[Tensor, Sequence[str] | None]:
    """Class indices (N,) int64 and the names of the classes, where they have some; names alone are sorted."""
    found = stored.find(column, LABELS, "data.label_column, or a folder for each class")
    cells, names = stored.column(found), stored.names.get(found)
    if cells and all(isinstance(cell, str) for cell in cells):
        numbered = all(cell.isdecimal() and cell.isascii() and len(cell) < 10 for cell in cells)
        names = None if numbered else sorted(set(cells))
        cells = [int(cell) for cell in cells] if names is None else list(map(names.index, cells))
    wrong = next((row for row, cell in enumerate(cells) if not isinstance(cell, int) or not 0 <= cell < 2**31), None)
    if wrong is not None:
        what = f"row {wrong} has {str(cells[wrong])[:40]!r}" if cells[wrong] is not None else f"row {wrong} has none"
        told = f"column {found!r} must hold class indices 0, 1, 2, ..., or names of classes"
        raise UserError(f"{stored.path}: {told}, but {what} (data.label_column)")
    return torch.tensor(cells, dtype=torch.int64), names


def read_captions(stored: Stored, column: str | None) -> tuple[list[str | None], str]:
    """The captions, None where one is missing or blank, and where they were found; raises UserError."""
    found = stored.find(column, CAPTIONS, "data.caption_column")
    cells = stored.column(found)
    wrong = next((cell for cell in cells if not isinstance(cell, str | None)), None)
    if wrong is not None:
        raise UserError(f"{stored.path}: column {found!r} holds {str(wrong)[:40]}, which is no text (data.caption_column)")
    return [cell if cell and cell.strip() else None for cell in cells], stored.places.get(found, "")


def describe(stored: Stored, source: str, size: int, channels: int, shrink: bool) -> str:
    """One line: what was found at `source`, and what a model of `size` pixels makes of it.

    Raises UserError if the model is smaller than most of the images, unless `shrink`.
    """
    sizes, num_grey = headers(stored)
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
    found = f"{stored.length:,} {kind} images{captioned}, {_sizes(sizes)}{looked}{_classes(stored)}"
    return f"{source}: {found}; {_done(sizes, num_grey, size, channels)}"


def headers(stored: Stored) -> tuple[Counter[tuple[int, int]], int]:
    """How often each (width, height) occurs among the images that are looked at, and how many of them are grey."""
    sizes: Counter[tuple[int, int]] = Counter()
    num_grey = 0
    for row in range(0, stored.length, -(-stored.length // LOOKED_AT)):
        try:
            with opened(stored.cells([row])[0], "") as header:
                sizes[header.size] += 1
                num_grey += header.mode[0] in "1LIF"
        except Unusable:
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
