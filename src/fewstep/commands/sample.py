"""`fewstep sample`: a grid of images from a run or a model folder."""

from dataclasses import replace
from pathlib import Path

from fewstep.commands.runs import check_writable, open_model, pick_device
from fewstep.data.pictures import grid, save_png
from fewstep.errors import UserError
from fewstep.evaluation.generation import Sampler, default_sampler, generate, parse_sampler
from fewstep.networks.image_model import ImageModel
from fewstep.networks.latent_model import LatentModel
from fewstep.networks.pixel_model import PixelModel


def sample(
    path: str,
    out: Path,
    num: int,
    seed: int,
    label: int | None,
    prompt: str | None,
    sampler: str | None,
    guidance_scale: float,
    device: str,
    config: str | None = None,
    prediction_type: str | None = None,
) -> None:
    """Writes `num` images of `path`'s model as one PNG grid to `out`."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a PNG file")
    check_writable(out.parent)
    model = open_model(path, config, prediction_type)
    model.to(pick_device(device))
    ask_for(model, label, prompt)
    images = generate(model, choose_sampler(model, sampler, guidance_scale), range(num), seed, label)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(images, columns=min(10, num)), out)


def ask_for(model: PixelModel | LatentModel, label: int | None, prompt: str | None) -> None:
    """Gives a text model its prompt; raises UserError where the model does not take what is asked for."""
    if isinstance(model, LatentModel):
        if label is not None or not prompt:
            raise UserError("--prompt: a text-to-image model takes a prompt, and no --label")
        model.prompts = [prompt]
    elif prompt is not None:
        raise UserError("--prompt: this model takes no text; choose a class with --label")
    elif label is not None and not 0 <= label < model.config.num_classes:
        raise UserError(f"--label {label}: the model has {model.config.num_classes} classes, counted from 0")


def choose_sampler(model: ImageModel, text: str | None, guidance_scale: float) -> Sampler:
    """The named sampler, or the model's own."""
    if model.timesteps:
        if text is not None or guidance_scale != 1:
            asked = f"--sampler {text}" if text else f"--guidance {guidance_scale:g}"
            raise UserError(f"{asked}: a student has its own timesteps and guidance, and takes neither")
        return default_sampler(model)
    chosen = parse_sampler(text) if text else default_sampler(model)
    guidance_scale = guidance_scale if guidance_scale != 1 else chosen.guidance_scale
    if guidance_scale != 1 and model.null_condition is None:
        raise UserError("--guidance: the model has no null class to guide with")
    return replace(chosen, guidance_scale=guidance_scale)
