"""From a folder to an image model; nothing in the folder is executed."""

import json
from pathlib import Path

from safetensors.torch import load_file

from fewstep.errors import UserError
from fewstep.networks.pixel_model import DESCRIPTION, PixelModel, PixelModelConfig, build_unet


def load(folder: Path) -> PixelModel:
    """The image model that `PixelModel.save` wrote to `folder`, on the CPU, in evaluation mode.

    Raises UserError if the folder is not one, or is damaged.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"{folder}: not a model folder (it has no {DESCRIPTION}); name a run or another checkpoint's model"
        )
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        config = PixelModelConfig(**description["config"])
        timesteps = description["timesteps"] and [float(t) for t in description["timesteps"]]
        unet = build_unet(config)
        unet.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    except Exception as error:  # a damaged file shows itself as almost any error
        reason = " ".join(str(error).split()[:20])
        raise UserError(
            f"{folder}: the model is damaged ({type(error).__name__}: {reason}); name another checkpoint's model folder"
        ) from error
    model = PixelModel(config, unet, timesteps)
    model.denoiser.eval()
    return model
