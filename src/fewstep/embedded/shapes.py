"""The embedded captioned pictures: coloured shapes on grey, 32x32 RGB, drawn on the fly.

One object has a size and a place ("a small red circle at the top left"); two have a relation ("a blue square above a
large green star"). Position, rotation, scale, hue and background vary within a caption.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fewstep.data.images import ImageSet
from fewstep.seeding import generator

IMAGE_SIZE = 32
NUM_IMAGES = 50_000  # an epoch; every index is another picture
TWO_OBJECT_SHARE = 0.25
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (235, 200, 30),
    "purple": (155, 50, 195),
    "cyan": (30, 190, 205),
}
SIZES = {"small": (4.4, 4.9), "large": (5.8, 6.4)}  # least and greatest scale, in pixels
PLACES = {
    "at the top left": (9.5, 9.5),
    "at the top right": (22.5, 9.5),
    "at the bottom left": (9.5, 22.5),
    "at the bottom right": (22.5, 22.5),
    "in the centre": (16.0, 16.0),
}  # x and y of the middle, in pixels
RELATIONS = {"above": (0, -8), "below": (0, 8), "left of": (-8, 0), "right of": (8, 0)}  # of the first, from the middle
PLACE_JITTER, ACROSS_JITTER, ALONG_JITTER = 1.5, 4.0, 0.3  # pixels
HUE_JITTER, MAX_ANGLE = 18, math.radians(10)
GREY = (175, 250)  # of the background


@dataclass(frozen=True)
class Thing:
    """One object; a size of None leaves it open."""

    shape: str
    colour: str
    size: str | None

    @property
    def caption(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """What a caption says: one thing and its place, or two and their relation."""

    things: tuple[Thing, ...]
    where: str
    """A key of PLACES or of RELATIONS."""

    @property
    def caption(self) -> str:
        return " ".join([self.things[0].caption, self.where, *(thing.caption for thing in self.things[1:])])


def one_object_scenes() -> list[Scene]:
    """All 240 of them, neighbours differing in as much as possible, so that every part of the list is a fair one."""
    scenes = [Scene((Thing(*each),), place) for *each, place in product(SHAPES, COLOURS, SIZES, PLACES)]
    return random.Random(0).sample(scenes, len(scenes))


def two_object_scenes(num: int) -> list[Scene]:
    """`num` scenes of two objects, of 20,736 that there are."""
    draws = random.Random(1)
    return [_draw_two(draws) for _ in range(num)]


def parse(caption: str) -> Scene | None:
    """The scene that a caption speaks of; None if it is not one of ours."""
    return _scenes().get(" ".join(caption.split()))


@cache
def _scenes() -> dict[str, Scene]:
    """All that there are, by caption."""
    things = [Thing(*each) for each in product(SHAPES, COLOURS, (None, *SIZES))]
    one = (Scene((thing,), place) for thing, place in product(things, PLACES))
    two = (Scene((first, second), where) for first, second, where in product(things, things, RELATIONS))
    return {scene.caption: scene for scene in (*one, *two)}


def draw_scene(index: int, seed: int) -> Scene:
    """The scene of picture number `index` of a seed."""
    draws = random.Random(f"{seed}/{index}")
    if draws.random() >= TWO_OBJECT_SHARE:
        return Scene((_draw_thing(draws, [*SIZES]),), draws.choice(list(PLACES)))
    return _draw_two(draws)


def _draw_two(draws: random.Random) -> Scene:
    sizes = [None, *SIZES]
    return Scene((_draw_thing(draws, sizes), _draw_thing(draws, sizes)), draws.choice(list(RELATIONS)))


def _draw_thing(draws: random.Random, sizes: Sequence[str | None]) -> Thing:
    return Thing(draws.choice(SHAPES), draws.choice(list(COLOURS)), draws.choice(sizes))


def coverage(shape: str, x: Tensor, y: Tensor, scale: Tensor, angle: Tensor) -> Tensor:
    """Share of each pixel that a shape at the origin covers, by its distance to the edge, blurred by one pixel.

    x, y, scale and angle broadcast; x, y and scale in pixels, angle in radians.
    """
    x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    radius = torch.hypot(x, y)
    if shape == "circle":
        distance = radius - scale
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.9 * scale
    else:
        tips, tip, dent = {"triangle": (3, 1.3, 0.65), "star": (5, 1.38, 0.54)}[shape]
        sector = math.pi / tips
        fold = ((torch.atan2(x, -y) + sector) % (2 * sector) - sector).abs()  # angle from the nearest tip
        edge_x, edge_y = dent * math.cos(sector) - tip, dent * math.sin(sector)  # from a tip to the dent beside it
        across = radius * (fold.cos() * edge_y - fold.sin() * edge_x) - scale * tip * edge_y
        distance = across / math.hypot(edge_x, edge_y)
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Sequence[Scene], draws: torch.Generator) -> Tensor:
    """uint8 pictures (N, 3, 32, 32) of scenes, with everything that a caption leaves open drawn at random."""
    axis = torch.arange(IMAGE_SIZE) + 0.5
    uniform = torch.rand(len(scenes), 2, 8, generator=draws)
    grey = GREY[0] + (GREY[1] - GREY[0]) * uniform[:, 0, 0]
    pictures = grey[:, None, None, None].repeat(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    for number in range(2):
        for shape in SHAPES:
            rows = [row for row, s in enumerate(scenes) if len(s.things) > number and s.things[number].shape == shape]
            if rows:
                u = uniform[rows, number]
                middle, scale, colour = _placed([scenes[row] for row in rows], number, u)
                x, y = (axis - middle[:, :1])[:, None, :], (axis - middle[:, 1:])[:, :, None]
                angle = (2 * u[:, 7] - 1) * MAX_ANGLE
                mask = coverage(shape, x, y, scale[:, None, None], angle[:, None, None])[:, None]
                pictures[rows] = torch.lerp(pictures[rows], colour[:, :, None, None].expand_as(pictures[rows]), mask)
    return pictures.round().clamp(0, 255).to(torch.uint8)


def _placed(scenes: Sequence[Scene], number: int, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Middle (N, 2), scale (N,) and colour (N, 3) of each scene's thing `number`, by uniform numbers u (N, 8)."""
    middles, ranges, colours = [], [], []
    for scene, size in zip(scenes, u[:, 6].tolist(), strict=True):
        thing = scene.things[number]
        if scene.where in PLACES:
            middles.append((*PLACES[scene.where], PLACE_JITTER, PLACE_JITTER))
        else:
            x, y = RELATIONS[scene.where]
            sign = 1 - 2 * number
            jitter = (ACROSS_JITTER, ALONG_JITTER) if x == 0 else (ALONG_JITTER, ACROSS_JITTER)
            middles.append((16 + sign * x, 16 + sign * y, *jitter))
        ranges.append(SIZES[thing.size or ("small" if size < 0.5 else "large")])
        colours.append(COLOURS[thing.colour])
    middle, span = torch.tensor(middles), torch.tensor(ranges)
    jittered = middle[:, :2] + (2 * u[:, 1:3] - 1) * middle[:, 2:]
    fraction = (2 * u[:, 6]) % 1  # the same number chose an open size
    colour = torch.tensor(colours).float() + (2 * u[:, 3:6] - 1) * HUE_JITTER
    return jittered, span[:, 0] + (span[:, 1] - span[:, 0]) * fraction, colour


class Captions(Sequence[str]):
    """The captions of a seed's pictures, made when they are asked for."""

    def __init__(self, seed: int, length: int):
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(index)
        return draw_scene(index % self.length, self.seed).caption


def shapes(seed: int = 0, length: int = NUM_IMAGES) -> ImageSet:
    """`length` captioned pictures; picture i is a function of (seed, i)."""

    def fetch(indices: Tensor) -> Tensor:
        return torch.cat([render([draw_scene(i, seed)], generator(seed, "shapes", i)) for i in indices.tolist()])

    return ImageSet(fetch, None, length, Captions(seed, length))
