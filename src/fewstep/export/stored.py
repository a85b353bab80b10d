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
from fewstep.models.image_model import DESCRIPTION, ImageModel
from fewstep.models.loading.hub import PIPELINE
from fewstep.models.loading.pipeline import PARTS, check_index, library_class

TRAINED = ImageModel.part  # that distillation trains
PIXEL_INDEX = {TRAINED: ["diffusers", "UNet2DModel"]}


@dataclass(frozen=True)
class Raw:
    """A network's weights as trained, by their names in it, and the file that they are in."""

    file: Path
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A network of a model, in files."""

    kind: Any
    """Its class in diffusers or transformers."""
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """Types and shapes, without memory."""
    files: dict[str, Path]
    """Where each tensor is."""
    raw: Mapping[str, Tensor]
    """Those that take the place of the files'."""

    def read(self, name: str) -> Tensor:
        """One tensor."""
        if name in self.raw:
            return self.raw[name]
        with open_weights(self.files[name]) as handle:  # anew, for what was read stays in memory as long as it is open
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def check_numbers(self, report: Callable[[], None]) -> None:
        """Raises UserError where a number is not finite."""
        for name, tensor in self.tensors.items():
            report()
            full = tensor.is_floating_point() and tensor.numel()
            if full and not all(bound.isfinite() for bound in self.read(name).aminmax()):  # NaN if one is
                raise not_whole(self.files[name], f"{name} holds numbers that are not finite")


@dataclass(frozen=True)
class StoredModel:
    """A model folder: what its description and its index say, and its networks by the names of their parts."""

    folder: Path
    description: dict[str, Any]
    index: dict[str, Any]
    parts: dict[str, Part]

    @property
    def is_pipeline(self) -> bool:
        """Of a class of diffusers; else it is a network on pixels."""
        return self.index is not PIXEL_INDEX

    @property
    def num_tensors(self) -> int:
        return sum(len(part.tensors) for part in self.parts.values())

    def check_numbers(self, report: Callable[[], None] = lambda: None) -> None:
        """Raises UserError where a number is not finite; `report` is called per tensor."""
        for part in self.parts.values():
            part.check_numbers(report)


def open_stored(folder: Path, raw: Raw | None = None) -> StoredModel:
    """The model in `folder`, its trained network with the weights `raw` where they are given.

    Raises UserError, naming part, file and tensor, unless every network has the names and shapes of its configuration.
    """
    description, index, names = read_json(folder / DESCRIPTION), PIXEL_INDEX, [TRAINED]
    if (folder / PIPELINE).is_file():
        index = read_json(folder / PIPELINE)
        names = list(PARTS[check_index(folder, index)])
    parts = {}
    for name in names:
        kind = library_class(index[name][1])
        if not (folder / name).is_dir():
            raise not_whole(folder / name, "is missing")
        if issubclass(kind, nn.Module):
            parts[name] = open_part(folder / name, kind, raw if name == TRAINED else None)
    return StoredModel(folder, description, index, parts)


def open_part(folder: Path, kind: Any, raw: Raw | None) -> Part:
    """A network of that class, of the names and shapes that its configuration gives it."""
    config, network = read_json(folder / "config.json"), None
    try:
        with torch.device("meta"):
            network = kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
    except Exception as error:  # of the library, and almost any
        raise not_whole(folder / "config.json", f"describes no {kind.__name__} ({brief(error)})") from error
    tensors, files = _stored_tensors(folder)
    if raw:
        tensors |= {name: torch.empty_like(tensor, device="meta") for name, tensor in raw.tensors.items()}
        files |= dict.fromkeys(raw.tensors, raw.file)
        for name, _ in network.named_parameters():
            if name not in raw.tensors:
                raise not_whole(raw.file, f"lacks {name}, which the {kind.__name__} in {folder} has")
    _check_shapes(folder, kind.__name__, network, tensors, files)
    return Part(kind, config, tensors, files, raw.tensors if raw else {})


def _check_shapes(
    folder: Path, kind: str, network: nn.Module, tensors: dict[str, Tensor], files: dict[str, Path]
) -> None:
    """Raises UserError unless the tensors have the names and shapes of the network's."""
    ours = {_plain(name): name for name in tensors}
    needs = {_plain(name): tensor.shape for name, tensor in network.state_dict().items()}
    for name in sorted(ours.keys() | needs.keys()):
        if name not in ours:
            raise not_whole(folder, f"lacks {name}, which the {kind} of its config.json has")
        file, shape = files[ours[name]], tensors[ours[name]].shape
        if name not in needs:
            raise not_whole(file, f"holds {name}, for which the {kind} in {folder} has no place")
        if shape != needs[name]:
            raise not_whole(file, f"{name} is {list(shape)}, where the {kind} in {folder} has {list(needs[name])}")


def _plain(name: str) -> str:
    """Some versions of transformers have one word more in the names of text encoders."""
    return name.removeprefix("text_model.")


def _stored_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """Every tensor of a part, without memory, and the file that it is in."""
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for file in _weight_files(folder):
        with open_weights(file) as handle:
            for name in handle.keys():  # noqa: SIM118, for it is no dict
                stored = handle.get_slice(name)
                if name in files:
                    raise not_whole(file, f"holds {name}, which is also in {files[name].name}")
                if stored.get_dtype() not in DTYPES:
                    raise not_whole(file, f"{name} is stored as {stored.get_dtype()}, which is not exported")
                tensors[name] = torch.empty(stored.get_shape(), dtype=DTYPES[stored.get_dtype()], device="meta")
                files[name] = file
    return tensors, files


def _weight_files(folder: Path) -> list[Path]:
    """Those that are there, and those that an index of shards names."""
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index*.json"):
        files |= {folder / name for name in read_json(index).get("weight_map", {}).values()}
    if not files:
        raise not_whole(folder, "holds no weights")
    return sorted(files)


def open_weights(file: Path) -> Any:
    """The file, memory-mapped; raises UserError if it is damaged."""
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise not_whole(file, "is damaged" if file.exists() else "is missing") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises UserError if the file holds none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise not_whole(file, f"can't be read ({brief(error)})") from error
    if not isinstance(content, dict):
        raise not_whole(file, "holds no JSON object")
    return content


def not_whole(where: Path, what: str) -> UserError:
    """One line about a part, a file or a tensor of it."""
    return UserError(f"{where}: {what}; name another checkpoint")
