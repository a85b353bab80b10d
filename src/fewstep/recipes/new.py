"""Recipes for one's own images: those of the digits at settings that suit what a look finds, and how long they take."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

import torch

from fewstep.data.latents import is_latents
from fewstep.data.settings import DataSettings
from fewstep.data.stored import Look, look
from fewstep.embedded.sources import open_images
from fewstep.errors import UserError
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig
from fewstep.recipes.loading import explained, idle, load_recipe
from fewstep.training.dmd2 import DMD2
from fewstep.training.roles import roles_of
from fewstep.training.teacher import TeacherTraining

TUNED_AT = 3 * 64 * 64  # numbers of an image, for which the GAN weights 3e-3 and 1e-2 were found (losses.py)
MIN_JUDGED, MAX_JUDGED_CLASSES = 100, 100
ALONE = 1.2  # times what a program computes is what it takes at most, where others don't compute, too
MEASURED = 256  # images, for their standard deviation
SECONDS = 0.3  # of each kind of step, which are timed


class Plan(NamedTuple):
    """What suits a size of images: channels of each level, batch, steps of the teacher, and its rate."""

    widths: list[int]
    batch_size: int
    num_steps: int
    lr: float


PLANS = {
    ("cpu", 8): Plan([24, 48], 128, 1000, 2e-3),
    ("cpu", 16): Plan([32, 64], 64, 1500, 1e-3),
    ("cpu", 32): Plan([32, 64, 96], 32, 2000, 7e-4),
    ("cpu", 64): Plan([32, 64, 96, 128], 32, 3000, 5e-4),
    ("cuda", 8): Plan([64, 128], 256, 4000, 1e-3),
    ("cuda", 16): Plan([64, 128], 128, 8000, 7e-4),
    ("cuda", 32): Plan([64, 128, 192], 128, 15000, 5e-4),
    ("cuda", 64): Plan([64, 128, 192, 256], 64, 20000, 3e-4),
}
LARGEST = {"cpu": 32, "cuda": 64}  # which are taught in hours
OF_OTHERS = {"embeddings", "prompts", "samples", "data.caption_column", "regression", "regression_weight"} | {
    f"teacher_{each}" for each in ("config", "prediction_type", "family")
}  # settings of text to image and of teachers from elsewhere


class Suggested(NamedTuple):
    """Recipes by the ends of their names, what is said of settings, by key, and a line of what was found."""

    recipes: dict[str, Any]
    notes: dict[str, str]
    found: str | None


def suggest(name: str, source: str, size: int | None, device: str) -> Suggested:
    """Teacher and students for one's own images; raises UserError for whatever is wrong with them."""
    found = look(source)
    fitting = [each for of, each in PLANS if of == device and each <= min(1.2 * _side(found), LARGEST[device])]
    size = size or max(fitting, default=8)
    if (device, size) not in PLANS:
        raise UserError(f"--size {size}: write {', '.join(str(each) for of, each in PLANS if of == device)}")
    plan, classes = PLANS[device, size], len(found.class_names or ())
    classes = classes if classes > 1 else 0
    model = PixelModelConfig(image_size=size, channels=1 if found.grey else 3, num_classes=classes)
    images = open_images(DataSettings(source=source), model, shrink=True)
    pixels = images.fetch(torch.arange(min(images.length, MEASURED))).double() / 127.5 - 1
    teacher = {
        "description": f"EDM teacher of {name}, {size}x{size}",
        **{f"model.{key}": getattr(model, key) for key in ("image_size", "channels", "num_classes")},
        "model.null_class": classes > 0,
        "class_dropout": 0.1 if classes else 0.0,
        "model.block_out_channels": plan.widths,
        "model.attention": [size > 8 and size // 2**level in (8, 16) for level in range(len(plan.widths))],
        "model.sigma_data": round(max(pixels.std().item(), 0.05), 2),
        "optimizer.lr": plan.lr,
        "ema_decay": _decay(plan.num_steps),
        **_rhythm(plan.num_steps),
    }
    told = {"teacher": ("digits-teacher", teacher)}
    judged = found.num_images >= MIN_JUDGED and 0 < classes <= MAX_JUDGED_CLASSES
    for steps, num_steps in ((1, 1600), (4, 1200)):
        student = _student(steps, int(num_steps * max(plan.num_steps / 3000, 1)) // 100 * 100, model, plan, judged)
        student |= {"description": f"{steps}-step student of {name}-teacher", "teacher": f"runs/{name}-teacher"}
        told[f"{steps}step"] = (f"digits-{steps}step", student)
    shared = {"data.source": source, "batch_size": plan.batch_size}
    recipes = {end: _with(like, settings | shared) for end, (like, settings) in told.items()}
    return Suggested(recipes, _notes(model, found), images.found)


def _with(name: str, settings: dict[str, Any]) -> Any:
    return load_recipe(name, [f"{key}={value}" for key, value in settings.items() if value is not None])


def _side(found: Look) -> int:
    """The median of the shorter sides."""
    return median_high(min(size) for size in found.sizes.elements())


def _student(steps: int, num_steps: int, model: PixelModelConfig, plan: Plan, judged: bool) -> dict[str, Any]:
    """The rates, noise levels and GAN weights that suit this size."""
    tuned = TUNED_AT / (model.channels * model.image_size**2)
    shift = math.sqrt(model.image_size / 8)  # neighbouring pixels share what they show: it takes more noise to hide
    return {
        "student.timesteps": [80.0, *(round(shift * each, 2) for each in (2.5, 0.8, 0.3))] if steps > 1 else None,
        "student.optimizer.lr": f"{plan.lr * (0.5 if steps == 1 else 0.15):.2g}",
        "student.ema_decay": _decay(num_steps // 5),
        "critic.optimizer.lr": plan.lr,
        "critic.noise.mean": round(-0.5 + math.log(shift), 2),
        "dm.noise.mean": round(-0.3 + math.log(shift), 2),
        "gan.student_weight": f"{min(3e-3 * tuned, 0.15):.2g}",
        "gan.critic_weight": f"{min(1e-2 * tuned, 0.3):.2g}",
        "evaluation.every": num_steps // 4 if judged else None,
        "evaluation.num_samples": 500 if judged else None,
        "init_from": "null",
        **_rhythm(num_steps),
    }


def _decay(updates: int) -> float:
    """An average over a tenth of a run."""
    return float(f"{1 - 10 / updates:.4g}")


def _rhythm(num_steps: int) -> dict[str, int]:
    return {"num_steps": num_steps, "sample_every": num_steps // 4, "checkpoint_every": num_steps // 4}


def _notes(model: PixelModelConfig, found: Look) -> dict[str, str]:
    """Why some settings are as they are here."""
    numbers = model.channels * model.image_size**2
    return {
        "model.image_size": f"Most images here have {_side(found)} pixels or more.",
        "model.sigma_data": "Measured on these images, in [-1, 1].",
        "model.attention": "At 16 and 8 pixels.",
        "model.block_out_channels": "Wider is better and slower.",
        "num_steps": "More is better, until samples repeat what was trained on.",
        "init_from": "A start by regression on the teacher's pairs (digits-1step-init) was tried on the digits alone.",
        "student.timesteps": "Sigmas; of larger images larger ones, for their neighbouring pixels are alike.",
        "gan.student_weight": f"3e-3 and 1e-2 were found at {TUNED_AT:,} numbers; these images have {numbers:,}.",
    }


def like(from_: str, name: str, source: str | None, teacher: str | None) -> Suggested:
    """A recipe whose teacher is brought along, with one's own images and teacher in it."""
    if source and not is_latents(Path(source)):
        look(source)  # which tells what is wrong with it
    told = {"data.source": source, "teacher": teacher, "description": f"{name}, as {from_}"}
    return Suggested({from_.partition("-")[2]: _with(from_, told)}, {}, None)


def text(recipe: Any, notes: dict[str, str], head: str) -> str:
    """The file: every setting, but for those of ours that change nothing, with its meaning, and why it is so here."""
    skipped = {*(key for key, _ in idle(recipe)), *OF_OTHERS} if notes else ()
    return "\n".join([f"# {head}", *explained(recipe, skipped, notes), ""])


def seconds_per_step(recipe: Any, model: PixelModelConfig, device: torch.device) -> float:
    """Measured on noise, on that very network, on a CPU at a part of the batch that it computes in a moment.

    There it is the time that one thread computes, which other programs don't lengthen, or, if there are none, the time
    that all threads take: on a busy machine these wait for one another, up to a hundred times as long.
    """
    part = max(1024 // model.image_size**2, 4) if device.type == "cpu" else recipe.batch_size
    rows = range(min(recipe.batch_size, part))
    images = torch.randint(256, (len(rows), model.channels, model.image_size, model.image_size), dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(len(rows)) % max(model.num_classes, 1)}
    start, turns = (recipe, PixelModel(model, build_unet(model).to(device))), getattr(recipe, "student_every", 1)
    length, threads = (recipe.num_steps, len(rows), recipe.seed), torch.get_num_threads()
    if recipe.kind == "teach":
        method: Any = TeacherTraining(*start, *length)
    else:
        method = DMD2(*start, roles_of(recipe, start[1]), *length)

    def seconds(step: int, clock: Callable[[], float]) -> float:
        done, begun, end = 0, clock(), time.perf_counter() + SECONDS
        while not done or time.perf_counter() < end:
            method.step([(rows, batch)], step)
            done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - begun) / done

    def mean(clock: Callable[[], float]) -> float:
        return (seconds(0, clock) + (turns - 1) * (seconds(1, clock) if turns > 1 else 0)) / turns

    computing = time.process_time if device.type == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    method.step([(rows, batch)], 1)  # the first one is slower
    begun, computed = time.perf_counter(), computing()
    found = mean(computing)
    alone = time.perf_counter() - begun < ALONE * (computing() - computed)
    torch.set_num_threads(threads)
    return float((min(found, mean(time.perf_counter)) if alone else found) * recipe.batch_size / len(rows))
