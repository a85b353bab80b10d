"""Images and grids of them as PNG files, with what they are in their text chunks."""

from __future__ import annotations  # torch is not imported for pictures that come from files

import io
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fewstep.files import written_whole

if TYPE_CHECKING:
    from torch import Tensor

GAP = 4  # pixels around every image
CELLS = (64, 96, 128)  # small images are enlarged, by a whole factor, to the first of these in which all labels fit
MAX_WIDTH = 4200  # four images of SDXL side by side; where more stand, they are made smaller
MAX_LINES = 3  # of a label
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def grid(
    images: Tensor,
    columns: int,
    labels: Sequence[str] = (),
    heads: Sequence[str] = (),
    max_width: int = MAX_WIDTH,
    sides: Sequence[str] = (),
) -> Image.Image:
    """uint8 images (N, C, H, W) row by row on white, each above its label, and the columns below their heads.

    In front of the rows stand their `sides`, of one or more lines.

    Small images are enlarged without smoothing, and large ones made smaller until all of a row fit into `max_width`.
    """
    num, _, height, width = images.shape
    shrink = -(-columns * width // max_width)
    for wanted in CELLS:
        scale = max(1, -(-wanted // width)) if shrink == 1 else 1
        cell, row = -(-width * scale // shrink), -(-height * scale // shrink)
        font = scalable_font(max(11, cell // 24))
        below, above = ([wrapped(text, font, cell) for text in texts] for texts in (labels, heads))
        if not any(lines[-1:] and lines[-1].endswith("…") for lines in below + above):
            break
    line = sum(font.getmetrics())
    margin = max((int(font.getlength(part)) + 3 * GAP for side in sides for part in side.split("\n")), default=0)
    foot, head = (line * max(map(len, told), default=0) for told in (below, above))
    size = margin + columns * (cell + GAP) + GAP, head + -(-num // columns) * (row + foot + GAP) + GAP
    canvas = Image.new("L" if images.shape[1] == 1 else "RGB", size, "white")
    draw = ImageDraw.Draw(canvas)

    def write(lines: Sequence[str], left: int, top: int) -> None:
        for number, text in enumerate(lines):
            draw.text((left + cell // 2, top + number * line), text, "black", font, "ma")

    for index, image in enumerate(images):
        left, top = margin + index % columns * (cell + GAP) + GAP, head + index // columns * (row + foot + GAP) + GAP
        picture = to_picture(image)
        enlarged = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        canvas.paste(enlarged.reduce(shrink) if shrink > 1 else enlarged, (left, top))
        write(below[index] if labels else (), left, top + row)
    for index, lines in enumerate(above):
        write(lines, margin + index * (cell + GAP) + GAP, GAP // 2)
    for index, side in enumerate(sides):
        middle = head + index * (row + foot + GAP) + GAP + row // 2
        draw.multiline_text((GAP, middle), side, "black", font, "lm")
    return canvas


def num_columns(num: int, num_subjects: int, most: int = 10) -> int:
    """Of a grid of so many images: one per prompt or class, or several, where they fit."""
    most = max(1, most)
    return min(num, most - most % num_subjects if 1 < num_subjects <= most else most)


@cache
def scalable_font(size: int) -> Any:
    """DejaVu, which comes with matplotlib and has most alphabets; Pillow's own font has ASCII alone."""
    carrier = find_spec("matplotlib")
    with suppress(OSError, AttributeError):
        return ImageFont.truetype(Path(carrier.origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans.ttf", size)  # type: ignore[union-attr, arg-type]
    return ImageFont.load_default(size)


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """At most MAX_LINES lines of so many pixels; what does not fit ends in an ellipsis."""
    lines, rest = list[str](), " ".join(text[:300].split())
    while rest and len(lines) < MAX_LINES:
        end = max(1, bisect_right(range(1, len(rest) + 1), width, key=lambda num: font.getlength(rest[:num])))
        if end < len(rest):  # not in the middle of a word, where there is a choice
            ends = (num for num in range(1, end + 1) if rest[num - 1] in " _/:@-" or rest[num] == " ")
            end = max(ends, default=end)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


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


def is_picture(path: Path) -> bool:
    """Whether it is a whole image file, and no link to one."""
    if path.is_symlink() or not path.is_file():
        return False
    with suppress(*UNREADABLE), Image.open(path) as picture:
        picture.verify()
        return True
    return False


def read_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG file; {} of anything else."""
    with suppress(*UNREADABLE), Image.open(path) as picture:
        return dict(getattr(picture, "text", {}))
    return {}


def parameters_text(prompt: str, fields: Mapping[str, object]) -> str:
    """The chunk `parameters` as A1111 writes and reads it: the prompt, and a line `Steps: 4, Sampler: LCM, ...`."""
    values = {name: str(value) for name, value in fields.items()}
    quoted = {name: json.dumps(value) if set(value) & set(",:\n") else value for name, value in values.items()}
    return f"{prompt}\n{', '.join(f'{name}: {value}' for name, value in quoted.items())}".lstrip("\n")
