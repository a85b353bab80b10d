"""The embedded captioned pictures: what a caption says, what is drawn for it, and which picture is which."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from fewstep.embedded.shapes import (
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Captions,
    Scene,
    Thing,
    coverage,
    draw_scene,
    one_object_scenes,
    parse,
    render,
    shapes,
    two_object_scenes,
)

AWAY = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}  # from the first to the second


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def strong_pixels(picture: Tensor, colour: str) -> Tensor:
    """Mask (H, W) of the pixels inside an object of a colour, whatever its hue's jitter."""
    return (picture.float() - torch.tensor(COLOURS[colour]).float()[:, None, None]).abs().amax(0) <= 20


def middle(mask: Tensor) -> tuple[float, float]:
    """x and y of a mask, in pixels."""
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return columns.double().mean().item() + 0.5, rows.double().mean().item() + 0.5


# --- which picture is which ------------------------------------------------------------------------------------------


def test_a_picture_is_a_function_of_seed_and_index_alone() -> None:
    whole = shapes(seed=3).batch(torch.arange(40))
    some = shapes(seed=3, length=500).batch(torch.tensor([17, 4, 17, 39]))
    assert torch.equal(some["image"], whole["image"][[17, 4, 17, 39]])
    assert some["caption"] == [whole["caption"][index] for index in (17, 4, 17, 39)]
    assert len({picture.numpy().tobytes() for picture in whole["image"]}) == 40
    other = shapes(seed=4).batch(torch.arange(40))
    assert not (other["image"] == whole["image"]).flatten(1).all(1).any()
    assert other["caption"] != whole["caption"]


def test_a_picture_shows_the_colours_of_its_caption_and_no_other() -> None:
    batch = shapes().batch(torch.arange(300))
    for picture, caption in zip(batch["image"], batch["caption"], strict=True):
        shown = {colour for colour in COLOURS if strong_pixels(picture, colour).sum() >= 9}
        assert shown == set(COLOURS) & set(caption.split()), caption


def test_captions_are_a_sequence() -> None:
    captions = Captions(seed=0, length=10)
    as_list = [draw_scene(index, 0).caption for index in range(10)]
    assert list(captions) == as_list
    assert captions[-1] == as_list[9]
    assert captions[2:20:3] == as_list[2:20:3]
    with pytest.raises(IndexError):
        captions[10]


def test_a_quarter_of_the_pictures_have_two_objects_and_all_attributes_occur_alike() -> None:
    """Every share within four standard deviations."""
    scenes = [draw_scene(index, 0) for index in range(4000)]
    one = [scene for scene in scenes if len(scene.things) == 1]
    assert abs(1 - len(one) / 4000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    cells = dict.fromkeys(product(SHAPES, SIZES, PLACES), 0)
    for scene in one:
        cells[scene.things[0].shape, str(scene.things[0].size), scene.where] += 1
    expected = len(one) / len(cells)
    assert max(abs(count - expected) for count in cells.values()) < 4 * math.sqrt(expected)
    colours = [thing.colour for scene in scenes for thing in scene.things]
    assert all(abs(colours.count(colour) / len(colours) - 1 / 6) < 0.03 for colour in COLOURS)


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_parse_back_to_their_scene() -> None:
    scenes = [*one_object_scenes(), *two_object_scenes(500), *(draw_scene(index, 1) for index in range(500))]
    assert [parse(scene.caption) for scene in scenes] == scenes


def test_the_captions_of_one_object_are_240_and_all_different() -> None:
    captions = [scene.caption for scene in one_object_scenes()]
    words = product(("small", "large"), COLOURS, ("circle", "square", "triangle", "star"), PLACES)
    assert sorted(captions) == sorted(f"a {size} {colour} {shape} {place}" for size, colour, shape, place in words)
    assert len(set(captions)) == len(captions) == 240


def test_every_part_of_the_list_has_all_attributes() -> None:
    for part in (one_object_scenes()[:60], one_object_scenes()[180:]):
        counts = Counter(value for s in part for value in (*vars(s.things[0]).values(), s.where))
        for values in (SHAPES, COLOURS, SIZES, PLACES):
            assert all(abs(counts[value] - 60 / len(values)) <= 8 for value in values), counts


def test_the_scenes_of_two_objects_are_a_prefix_of_a_longer_list() -> None:
    scenes = two_object_scenes(200)
    assert scenes == two_object_scenes(300)[:200]
    assert {scene.where for scene in scenes} == set(RELATIONS)
    assert {thing.size for scene in scenes for thing in scene.things} == {None, "small", "large"}


def test_what_a_caption_says_is_read() -> None:
    assert parse("a small red circle at the top left") == Scene((Thing("circle", "red", "small"),), "at the top left")
    two = (Thing("square", "blue", None), Thing("star", "green", "large"))
    assert parse("a blue square above a large green star") == Scene(two, "above")


NO_CAPTIONS = (
    "| |a cat|a red circle|above|   above a red circle| in the centre|the red circle in the centre"
    "|a pink circle in the centre|a red hexagon in the centre|a huge red circle in the centre"
    "|a small small red circle in the centre|a circle in the centre|a red circle in the centre a blue square"
    "|a red circle in the centres|a red circle above|a red circle abovea blue square"
    "|a red circle above a blue square in the centre|a red circle above a cat"
    "|a red circle at the top left of a blue square"
)


@pytest.mark.parametrize("caption", NO_CAPTIONS.split("|"))
def test_another_text_is_no_caption(caption: str) -> None:
    assert parse(caption) is None


# --- what is drawn ---------------------------------------------------------------------------------------------------


def polygon(points: list[tuple[float, float]]) -> float:
    """The shoelace formula."""
    pairs = zip(points, [*points[1:], points[0]], strict=True)
    return abs(sum(x * v - u * y for (x, y), (u, v) in pairs)) / 2


def star(tips: int, tip: float, dent: float) -> float:
    """Area of the polygon whose corners lie in turn at the distances `tip` and `dent`."""
    radii = [(tip, dent)[index % 2] for index in range(2 * tips)]
    angles = [math.pi * index / tips for index in range(2 * tips)]
    return polygon([(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)])


AREAS = {"circle": math.pi, "square": 1.8**2, "triangle": star(3, 1.3, 0.65), "star": star(5, 1.38, 0.54)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [4.4, 6.4])
@pytest.mark.parametrize("angle", [0.0, 0.17])
def test_the_area_is_the_closed_form(shape: str, scale: float, angle: float) -> None:
    axis = torch.arange(-16, 16) + 0.3  # off the pixels' middle
    mask = coverage(shape, axis[None, :], axis[:, None], torch.tensor(scale), torch.tensor(angle))
    assert mask.sum().item() == pytest.approx(AREAS[shape] * scale**2, rel=0.04)
    assert mask.amax() == 1
    assert mask.amin() == 0


@pytest.mark.parametrize(("shape", "tip"), [("triangle", 1.3), ("star", 1.38)])
def test_a_tip_points_up(shape: str, tip: float) -> None:
    """The edge lies where the polygon's does, above the middle and below it."""
    y = torch.linspace(-12, 12, 2401)
    inside = y[coverage(shape, torch.zeros(1), y, torch.tensor(6.0), torch.tensor(0.0)) > 0.5]
    bottom = {"triangle": 0.65, "star": 0.54}[shape]  # of a triangle half an edge, of a star a dent
    assert inside.min().item() == pytest.approx(-6 * tip, abs=1.5)  # the blur rounds a tip off
    assert inside.max().item() == pytest.approx(6 * bottom, abs=0.02)


@pytest.mark.parametrize("where", RELATIONS)
def test_the_second_object_lies_on_its_side(where: str) -> None:
    scene = Scene((Thing("circle", "red", None), Thing("square", "blue", None)), where)
    for picture in render([scene] * 50, draws()):
        first, second = (middle(strong_pixels(picture, colour)) for colour in ("red", "blue"))
        along = sum((b - a) * away for a, b, away in zip(first, second, AWAY[where], strict=True))
        across = abs(sum((b - a) * (1 - abs(away)) for a, b, away in zip(first, second, AWAY[where], strict=True)))
        assert along > max(12, across)


@pytest.mark.parametrize("place", PLACES)
def test_an_object_lies_at_its_place(place: str) -> None:
    vertical, horizontal = ("bottom" in place) - ("top" in place), ("right" in place) - ("left" in place)
    for picture in render([Scene((Thing("circle", "green", "large"),), place)] * 50, draws(1)):
        x, y = middle(strong_pixels(picture, "green"))
        assert x == pytest.approx(16 + 6.5 * horizontal, abs=2)
        assert y == pytest.approx(16 + 6.5 * vertical, abs=2)


def test_small_and_large_differ_in_area_whatever_else_is_drawn() -> None:
    for shape in SHAPES:
        areas = {}
        for size in SIZES:
            scene = Scene((Thing(shape, "purple", size),), "in the centre")
            pictures = render([scene] * 50, draws(2)).float()
            saturation = pictures.amax(1) - pictures.amin(1)
            areas[size] = (saturation / saturation.flatten(1).amax(1)[:, None, None]).sum((1, 2))
        assert areas["small"].max() < 0.9 * areas["large"].min()


def test_what_a_caption_leaves_open_varies_and_a_generator_fixes_it() -> None:
    scene = Scene((Thing("square", "cyan", "small"),), "in the centre")
    pictures = render([scene] * 20, draws())
    assert torch.equal(pictures, render([scene] * 20, draws()))
    assert len({picture.numpy().tobytes() for picture in pictures}) == 20
    corner = pictures[:, :, 0, 0].float()  # grey, each its own
    assert torch.equal(corner.amax(1), corner.amin(1))
    assert corner.min() >= 175
    assert corner.max() <= 250
    assert corner.std() > 10
