"""From a folder to an image model; nothing in the folder is executed."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fewstep.errors import UserError
from fewstep.networks.image_model import DESCRIPTION
from fewstep.networks.latent_model import LatentModel
from fewstep.networks.pixel_model import PixelModel, PixelModelConfig, build_unet

PIPELINE = "model_index.json"
LIBRARIES = ("diffusers", "transformers", None)  # None: an optional part that is not there
UNWANTED = {"safety_checker", "feature_extractor", "image_encoder"}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def is_model_folder(folder: Path) -> bool:
    """Whether `load` would try."""
    return any((folder / name).is_file() for name in (DESCRIPTION, PIPELINE))


def load(folder: Path) -> PixelModel | LatentModel:
    """The image model in `folder`, on the CPU, in evaluation mode: one of ours, or a diffusers pipeline of SD or SDXL.

    Raises UserError if the folder is neither, or is damaged.
    """
    if not is_model_folder(folder):
        raise UserError(
            f"{folder}: not a model folder (it has no {DESCRIPTION}); name a run or another checkpoint's model"
        )
    try:
        return _load_pipeline(folder) if (folder / PIPELINE).is_file() else _load_pixel_model(folder)
    except UserError:
        raise
    except Exception as error:  # a damaged file shows itself as almost any error
        reason = " ".join(str(error).split()[:20])
        raise UserError(
            f"{folder}: the model is damaged ({type(error).__name__}: {reason}); name another checkpoint's model folder"
        ) from error


def _load_pixel_model(folder: Path) -> PixelModel:
    description = json.loads((folder / DESCRIPTION).read_text())
    config = PixelModelConfig(**description["config"])
    timesteps = description["timesteps"] and [float(t) for t in description["timesteps"]]
    unet = build_unet(config)
    unet.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    model = PixelModel(config, unet, timesteps)
    model.denoiser.eval()
    return model


def _load_pipeline(folder: Path) -> LatentModel:
    index = json.loads((folder / PIPELINE).read_text())
    name = index["_class_name"]
    if name not in PIPELINES:
        raise UserError(f"{folder}: a {name}, which is not supported; supported are {', '.join(PIPELINES)}")
    parts = {part: entry[0] for part, entry in index.items() if isinstance(entry, list) and part not in UNWANTED}
    foreign = [f"{part} ({library})" for part, library in parts.items() if library not in LIBRARIES]
    if foreign:
        raise UserError(f"{folder}: {', '.join(foreign)} is code from elsewhere, which is never run")
    missing = [part for part, library in parts.items() if library and not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: lacks the subfolder {', '.join(missing)}; the whole pipeline is needed")
    described = (folder / DESCRIPTION).is_file()
    timesteps = json.loads((folder / DESCRIPTION).read_text())["timesteps"] if described else None
    pipeline_class = _quiet_diffusers(name)
    unwanted = UNWANTED & set(pipeline_class._optional_components)
    pipeline = pipeline_class.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, **dict.fromkeys(unwanted)
    )
    return LatentModel(pipeline, timesteps)


def _quiet_diffusers(name: str) -> Any:
    """A pipeline class, with the bars and the advice of both libraries off: what matters is raised."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    return getattr(diffusers, name)
