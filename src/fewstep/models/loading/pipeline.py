"""Diffusers pipelines of SD and SDXL out of a folder, or out of a single file and a folder with its configuration."""

from __future__ import annotations  # diffusers is imported only where a pipeline is loaded

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.models.loading.hub import read_index
from fewstep.models.loading.single_file import Weights, convert, parts_in, pipeline_name

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

Changes = dict[str, Any]
LIBRARIES = ("diffusers", "transformers")
WEIGHTED = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
PARTS = {  # what is needed of a pipeline; its safety checker and its image encoder are not
    "StableDiffusionPipeline": ("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": (
        *("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
        *("text_encoder_2", "tokenizer_2"),
    ),
}


def check_index(source: object, index: dict[str, Any]) -> str:
    """The pipeline's class; raises UserError if it is unsupported, has foreign code, or lacks a part."""
    name = index["_class_name"]
    if name not in PARTS:
        raise UserError(f"{source}: a {name}, which is not supported; supported are {', '.join(PARTS)}")
    entries = {part: index.get(part) or (None, None) for part in PARTS[name]}
    missing = [part for part, (library, _) in entries.items() if library is None]
    if missing:
        raise UserError(f"{source}: is without {', '.join(missing)}; the whole pipeline is needed")
    foreign = [f"{part} ({library})" for part, (library, _) in entries.items() if library not in LIBRARIES]
    if foreign:
        raise UserError(f"{source}: {', '.join(foreign)} is code from elsewhere, which is never run")
    return name


def load_pipeline(folder: Path, changes: Changes) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline in a diffusers folder, in float32, with these changes to its scheduler."""
    name = check_index(folder, read_index(folder))
    _check_subfolders(folder, name)
    parts = {part: _from_folder(folder, part) for part in PARTS[name] if part in WEIGHTED}
    return _assemble(folder, name, parts, changes)


def load_single_file(
    path: Path, weights: Weights, config: Path, changes: Changes
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline of a single file, in float32; its configuration, and the parts it lacks, come from `config`."""
    name = check_index(config, read_index(config))
    if name != pipeline_name(weights):
        raise UserError(f"{path}: for a {pipeline_name(weights)}, but the configuration in {config} is a {name}'s")
    _check_subfolders(config, name)
    there = parts_in(weights)
    absent = [part for part in PARTS[name] if part in WEIGHTED and part not in there and not _files(config, part)]
    if absent:
        raise UserError(f"{path}: lacks {', '.join(absent)}, and {config} has no weights for that; name a whole folder")
    parts = {
        part: _from_file(path, weights, config, part) if part in there else _from_folder(config, part)
        for part in PARTS[name]
        if part in WEIGHTED
    }
    return _assemble(config, name, parts, changes)


def _check_subfolders(folder: Path, name: str) -> None:
    missing = [part for part in PARTS[name] if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: lacks the subfolder {', '.join(missing)}; the whole pipeline is needed")


def _files(folder: Path, part: str) -> list[str]:
    return [file.name for file in (folder / part).glob("*.safetensors")]


def _from_folder(folder: Path, part: str) -> nn.Module:
    files = _files(folder, part)
    if not files:
        raise UserError(f"{folder}: {part} has no safetensors weights; other formats can run code, and are never read")
    halves = all(".fp16" in file for file in files)  # also of shards: .fp16-00001-of-00002
    low_memory = {"low_cpu_mem_usage": False} if WEIGHTED[part] in ("UNet2DConditionModel", "AutoencoderKL") else {}
    model, information = library_class(WEIGHTED[part]).from_pretrained(
        str(folder),
        subfolder=part,
        variant="fp16" if halves else None,
        torch_dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **low_memory,
    )
    _check_whole(f"{folder}: {part}", list(information["missing_keys"]))
    return model


def _from_file(path: Path, weights: Weights, config: Path, part: str) -> nn.Module:
    kind = library_class(WEIGHTED[part])
    settings = json.loads((config / part / "config.json").read_text())
    model = kind.from_config(settings) if hasattr(kind, "from_config") else kind(kind.config_class(**settings))
    try:
        missing, _ = model.load_state_dict(convert(weights, part, model), strict=False)
    except RuntimeError as error:  # sizes, of which it would print every one
        raise UserError(
            f"{path}: its {part} has other sizes than the configuration in {config}; name one of its own family"
        ) from error
    _check_whole(f"{path}: {part}", missing)
    return model


def _check_whole(where: str, missing: list[str]) -> None:
    """Both libraries would go on with random weights."""
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors ({missing[0]}, ...); fetch the model again")


def _assemble(
    folder: Path, name: str, parts: dict[str, nn.Module], changes: Changes
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline of these parts, with the folder's scheduler and tokenizers."""
    kind = library_class(name)
    unwanted = set(kind._optional_components) - set(PARTS[name])
    pipeline = kind.from_pretrained(str(folder), local_files_only=True, **parts, **dict.fromkeys(unwanted))
    if changes:  # DDIM's is the one scheduler that knows all of them
        pipeline.scheduler = library_class("DDIMScheduler").from_config(pipeline.scheduler.config, **changes)
    return pipeline


def library_class(name: str) -> Any:
    """A class of diffusers or transformers, with the bars and the advice of both off: what matters is raised."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    return getattr(diffusers, name, None) or getattr(transformers, name)
