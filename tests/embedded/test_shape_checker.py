"""The checker reads freshly drawn pictures, and finds exactly what is wrong in others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.embedded.shape_checker import ATTRIBUTES, check, see
from fewstep.embedded.shapes import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene, Thing, render, shapes
from fewstep.embedded.shapes import one_object_scenes as one_scenes
from fewstep.embedded.shapes import two_object_scenes as two_scenes

ONE = one_scenes()
TWO = two_scenes(400)
TELLING = [s for s in TWO if s.things[0].shape != s.things[1].shape and s.things[0].colour != s.things[1].colour]
"""Two objects that no change of one attribute makes into the other."""

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def drawn(scenes: list[Scene], seed: int = 0) -> Tensor:
    return render(scenes, torch.Generator().manual_seed(seed))


def prompt_accuracy(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Share of pictures with everything right ("all"), and with each attribute right that is asked."""
    answers = check(images, captions)
    told = {name: [answer[name] for answer in answers if name in answer] for name in ATTRIBUTES}
    return {name: sum(right) / len(right) for name, right in told.items() if right} | {
        "all": sum(all(answer.values()) for answer in answers) / len(answers)
    }


def following(value: str, values: Iterable[str]) -> str:
    listed = list(values)
    return listed[(listed.index(value) + 1) % len(listed)]


def with_first(scene: Scene, **changes: str) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes), *scene.things[1:]))


CHANGES: dict[str, Callable[[Scene], Scene]] = {
    "colour": lambda scene: with_first(scene, colour=following(scene.things[0].colour, COLOURS)),
    "shape": lambda scene: with_first(scene, shape=following(scene.things[0].shape, SHAPES)),
    "size": lambda scene: with_first(scene, size=following(str(scene.things[0].size), SIZES)),
    "place": lambda scene: replace(scene, where=following(scene.where, PLACES)),
    "relation": lambda scene: replace(scene, where=following(scene.where, RELATIONS)),
    "opposite relation": lambda scene: replace(scene, where=OPPOSITE[scene.where]),
}


@pytest.mark.parametrize(("scenes", "last"), [(ONE * 3, "place"), (TWO, "relation")], ids=["one", "two"])
def test_fresh_pictures_are_right(scenes: list[Scene], last: str) -> None:
    shares = prompt_accuracy(drawn(scenes), [scene.caption for scene in scenes])
    assert shares.keys() == {"all", "shape", "colour", "size", last, "count"}
    assert min(shares.values()) >= 0.99, shares


def test_the_pictures_of_the_set_are_those_of_their_captions() -> None:
    batch = shapes(seed=5).batch(torch.arange(400))
    assert prompt_accuracy(batch["image"], batch["caption"])["all"] >= 0.99
    shifted = batch["caption"][1:] + batch["caption"][:1]
    assert prompt_accuracy(batch["image"], shifted)["all"] < 0.05


@pytest.mark.parametrize("scenes", [ONE, TELLING], ids=["one", "two"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_wrong_and_nothing_else(change: str, scenes: list[Scene]) -> None:
    """The caption is the scene's, the picture the changed one's; of two objects, only where both remain different."""
    wrong = change.split()[-1]
    if wrong == ("relation" if scenes is ONE else "place"):
        return
    pairs = [(scene, CHANGES[change](scene)) for scene in scenes if change != "size" or scene.things[0].size]
    pairs = [(s, c) for s, c in pairs if len(s.things) == 1 or len({t.colour for t in c.things}) == 2]
    pairs = [(s, c) for s, c in pairs if len(s.things) == 1 or len({t.shape for t in c.things}) == 2]
    assert len(pairs) >= 100
    answers = check(drawn([changed for _, changed in pairs]), [scene.caption for scene, _ in pairs])
    exact = [{name for name, right in answer.items() if not right} == {wrong} for answer in answers]
    assert sum(exact) >= 0.99 * len(exact)


def test_with_the_wrong_number_of_objects_everything_is_wrong() -> None:
    one = [Scene(scene.things[:1], "in the centre") for scene in TWO[:60]]
    for pictures, captions in ((drawn(one), TWO[:60]), (drawn(TWO[:60]), one)):
        for answer, scene in zip(check(pictures, [s.caption for s in captions]), captions, strict=True):
            assert not any(answer.values())
            assert {"count", "shape", "colour"} <= answer.keys()
            assert ("size" in answer) == any(thing.size for thing in scene.things)


def test_an_attribute_that_the_caption_leaves_open_is_not_judged() -> None:
    scene = Scene((Thing("circle", "red", None), Thing("square", "blue", None)), "above")
    (answer,) = check(drawn([scene]), [scene.caption])
    assert answer == {"count": True, "shape": True, "colour": True, "relation": True}


def test_what_is_seen_lies_where_it_was_drawn() -> None:
    scenes = [scene for scene in ONE if scene.things[0].shape in ("circle", "square")]
    for scene, found in zip(scenes, see(drawn(scenes)), strict=True):
        (seen,) = found
        assert seen.x == pytest.approx(PLACES[scene.where][0], abs=1.6)
        assert seen.y == pytest.approx(PLACES[scene.where][1], abs=1.6)
        assert (seen.shape, seen.colour, seen.size) == tuple(vars(scene.things[0]).values())


def test_slightly_blurred_pictures_are_mostly_read() -> None:
    kernel = torch.tensor([0.2, 0.6, 0.2])
    weight = (kernel[:, None] * kernel)[None, None].repeat(3, 1, 1, 1)
    padded = torch.nn.functional.pad(drawn(ONE).float(), (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.conv2d(padded, weight, groups=3).round().to(torch.uint8)
    shares = prompt_accuracy(blurred, [scene.caption for scene in ONE])
    assert shares["all"] >= 0.85, shares
    assert min(shares["colour"], shares["place"], shares["count"]) >= 0.99, shares


@pytest.mark.parametrize("value", [0, 128, 200, 255])
def test_blank_pictures_are_all_wrong(value: int) -> None:
    blank = torch.full((4, 3, 32, 32), value, dtype=torch.uint8)
    captions = [scene.caption for scene in (*ONE[:2], *TWO[:2])]
    assert see(blank) == [[], [], [], []]
    assert set(prompt_accuracy(blank, captions).values()) == {0}


def test_noise_is_wrong_in_every_picture() -> None:
    """It may pass for one object in the middle of some colour, but has no shape."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (len(ONE), 3, 32, 32), generator=draws).to(torch.uint8)
    shares = prompt_accuracy(noise, [scene.caption for scene in ONE])
    assert (shares["all"], shares["shape"]) == (0, 0)
    assert shares["colour"] < 0.3


def test_a_patch_that_is_no_shape_has_none() -> None:
    picture = torch.full((1, 3, 32, 32), 220, dtype=torch.uint8)
    picture[0, :, 4:6, 2:30] = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    ((seen,),) = see(picture)
    assert (seen.shape, seen.colour) == (None, "red")


def test_a_picture_is_judged_alone() -> None:
    pictures, captions = drawn(TWO[:12]), [scene.caption for scene in TWO[1:13]]
    assert check(pictures, captions) == [check(pictures[i : i + 1], captions[i : i + 1])[0] for i in range(12)]


def test_an_unknown_caption_is_an_error() -> None:
    with pytest.raises(ValueError, match="'a cat' is not a caption"):
        check(drawn(ONE[:2]), [ONE[0].caption, "a cat"])
