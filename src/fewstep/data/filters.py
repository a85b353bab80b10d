"""Which images of a captioned source are used: the paper's filters of its LAION images, by size, safety and score."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.images import ImageSet, decoded
from fewstep.data.settings import DataSettings
from fewstep.data.stored import Stored
from fewstep.data.tables import open_table, read_captions
from fewstep.errors import UserError

UNSAFE = {"UNSAFE", "NSFW", "TRUE", "YES", "1"}
SAFE = {"SAFE", "UNLIKELY", "UNSURE", "FALSE", "NO", "0", ""}


@dataclass(frozen=True)
class Filter:
    """What an image must fulfil; the paper has 1024 pixels, nothing unsafe, and a score of 5.5 for the GAN's images."""

    min_side: int = 0
    """Smaller side of the stored image in pixels, at least."""
    unsafe_column: str | None = None
    """Drop what is true, UNSAFE or NSFW, or a score above `max_unsafe` here, and what has no value."""
    max_unsafe: float = 0.5
    aesthetic_column: str | None = None
    min_aesthetic: float | None = None
    """Smallest score in `aesthetic_column`."""

    def __post_init__(self) -> None:
        if (self.aesthetic_column is None) != (self.min_aesthetic is None):
            raise UserError("aesthetic-column and min-aesthetic: give both or neither")


def load_filtered(data: DataSettings, size: int, filter: Filter) -> tuple[ImageSet, dict[str, int]]:
    """The captioned RGB images that pass the filters on columns, and how many were dropped for which reason.

    Those that can't be read or are too small show themselves where they are fetched, by Unusable. Nothing is kept in
    memory. Raises UserError for whatever is wrong with the source or its columns.
    """
    path = Path(data.required)
    table, cells = open_table(data)
    captions = read_captions(table, data.caption_column, path)
    drop = {"without a caption": [caption is None for caption in captions]}
    if filter.unsafe_column:
        drop["unsafe"] = [_is_unsafe(cell, filter, path) for cell in _cells(table, filter.unsafe_column, path)]
    if filter.aesthetic_column and filter.min_aesthetic is not None:
        scores = [_score(cell, filter, path) for cell in _cells(table, filter.aesthetic_column, path)]
        drop[f"aesthetic score below {filter.min_aesthetic:g}"] = [not s >= filter.min_aesthetic for s in scores]
    reasons = [next((reason for reason in drop if drop[reason][row]), None) for row in range(len(captions))]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    told = [captions[row] or "" for row in kept]
    stored = Stored(lambda rows: cells([kept[row] for row in rows]), len(kept), captions=told)
    return decoded(stored, size, 3, path, filter.min_side), dict(Counter(reason for reason in reasons if reason))


def _cells(table: Any, column: str, path: Path) -> list[Any]:
    """A column; `json.punsafe` is a field of the JSON that stands beside each image in a WebDataset."""
    table = table if column in table.column_names else table.flatten()
    if column not in table.column_names:
        raise UserError(f"{path}: has no column {column!r}; it has {', '.join(table.column_names)}")
    return list(table[column][:])


def _is_unsafe(cell: Any, filter: Filter, path: Path) -> bool:
    if isinstance(cell, int | float):  # a truth value is 0 or 1
        return not cell <= filter.max_unsafe  # not a number is unsafe
    word = "NSFW" if cell is None else str(cell).strip().upper()
    if word not in UNSAFE | SAFE:
        raise UserError(f"{path}: column {filter.unsafe_column!r} holds {cell!r}, which is neither a flag nor a score")
    return word in UNSAFE


def _score(cell: Any, filter: Filter, path: Path) -> float:
    if cell is not None and not isinstance(cell, int | float):
        raise UserError(f"{path}: column {filter.aesthetic_column!r} holds {cell!r}, which is no number")
    return float("-inf") if cell is None else cell
