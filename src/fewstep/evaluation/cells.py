"""The cells of a sweep over strength, steps and guidance scale: as a picture, as a table, and which one is the best."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.report import cell as text_of
from fewstep.metric_table import METRICS, cost
from fewstep.models.sampler import Sampler
from fewstep.pictures import grid

CLIP, SECONDS = "clip", "seconds"
SCORES = (CLIP, "prompt_accuracy", "accuracy", "two_objects")
"""The first of these that was measured names the best cell: what is most diverse, or quickest, may be noise."""
SHOWN, ACROSS = 4, 2  # pictures of a cell, and how many of them stand side by side


@dataclass(frozen=True)
class Cell:
    """What one strength (None without a LoRA) and one sampler draw, and its measures: neither of what is not finite."""

    strength: float | None
    sampler: Sampler
    values: dict[str, float] = field(default_factory=dict)
    pictures: Tensor | None = None  # uint8 (N, C, H, W)

    def __str__(self) -> str:
        return f"{self.sampler}" + ("" if self.strength is None else f" at strength {self.strength:g}")

    @property
    def settings(self) -> dict[str, float | int | None]:
        return {"strength": self.strength, "steps": self.sampler.num_steps, "cfg": self.sampler.guidance_scale}

    @property
    def facts(self) -> dict[str, Any]:
        """All but the pictures."""
        return {**self.settings, "nfe": self.sampler.nfe, **self.values}


def choose_measure(cells: Sequence[Cell], asked: str | None) -> str | None:
    """What the best cell is named by: as asked, else the first of `SCORES`; raises UserError if it was not measured."""
    there = next((list(each.values) for each in cells if each.values), [])
    if asked and there and asked not in there:
        needs = "--clip names a folder of CLIP" if asked == CLIP else f"there is {', '.join(there)}"
        raise UserError(f"--best {asked}: is not measured here; {needs}")
    return asked or next((name for name in SCORES if name in there), None)


def best_of(cells: Sequence[Cell], measure: str) -> Cell:
    """The best by a measure; of equals the one with the fewest calls of the network."""

    def rank(each: Cell) -> tuple[float, int]:
        value = each.values[measure]
        return value if measure == SECONDS else cost(measure, value), each.sampler.nfe

    return min((each for each in cells if each.values), key=rank)


def table(cells: Sequence[Cell]) -> str:
    """In Markdown; what is nowhere measured has no column."""
    names = [name for name in dict.fromkeys((CLIP, *METRICS, SECONDS)) if any(name in each.values for each in cells)]
    axes = [*(name for name, value in cells[0].settings.items() if value is not None), "nfe"]
    lines = [[*axes, *("s/image" if name == SECONDS else name.replace("_", " ") for name in names)]]
    for each in cells:
        lines.append([f"{each.facts[name]:g}" for name in axes] + [text_of(n, each.values.get(n)) for n in names])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    padded = (map(str.rjust, line, widths) for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def picture(cells: Sequence[Cell], measure: str | None, best: Cell | None) -> Image.Image:
    """A column per strength, and a row per number of steps and guidance scale; of one strength, a column per scale."""
    several = len({each.strength for each in cells}) > 1

    def place(each: Cell) -> tuple[str, str]:
        steps = f"{each.sampler.num_steps} step{'s' * (each.sampler.num_steps > 1)}"
        scale = f"CFG {each.sampler.guidance_scale:g}"
        return (f"strength {each.strength:g}", f"{steps}\n{scale}") if several else (scale, steps)

    def label(each: Cell) -> str:
        told = f"{measure.replace('_', ' ')} {text_of(measure, each.values.get(measure))}" if measure else ""
        return ("best: " if each is best else "") + (told if each.values else "not finite")

    by_place = {place(each): each for each in cells}
    heads, sides = (list(dict.fromkeys(names)) for names in zip(*by_place, strict=True))
    ordered = [by_place[head, side] for side in sides for head in heads]
    black = next(torch.zeros_like(each.pictures) for each in cells if each.pictures is not None)
    tiles = [_tile((black if each.pictures is None else each.pictures)[:SHOWN]) for each in ordered]
    return grid(torch.stack(tiles), len(heads), list(map(label, ordered)), heads, sides=sides)


def _tile(pictures: Tensor) -> Tensor:
    """uint8 (N, C, H, W) as one (C, h, w), `ACROSS` in a row."""
    array = np.array(grid(pictures, min(ACROSS, len(pictures))))
    return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)
