"""`fewstep sample`: a grid of images from a run or a model folder."""

from pathlib import Path

from fewstep.commands.runs import check_writable, open_model, pick_device
from fewstep.data.pictures import grid, save_png
from fewstep.errors import UserError
from fewstep.evaluation.generation import Sampler, default_sampler, generate, parse_sampler
from fewstep.networks.pixel_model import PixelModel


def sample(path: Path, out: Path, num: int, seed: int, label: int | None, sampler: str | None, device: str) -> None:
    """Writes `num` images of `path`'s model as one PNG grid to `out`."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a PNG file")
    check_writable(out.parent)
    model = open_model(path)
    model.denoiser.to(pick_device(device))
    if label is not None and not 0 <= label < model.config.num_classes:
        raise UserError(f"--label {label}: the model has {model.config.num_classes} classes, counted from 0")
    images = generate(model, choose_sampler(model, sampler), range(num), seed, label)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(images, columns=min(10, num)), out)


def choose_sampler(model: PixelModel, text: str | None) -> Sampler:
    """The named sampler, or the model's own."""
    if text is None:
        return default_sampler(model)
    if model.timesteps:
        raise UserError(f"--sampler {text}: a student has its own timesteps and takes no sampler")
    return parse_sampler(text)
