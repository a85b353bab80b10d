"""The paper's filters: which images of a captioned source are left, and what is said of the others."""

from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from fewstep.data.decoding import Unusable
from fewstep.data.filters import Filter, load_filtered
from fewstep.data.settings import DataSettings
from fewstep.errors import UserError
from image_sets import encoded, write_tar

SIDES = [(20, 30), (16, 40), (15, 15), (64, 16)]


def png(index: int) -> bytes:
    return encoded(Image.new("RGB", SIDES[index], (index, 0, 0)))


def source(folder: Path, **columns: list) -> str:
    captions = [f"caption {index}" for index in range(4)]
    table = {"image": [png(index) for index in range(4)], "caption": captions} | columns
    datasets.Dataset.from_dict(table).to_parquet(folder / "set.parquet")
    return str(folder / "set.parquet")


def left(path: str, filter: Filter) -> tuple[list[int], dict[str, int]]:
    """The images that can be used, by their colour, and what was dropped before."""
    images, dropped = load_filtered(DataSettings(source=path), 8, filter)
    usable = []
    for index in range(images.length):
        try:
            batch = images.batch(torch.tensor([index]))
        except Unusable:
            continue
        usable.append(int(batch["image"][0, 0, 0, 0]))
        assert batch["caption"] == [f"caption {usable[-1]}"]
    return usable, dropped


def test_an_image_that_is_too_small_is_told(tmp_path: Path) -> None:
    images, _ = load_filtered(DataSettings(source=source(tmp_path)), 8, Filter(min_side=17))
    with pytest.raises(Unusable, match="row 1: smaller than 17 pixels") as caught:
        images.fetch(torch.tensor([1]))
    assert caught.value.reason == "smaller than 17 pixels"


NSFW = Filter(unsafe_column="NSFW")
SCORE = Filter(aesthetic_column="score", min_aesthetic=5.5)
BOTH = Filter(unsafe_column="NSFW", aesthetic_column="score", min_aesthetic=6.25)
ALL = {"caption": ["caption 0", None, "  ", "caption 3"], "NSFW": [True, True, False, False], "score": [1.0] * 4}


@pytest.mark.parametrize(
    ("columns", "filter", "kept", "dropped"),
    [
        ({}, Filter(), [0, 1, 2, 3], {}),
        ({}, Filter(min_side=16), [0, 1, 3], {}),  # of the stored image, its smaller side
        ({}, Filter(min_side=17), [0], {}),
        ({"NSFW": [True, False, True, False]}, NSFW, [1, 3], {"unsafe": 2}),
        ({"NSFW": [0, 1, 0, 0]}, NSFW, [0, 2, 3], {"unsafe": 1}),
        ({"NSFW": ["UNLIKELY", "NSFW", "UNSURE", "unsafe"]}, NSFW, [0, 2], {"unsafe": 2}),
        ({"NSFW": ["safe", None, "False", "true"]}, NSFW, [0, 2], {"unsafe": 2}),
        ({"NSFW": [0.1, 0.5, 0.51, float("nan")]}, NSFW, [0, 1], {"unsafe": 2}),
        ({"NSFW": [0.1, None, 0.9, 0.2]}, NSFW, [0, 3], {"unsafe": 2}),
        ({"NSFW": [0.1, 0.2, 0.3, 0.4]}, Filter(unsafe_column="NSFW", max_unsafe=0.2), [0, 1], {"unsafe": 2}),
        ({"score": [5.4, 5.5, None, 7.0]}, SCORE, [1, 3], {"aesthetic score below 5.5": 2}),
        (ALL, BOTH, [], {"without a caption": 2, "unsafe": 1, "aesthetic score below 6.25": 1}),  # each counts once
    ],
)
def test_sides_flags_and_scores_as_laion_has_them(
    columns: dict, filter: Filter, kept: list[int], dropped: dict[str, int], tmp_path: Path
) -> None:
    assert left(source(tmp_path, **columns), filter) == (kept, dropped)


def test_a_field_of_the_json_in_a_webdataset(tmp_path: Path) -> None:
    members = {}
    for i in range(4):
        members |= {f"{i}.png": png(i), f"{i}.txt": b"caption %d" % i, f"{i}.json": b'{"punsafe": %d}' % i}
    write_tar(tmp_path / "set.tar", members)
    assert left(str(tmp_path / "set.tar"), Filter(unsafe_column="json.punsafe", max_unsafe=1.5))[0] == [0, 1]


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        (Filter(unsafe_column="nsfw"), "has no column 'nsfw'; it has .*caption"),
        (Filter(unsafe_column="caption"), "column 'caption' holds 'caption 0', which is neither a flag nor a score"),
        (Filter(aesthetic_column="caption", min_aesthetic=5.0), "holds 'caption 0', which is no number"),
    ],
)
def test_a_column_that_is_no_filter_is_refused(filter: Filter, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_filtered(DataSettings(source=source(tmp_path)), 8, filter)


def test_a_score_without_its_column_is_refused() -> None:
    with pytest.raises(UserError, match="give both or neither"):
        Filter(min_aesthetic=5.5)
