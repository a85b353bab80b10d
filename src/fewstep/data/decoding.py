"""One stored picture: from its bytes to the pixels that a model takes, or the reason why it can't be used."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from fewstep.errors import UserError, brief

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # said from half the limit on
MAX_BYTES = 2**28  # of a picture, unpacked; what is longer is cut
DEEP = {"I": "32-bit", "F": "floating-point"}


class Cell(NamedTuple):
    """An undecoded picture: its name, and its bytes or the file that has them; without them, `fault` says why."""

    name: str
    content: bytes | Path | None
    fault: str = "no picture"


class Unusable(UserError):
    """One image that can't be used; `reason` is what a report of many counts, `told` has more of this one."""

    def __init__(self, image: str, reason: str, told: str | None = None):
        super().__init__(f"{image}: {told or reason}; replace or remove it")
        self.reason = reason


@contextmanager
def opened(cell: Cell, where: str) -> Iterator[Image.Image]:
    """The picture with only its header read; what fails here, and in the block, is Unusable."""
    named = f"{where} ({cell.name[:200]})" if cell.name else where
    name = str(cell.content) if isinstance(cell.content, Path) else named
    try:
        if cell.content is None:
            raise Unusable(name, cell.fault)
        with Image.open(io.BytesIO(cell.content) if isinstance(cell.content, bytes) else cell.content) as picture:
            yield picture
    except Unusable as error:
        raise Unusable(name, error.reason) from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise Unusable(name, *_reason(error, cell)) from error


def _reason(error: Exception, cell: Cell) -> tuple[str, str | None]:
    """What is wrong with the picture, in words that many share, and more of this one."""
    if isinstance(error, Image.DecompressionBombError):
        pixels, limit = (int(number) / 1e6 for number in re.findall(r"\d+", str(error))[:2])
        return f"over {limit:.0f} megapixels", f"{pixels:.0f} megapixels, over the limit of {limit:.0f}"
    if isinstance(error, FileNotFoundError):
        return "gone, or a link to nothing", None
    if not (cell.content.stat().st_size if isinstance(cell.content, Path) else cell.content):
        return "empty", None
    if isinstance(error, UnidentifiedImageError):
        return "in no format that can be read here", None
    if "truncated" in str(error).lower():
        return "truncated", None
    return "damaged", f"damaged ({brief(error)})"


def decode(cell: Cell, where: str, size: int, channels: int, background: str = "white", min_side: int = 0) -> Tensor:
    """The picture as uint8 (C, size, size), resized by its shorter side and centre-cropped; what is transparent shows
    the background. Raises Unusable.
    """
    with opened(cell, where) as stored:
        if min(stored.size) < min_side:
            raise Unusable("", f"smaller than {min_side} pixels")
        if stored.mode[0] in DEEP:  # which convert() would clip at 255
            sixteen = stored.mode.startswith("I;16") or stored.format == "PNG"
            raise Unusable("", f"{'16-bit' if sixteen else DEEP[stored.mode[0]]}, not 8-bit")
        picture = ImageOps.exif_transpose(stored)
        if picture.has_transparency_data:  # or colours that stand under it, which nobody sees, would come up
            ground = Image.new("RGBA", picture.size, ImageColor.getrgb(background)[:3])
            picture = Image.alpha_composite(ground, picture.convert("RGBA"))
        picture = picture.convert("L" if channels == 1 else "RGB")
    return square(picture, size)


def square(picture: Image.Image, size: int) -> Tensor:
    """A grey or RGB picture as uint8 (C, size, size), resized by its shorter side and centre-cropped."""
    fitted = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, -1).permute(2, 0, 1)
