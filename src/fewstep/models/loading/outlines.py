"""Outlines of models: from the configurations in a folder, the header of a file, or what is known of a release."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.models.image_model import DESCRIPTION, read_description
from fewstep.models.loading import single_file
from fewstep.models.loading.files import read_config, whole
from fewstep.models.loading.hub import PIPELINE, read_index
from fewstep.models.loading.pipeline import check_index, library_class, outline
from fewstep.models.loading.pretrained import is_model_folder, is_single_file
from fewstep.models.outline import Outline
from fewstep.networks.families import FAMILIES, find_family
from fewstep.networks.family import Family

STANDARDS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("standard.yaml").read_text())
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # of all releases
AUTOENCODER = {  # of all releases
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TOKENS = 77  # of a prompt, of all releases


def outline_of(source: Path, config: str | None = None) -> Outline | None:
    """Of what lies at `source`, a folder or a single file, which a folder `config` configures; None of nothing."""
    if is_single_file(source) and source.is_file():
        names = single_file.header(source)  # also where it is configured: a LoRA is refused here
        folder = Path(config) if config and is_model_folder(Path(config)) else None
        return _of_folder(folder) if folder else standard(_named(single_file.base_model(names)) or "")
    return _of_folder(source) if is_model_folder(source) else None


def guess(*names: str) -> str | None:
    """The release that one of these names speaks of, the first that does."""
    return next((found for name in names if (found := _named(name))), None)


def _named(name: str) -> str | None:
    """The release with that hub id, or of whose fine-tunes it is a likely name."""
    fits = (key for key, told in STANDARDS.items() if told.get("hub") == name or re.search(told["names"], name.lower()))
    return next(fits, None)


def standard(name: str) -> Outline:
    """Of a release; raises UserError for one that is not known."""
    if name not in STANDARDS:
        raise UserError(f"--architecture {name!r}: write {', '.join(STANDARDS)}")
    told = STANDARDS[name]
    family = FAMILIES[told["family"]]
    if family.settings:
        return of_settings(family, family.settings(**told["settings"]))
    with torch.device("meta"):
        parts = {
            "vae": library_class("AutoencoderKL")(**AUTOENCODER),
            family.part: library_class(family.weights[family.part])(**told["network"]),
        }
    return of_parts(family, parts, SCHEDULER, encoders=told["encoders"])


def of_settings(family: Family, settings: Any) -> Outline:
    """Of a network on pixels."""
    with torch.device("meta"):
        network = family.network(settings)
    label = {"label": torch.zeros(1, dtype=torch.int64)} if settings.num_classes else {}
    denoiser = Denoiser(family.adapter(network), *family.schedule(settings))
    shape = (settings.channels, settings.image_size, settings.image_size)
    return Outline(family, denoiser, shape, label, label if settings.null_class else None)


def of_parts(
    family: Family,
    parts: dict[str, nn.Module],
    scheduler: dict[str, Any],
    size: int | None = None,
    tokens: int = TOKENS,
    encoders: int = 0,
) -> Outline:
    """Of a pipeline by its network, its autoencoder `vae` and its scheduler's configuration; UserError if unknown."""
    network: Any = parts[family.part]
    condition = family.example(network, tokens)
    if condition is None:
        raise UserError(
            f"a {family.name}, whose conditions are not known without its weights: its family lacks example"
        )
    codec = family.codec(parts["vae"])
    factor = 2 ** (len(codec.vae.config.block_out_channels) - 1)
    size = size or family.image_size(SimpleNamespace(vae_scale_factor=factor, **{family.part: network}))
    null = {name: condition[name] for name in family.keeps}
    denoiser = Denoiser(family.adapter(network), *family.schedule(scheduler))
    return Outline(family, denoiser, codec.shape(size), condition, null, parts["vae"], encoders)


def _of_folder(folder: Path) -> Outline:
    with whole(folder):
        description = read_description(folder)
        named = find_family(str(description["family"]))
        if named is not None and named.settings is not None:
            return of_settings(named, named.settings(**description["config"]))
        if not (folder / PIPELINE).is_file():
            raise UserError(f"{folder / DESCRIPTION}: of the family {description['family']!r}, which is not known here")
        family = check_index(folder, read_index(folder))
        parts = {part: outline(library_class(kind), folder / part) for part, kind in family.weights.items()}
        encoders: dict[str, Any] = {name: part for name, part in parts.items() if name not in (family.part, "vae")}
        tokens = min((part.config.max_position_embeddings for part in encoders.values()), default=TOKENS)
        num = sum(p.numel() for part in encoders.values() for p in part.parameters())
        scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
        return of_parts(family, parts, scheduler, description.get("image_size"), tokens, num)
