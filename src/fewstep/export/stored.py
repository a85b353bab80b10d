"""A model as it lies on the disk, compared with its own configuration before anything is made of it.

No network is given memory: its configuration says which tensors it has, and those of the files are read one by one.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.errors import UserError, brief
from fewstep.export.weights import DTYPES
from fewstep.models.image_model import DESCRIPTION
from fewstep.models.loading.hub import PIPELINE
from fewstep.models.loading.pipeline import check_index, library_class
from fewstep.models.loading.weights import check_finite, check_names
from fewstep.models.settings import PixelModelConfig
from fewstep.networks.families.edm import PIXELS
from fewstep.networks.family import Family

Raw = tuple[Path, Mapping[str, Tensor]]
"""A file, and the trained network's weights in it by their names there."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `meta` has its type and shape, without memory."""

    name: str
    file: Path
    meta: Tensor
    raw: Tensor | None = None
    """Out of another kind of file, where it stays on the disk until it is used."""

    def read(self) -> Tensor:
        if self.raw is not None:
            return self.raw
        with open_weights(self.file) as handle:  # anew, for what was read stays in memory as long as it is open
            tensor: Tensor = handle.get_tensor(self.name)
        return tensor


@dataclass(frozen=True)
class Part:
    """A network: its class in diffusers or transformers, its configuration and its tensors by name."""

    kind: type[nn.Module]
    config: dict[str, Any]
    tensors: dict[str, Stored]


@dataclass(frozen=True)
class StoredModel:
    """A model folder: what its description and its index say, and its networks by the names of their parts."""

    folder: Path
    description: dict[str, Any]
    family: Family
    index: dict[str, Any]
    """{} without a class of diffusers: of a network on pixels."""
    parts: dict[str, Part]

    @property
    def tensors(self) -> list[Stored]:
        return [stored for part in self.parts.values() for stored in part.tensors.values()]

    def check_numbers(self, report: Callable[[], None] = lambda: None) -> None:
        """Raises UserError where a number is not finite; `report` is called per tensor."""
        for stored in self.tensors:
            report()
            check_finite(stored.file, [(stored.name, stored.read())])


def open_stored(folder: Path, raw: Raw | None = None) -> StoredModel:
    """The model in `folder`, its trained network with the weights `raw` where they are given.

    Raises UserError, naming part, file and tensor, unless every network has the names and shapes of its configuration.
    """
    description, index, family = read_json(folder / DESCRIPTION), dict[str, Any](), PIXELS
    if (folder / PIPELINE).is_file():
        index = read_json(folder / PIPELINE)
        family = check_index(folder, index)
    try:
        [float(t) for t in description["timesteps"]]
        if not index:
            PixelModelConfig(**description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise not_whole(folder / DESCRIPTION, f"describes no student ({brief(error)})") from error
    for name in family.parts:
        if not (folder / name).is_dir():
            raise not_whole(folder / name, "is missing")
    prefix, given = f"network.{family.part}.", {}
    if raw:
        given = {family.part: (raw[0], {name.removeprefix(prefix): value for name, value in raw[1].items()})}
    parts = {
        name: open_part(folder / name, library_class(kind), given.get(name)) for name, kind in family.weights.items()
    }
    return StoredModel(folder, description, family, index, parts)


def open_part(folder: Path, kind: Any, raw: Raw | None = None) -> Part:
    """A network of that class, of the names and shapes that its configuration gives it; `raw` by its own names."""
    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            network = kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
    except Exception as error:  # of the library, and almost any
        raise not_whole(folder / "config.json", f"describes no {kind.__name__} ({brief(error)})") from error
    tensors = _stored_tensors(folder)
    if raw:
        check_names(raw[0], {name for name, _ in network.named_parameters()} - raw[1].keys(), ())
        tensors |= {name: Stored(name, raw[0], torch.empty_like(t, device="meta"), t) for name, t in raw[1].items()}
    ours = {_plain(name): stored for name, stored in tensors.items()}
    needs = {_plain(name): list(tensor.shape) for name, tensor in network.state_dict().items()}
    check_names(folder, needs.keys() - ours.keys(), ())
    for name, stored in ours.items():
        check_names(stored.file, (), {name} - needs.keys())
        if name in needs and list(stored.meta.shape) != needs[name]:
            shapes = f"{name} is {list(stored.meta.shape)}, where the {kind.__name__} in {folder} has {needs[name]}"
            raise not_whole(stored.file, shapes)
    return Part(kind, config, tensors)


def _plain(name: str) -> str:
    """Some versions of transformers have one word more in the names of text encoders."""
    return name.removeprefix("text_model.")


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    """All of a part, by their names: of the files that are there, and of those that an index of shards names."""
    files, found = set(folder.glob("*.safetensors")), dict[str, Stored]()
    for index in folder.glob("*.safetensors.index*.json"):
        files |= {folder / name for name in read_json(index).get("weight_map", {}).values()}
    if not files:
        raise not_whole(folder, "holds no weights")
    for file in sorted(files):
        with open_weights(file) as handle:
            for name in handle.keys():  # noqa: SIM118, for it is no dict
                stored = handle.get_slice(name)
                if name in found:
                    raise not_whole(file, f"holds {name}, which is also in {found[name].file.name}")
                if stored.get_dtype() not in DTYPES:
                    raise not_whole(file, f"{name} is stored as {stored.get_dtype()}, which is not exported")
                meta = torch.empty(stored.get_shape(), dtype=DTYPES[stored.get_dtype()], device="meta")
                found[name] = Stored(name, file, meta)
    return found


def open_weights(file: Path) -> Any:
    """The file, memory-mapped; raises UserError if it is damaged."""
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise not_whole(file, "is damaged" if file.exists() else "is missing") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises UserError if the file holds none."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise not_whole(file, f"can't be read ({brief(error)})") from error


def not_whole(where: Path, what: str) -> UserError:
    """One line about a part, a file or a tensor of it."""
    return UserError(f"{where}: {what}; name another checkpoint")
