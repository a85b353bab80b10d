"""Which images of a captioned source are used: the paper's filters of its LAION images, by size, safety and score."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.data.images import ImageSet, decoded
from fewstep.data.settings import DataSettings
from fewstep.data.tables import open_stored
from fewstep.errors import UserError

UNSAFE = {"UNSAFE", "NSFW", "TRUE", "YES"}
SAFE = {"SAFE", "UNLIKELY", "UNSURE", "FALSE", "NO", ""}


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
    stored, path = open_stored(data).with_captions(data.caption_column), Path(data.required)
    captions = stored.captions or []
    drop = {"without a caption": [caption is None for caption in captions]}
    if filter.unsafe_column:
        drop["unsafe"] = [_is_unsafe(cell, filter, path) for cell in stored.column(filter.unsafe_column)]
    if filter.aesthetic_column and filter.min_aesthetic is not None:
        scores = [_score(cell, filter, path) for cell in stored.column(filter.aesthetic_column)]
        drop[f"aesthetic score below {filter.min_aesthetic:g}"] = [not s >= filter.min_aesthetic for s in scores]
    reasons = [next((reason for reason in drop if drop[reason][row]), None) for row in range(stored.length)]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    left = replace(stored, length=len(kept), captions=[captions[row] for row in kept])
    left = replace(left, cells=lambda rows: stored.cells([kept[row] for row in rows]))
    return decoded(left, data, size, 3, filter.min_side), dict(Counter(reason for reason in reasons if reason))


def _is_unsafe(cell: Any, filter: Filter, path: Path) -> bool:
    number = _number(cell)
    if number is not None:  # a truth value is 0 or 1
        return not number <= filter.max_unsafe  # not a number is unsafe
    word = "NSFW" if cell is None else str(cell).strip().upper()
    if word not in UNSAFE | SAFE:
        raise UserError(f"{path}: column {filter.unsafe_column!r} holds {cell!r}, which is neither a flag nor a score")
    return word in UNSAFE


def _score(cell: Any, filter: Filter, path: Path) -> float:
    number = float("-inf") if cell is None else _number(cell)
    if number is None:
        raise UserError(f"{path}: column {filter.aesthetic_column!r} holds {cell!r}, which is no number")
    return number


def _number(cell: Any) -> float | None:
    """Of a number, or of text that is one, as all of a .csv is text."""
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
