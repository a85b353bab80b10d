"""What is found at a source is told in one line, by headers, and a smaller model is refused unless it is asked for."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from fewstep.data import stored as module
from fewstep.errors import UserError
from image_sets import captioned, encoded, load, write_captioned, write_files


def png(mode: str = "RGB", sides: tuple[int, int] = (33, 33)) -> bytes:
    return encoded(Image.new(mode, sides))


def test_the_names_of_classes_are_those_of_a_parquet_file(tmp_path: Path) -> None:
    columns = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [png(), png(sides=(40, 30)), png()], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(rows, columns).to_parquet(tmp_path / "set.parquet")
    found = f"{tmp_path}/set.parquet: 3 RGB images, 33x33 to 40x30, mostly 33x33; "
    told = load(tmp_path / "set.parquet", 16, 3, 2, shrink=True).found
    assert told == f"{found}2 classes: 0 cat (2), 1 dog (1); resized and cropped to 16x16"
    with pytest.raises(UserError, match=r"has 2 classes, numbered 0 to 1 \(cat, dog\), but the model has 3"):
        load(tmp_path / "set.parquet", 16, 3, 3, shrink=True)


@pytest.mark.parametrize(
    ("size", "channels", "draw", "told"),
    [
        (33, 3, lambda index: png(), "RGB images, 33x33; taken as they are"),
        (33, 1, lambda index: png("L"), "grey images, 33x33; taken as they are"),
        (33, 3, lambda index: png("L"), "grey images, 33x33; made RGB"),
        (64, 1, lambda i: png("RGB" if i else "L"), "grey and RGB images, 33x33; resized to 64x64, made grey"),
        (30, 3, lambda index: png(sides=(40, 30)), "RGB images, 40x30; cropped to 30x30"),
    ],
)
def test_what_is_done_is_no_more_than_needed(
    size: int, channels: int, draw: Callable[[int], bytes], told: str, tmp_path: Path
) -> None:
    [(tmp_path / f"{index}.png").write_bytes(draw(index)) for index in range(3)]
    assert load(tmp_path, size, channels, shrink=False).found == f"{tmp_path}: 3 {told}"


def test_the_shorter_side_of_most_decides(tmp_path: Path) -> None:
    for index, sides in enumerate([(16, 90), (16, 16), (200, 200)]):
        Image.new("L", sides).save(tmp_path / f"{index}.png")
    assert "mostly" in str(load(tmp_path, 16, 1, shrink=False).found)
    Image.new("L", (17, 90)).save(tmp_path / "3.png")
    Image.new("L", (17, 90)).save(tmp_path / "4.png")
    with pytest.raises(UserError, match=r"16x16 to 200x200, mostly 17x90 would be shrunk.*image_size=16"):
        load(tmp_path, 16, 1, shrink=False)


def test_a_look_is_at_a_bounded_number_and_passes_over_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKED_AT", 3)
    opened, whole = [], module.opened
    monkeypatch.setattr(module, "opened", lambda cell, where: opened.append(cell) or whole(cell, where))
    for index in range(7):
        Image.new("L", (8 + index, 8)).save(tmp_path / f"{index}.png")
    told = load(tmp_path, 8, 1, shrink=False).found
    assert told == f"{tmp_path}: 7 grey images, 8x8 to 14x8, mostly 8x8 (3 looked at); cropped to 8x8"
    assert [cell.name for cell in opened] == ["0.png", "3.png", "6.png"]
    (tmp_path / "3.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"3\.png"):
        load(tmp_path, 8, 1, shrink=False)


def test_many_classes_are_told_by_the_first_and_the_last(tmp_path: Path) -> None:
    write_files(tmp_path, {f"class{index:02d}/a.png": png("L", (8, 8)) for index in range(12)})
    told = load(tmp_path, 8, 1, 12, shrink=False).found
    assert "; 12 classes: 0 class00 (1), 1 class01 (1), 2 class02 (1), ..., 11 class11 (1); taken" in str(told)
    with pytest.raises(UserError, match=r"numbered 0 to 11 \(class00, class01, class02, class03, class04, ...\), but"):
        load(tmp_path, 8, 1, 3)


def test_captions_are_told(tmp_path: Path) -> None:
    write_captioned(tmp_path, [Image.new("RGB", (20, 20))], ["a cat"])
    told = captioned(tmp_path, 16, shrink=True).found
    assert told == f"{tmp_path}: 1 RGB images with captions of metadata.csv, 20x20; resized to 16x16"
