"""From a folder, a single file or a model on the hub to an image model; nothing in it is executed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fewstep.errors import UserError, brief
from fewstep.models.image_model import DESCRIPTION, LORA, read_description
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading import hub, single_file
from fewstep.models.loading.files import check_files, check_sizes, part_tensors, read_config, whole
from fewstep.models.loading.hub import PIPELINE, read_index
from fewstep.models.loading.pipeline import check_index, load_pipeline, load_single_file
from fewstep.models.loading.weights import check_fits, load_checked
from fewstep.models.lora_files import apply_lora, open_lora
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families import find_family
from fewstep.networks.families.stable_diffusion import PARAMETERIZATIONS
from fewstep.networks.family import Family
from fewstep.networks.settings import PixelSettings
from fewstep.runtime.runs import find

Model = PixelModel | LatentModel
Source = str | Path
SUFFIX = ".safetensors"
WEIGHT_SUFFIXES = (SUFFIX, ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".pkl")  # all but two are refused, by name


def is_model_folder(folder: Path) -> bool:
    """Whether `load` would try."""
    return any((folder / name).is_file() for name in (DESCRIPTION, PIPELINE))


def is_single_file(source: Source) -> bool:
    """Whether it has the name of a file of safetensors."""
    return Path(source).suffix.lower() in (SUFFIX, ".sft")


def configured(sources: Sequence[str]) -> Sequence[str]:
    """Those that a `--config` is of: the single files, else the first, which refuses it."""
    return [source for source in sources if is_single_file(source)] or sources[:1]


def is_loadable(source: Source) -> bool:
    """Whether it is a model folder, a file of weights or a hub id."""
    path = Path(source)
    return is_model_folder(path) or path.suffix.lower() in WEIGHT_SUFFIXES or hub.is_hub_id(source)


def load(
    source: Source,
    config: Source | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Model:
    """The image model in `source`, on the CPU, in float32, but a pipeline's network in `dtype`, in evaluation mode.

    None is a network that is only to be read: as its files have it, of which all processes share one copy in memory.

    `source` is a folder (one of ours, or a diffusers pipeline of SD or SDXL), a `.safetensors` file of an SD or SDXL
    fine-tune, or a hub id `owner/name`. A file is configured by `config`, a diffusers folder or hub id of its family,
    by default its base model on the hub. `prediction_type` (epsilon, v_prediction) replaces what the model says of
    itself. Raises UserError if it is none of these, is damaged, or can't be fetched.
    """
    path = Path(source)
    if prediction_type not in (None, *PARAMETERIZATIONS):
        raise UserError(f"prediction type {prediction_type!r}: write {' or '.join(PARAMETERIZATIONS)}")
    if config is not None and not is_single_file(path):
        raise UserError(f"{source}: has its own configuration; only a single {SUFFIX} file takes another")
    try:
        with whole(source, "the model is damaged", "name another checkpoint's model folder"):
            if path.is_file() or path.suffix.lower() in WEIGHT_SUFFIXES:
                return _checked(_load_file(path, config, prediction_type, dtype))
            folder = _local(path)
            hub_id = None if folder == path else str(path)
            return _checked(_with_lora(folder, _load_folder(folder, prediction_type, hub_id, dtype)))
    except UserError as error:
        if str(source) in str(error):
            raise
        raise UserError(f"{source}: {error}") from error  # of the family, which knows no files


def _local(path: Path) -> Path:
    """The folder itself, or what the hub has under its name."""
    if path.is_dir() or not hub.is_hub_id(path):
        return path
    family = check_index(path, read_index(hub.fetch_index(str(path))))
    return hub.fetch(str(path), family.parts, family.weights)


def _load_folder(folder: Path, prediction_type: str | None, hub_id: str | None, dtype: torch.dtype | None) -> Model:
    if not is_model_folder(folder):
        advice = "name a run or another checkpoint's model"
        raise UserError(f"{folder}: not a model folder (it has no {DESCRIPTION}); {advice}")
    check_files(folder, [name for name in (DESCRIPTION, PIPELINE) if (folder / name).is_file()])
    description = read_description(folder)
    check_sizes(folder / DESCRIPTION, description)
    with whole(folder / DESCRIPTION):  # without them a student would pass for a teacher
        timesteps = description["timesteps"] if (folder / DESCRIPTION).is_file() else None
    named = description["family"]
    if named == "latent":
        pipeline = load_pipeline(folder, {"prediction_type": prediction_type} if prediction_type else {}, dtype)
        base = hub_id or description.get("base_model")
        return LatentModel(pipeline, timesteps, description.get("image_size"), base)
    if prediction_type:
        raise UserError(f"{folder}: a pixel model, which takes no prediction type")
    family = find_family(str(named))
    if family is None or family.settings is None:
        advice = "name it with --family MODULE:NAME"
        raise UserError(f"{folder}: of the family {named!r}, which is not known here; {advice}")
    with whole(folder / DESCRIPTION):
        config = family.settings(**description["config"])
    names = description.get("class_names")
    return PixelModel(config, _load_network(folder, family, config), timesteps, names, family)


def _with_lora(folder: Path, model: Model) -> Model:
    """The model with the low-rank weights merged that its description says were trained beside it."""
    if LORA in read_description(folder):
        check_files(folder, [LORA])
        apply_lora(model, open_lora(folder / LORA, model.network, model.family), 1.0)
    return model


def _checked(model: Model) -> Model:
    """The model in evaluation mode; raises UserError for timesteps that are none of its schedule."""
    if model.timesteps is not None:
        try:
            model.timesteps = [float(t) for t in model.timesteps]
            model.denoiser.schedule.check_timesteps(torch.tensor(model.timesteps, dtype=torch.float64))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"timesteps: can't be a student's ({brief(error)}); name another checkpoint") from error
    model.denoiser.eval()
    return model


def _load_network(folder: Path, family: Family, config: PixelSettings) -> nn.Module:
    """The network on pixels by its settings, which its own configuration, where there is one, must not contradict."""
    place = folder / family.part
    check_files(folder, [family.part])
    tensors, _ = part_tensors(place)
    if family.weights:  # of a library, whose networks can be made without memory: so it is known that they fit
        check_fits(
            place, described(place, family, config).state_dict(), {name: meta for name, (_, meta) in tensors.items()}
        )
    network = family.network(config)
    files = dict.fromkeys(file for file, _ in tensors.values())
    load_checked(place, network, {name: value for file in files for name, value in load_file(file).items()})
    return network


def described(place: Path, family: Family, config: PixelSettings) -> nn.Module:
    """The network by its settings, without memory; raises UserError where the configuration at `place` contradicts."""
    with torch.device("meta"):
        bare: Any = family.network(config)
    stored = read_config(place / "config.json")
    for name, value in json.loads(json.dumps(dict(bare.config))).items():  # lists for tuples, as the file has them
        if not name.startswith("_") and name in stored and stored[name] != value:
            told = f"says {name} {stored[name]}, {DESCRIPTION} {value}; they are of two models"
            raise UserError(f"{place}/config.json {told}")
    network: nn.Module = bare
    return network


def _load_file(
    path: Path, config: Source | None, prediction_type: str | None, dtype: torch.dtype | None
) -> LatentModel:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not is_single_file(path):
        why = f"others ({path.suffix}) can run code when they are opened"
        hint = "; `fewstep import edm` reads EDM's" if path.suffix == ".pkl" else ""
        raise UserError(f"{path}: only {SUFFIX} files are read; {why}{hint}")
    weights = single_file.read(path)
    changes = single_file.scheduler_changes(path, weights, prediction_type)
    pipeline = load_single_file(path, weights, _configuration(path, weights, config), changes, dtype)
    return LatentModel(pipeline, single_file.read_timesteps(path))


def _configuration(path: Path, weights: single_file.Weights, config: Source | None) -> Path:
    """A local diffusers folder with what the file lacks."""
    if config is not None and (is_model_folder(Path(config)) or not hub.is_hub_id(config)):
        if not (Path(config) / PIPELINE).is_file():
            raise UserError(f"{config}: no diffusers folder (it has no {PIPELINE}); it should configure {path}")
        return Path(config)
    name = str(config or single_file.base_model(weights))
    try:
        family = check_index(name, read_index(hub.fetch_index(name)))
        return hub.fetch(name, family.parts, weights=set(family.weights) - set(single_file.parts_in(weights)))
    except UserError as error:
        advice = "name a diffusers folder of it with --config, in a recipe with teacher_config"
        raise UserError(f"{path}: needs the configuration of its family; {advice} (tried {error})") from error


def open_model(
    source: Source,
    config: Source | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Model:
    """What `pretrained.load` finds in `source`, or the image model of RUN, RUN@STEP or RUN@best-METRIC."""
    return load(source if is_loadable(source) else _described(find(source).folder), config, prediction_type, dtype)


def _described(folder: Path) -> Path:
    """The model folder of a checkpoint; without its description a student would be taken for a teacher."""
    if not (folder / DESCRIPTION).exists():
        raise UserError(f"{folder}: is damaged (it has no {DESCRIPTION}); name another checkpoint")
    return folder


def open_averages(source: Source, config: Source | None = None) -> dict[str, Model]:
    """The image model in `source` as "", and of a run the other averages of its checkpoint as " ema0.99995"."""
    if is_loadable(source):
        return {"": load(source, config)}
    found = {each.ema: _described(each.folder) for each in find(source).averages}
    return {f" ema{ema}" if ema else "": load(folder, config) for ema, folder in found.items()}
