"""Diffusers pipelines out of a folder, or out of a single file and a folder with its configuration."""

import warnings
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.models.loading.files import check_files, part_tensors, read_config, whole
from fewstep.models.loading.hub import read_index
from fewstep.models.loading.single_file import Weights, convert, parts_in, pipeline_name
from fewstep.models.loading.weights import check_finite, check_fits, fill, load_checked, plain_name, stored
from fewstep.networks.families import FAMILIES, find_family
from fewstep.networks.family import Family

Changes = dict[str, Any]
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # newer folders have the first, older the others


def check_index(source: object, index: dict[str, Any]) -> Family:
    """The family of a pipeline; raises UserError if it is unsupported, has foreign code, or other parts."""
    name = index.get("_class_name")
    family = find_family(str(name))
    if family is None or family.settings:
        supported = ", ".join(each.name for each in FAMILIES.values() if not each.settings)
        raise UserError(f"{source}: a {name}, which is not supported; supported are {supported}")
    entries = {part: index.get(part) or (None, None) for part in family.parts}
    if odd := [part for part, entry in entries.items() if not isinstance(entry, list | tuple) or len(entry) != 2]:
        raise UserError(f"{source}: its {odd[0]} is {index[odd[0]]!r}, not [library, class]; name another model")
    missing = [part for part, (library, _) in entries.items() if library is None]
    if missing:
        raise UserError(f"{source}: is without {', '.join(missing)}; the whole pipeline is needed")
    foreign = [
        f"{part} ({library})" for part, (library, _) in entries.items() if library not in ("diffusers", "transformers")
    ]
    if foreign:
        raise UserError(f"{source}: {', '.join(foreign)} is code from elsewhere, which is never run")
    for part, kind in family.weights.items():
        if entries[part][1] != kind:
            raise UserError(f"{source}: its {part} is of the class {entries[part][1]}; supported is {kind}")
    return family


def load_pipeline(folder: Path, changes: Changes, dtype: torch.dtype | None = torch.float32) -> Any:
    """The pipeline in a diffusers folder, its trained network in `dtype`, with these changes to its scheduler.

    None leaves the network as and where the files have it: in memory that all processes share.
    """
    family = check_index(folder, read_index(folder))
    check_subfolders(folder, family)
    parts = {
        part: load_part(library_class(kind), folder / part, dtype if part == family.part else torch.float32)
        for part, kind in family.weights.items()
    }
    return _assemble(folder, family, parts, changes)


def load_single_file(
    path: Path, weights: Weights, config: Path, changes: Changes, dtype: torch.dtype | None = torch.float32
) -> Any:
    """The pipeline of a single file, its trained network in `dtype`; what the file lacks comes from `config`."""
    family = check_index(config, read_index(config))
    if family.name != pipeline_name(weights):
        of = pipeline_name(weights)
        raise UserError(f"{path}: for a {of}, but the configuration in {config} is a {family.name}'s")
    check_subfolders(config, family)
    there = parts_in(weights)
    absent = [part for part in family.weights if part not in there and not any((config / part).glob("*.safetensors"))]
    if absent:
        raise UserError(f"{path}: lacks {', '.join(absent)}, and {config} has no weights for that; name a whole folder")
    parts = {}
    for part, name in family.weights.items():
        kind, held_in = library_class(name), dtype if part == family.part else torch.float32
        where = (config / part, held_in)
        parts[part] = _from_file(path, weights, part, kind, *where) if part in there else load_part(kind, *where)
    return _assemble(config, family, parts, changes)


def check_subfolders(folder: Path, family: Family) -> None:
    """Raises UserError unless the folder has one for every part, of files of its own."""
    missing = [part for part in family.parts if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: lacks the subfolder {', '.join(missing)}; the whole pipeline is needed")
    check_files(folder, family.parts)


def load_part(kind: Any, folder: Path, dtype: torch.dtype | None = torch.float32) -> Any:
    """The network of that class in the folder of a part, on the CPU, in `dtype`.

    It is given memory when the files have the names and shapes that its configuration gives it. Raises UserError,
    naming part, file and tensor, if they have not, or a number is not finite.
    """
    tensors, variant = part_tensors(folder)
    place = {plain_name(name): file for name, (file, _) in tensors.items()}
    bare = outline(kind, folder)
    needs = {plain_name(name): tensor for name, tensor in bare.state_dict().items()}
    check_fits(folder, needs, {plain_name(name): meta for name, (_, meta) in tensors.items()}, place)
    if dtype != torch.float32 and _are_all(tensors, bare):
        with whole(folder):
            fill(folder, bare, stored(dict.fromkeys(place.values())), dtype, place)
        return bare
    with whole(folder):
        how: Changes = {"variant": variant, "torch_dtype": torch.float32, "local_files_only": True}
        how |= {"low_cpu_mem_usage": False} if hasattr(kind, "from_config") else {}  # those of diffusers
        network = kind.from_pretrained(str(folder), use_safetensors=True, **how)
    for name, tensor in network.state_dict().items():
        check_finite(place.get(plain_name(name), folder), [(name, tensor)])
    return network.to(dtype or torch.float32)


def _are_all(names: Container[str], bare: nn.Module) -> bool:
    """Whether these tensors are all of a network: others have tables, which are made with it, or parts of old names."""
    own = bare.state_dict()
    return all(name in own for name, _ in bare.named_buffers()) and all(name in names for name in own)


def _from_file(
    path: Path, weights: Weights, part: str, kind: Any, config: Path, dtype: torch.dtype | None
) -> nn.Module:
    try:
        found = convert(weights, part, bare := outline(kind, config))
        check_fits(where := f"{path}: {part}", bare.state_dict(), found)
        if _are_all(found, bare):
            fill(where, bare, found.items(), dtype)
            return bare
        load_checked(where, model := build_part(kind, config), found)
    except UserError as error:
        raise UserError(f"{error}" + f" ({config.parent} configures it)" * ("other sizes" in str(error))) from error
    return model.to(dtype or torch.float32)


def build_part(kind: Any, folder: Path) -> nn.Module:
    """A network of that class, of random weights, by the configuration in its folder."""
    config = read_config(path := folder / "config.json")
    if config.get("quantization_config"):
        raise UserError(f"{path}: is of quantised weights, which are not read; name the model in 16 or 32 bits")
    if (name := config.get("_class_name", kind.__name__)) != kind.__name__:
        raise UserError(f"{path}: is of the class {name}; supported is {kind.__name__}")
    with whole(path):
        make: Callable[..., nn.Module] = getattr(kind, "from_config", lambda read: kind(kind.config_class(**read)))
        return make(config)


def outline(kind: Any, folder: Path) -> nn.Module:
    """The same without memory: names and shapes alone."""
    with torch.device("meta"):
        return build_part(kind, folder)


def _assemble(folder: Path, family: Family, parts: dict[str, nn.Module], changes: Changes) -> Any:
    """The pipeline of these parts, with the folder's scheduler and tokenizers."""
    from diffusers.configuration_utils import FrozenDict

    kind, index = library_class(family.name), read_index(folder)
    others = {name for name, entry in index.items() if isinstance(entry, list)}  # SD3's T5, say
    unwanted = (others | set(kind._optional_components)) - set(family.parts)
    told = read_config(folder / "scheduler" / "scheduler_config.json")  # of which a class drops what it does not know
    given = parts | {name: without_weights(folder / name, str(index[name][1])) for name in family.others}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 20 lines each, of settings that no denoiser depends on
        pipeline = kind.from_pretrained(str(folder), local_files_only=True, **given, **dict.fromkeys(unwanted))
        for config in (FrozenDict(told), pipeline.scheduler.config):
            family.schedule(config)  # which refuses what is not its kind
        if changes:  # DDIM's is the one scheduler that knows all of them
            pipeline.scheduler = library_class("DDIMScheduler").from_config(pipeline.scheduler.config, **changes)
    return pipeline


def without_weights(folder: Path, name: str) -> Any:
    """A scheduler or a tokenizer of that class; for want of its files the library would make an empty one."""
    if not name.endswith(("Scheduler", "Tokenizer", "TokenizerFast")):
        raise UserError(f"{folder}: is of the class {name}, which is no scheduler and no tokenizer")
    if "Tokenizer" in name and not any(all((folder / file).is_file() for file in files) for files in VOCABULARIES):
        told = " nor ".join(" with ".join(files) for files in VOCABULARIES)
        raise UserError(f"{folder}: holds neither {told}; fetch the model again")
    with whole(folder):
        return library_class(name).from_pretrained(str(folder), local_files_only=True)


def library_class(name: str) -> Any:
    """A class of diffusers or transformers, with the bars and the advice of both off: what matters is raised."""
    import diffusers
    import transformers

    libraries: tuple[Any, ...] = (transformers, diffusers)
    for library in libraries:
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    return getattr(diffusers, name, None) or getattr(transformers, name)
