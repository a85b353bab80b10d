"""Grids put every image where it belongs, enlarge it exactly, and reach the disk whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.pictures import GAP, grid, num_columns, png_bytes, save_png, scalable_font, wrapped


def numbered(num: int, channels: int, height: int, width: int) -> Tensor:
    """Random uint8 images without 255, which is the colour of the gaps."""
    return torch.randint(0, 255, (num, channels, height, width), generator=torch.Generator().manual_seed(0)).byte()


def cut(canvas: np.ndarray, index: int, columns: int, side: int, foot: int = 0) -> np.ndarray:
    """Image `index` of a grid of images of so many pixels."""
    row, column = divmod(index, columns)
    top, left = GAP + row * (side + foot + GAP), GAP + column * (side + GAP)
    return canvas[top : top + side, left : left + side]


@pytest.mark.parametrize("channels", [1, 3])
def test_image_k_is_in_row_k_by_columns_and_all_else_is_white(channels: int) -> None:
    images = numbered(5, channels, 70, 70)  # not enlarged
    canvas = np.array(grid(images, columns=2)).reshape(3 * 74 + 4, 2 * 74 + 4, channels)
    for index, image in enumerate(images):
        assert np.array_equal(cut(canvas, index, 2, 70), image.permute(1, 2, 0).numpy())
    assert (canvas == 255).sum() == canvas.size - images.numel()


@pytest.mark.parametrize(("side", "factor"), [(8, 8), (28, 3), (24, 3), (16, 4), (48, 2), (64, 1), (100, 1)])
def test_small_images_are_enlarged_by_a_whole_factor(side: int, factor: int) -> None:
    images = numbered(2, 1, side, side)
    canvas = np.array(grid(images, columns=2))
    for index, image in enumerate(images):
        expected = image[0].numpy().repeat(factor, 0).repeat(factor, 1)
        assert np.array_equal(cut(canvas, index, 2, side * factor), expected)


def test_many_large_images_are_made_smaller_and_four_of_sdxl_are_not() -> None:
    images = numbered(1, 3, 1024, 1024)
    assert grid(images.expand(4, -1, -1, -1), columns=4).size == (4 * 1028 + 4, 1028 + 4)
    ten = grid(images.expand(10, -1, -1, -1), columns=10)
    assert ten.size == (10 * (342 + 4) + 4, 342 + 8)  # to a third
    assert abs(np.array(ten).mean() - 131) < 1


def test_labels_stand_below_and_heads_above() -> None:
    images = numbered(4, 1, 8, 8)
    labelled = np.array(
        grid(images, 2, ["cat", "dog", "", "a very long name of a class of animals that few know"], ["one", "two"])
    )
    bare = np.array(grid(images, 2))
    assert labelled.shape[1] == bare.shape[1] + 2 * (128 - 64)  # wide enough for the long name
    line = sum(scalable_font(11).getmetrics())
    num_lines = len(wrapped("a very long name of a class of animals that few know", scalable_font(11), 128))
    for row in range(2):
        top = line + GAP + row * (128 + num_lines * line + GAP)
        pictures, below = labelled[top : top + 128], labelled[top + 128 : top + 128 + line]
        assert np.array_equal(pictures[::16, GAP : GAP + 128 : 16], images[2 * row, 0].numpy())
        assert (below[:, GAP : GAP + 128] < 128).any() == (row == 0)  # "cat", and nothing
        assert (below[:, 2 * GAP + 128 :] < 128).any()
    assert (labelled[:line, : 128 + GAP] < 128).any()


@pytest.mark.parametrize(
    "text", ["\u732b \U0001f600", "\x00\x1f\u2028", "\ud800", "\u05e9\u05dc", "x" * 100_000, " ", "a\nb\n" * 50]
)
def test_any_text_can_be_a_label(text: str) -> None:
    picture = grid(numbered(2, 3, 8, 8), 2, [text, "b"], ["", text])
    assert picture.width == 2 * 132 + 4 or picture.width == 2 * 68 + 4
    assert picture.height < 300


def test_long_prompts_are_wrapped_between_words_and_cut_with_an_ellipsis() -> None:
    font, prompt = (
        scalable_font(11),
        "a small red circle at the top left of a large picture, painted by nobody in particular",
    )
    lines = wrapped(prompt, font, 128)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 128 for line in lines)
    assert prompt.startswith(" ".join(lines)[:-1])
    assert {word for line in lines[:-1] for word in line.split()} <= {*prompt.split()}
    assert wrapped("digits-1step student:1", font, 64) == ["digits-", "1step", "student:1"]
    assert wrapped("", font, 64) == []


@pytest.mark.parametrize(
    ("given", "columns"), [((40, 10), 10), ((40, 3), 9), ((11, 3, 5), 3), ((2, 10), 2), ((40, 0), 10), ((4, 1, 0), 1)]
)
def test_a_column_per_class_or_prompt(given: tuple[int, ...], columns: int) -> None:
    assert num_columns(*given) == columns


def test_the_file_holds_the_picture(tmp_path: Path) -> None:
    picture = grid(numbered(4, 3, 8, 8), columns=2)
    save_png(picture, tmp_path / "grid.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "grid.png")), np.array(picture))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_png(grid(numbered(1, 1, 8, 8), columns=1), path)
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"grid\.png: can't be written .*disk full"):
        save_png(grid(numbered(2, 1, 8, 8), columns=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_png_bytes_are_a_png_file() -> None:
    assert png_bytes(Image.new("L", (2, 2))).startswith(b"\x89PNG")
