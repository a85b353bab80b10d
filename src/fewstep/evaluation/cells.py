"""The cells of a sweep over strength, steps and guidance scale: as a picture, as tables, and which one is the best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

from fewstep.errors import UserError
from fewstep.evaluation.report import cell as text_of
from fewstep.metric_table import METRICS, lower_is_better
from fewstep.models.sampler import Sampler
from fewstep.pictures import grid

CLIP, SECONDS = "clip", "seconds"
SCORES = (CLIP, "prompt_accuracy", "accuracy", "two_objects")
"""The first of these that was measured names the best cell: what is most diverse, or quickest, may be noise."""
SHOWN, ACROSS = 4, 2  # pictures of a cell, and how many of them stand side by side
WIDTH = 96  # pixels of a picture, to which small ones are enlarged


@dataclass(frozen=True)
class Cell:
    """What was drawn with one strength (None without a LoRA) and one sampler, and what was measured of it."""

    strength: float | None
    sampler: Sampler
    values: dict[str, float]
    pictures: Tensor  # uint8 (N, C, H, W)

    @property
    def settings(self) -> dict[str, float | int | None]:
        return {"strength": self.strength, "steps": self.sampler.num_steps, "cfg": self.sampler.guidance_scale}

    @property
    def facts(self) -> dict[str, Any]:
        """All but the pictures."""
        return {**self.settings, "nfe": self.sampler.nfe, **self.values}


def choose_measure(cells: Sequence[Cell], asked: str | None) -> str | None:
    """What the best cell is named by: as asked, else the first of `SCORES`; raises UserError if it was not measured."""
    there = [name for name in cells[0].values if all(name in each.values for each in cells)]
    if asked and asked not in there:
        needs = "--clip names a folder of CLIP" if asked == CLIP else f"there is {', '.join(there)}"
        raise UserError(f"--best {asked}: is not measured here; {needs}")
    return asked or next((name for name in SCORES if name in there), None)


def best_of(cells: Sequence[Cell], measure: str) -> Cell:
    """The best by a measure; of equals the one with the fewest calls of the network."""
    sign = 1 if lower_is_better(measure) or measure == SECONDS else -1
    return min(cells, key=lambda each: (sign * each.values[measure], each.sampler.nfe))


def rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The table, its head in front; what is nowhere measured has no column."""
    names = [name for name in (CLIP, *METRICS, SECONDS) if any(name in each.values for each in cells)]
    axes = [name for name in cells[0].settings if cells[0].settings[name] is not None]
    heads = [*axes, "nfe", *("s/image" if name == SECONDS else name.replace("_", " ") for name in names)]
    numbers = ([f"{each.settings[name]:g}" for name in axes] + [str(each.sampler.nfe)] for each in cells)
    values = ([text_of(name, each.values.get(name)) for name in names] for each in cells)
    return [heads, *(first + last for first, last in zip(numbers, values, strict=True))]


def terminal_table(lines: list[list[str]], best: int | None) -> Table:
    """The same for a terminal, with the best row in bold."""
    table = Table(*lines[0], box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify = "right"
    for index, line in enumerate(lines[1:]):
        table.add_row(*line, style="bold" if index == best else None)
    return table


def markdown_table(lines: list[list[str]]) -> str:
    ruled = [lines[0], ["--:"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def picture(cells: Sequence[Cell], measure: str | None, best: Cell | None) -> Image.Image:
    """A column per strength, and a row per number of steps and guidance scale; of one strength, a column per scale."""
    across = ("strength",) if len({each.strength for each in cells}) > 1 else ("cfg",)
    down = tuple(name for name in ("steps", "cfg") if name not in across)

    def place(each: Cell, axes: Sequence[str]) -> str:
        steps = f"{each.sampler.num_steps} step{'s' * (each.sampler.num_steps > 1)}"
        said = {"strength": f"strength {each.strength:g}" if "strength" in axes else "", "steps": steps}
        said["cfg"] = f"CFG {each.sampler.guidance_scale:g}"
        return "\n".join(said[name] for name in axes)

    heads, sides = (list(dict.fromkeys(place(each, axes) for each in cells)) for axes in (across, down))
    by_place = {(place(each, down), place(each, across)): each for each in cells}
    ordered = [by_place[side, head] for side in sides for head in heads]
    labels = [_label(each, measure, each is best) for each in ordered]
    images = torch.stack([_mosaic(each.pictures[:SHOWN]) for each in ordered])
    return grid(images, len(heads), labels, heads, sides=sides)


def _label(each: Cell, measure: str | None, is_best: bool) -> str:
    if measure is None:
        return ""
    return f"{'best: ' if is_best else ''}{measure.replace('_', ' ')} {text_of(measure, each.values[measure])}"


def _mosaic(pictures: Tensor) -> Tensor:
    """Up to `SHOWN` pictures (N, C, H, W) as one (C, h, w), `ACROSS` in a row, with white around each."""
    scale = max(1, -(-WIDTH // pictures.shape[-1]))
    large = pictures.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    gap = max(1, large.shape[-1] // WIDTH)
    across = min(ACROSS, len(large))
    empty = large.new_full((-len(large) % across, *large.shape[1:]), 255)
    framed = pad(torch.cat([large, empty]), (gap, gap, gap, gap), value=255).unflatten(0, (-1, across))
    joined: Tensor = framed.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)  # of (rows, across, C, H, W)
    return pad(joined, (2 * gap,) * 4, value=255)
