"""Undecoded images by row, and the columns beside them: labels and captions are found here, whatever the file is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.decoding import Cell
from fewstep.data.texts import find_column, some
from fewstep.errors import UserError

LABELS = ("label", "labels", "class", "cls")
CAPTIONS = ("caption", "text", "txt", "prompt")


@dataclass(frozen=True)
class Stored:
    """Undecoded images by row, with the labels and captions that were asked for."""

    path: Path
    cells: Callable[[list[int]], list[Cell]]
    length: int
    columns: Mapping[str, Callable[[], Sequence[Any]]]
    """What stands beside the images, by column; read when it is asked for."""
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of the classes, by the column of their indices."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where a column was found, for people, who may have meant another."""
    labels: Tensor | None = None
    """Class indices (N,) int64."""
    class_names: Sequence[str] | None = None
    captions: Sequence[str | None] | None = None
    """None where one is missing or blank."""
    told: str = ""
    """Where the captions were found."""

    def has(self, usual: Sequence[str]) -> bool:
        """Whether there is one of these columns."""
        return bool(set(usual) & {name.lower() for name in self.columns})

    def column(self, name: str) -> Sequence[Any]:
        """By its name; `json.punsafe` is a field of the JSON that stands beside each image. Raises UserError."""
        if name in self.columns:
            return self.columns[name]()
        outer, _, inner = name.partition(".")
        found = self.columns[outer]() if outer in self.columns else []
        cells = [cell if isinstance(cell, dict) else {} for cell in found]
        names = dict.fromkeys(f"{outer}.{key}" for cell in cells for key in cell)
        if name not in names:
            raise UserError(f"{self.path}: has no column {name!r}; it has {some([*self.columns, *names], 30)}")
        return [cell.get(inner) for cell in cells]

    def _find(self, wanted: str | None, usual: Sequence[str], what: str, more: str) -> str:
        """The column asked for, or the first usual one; raises UserError that says `more` of how to have one."""
        if wanted and wanted.partition(".")[0] in self.columns:
            return wanted
        return find_column([*self.columns], wanted, usual, what, f"data.{what[:-1]}_column", self.path, more)

    def with_labels(self, column: str | None) -> "Stored":
        """Raises UserError unless every image has a class index, or every one a name, which are sorted."""
        found = self._find(column, LABELS, "labels", ", or sort the images into a folder per class")
        cells, names = self.column(found), self.names.get(found)
        if all(isinstance(cell, str) for cell in cells):
            numbered = all(cell.isascii() and cell.isdecimal() and len(cell) < 10 for cell in cells)
            names = None if numbered else sorted(set(cells))
            cells = [int(cell) for cell in cells] if names is None else list(map(names.index, cells))
        wrong = next((row for row, cell in enumerate(cells) if type(cell) is not int or not 0 <= cell < 2**31), None)
        if wrong is not None:
            name, has = self.cells([wrong])[0].name or f"row {wrong}", str(cells[wrong])[:40]
            told = f"column {found!r} must hold class indices 0, 1, 2, ... or names, but {name} has {has}"
            raise UserError(f"{self.path}: {told} (data.label_column)")
        return replace(self, labels=torch.tensor(cells, dtype=torch.int64), class_names=names)

    def with_captions(self, column: str | None) -> "Stored":
        """Raises UserError where there is something else than text."""
        found = self._find(column, CAPTIONS, "captions", "; a folder has them in metadata.csv or in .txt files")
        cells = self.column(found)
        wrong = next((str(cell)[:40] for cell in cells if not isinstance(cell, str | None)), None)
        if wrong is not None:
            raise UserError(f"{self.path}: column {found!r} holds {wrong}, which is no text (data.caption_column)")
        captions = [cell if cell and cell.strip() else None for cell in cells]
        return replace(self, captions=captions, told=self.places.get(found, ""))
