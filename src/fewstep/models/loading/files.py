"""The files of a model folder, looked at before a library reads them: inside of it, regular, small, JSON objects."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.errors import UserError, brief
from fewstep.files import read_json
from fewstep.models.loading.weights import check_stored

MAX_TEXT = 2**28  # bytes of a file that is no weights; the largest tokenizers have 2**25
MAX_NUMBER = 2**20  # in a configuration, where the largest are vocabularies
MAX_LAYERS = 1000  # each is built before its weights are looked for
# as diffusers and transformers write
WEIGHTS = re.compile(r"[^.]+?(\.(?P<variant>[^.]+?))?(-\d+-of-\d+)?\.safetensors")
PREFERRED = ("", "fp32", "bf16", "fp16")  # variants, where a part has several


@contextmanager
def whole(path: object, what: str = "is missing or damaged", advice: str = "name another checkpoint") -> Iterator[None]:
    """Raises UserError for a file that is missing or damaged, which shows itself as almost any error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {what} ({brief(error)}); {advice}") from error


def read_config(path: Path) -> dict[str, Any]:
    """A configuration; raises UserError where it is none."""
    check_sizes(path, content := read_json(path))
    return content


def check_sizes(path: Path, content: Any, key: str = "") -> None:
    """Raises UserError for whole numbers, named by the innermost `key`, by which no network fits a computer."""
    if isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else ((key, value) for value in content):
            check_sizes(path, value, name)
    elif isinstance(content, int) and abs(content) > (MAX_LAYERS if "layers" in key else MAX_NUMBER):
        raise UserError(f"{path}: {key} is {content:.3g}, which no model has; name another checkpoint")


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Raises UserError for links that lead out of the folder, what is no file, and text that is too long.

    Of `names`, files or folders with all that is in them. What a link leads to would be published with an export. In a
    snapshot of the hub's cache all files are links, to the blobs beside it.
    """
    root = folder.resolve()
    cached = root.parent.name == "snapshots" and root.parents[1].name.startswith("models--")
    for path in (path for name in names for path in (folder / name, *(folder / name).rglob("*"))):
        target = path.resolve()
        if not target.is_relative_to(root) and not (cached and target.parent == root.parents[1] / "blobs"):
            raise UserError(f"{path}: is a link out of its model folder; put what it leads to in its place")
        if not path.is_dir() and not path.is_file():
            what = "is no ordinary file" if path.exists() else "is missing or damaged (no such file)"
            raise UserError(f"{path}: {what}; name another checkpoint")
        if path.is_file() and path.suffix != ".safetensors" and (size := path.stat().st_size) > MAX_TEXT:
            raise UserError(f"{path}: has {size:,} bytes, which is too much for such a file; name another checkpoint")


def part_tensors(folder: Path) -> tuple[dict[str, tuple[Path, Tensor]], str | None]:
    """All tensors of a part by name, each with its file and, without memory, its type and shape; and their variant.

    Of all that is there one variant is taken, with whole files or shards. Raises UserError, naming the file, if there
    is none, one is damaged or missing, or two hold the same.
    """
    with whole(folder):
        files = sorted(folder.iterdir())
    found = [(path, match["variant"] or "") for path in files if (match := WEIGHTS.fullmatch(path.name))]
    variants = {variant for _, variant in found}
    if not variants:
        raise UserError(f"{folder}: holds no weights in safetensors; other formats can run code, and are never read")
    variant = next((each for each in PREFERRED if each in variants), min(variants))
    if variant not in PREFERRED and len(variants) > 1:
        raise UserError(f"{folder}: has weights of several variants ({', '.join(sorted(variants))}); leave one there")
    files = [path for path, of in found if of == variant]
    for index in folder.glob(f"*.safetensors.index{f'.{variant}' if variant else ''}.json"):
        with whole(index):
            missing = set(read_json(index)["weight_map"].values()) - {file.name for file in files}
        if missing:
            raise UserError(f"{index}: names {min(map(str, missing))}, which is not there; fetch the model again")
    tensors: dict[str, tuple[Path, Tensor]] = {}
    for file in files:
        with whole(file):
            for name, meta in check_stored(file).items():
                if name in tensors:
                    raise UserError(f"{file}: holds {name}, which is also in {tensors[name][0].name}")
                tensors[name] = file, meta
    return tensors, variant or None
