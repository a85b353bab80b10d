"""Grids of images as PNG files."""

import io
from pathlib import Path

from PIL import Image
from torch import Tensor

CELL_PIXELS = 48  # small images are enlarged by a whole factor to about this


def grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 images (N, C, H, W) row by row, with a gap of one image pixel, enlarged without smoothing if small."""
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    canvas = images.new_full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 255)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1) + 1, index % columns * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = image
    array = canvas.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    scale = max(1, CELL_PIXELS // height)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file in memory."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(png_bytes(picture))
    temporary.replace(path)
