"""Reads shape, colour, size and place back from a picture of the embedded captioned set, by rules: nothing is trained.

Objects are the connected regions of saturated pixels. Colour is the nearest of the set's; shape and scale are those of
the nearest template around the region's middle.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fewstep.embedded.shapes import COLOURS, MAX_ANGLE, PLACES, RELATIONS, SHAPES, SIZES, Scene, coverage, parse

ATTRIBUTES = ("shape", "colour", "size", "place", "relation", "count")
WINDOW = 24  # pixels; holds the largest shape
SATURATED = 0.25  # share of the full range; grey has none, the set's colours over 0.6
MIN_PIXELS = 9  # of an object; the smallest is drawn with 20
MAX_RESIDUAL = 0.3  # of a template, as a share of the region's energy; rendered pictures stay under 0.1
SIZE_BORDER = (SIZES["small"][1] + SIZES["large"][0]) / 2


@dataclass(frozen=True)
class Seen:
    """One object that was found; `shape` is None where no template fits."""

    shape: str | None
    colour: str
    size: str
    x: float
    y: float


def see(images: Tensor) -> list[list[Seen]]:
    """The objects in each of uint8 pictures (N, 3, 32, 32), from the top left."""
    pixels = images.float() / 255
    saturation = pixels.amax(1) - pixels.amin(1)  # (N, H, W)
    regions = [(index, mask) for index, picture in enumerate(saturation) for mask in _regions(picture)]
    seen: list[list[Seen]] = [[] for _ in images]
    if not regions:
        return seen
    owners, masks = [index for index, _ in regions], torch.stack([mask for _, mask in regions])
    strength = saturation[owners] * masks
    peak = strength.flatten(1).topk(5).values[:, -1, None, None]  # inside the region: its fifth strongest pixel
    strength = (strength / peak.clamp_min(1e-3)).clamp(0, 1)
    middles = _middles(strength)
    kinds, scales = _fit(strength, middles)
    colours = _nearest_colour(pixels[owners], strength)
    for owner, kind, colour, scale, (x, y) in zip(owners, kinds, colours, scales, middles.tolist(), strict=True):
        seen[owner].append(Seen(kind, colour, "small" if scale < SIZE_BORDER else "large", x, y))
    return seen


def _regions(saturation: Tensor) -> list[Tensor]:
    """Masks (H, W) of the connected saturated regions, each widened by one pixel to take in its blurred edge."""
    labels, _ = ndimage.label((saturation > SATURATED).numpy())
    sizes = torch.from_numpy(labels).flatten().bincount().tolist()
    kept = [label for label, size in enumerate(sizes) if label and size >= MIN_PIXELS]
    return [torch.from_numpy(ndimage.binary_dilation(labels == label)) for label in kept]


def _middles(strength: Tensor) -> Tensor:
    """Centres of mass (R, 2), x and y in pixels."""
    axis = torch.arange(strength.shape[-1]) + 0.5
    mass = strength.sum((1, 2))
    return torch.stack([(strength.sum(1) * axis).sum(1) / mass, (strength.sum(2) * axis).sum(1) / mass], dim=1)


def _nearest_colour(pixels: Tensor, strength: Tensor) -> list[str]:
    """Of each region's mean colour, weighted towards its inside."""
    weight = (strength**4)[:, None]
    mean = (pixels * weight).sum((2, 3)) / weight.sum((2, 3))
    distances = torch.cdist(mean, torch.tensor(list(COLOURS.values())) / 255)
    return [list(COLOURS)[index] for index in distances.argmin(1).tolist()]


def _fit(strength: Tensor, middles: Tensor) -> tuple[list[str | None], list[float]]:
    """Shape and scale in pixels of the template that leaves the least residual, of regions (R, H, W)."""
    templates, kinds, scales = _templates()
    window = _centred(strength, middles).flatten(1)
    distance = torch.cdist(window, templates).square()
    best = distance.argmin(1)
    share = distance.gather(1, best[:, None])[:, 0] / window.square().sum(1)
    pairs = zip(best.tolist(), share.tolist(), strict=True)
    shapes = [kinds[index] if residual < MAX_RESIDUAL else None for index, residual in pairs]
    return shapes, scales[best].tolist()


def _centred(strength: Tensor, middles: Tensor) -> Tensor:
    """Windows (R, WINDOW, WINDOW) around the middles."""
    size = strength.shape[-1]
    theta = torch.zeros(len(strength), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = WINDOW / size
    theta[:, :, 2] = 2 * middles / size - 1
    grid = affine_grid(theta, [len(strength), 1, WINDOW, WINDOW], align_corners=False)
    return grid_sample(strength[:, None], grid, align_corners=False)[:, 0]


@cache
def _templates() -> tuple[Tensor, list[str], Tensor]:
    """Rendered shapes (T, WINDOW^2) around their centres of mass, with the kind and the scale of each."""
    axis = torch.arange(WINDOW) + 0.5 - WINDOW / 2
    low, high = SIZES["small"][0] - 0.5, SIZES["large"][1] + 0.7
    scales, angles = torch.arange(low, high, 0.2), torch.linspace(-1.2 * MAX_ANGLE, 1.2 * MAX_ANGLE, 7)
    scale, angle = torch.cartesian_prod(scales, angles).unbind(1)
    drawn = [coverage(shape, axis, axis[:, None], scale[:, None, None], angle[:, None, None]) for shape in SHAPES]
    masks = torch.cat(drawn)
    kinds = [shape for shape in SHAPES for _ in scale]
    return _centred(masks, _middles(masks)).flatten(1), kinds, scale.repeat(len(SHAPES))


def check(images: Tensor, captions: Sequence[str]) -> list[dict[str, bool]]:
    """Which attributes of its caption each of uint8 pictures (N, 3, 32, 32) has right; a caption names only some.

    Raises ValueError for a caption that is not of the embedded set.
    """
    scenes = [parse(caption) for caption in captions]
    if None in scenes:
        raise ValueError(f"{captions[scenes.index(None)]!r} is not a caption of the embedded shapes")
    return [_compare(seen, scene) for seen, scene in zip(see(images), scenes, strict=True) if scene]


def _compare(seen: list[Seen], scene: Scene) -> dict[str, bool]:
    """The best assignment of what is seen to what is said; with the wrong number of objects everything is wrong."""
    asked = ["count", "shape", "colour", "place" if scene.where in PLACES else "relation"]
    asked += ["size"] if any(thing.size for thing in scene.things) else []
    if len(seen) != len(scene.things):
        return dict.fromkeys(asked, False)
    answers = [{name: _is_right(name, order, scene) for name in asked} for order in itertools.permutations(seen)]
    return max(answers, key=lambda answer: sum(answer.values()))


def _is_right(attribute: str, seen: Sequence[Seen], scene: Scene) -> bool:
    """Of as many objects as the scene has, in its order."""
    first = seen[0]
    if attribute == "place":
        return scene.where == min(PLACES, key=lambda place: math.dist(PLACES[place], (first.x, first.y)))
    if attribute == "relation":  # along the axis on which they are further apart
        x, y = first.x - seen[1].x, first.y - seen[1].y
        return scene.where == max(RELATIONS, key=lambda name: x * RELATIONS[name][0] + y * RELATIONS[name][1])
    right = (getattr(t, attribute) in (None, getattr(s, attribute)) for s, t in zip(seen, scene.things, strict=True))
    return attribute == "count" or all(right)
