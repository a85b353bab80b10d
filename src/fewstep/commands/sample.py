"""`fewstep sample`: a grid and single images of a run, a folder, a file or a hub model, or of two side by side."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep.commands.options import Sample
from fewstep.commands.places import check_writable, free_place, tell_done
from fewstep.commands.runs import check_alike, check_asked, class_number, pick_device
from fewstep.data.texts import check_lengths, load_prompts
from fewstep.errors import UserError
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.hub import is_hub_id
from fewstep.models.loading.pretrained import configured, open_model
from fewstep.models.lora_files import LoRAFile, open_loras, with_loras
from fewstep.models.sampler import Sampler, default_sampler, generate, parse_sampler, spread_timesteps
from fewstep.networks.families import use_family
from fewstep.networks.fingerprint import fingerprint
from fewstep.pictures import grid, num_columns, parameters_text, read_text, save_png, to_picture
from fewstep.runtime.runs import is_run, short_name
from fewstep.runtime.tracking import progress_bar

COLUMNS = 10
CHUNK = "fewstep"  # the PNG text chunk with all settings as JSON
SINGLE = re.compile(r"\d{5,}(-[12])?\.png")
Loras = Sequence[tuple[LoRAFile, float]]
SAMPLER_NAMES = {"student": "LCM", "heun": "Heun", "euler": "Euler"}  # of A1111
SAMPLER_NAMES |= {"ddim": "DDIM", "dpm++": "DPM++ 2M", "unipc": "UniPC", "lcm": "LCM"}


@dataclass(frozen=True)
class Painter:
    """A model, how and what it draws, and what the pictures' text says of it."""

    model: ImageModel
    sampler: Sampler
    asked: Asked
    facts: dict[str, Any]
    loras: Loras = ()

    def label(self, index: int) -> str:
        """What image `index` is of: its prompt, or its class by name or number."""
        return self.model.label(index, self.asked)

    def __str__(self) -> str:
        loras = "".join(f" + {file.path.stem}:{strength:g}" for file, strength in self.loras)
        return f"{self.facts['model']}{loras} {self.sampler}"


def sample(order: Sample) -> None:
    """Writes the grid `out` and, unless it is to be alone, the single images beside it.

    Image i of a seed has the same noise and the same class or prompt for every model, here and in `evaluate`.
    """
    order = with_place(order)
    use_family(order.family)
    device = pick_device(order.device)
    prompts = check_lengths("--prompt", list(order.prompt))
    prompts += load_prompts(order.prompts, field="--prompts") if order.prompts else []
    painters = make_painters(order, prompts)
    num = order.num or (max(4, len(prompts)) if prompts else 40)
    images = [draw(painter, order, number, num, device) for number, painter in enumerate(painters, 1)]
    subjects = len(prompts) or (1 if order.label else painters[0].model.num_classes)
    columns = len(painters) * num_columns(num, subjects, COLUMNS // len(painters))
    labels = [painters[0].label(index) for index in range(num) for _ in painters]
    heads = [str(painter) for painter in painters] * (columns // len(painters))
    picture = grid(torch.stack(images, dim=1).flatten(0, 1), columns, labels, heads if order.compare else ())
    save_png(picture, order.out, grid_text(painters, order, num, heads, prompts))
    if not order.grid_only:
        new = {single_path(order, number, index) for number in (1, 2) for index in range(num)}
        for earlier in filter(is_single, set(order.folder.iterdir()) - new):
            earlier.unlink()
    alone = "" if order.grid_only else f" and its {num * len(painters)} images to {order.folder}"
    data = "" if is_run(order.path) else " --data IMAGES"
    tell_done(f"{order.out}{alone}", *([] if order.lora else [f"evaluate {quote(order.path)}{data}"]))


def with_place(order: Sample) -> Sample:
    """The order with a grid to write; raises UserError as `check_out`, and where pictures would be overwritten."""

    def taken(out: Path) -> bool:
        folder = out.with_suffix("")
        return out.exists() or (not order.grid_only and folder.is_dir() and any(folder.iterdir()))

    if order.out:
        check_out(order)
    order = replace(order, out=free_place(order.out, Path("samples.png"), taken, order.overwrite))
    check_out(order)
    return order


def check_out(order: Sample) -> None:
    """Raises UserError if the pictures can't be written, or would be put among other things; writes nothing."""
    out, folder = order.out, order.folder
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a PNG file")
    check_writable(out.parent)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: is written as PNG; name a file that ends in .png")
    if not order.grid_only and folder.exists():
        foreign = [path.name for path in folder.iterdir() if not is_single(path)] if folder.is_dir() else ["a file"]
        if foreign:
            what = f"single images would go to {folder}, which holds other things ({foreign[0]})"
            raise UserError(f"--out {out}: {what}; choose another name, or --grid-only")


def is_single(path: Path) -> bool:
    """Whether an earlier `sample` wrote it."""
    return bool(SINGLE.fullmatch(path.name)) and CHUNK in read_text(path)


def single_path(order: Sample, number: int, index: int) -> Path:
    """Of image `index` of the first model or the second; with one model they have no number."""
    return order.folder / f"{index:05d}{f'-{number}' if order.compare else ''}.png"


def make_painters(order: Sample, prompts: list[str]) -> list[Painter]:
    """One or two models, open on the CPU, with their samplers; raises UserError for what they can't do."""
    sources = [order.path, *([order.compare] if order.compare else [])]
    models, loras = list[ImageModel](), list[tuple[LoRAFile, float]]()
    for source in sources:
        prediction_type = order.prediction_type if not models else None  # of the first
        models.append(open_model(source, order.config if source in configured(sources) else None, prediction_type))
        if order.lora and len(models) == 1:
            loras = open_loras(order.lora, models[0])
            models[0] = with_loras(models[0], loras, lambda told: print(f"fewstep: {told}", file=sys.stderr))
        check_asked(models[-1], order.label, prompts)
    check_alike(sources, models)
    named = next((model for model in models if model.class_names), models[0])
    asked: Asked = prompts or (None if order.label is None else [class_number(named, order.label)])
    no_teacher = all(model.timesteps for model in models)
    chosen = [choose_sampler(model, order, model is models[0], no_teacher) for model in models]
    return [
        Painter(model, sampler, asked, describe(source, model, sampler), loras if source is sources[0] else ())
        for source, (model, sampler) in zip(sources, chosen, strict=True)
    ]


def choose_sampler(model: ImageModel, order: Sample, first: bool, no_teacher: bool) -> tuple[ImageModel, Sampler]:
    """The model as it is to be sampled, and how.

    `--sampler` and `--guidance` are the teachers' alone, and, where there is none, those of a model with LoRAs.
    `--steps` are the first model's, and those of a sampler that is named without steps.
    """
    named, scale = (order.sampler, order.guidance) if no_teacher or not model.timesteps else (None, 1.0)
    steps = order.steps if first or (named and ":" not in named) else None
    if model.timesteps and not (first and order.lora) and (named is not None or scale != 1):
        asked = f"--sampler {named}" if named else f"--guidance {scale:g}"
        raise UserError(f"{asked}: a student has its own timesteps and guidance, and takes neither")
    if model.timesteps and steps and named is None:
        model = model.student(model.denoiser, spread_timesteps(model, model.timesteps, steps))
    sampler = teachers_sampler(model, named, scale, steps)
    if sampler.num_steps > (most := len(model.denoiser.schedule.levels)):
        raise UserError(f"--steps {sampler.num_steps}: the model has {most} noise levels; take no more steps")
    return model, sampler


def teachers_sampler(model: ImageModel, named: str | None, guidance_scale: float, steps: int | None) -> Sampler:
    """The named sampler, or the model's own, with so many steps."""
    if named and steps:
        kind, at, scale = named.partition("@")
        if ":" in kind:
            raise UserError(f"--steps {steps}: --sampler {named} says its steps already; leave one out")
        named = f"{kind}:{steps}{at}{scale}"
    chosen = parse_sampler(named) if named else default_sampler(model)
    guidance_scale = guidance_scale if guidance_scale != 1 else chosen.guidance_scale
    if guidance_scale != 1 and model.null_condition is None:
        raise UserError("--guidance: the model has no null class to guide with")
    return replace(chosen, num_steps=steps or chosen.num_steps, guidance_scale=guidance_scale)


def describe(source: str, model: ImageModel, sampler: Sampler) -> dict[str, Any]:
    """What the pictures' text says of a model and its sampler."""
    return {
        "model": source if is_hub_id(source) else short_name(source),
        "fingerprint": fingerprint([model.network], first=64),  # in milliseconds, and no two checkpoints agree in it
        "sampler": sampler.kind,
        "num_steps": sampler.num_steps,
        "timesteps": model.timesteps if sampler.kind == "student" else None,
        "guidance_scale": sampler.guidance_scale,
    }


def draw(painter: Painter, order: Sample, number: int, num: int, device: torch.device) -> Tensor:
    """Images (N, C, H, W) of one model, each written when its batch is done; the model has left the device then."""
    model = painter.model
    model.to(device)
    batches: list[Tensor] = []
    with progress_bar(painter.facts["model"], num) as show:
        for first in range(0, num, model.sampling_batch):
            indices = range(first, min(first + model.sampling_batch, num))
            batches.append(generate(model, painter.sampler, indices, order.seed, painter.asked))
            for index, image in zip(indices, batches[-1], strict=True):
                if not order.grid_only:
                    path = single_path(order, number, index)
                    save_png(to_picture(image), path, single_text(painter, order, index))
            show(indices.stop, {})
    model.to(torch.device("cpu"))
    model.release()
    return torch.cat(batches)


def single_text(painter: Painter, order: Sample, index: int) -> dict[str, str]:
    """The text chunks of one image."""
    model = painter.model
    asked = range(model.num_classes) if painter.asked is None else painter.asked
    subject = {"prompt" if model.kind == "text" else "class": asked[index % len(asked)]} if asked else {}
    if model.class_names:
        subject["class_name"] = model.class_name(int(subject["class"]))
    title = painter.label(index) if model.kind == "text" or not asked else f"class {painter.label(index)}"
    return chunks(title, painter, order, {"Image": index}, {**subject, **painter.facts, "index": index})


def grid_text(painters: list[Painter], order: Sample, num: int, heads: list[str], prompts: list[str]) -> dict[str, str]:
    """The text chunks of the grid; of two models it names the one that each column shows."""
    facts = [painter.facts for painter in painters]
    label = None if order.label is None or not painters[0].asked else painters[0].asked[0]
    title = "; ".join(prompts) or ("" if order.label is None else f"class {painters[0].label(0)}")
    shown = {"Columns": " | ".join(heads)} if order.compare else {}
    settings = {"models": facts, "prompts": prompts, "class": label, "num": num, "columns": heads}
    return chunks(title, painters[0], order, shown, settings)


def chunks(
    title: str, painter: Painter, order: Sample, further: dict[str, Any], settings: dict[str, Any]
) -> dict[str, str]:
    """What UIs write behind the prompt, under their names, and all settings as JSON."""
    fields = {
        "Steps": painter.sampler.num_steps,
        "Sampler": SAMPLER_NAMES[painter.sampler.kind],
        "CFG scale": f"{painter.sampler.guidance_scale:g}",
        "Seed": order.seed,
        "Model": painter.facts["model"],
        "Version": f"fewstep {fewstep.__version__}",
    }
    whole = {**settings, "seed": order.seed, "version": fewstep.__version__}
    if painter.loras:  # where UIs look for them
        title += "".join(f" <lora:{file.path.stem}:{strength:g}>" for file, strength in painter.loras)
        further |= {"Lora hashes": ", ".join(f"{file.path.stem}: {file.hash}" for file, _ in painter.loras)}
        whole["loras"] = {str(file.path.name): strength for file, strength in painter.loras}
    return {"parameters": parameters_text(title, fields | further), CHUNK: json.dumps(whole)}
