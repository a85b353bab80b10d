"""Image sets that tests write, and how they open them."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from fewstep.data.images import ImageSet, load_captioned, load_images
from fewstep.data.settings import DataSettings


def load(
    source: Path | str, size: int, channels: int, num_classes: int = 0, shrink: bool | None = None, **columns: str
) -> ImageSet:
    return load_images(DataSettings(source=str(source), **columns), size, channels, num_classes, shrink)


def captioned(source: Path | str, size: int, shrink: bool | None = None) -> ImageSet:
    return load_captioned(DataSettings(source=str(source)), size, shrink)


def encoded(picture: Image.Image) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_edm_zip(
    path: Path, images: Mapping[str, bytes], labels: object, compression: Sequence[int] = (zipfile.ZIP_STORED,)
) -> Path:
    """As dataset_tool writes it: dataset.json behind the images, which are compressed in turn; labels may be bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for index, (name, content) in enumerate(images.items()):
            archive.writestr(name, content, compression[index % len(compression)])
        archive.writestr("dataset.json", labels if isinstance(labels, bytes) else json.dumps({"labels": labels}))
    return path
