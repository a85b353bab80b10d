"""Diffusers pipelines out of a folder, or out of a single file and a folder with its configuration."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.files import read_json
from fewstep.models.loading.hub import read_index
from fewstep.models.loading.single_file import Weights, convert, parts_in, pipeline_name
from fewstep.models.loading.weights import check_finite, check_names, check_stored, load_checked
from fewstep.networks.families import FAMILIES, find_family
from fewstep.networks.family import Family

Changes = dict[str, Any]
LIBRARIES = ("diffusers", "transformers")


def check_index(source: object, index: dict[str, Any]) -> Family:
    """The family of a pipeline; raises UserError if it is unsupported, has foreign code, or other parts."""
    name = index.get("_class_name")
    family = find_family(str(name))
    if family is None or family.settings:
        supported = ", ".join(each.name for each in FAMILIES.values() if not each.settings)
        raise UserError(f"{source}: a {name}, which is not supported; supported are {supported}")
    entries = {part: index.get(part) or (None, None) for part in family.parts}
    missing = [part for part, (library, _) in entries.items() if library is None]
    if missing:
        raise UserError(f"{source}: is without {', '.join(missing)}; the whole pipeline is needed")
    foreign = [f"{part} ({library})" for part, (library, _) in entries.items() if library not in LIBRARIES]
    if foreign:
        raise UserError(f"{source}: {', '.join(foreign)} is code from elsewhere, which is never run")
    for part, kind in family.weights.items():
        if entries[part][1] != kind:
            raise UserError(f"{source}: its {part} is of the class {entries[part][1]}; supported is {kind}")
    return family


def load_pipeline(folder: Path, changes: Changes) -> Any:
    """The pipeline in a diffusers folder, in float32, with these changes to its scheduler."""
    family = check_index(folder, read_index(folder))
    check_subfolders(folder, family)
    return _assemble(folder, family, {part: _from_folder(folder, part, family) for part in family.weights}, changes)


def load_single_file(path: Path, weights: Weights, config: Path, changes: Changes) -> Any:
    """The pipeline of a single file, in float32; its configuration, and the parts it lacks, come from `config`."""
    family = check_index(config, read_index(config))
    if family.name != pipeline_name(weights):
        its = f"the configuration in {config} is a {family.name}'s"
        raise UserError(f"{path}: for a {pipeline_name(weights)}, but {its}")
    check_subfolders(config, family)
    there = parts_in(weights)
    absent = [part for part in family.weights if part not in there and not _files(config, part)]
    if absent:
        raise UserError(f"{path}: lacks {', '.join(absent)}, and {config} has no weights for that; name a whole folder")
    parts = {
        part: _from_file(path, weights, config, part, family) if part in there else _from_folder(config, part, family)
        for part in family.weights
    }
    return _assemble(config, family, parts, changes)


def check_subfolders(folder: Path, family: Family) -> None:
    """Raises UserError unless the folder has one for every part."""
    missing = [part for part in family.parts if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: lacks the subfolder {', '.join(missing)}; the whole pipeline is needed")


def _files(folder: Path, part: str) -> list[Path]:
    return sorted((folder / part).glob("*.safetensors"))


def _from_folder(folder: Path, part: str, family: Family) -> nn.Module:
    files = _files(folder, part)
    if not files:
        raise UserError(f"{folder}: {part} has no safetensors weights; other formats can run code, and are never read")
    halves = all(".fp16" in file.name for file in files)  # also of shards: .fp16-00001-of-00002
    read = [file for file in files if halves or ".fp16" not in file.name]
    place = {name: file for file in read for name in check_stored(file)}
    kind = library_class(family.weights[part])
    model, information = kind.from_pretrained(
        str(folder),
        subfolder=part,
        variant="fp16" if halves else None,
        torch_dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **({"low_cpu_mem_usage": False} if hasattr(kind, "from_config") else {}),  # those of diffusers
    )
    check_names(f"{folder}: {part}", information["missing_keys"], information["unexpected_keys"])
    for name, tensor in model.state_dict().items():
        check_finite(place.get(name, folder / part), [(name, tensor)])
    network: nn.Module = model
    return network


def _from_file(path: Path, weights: Weights, config: Path, part: str, family: Family) -> nn.Module:
    model = build_part(library_class(family.weights[part]), config / part)
    try:
        load_checked(f"{path}: {part}", model, convert(weights, part, model))
    except UserError as error:
        raise UserError(f"{error}" + f" ({config} configures it)" * ("other sizes" in str(error))) from error
    return model


def build_part(kind: Any, folder: Path) -> nn.Module:
    """A network of that class, of random weights, by the configuration in its folder."""
    config = read_json(folder / "config.json")
    network: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
    return network


def _assemble(folder: Path, family: Family, parts: dict[str, nn.Module], changes: Changes) -> Any:
    """The pipeline of these parts, with the folder's scheduler and tokenizers."""
    kind = library_class(family.name)
    others = {name for name, entry in read_index(folder).items() if isinstance(entry, list)}  # SD3's T5, say
    unwanted = (others | set(kind._optional_components)) - set(family.parts)
    pipeline = kind.from_pretrained(str(folder), local_files_only=True, **parts, **dict.fromkeys(unwanted))
    if changes:  # DDIM's is the one scheduler that knows all of them
        family.schedule(pipeline.scheduler.config)  # which refuses what is not its kind
        pipeline.scheduler = library_class("DDIMScheduler").from_config(pipeline.scheduler.config, **changes)
    return pipeline


def library_class(name: str) -> Any:
    """A class of diffusers or transformers, with the bars and the advice of both off: what matters is raised."""
    import diffusers
    import transformers

    libraries: tuple[Any, ...] = (transformers, diffusers)
    for library in libraries:
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    return getattr(diffusers, name, None) or getattr(transformers, name)
