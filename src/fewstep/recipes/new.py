"""Recipes for one's own images: settings that suit what a look at them finds, and how long they will take here."""

import math
import time
from pathlib import Path
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
from fewstep.recipes.loading import explained, idle, load_recipe, parse
from fewstep.recipes.schema import AnyRecipe
from fewstep.training.dmd2 import DMD2
from fewstep.training.method import Method
from fewstep.training.roles import make_roles
from fewstep.training.teacher import TeacherTraining

TUNED_AT = 3 * 64 * 64  # numbers of an image, for which the GAN weights 3e-3 and 1e-2 were found (losses.py)
MIN_JUDGED, MAX_JUDGED_CLASSES = 100, 100
MEASURED = 256  # images, for their standard deviation
SECONDS = 0.5  # of each kind of step, which are timed


class Plan(NamedTuple):
    """What suits a size of images: channels of each level, batch, steps of the teacher, and its rate."""

    widths: list[int]
    batch_size: int
    num_steps: int
    lr: float


PLANS = {
    "cpu": {
        8: Plan([24, 48], 128, 1000, 2e-3),
        16: Plan([32, 64], 64, 1500, 1e-3),
        32: Plan([32, 64, 96], 32, 2000, 7e-4),
        64: Plan([32, 64, 96, 128], 32, 3000, 5e-4),
    },
    "cuda": {
        8: Plan([64, 128], 256, 4000, 1e-3),
        16: Plan([64, 128], 128, 8000, 7e-4),
        32: Plan([64, 128, 192], 128, 15000, 5e-4),
        64: Plan([64, 128, 192, 256], 64, 20000, 3e-4),
    },
}
OF_OTHERS = {"embeddings", "prompts", "samples", "data.caption_column", "regression", "regression_weight"} | {
    f"teacher_{each}" for each in ("config", "prediction_type", "family")
}  # settings of text to image and of teachers from elsewhere
LARGEST = {"cpu": 32, "cuda": 64}  # which are taught in hours


class Suggested(NamedTuple):
    """Recipes by the ends of their names, what is said of settings, by key, and a line of what was found."""

    recipes: dict[str, AnyRecipe]
    notes: dict[str, str]
    found: str | None


def suggest(name: str, source: str, size: int | None, device: str) -> Suggested:
    """Teacher and students for one's own images; raises UserError for whatever is wrong with them."""
    found = look(source)
    fitting = [each for each in PLANS[device] if each <= 1.2 * _side(found) and each <= LARGEST[device]]
    size = size or max(fitting, default=8)
    if size not in PLANS[device]:
        raise UserError(f"--size {size}: write {', '.join(map(str, PLANS[device]))}")
    plan, classes = PLANS[device][size], len(found.class_names or ())
    model = _model(size, 1 if found.grey else 3, classes if classes > 1 else 0, plan)
    images = open_images(DataSettings(source=source), PixelModelConfig(**model), shrink=True)
    pixels = images.fetch(torch.arange(min(images.length, MEASURED))).double() / 127.5 - 1
    model["sigma_data"] = round(max(pixels.std().item(), 0.05), 2)
    teacher = {"kind": "teach", "description": f"EDM teacher of {name}, {size}x{size}", "model": model}
    teacher |= {"data": {"source": source}, "num_steps": plan.num_steps, "batch_size": plan.batch_size}
    teacher |= {"class_dropout": 0.1 if model["num_classes"] else 0.0, "ema_decay": _decay(plan.num_steps)}
    teacher |= {"optimizer": {"lr": plan.lr, "warmup_steps": 50, "decay": "cosine", "clip_norm": 1.0}}
    teacher |= {"noise": {"distribution": "lognormal", "mean": -1.2, "std": 1.2}} | _rhythm(plan.num_steps)
    judged = found.num_images >= MIN_JUDGED and 0 < model["num_classes"] <= MAX_JUDGED_CLASSES
    students = {f"{steps}step": _student(name, steps, teacher, judged) for steps in (1, 4)}
    recipes = {end: parse(content, end) for end, content in ({"teacher": teacher} | students).items()}
    return Suggested(recipes, _notes(model, found), images.found)


def _side(found: Look) -> int:
    """The median of the shorter sides."""
    sides = sorted(min(size) for size in found.sizes.elements())
    return sides[len(sides) // 2]


def _model(size: int, channels: int, classes: int, plan: Plan) -> dict[str, Any]:
    attention = [size > 8 and size // 2**level in (8, 16) for level in range(len(plan.widths))]
    widths = {"block_out_channels": plan.widths, "attention": attention, "norm_num_groups": 8}
    return {"image_size": size, "channels": channels, "num_classes": classes, "null_class": classes > 0} | widths


def _student(name: str, steps: int, teacher: dict[str, Any], judged: bool) -> dict[str, Any]:
    """As digits-1step and digits-4step, at the rates, noise levels and GAN weights that suit this size."""
    model, share = teacher["model"], teacher["num_steps"] / 1000
    num_steps = round((1600 if steps == 1 else 1200) * max(share / 3, 1), -2)
    rate, tuned = teacher["optimizer"]["lr"], TUNED_AT / (model["channels"] * model["image_size"] ** 2)
    shift = math.sqrt(model["image_size"] / 8)  # neighbouring pixels share what they show: it takes more noise to hide
    falling = {"decay": "linear", "decay_start": 0.5}
    times = [80.0] if steps == 1 else [80.0, *(round(shift * each, 2) for each in (2.5, 0.8, 0.3))]
    student = {"num_timesteps": steps, "timesteps": times, "ema_decay": _decay(num_steps // 5)}
    noise = {key: _lognormal(mean + math.log(shift)) for key, mean in (("critic", -0.5), ("dm", -0.3))}
    weights = {"student_weight": min(3e-3 * tuned, 0.15), "critic_weight": min(1e-2 * tuned, 0.3)}
    evaluation = {"evaluation": {"every": num_steps // 4, "num_samples": 500}} if judged else {}
    return {
        "kind": "distill",
        "description": f"{steps}-step student of {name}-teacher",
        "teacher": f"runs/{name}-teacher",
        "data": teacher["data"],
        "num_steps": num_steps,
        "batch_size": teacher["batch_size"],
        "student": student | {"optimizer": {"lr": rate * (0.5 if steps == 1 else 0.15), "warmup_steps": 10} | falling},
        "critic": {"optimizer": {"lr": rate, "warmup_steps": 50} | falling, "condition_on_stop": steps > 1}
        | noise["critic"],
        "dm": noise["dm"],
        "gan": {key: float(f"{weight:.2g}") for key, weight in weights.items()},
    } | evaluation | _rhythm(num_steps)  # fmt: skip


def _lognormal(mean: float) -> dict[str, Any]:
    return {"noise": {"distribution": "lognormal", "mean": round(mean, 2), "std": 1.2}}


def _decay(updates: int) -> float:
    """An average over a tenth of a run."""
    return float(f"{1 - 10 / updates:.4g}")


def _rhythm(num_steps: int) -> dict[str, int]:
    return {"log_every": 20, "sample_every": num_steps // 4, "checkpoint_every": num_steps // 4}


def _notes(model: dict[str, Any], found: Look) -> dict[str, str]:
    """Why some settings are as they are here."""
    numbers = model["channels"] * model["image_size"] ** 2
    scaled = f"3e-3 and 1e-2 were found at {TUNED_AT:,} numbers per image; these have {numbers:,}."
    return {
        "model.image_size": f"Most images here have {_side(found)} pixels or more.",
        "model.sigma_data": "Measured on these images, in [-1, 1].",
        "model.attention": "At 16 and 8 pixels.",
        "model.block_out_channels": "Wider is better and slower.",
        "num_steps": "More is better, until samples repeat what was trained on.",
        "student.timesteps": "Sigmas; of larger images larger ones, for their neighbouring pixels are alike.",
        "gan.student_weight": scaled,
    }


def like(from_: str, name: str, source: str | None, teacher: str | None) -> Suggested:
    """A recipe whose teacher is brought along, with one's own images and teacher in it."""
    if source and not is_latents(Path(source)):
        look(source)  # which tells what is wrong with it
    given = [f"{key}={value}" for key, value in (("data.source", source), ("teacher", teacher)) if value]
    recipe = load_recipe(from_, [*given, f"description={name}, as {from_}"])
    return Suggested({from_.partition("-")[2]: recipe}, {}, None)


def text(recipe: AnyRecipe, notes: dict[str, str], head: str) -> str:
    """The file: every setting, but for those of ours that change nothing, with its meaning, and why it is so here."""
    skipped = {*(key for key, _ in idle(recipe)), *OF_OTHERS} if notes else ()
    return "\n".join([f"# {head}", *explained(recipe, skipped, notes), ""])


def seconds_per_step(recipe: AnyRecipe, model: PixelModelConfig, device: torch.device) -> float:
    """Measured on noise, on that very network, on a CPU at a part of the batch that it computes in a moment."""
    part = max(1024 // model.image_size**2, 4) if device.type == "cpu" else recipe.batch_size
    rows = range(min(recipe.batch_size, part))
    images = torch.randint(256, (len(rows), model.channels, model.image_size, model.image_size), dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(len(rows)) % max(model.num_classes, 1)}
    method, turns = _method(recipe, PixelModel(model, build_unet(model).to(device)), len(rows))

    def seconds(step: int) -> float:
        done, start = 0, time.perf_counter()
        while not done or time.perf_counter() - start < SECONDS:
            method.step([(rows, batch)], step)
            done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / done

    method.step([(rows, batch)], 1)  # the first one is slower
    whole = seconds(0) + (turns - 1) * seconds(1) if turns > 1 else seconds(0)
    return whole / turns * recipe.batch_size / len(rows)


def _method(recipe: AnyRecipe, model: PixelModel, batch_size: int) -> tuple[Method, int]:
    """What trains, and after how many steps the student has its turn again."""
    if recipe.kind == "teach":
        return TeacherTraining(recipe, model, recipe.num_steps, batch_size, recipe.seed), 1
    num_stops = recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0
    roles = make_roles(model, recipe.guidance_scale, recipe.gan.feature_layer, num_stops)
    return DMD2(recipe, model, roles, recipe.num_steps, batch_size, recipe.seed), recipe.student_every
