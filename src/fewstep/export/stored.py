"""A model as it lies on the disk, compared with its own configuration before anything is made of it.

No network is given memory: its configuration says which tensors it has, and those of the files are read one by one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.files import read_json
from fewstep.models.image_model import DESCRIPTION, LORA, read_description
from fewstep.models.loading.files import check_files, check_sizes, part_tensors, read_config, whole
from fewstep.models.loading.hub import ID, PIPELINE, read_index
from fewstep.models.loading.pipeline import check_index, check_subfolders, library_class, outline, without_weights
from fewstep.models.loading.pretrained import described
from fewstep.models.loading.weights import check_finite, check_fits, check_names, plain_name
from fewstep.models.lora_files import open_lora
from fewstep.networks.families.edm import PIXELS
from fewstep.networks.family import Family
from fewstep.networks.lora import LoRA, LowRank, lora_in, merged
from fewstep.networks.settings import LoRASettings, PixelModelConfig
from fewstep.networks.text import check_fit

Raw = tuple[Path, Mapping[str, Tensor]]
"""A file, and the trained network's weights in it by their names there."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `meta` has its type and shape, without memory."""

    name: str
    file: Path
    meta: Tensor
    raw: Tensor | None = None  # out of another kind of file, where it stays on the disk until it is used
    change: LowRank | None = None  # of low rank, which is trained beside it

    def read(self) -> Tensor:
        if self.raw is not None:
            return self.raw
        with safe_open(self.file, "pt") as handle:  # anew, for what was read stays in memory as long as it is open
            tensor: Tensor = handle.get_tensor(self.name)
        return merged(tensor, self.change) if self.change else tensor


@dataclass(frozen=True)
class Part:
    """A network without memory, and its tensors by name."""

    network: nn.Module
    tensors: dict[str, Stored]


@dataclass(frozen=True)
class StoredModel:
    """A model folder: what its description and its index say, and its networks by the names of their parts."""

    folder: Path
    description: dict[str, Any]
    family: Family
    index: dict[str, Any]  # {} without a class of diffusers: of a network on pixels
    parts: dict[str, Part]
    lora: LoRA = field(default_factory=dict)  # what is merged into the trained network's weights as they are read

    @property
    def prediction(self) -> str:
        """The prediction type that its scheduler says, where it has one."""
        if not self.index:
            return "edm"
        return str(read_json(self.folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon"))

    @property
    def base_model(self) -> str | None:
        """The teacher's id on the hub, by what its student was told when it was made: of older ones nobody knows."""
        base = str(self.description.get("base_model"))
        return base if ID.fullmatch(base) else None

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
    check_plain(folder)
    description, index, family = read_description(folder), dict[str, Any](), PIXELS
    check_sizes(folder / DESCRIPTION, description)
    if (folder / PIPELINE).is_file():
        index = read_index(folder)
        family = check_index(folder, index)
    elif description["family"] != family.name:
        what = f"of the family {description['family']!r}, which has no export; sample takes --family"
        raise UserError(f"{folder}: {what}")
    config = None
    with whole(folder / DESCRIPTION):
        if min(float(t) for t in description["timesteps"]) < 0 or (description["family"] == "latent") != bool(index):
            raise ValueError("its family or its timesteps are of no student")
        if not index:
            config = PixelModelConfig(**description["config"])
    check_subfolders(folder, family)
    prefix, told, given = f"network.{family.part}.", description.pop(LORA, None), {}
    if raw:
        raw = raw[0], {name.removeprefix(prefix): value for name, value in raw[1].items()}
        given = {} if told else {family.part: raw}
    kinds = {name: library_class(kind) for name, kind in family.weights.items()}
    parts = {name: open_part(folder / name, kind, given.get(name)) for name, kind in kinds.items()}
    if config:
        described(folder / family.part, family, config)
    else:
        _check_pipeline(folder, description, family, index, parts)
    lora: LoRA = {}
    if told:
        lora = _trained(folder, told, family, parts[family.part].network, raw)
        parts[family.part] = changed(parts[family.part], lora)
    return StoredModel(folder, description, family, index, parts, lora)


def _trained(folder: Path, told: Any, family: Family, network: nn.Module, raw: Raw | None) -> LoRA:
    """The low-rank weights that lie in the folder, or those of a state."""
    check_files(folder, [LORA])
    with whole(folder / DESCRIPTION):
        settings = LoRASettings(**told)
    return lora_in(raw[1], settings.alpha) if raw else open_lora(folder / LORA, network, family).lora


def changed(part: Part, lora: LoRA) -> Part:
    """The part, whose weights are merged, in float32, as they are read."""
    changes = {f"{name}.weight": change for name, change in lora.items()}
    return replace(part, tensors={n: replace(s, change=changes.get(n)) for n, s in part.tensors.items()})


def _check_pipeline(
    folder: Path, description: dict[str, Any], family: Family, index: dict[str, Any], parts: dict[str, Part]
) -> None:
    """Raises UserError for what would be copied and is none of the model's: sizes, a scheduler, tokenizers."""
    for part in family.others:
        with naming(path := folder / part / f"{part.partition('_')[0]}_config.json"):
            content = read_config(path)
            if "auto_map" in content:
                raise UserError("auto_map names code from elsewhere; take it out")
            if part == "scheduler":
                family.schedule(content)
            else:
                encoder: Any = parts[part.replace("tokenizer", "text_encoder")].network
                check_fit(without_weights(folder / part, str(index[part][1])), encoder.config)
    networks: dict[str, Any] = {name: part.network for name, part in parts.items()}
    factor = 2 ** (len(networks["vae"].config.block_out_channels) - 1)
    pipeline = SimpleNamespace(**networks, components=index, vae_scale_factor=factor)
    with naming(folder / family.part / "config.json"):
        family.check(pipeline)
        if (size := family.image_size(pipeline)) != (said := description.get("image_size", size)):
            raise UserError(f"is of {size} pixels, {DESCRIPTION} of {said}; they are of two models")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors say the path, unless they do."""
    try:
        with whole(path):
            yield
    except UserError as error:
        raise UserError(str(error) if str(path.parent) in str(error) else f"{path}: {error}") from error


def check_plain(folder: Path) -> None:
    """Raises UserError unless it holds files and folders alone: what a link leads to must not be published."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is a link or no plain file, which is never exported; put the file itself there")


def open_part(folder: Path, kind: Any, raw: Raw | None = None) -> Part:
    """A network of that class, of the names and shapes that its configuration gives it; `raw` by its own names."""
    network = outline(kind, folder)
    tensors = {name: Stored(name, file, meta) for name, (file, meta) in part_tensors(folder)[0].items()}
    if raw:
        check_names(raw[0], dict(network.named_parameters()).keys() - raw[1].keys(), ())
        tensors |= {name: Stored(name, raw[0], torch.empty_like(t, device="meta"), t) for name, t in raw[1].items()}
    needs = {plain_name(name): tensor for name, tensor in network.state_dict().items()}
    found = {plain_name(name): stored.meta for name, stored in tensors.items()}
    check_fits(folder, needs, found, {plain_name(name): stored.file for name, stored in tensors.items()})
    return Part(network, tensors)
