"""Images and grids of them as PNG files, with what they are in their text chunks."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fewstep.files import written_whole

CELL_PIXELS = 48  # small images are enlarged by a whole factor to about this


def grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 images (N, C, H, W) row by row, with a gap of one image pixel, enlarged without smoothing if small."""
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    canvas = images.new_full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 255)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1) + 1, index % columns * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = image
    picture = to_picture(canvas)
    scale = max(1, CELL_PIXELS // height)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def to_picture(image: Tensor) -> Image.Image:
    """A uint8 image (C, H, W), grey or RGB."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if len(image) == 1 else array)


def png_bytes(picture: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """The picture as a PNG file in memory, with these text chunks."""
    chunks, buffer = PngInfo(), io.BytesIO()
    for name, content in (text or {}).items():
        chunks.add_text(name, content)
    picture.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_png(picture: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Writes the file whole or not at all; raises UserError if the disk is full."""
    with written_whole(path) as temporary:
        temporary.write_bytes(png_bytes(picture, text))


def read_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG file; {} of anything else."""
    try:
        with Image.open(path) as picture:
            return dict(getattr(picture, "text", {}))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # no picture of ours
        return {}


def parameters_text(prompt: str, fields: Mapping[str, object]) -> str:
    """The chunk `parameters` as A1111 writes and reads it: the prompt, and a line `Steps: 4, Sampler: LCM, ...`."""
    values = {name: str(value) for name, value in fields.items()}
    quoted = {name: json.dumps(value) if set(value) & set(",:\n") else value for name, value in values.items()}
    return f"{prompt}\n{', '.join(f'{name}: {value}' for name, value in quoted.items())}".lstrip("\n")
