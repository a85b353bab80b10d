"""From a folder to an image model; nothing in the folder is executed."""

import json
from pathlib import Path

from diffusers import UNet2DModel

from fewstep.errors import UserError
from fewstep.networks.image_model import DESCRIPTION, PixelModel, PixelModelConfig


def load(folder: Path) -> PixelModel:
    """The image model that `PixelModel.save` wrote to `folder`, on the CPU, in evaluation mode.

    Raises UserError if the folder is not one, or is damaged.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder}: not a model folder (it has no {DESCRIPTION})")
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        config = PixelModelConfig(**description["config"])
        unet = UNet2DModel.from_pretrained(
            folder / "unet", use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # a damaged file shows itself as almost any error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder}: the model can't be read ({reason})") from error
    model = PixelModel(config, unet, description["timesteps"])
    model.denoiser.eval()
    return model
