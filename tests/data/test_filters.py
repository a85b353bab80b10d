"""The paper's filters: which images of a captioned source are left, and what is said of the others."""

from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from fewstep.data.filters import Filter, load_filtered
from fewstep.data.images import Unusable
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


def test_without_a_filter_everything_is_kept(tmp_path: Path) -> None:
    assert left(source(tmp_path), Filter()) == ([0, 1, 2, 3], {})


def test_the_smaller_side_of_the_stored_image_counts(tmp_path: Path) -> None:
    path = source(tmp_path)
    assert left(path, Filter(min_side=16))[0] == [0, 1, 3]
    assert left(path, Filter(min_side=17))[0] == [0]
    images, _ = load_filtered(DataSettings(source=path), 8, Filter(min_side=17))
    with pytest.raises(Unusable, match="row 1: smaller than 17 pixels") as caught:
        images.fetch(torch.tensor([1]))
    assert caught.value.reason == "smaller than 17 pixels"


@pytest.mark.parametrize(
    ("cells", "kept"),
    [
        ([True, False, True, False], [1, 3]),
        ([0, 1, 0, 0], [0, 2, 3]),
        (["UNLIKELY", "NSFW", "UNSURE", "unsafe"], [0, 2]),
        (["safe", None, "False", "true"], [0, 2]),
        ([0.1, 0.5, 0.51, float("nan")], [0, 1]),
        ([0.1, None, 0.9, 0.2], [0, 3]),
    ],
)
def test_unsafe_flags_and_scores_as_laion_has_them(cells: list, kept: list[int], tmp_path: Path) -> None:
    answer = left(source(tmp_path, NSFW=cells), Filter(unsafe_column="NSFW"))
    assert answer == (kept, {"unsafe": 4 - len(kept)})


def test_the_limit_of_unsafe_scores_can_be_chosen(tmp_path: Path) -> None:
    path = source(tmp_path, punsafe=[0.1, 0.2, 0.3, 0.4])
    assert left(path, Filter(unsafe_column="punsafe", max_unsafe=0.2))[0] == [0, 1]


def test_aesthetic_scores(tmp_path: Path) -> None:
    path = source(tmp_path, score=[5.4, 5.5, None, 7.0])
    assert left(path, Filter(aesthetic_column="score", min_aesthetic=5.5)) == ([1, 3], {"aesthetic score below 5.5": 2})


def test_an_image_is_counted_for_its_first_reason_only(tmp_path: Path) -> None:
    captions = ["caption 0", None, "  ", "caption 3"]
    path = source(tmp_path, caption=captions, unsafe=[True, True, False, False], score=[1.0, 1.0, 1.0, 1.0])
    wanted = Filter(unsafe_column="unsafe", aesthetic_column="score", min_aesthetic=6.25)
    assert left(path, wanted) == ([], {"without a caption": 2, "unsafe": 1, "aesthetic score below 6.25": 1})


def test_a_field_of_the_json_in_a_webdataset(tmp_path: Path) -> None:
    members = {
        f"{index}.{suffix}": content
        for index in range(4)
        for suffix, content in (
            ("png", png(index)),
            ("txt", b"caption %d" % index),
            ("json", b'{"punsafe": %d}' % index),
        )
    }
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
