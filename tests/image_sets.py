"""Image sets that tests write, and how they open them."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
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


def picture(index: int, width: int, height: int) -> Image.Image:
    """An RGB picture whose pixels are a function of `index`."""
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_files(folder: Path, contents: Mapping[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_captioned(
    folder: Path, pictures: Sequence[Image.Image], captions: Sequence[str], column: str = "text"
) -> Path:
    """0.png, 1.png, ..., and their captions in metadata.csv; `text,score` makes two columns of `a cat,5`."""
    rows = "".join(f"{index}.png,{caption}\n" for index, caption in enumerate(captions))
    images = {f"{index}.png": encoded(picture) for index, picture in enumerate(pictures)}
    return write_files(folder, images | {"metadata.csv": f"file_name,{column}\n{rows}".encode()})


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
