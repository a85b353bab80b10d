"""Grids put every image where it belongs, enlarge it exactly, and reach the disk whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.pictures import grid, png_bytes, save_png


def numbered(num: int, channels: int, height: int, width: int) -> Tensor:
    """Random uint8 images without 255, which is the colour of the gaps."""
    return torch.randint(0, 255, (num, channels, height, width), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("channels", [1, 3])
def test_image_k_is_in_row_k_by_columns(channels: int) -> None:
    images = numbered(5, channels, 60, 50)  # not enlarged
    canvas = np.array(grid(images, columns=2)).reshape(3 * 61 + 1, 2 * 51 + 1, channels)
    for index, image in enumerate(images):
        row, column = divmod(index, 2)
        cut = canvas[row * 61 + 1 : row * 61 + 61, column * 51 + 1 : column * 51 + 51]
        assert np.array_equal(cut, image.permute(1, 2, 0).numpy())


def test_all_but_the_images_is_white() -> None:
    images = numbered(3, 1, 60, 50)
    canvas = np.array(grid(images, columns=2))
    assert (canvas == 255).sum() == canvas.size - images.numel()


@pytest.mark.parametrize(("side", "factor"), [(8, 6), (28, 1), (24, 2), (16, 3), (48, 1), (64, 1)])
def test_small_images_are_enlarged_by_a_whole_factor(side: int, factor: int) -> None:
    images = numbered(2, 1, side, side)
    canvas = np.array(grid(images, columns=2))
    assert canvas.shape == ((side + 2) * factor, (2 * side + 3) * factor)
    small = canvas[::factor, ::factor]
    assert np.array_equal(canvas, small.repeat(factor, 0).repeat(factor, 1))
    assert np.array_equal(small[1:-1, 1 : side + 1], images[0, 0].numpy())


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
