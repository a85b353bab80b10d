"""Undecoded images by row, and the columns beside them: labels and captions are found here, whatever the file is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.decoding import Cell
from fewstep.data.texts import find_column
from fewstep.errors import UserError

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
        if name in self.columns:
            return self.columns[name]()
        found = self.columns[outer]() if outer in self.columns else []
        cells = [cell if isinstance(cell, dict) else {} for cell in found]
        names = dict.fromkeys(f"{outer}.{key}" for cell in cells for key in cell)
        if name not in names:
            raise UserError(f"{self.path}: has no column {name!r}; it has {', '.join([*self.columns, *names][:30])}")
        return [cell.get(inner) for cell in cells]

    def find(self, wanted: str | None, usual: Sequence[str], what: str, more: str) -> str:
        """The column asked for, or the first usual one; raises UserError that says `more` of how to have one."""
        if wanted and wanted.partition(".")[0] in self.columns:
            return wanted
        return find_column([*self.columns], wanted, usual, what, f"data.{what[:-1]}_column", self.path, more)


def read_labels(stored: Stored, column: str | None) -> tuple[Tensor, Sequence[str] | None]:
    """Class indices (N,) int64 and the names of the classes, where they have some; names alone are sorted."""
    found = stored.find(column, LABELS, "labels", ", or sort the images into a folder per class")
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
    found = stored.find(column, CAPTIONS, "captions", "; a folder has them in metadata.csv or in .txt files")
    cells = stored.column(found)
    wrong = next((cell for cell in cells if not isinstance(cell, str | None)), None)
    if wrong is not None:
        raise UserError(
            f"{stored.path}: column {found!r} holds {str(wrong)[:40]}, which is no text (data.caption_column)"
        )
    return [cell if cell and cell.strip() else None for cell in cells], stored.places.get(found, "")
