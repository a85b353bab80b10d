"""`fewstep sweep`: one LoRA, or a model, at several strengths, steps and guidance scales, on the same noise."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fewstep
from fewstep.commands.options import Sweep
from fewstep.commands.runs import check_asked, check_writable, class_number, free_place, pick_device, tell_done
from fewstep.data.texts import check_lengths, load_prompts
from fewstep.diffusion.denoiser import Condition
from fewstep.embedded import shapes
from fewstep.embedded.sources import open_images
from fewstep.errors import UserError
from fewstep.evaluation.cells import (
    CLIP,
    SECONDS,
    Cell,
    best_of,
    choose_measure,
    markdown_table,
    picture,
    rows,
    terminal_table,
)
from fewstep.evaluation.clip import Clip
from fewstep.evaluation.extractors import MAX_FEATURES, AutoencoderExtractor, Extractor, Thumbnails, open_classifier
from fewstep.evaluation.gathering import Check, gather
from fewstep.evaluation.judge import MAX_CLASSES, check_scenes, classifier_path
from fewstep.evaluation.metrics import measure
from fewstep.export.card import last_part
from fewstep.files import write_text
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.hub import is_hub_id
from fewstep.models.loading.pretrained import open_model
from fewstep.models.lora_files import LoRAFile, open_loras, with_loras
from fewstep.models.sampler import Sampler, default_sampler, draw_noise, sample, spread_timesteps
from fewstep.networks.codec import to_images
from fewstep.networks.families import use_family
from fewstep.pictures import save_png
from fewstep.recipes.loading import read_run_recipe
from fewstep.runtime.checkpoint import RECIPE
from fewstep.runtime.runs import is_run, run_folder
from fewstep.runtime.tracking import progress_bar

RESULTS, PICTURE, TABLE = "results.json", "grid.png", "table.md"
MOST_CELLS, MOST_STEPS, MOST_SCALE, MOST_STRENGTH = 400, 1000, 1000.0, 100.0
USUAL_STEPS = [2, 4, 8]
Axes = tuple[list[float], list[int], list[float]]
"""Strengths, numbers of steps, guidance scales."""


@dataclass(frozen=True)
class Scene:
    """What every cell draws, number 0 .. num-1 of a seed, and what it is judged by."""

    subjects: Sequence[str]
    """Prompts or classes, in turn."""
    condition: Condition
    """Of the subjects."""
    null: Condition | None
    num: int
    seed: int
    extractor: Extractor
    check: Check
    clip: Clip | None


def sweep(order: Sweep) -> None:
    """Writes the grid, the table and the numbers of all cells into a folder; weights are changed once per strength."""
    strengths, steps, scales = parse_axes(order)
    out = free_place(order.out, Path("sweep"), lambda folder: (folder / RESULTS).exists(), order.overwrite)
    check_writable(out)
    use_family(order.family)
    device = pick_device(order.device)
    prompts = check_lengths("--prompt", list(order.prompt))
    prompts += load_prompts(order.prompts, field="--prompts") if order.prompts else []
    model = open_model(order.base, order.config)
    check_asked(model, order.label, prompts)
    loras = open_loras(order.lora, model)
    own = next((file.timesteps for file, _ in reversed(loras) if file.timesteps), model.timesteps)
    counts = steps or ([len(own)] if own else USUAL_STEPS)
    chosen = [choose(model, own, bool(loras), *each) for each in product(counts, scales)]
    scene, cells = make_scene(order, model, prompts, max(scales) > 1, device), list[Cell]()
    with progress_bar("sweep", len(strengths) * len(chosen)) as show:
        for strength, tuned in at_strengths(model, loras, strengths):
            for timesteps, sampler in chosen:
                drawer = tuned.student(tuned.denoiser, timesteps) if timesteps else tuned
                cells.append(draw_cell(drawer, sampler, scene, strength if loras else None, warm_up=not cells))
                measure = choose_measure(cells, order.best)  # which is told behind the first
                show(len(cells), {})
    publish(order, cells, measure, scene, loras, out)


def parse_axes(order: Sweep) -> Axes:
    """The three lists; raises UserError for what is no list of numbers, or makes too many cells."""
    if order.strength is not None and not order.lora:
        raise UserError("--strength: is a LoRA's; name one with --lora, or leave it out")
    strengths = numbers("--strength", "1" if order.strength is None else order.strength, -MOST_STRENGTH, MOST_STRENGTH)
    steps = numbers("--steps", order.steps, 1, MOST_STEPS, int) if order.steps is not None else []
    scales = numbers("--cfg", order.guidance, 1, MOST_SCALE)
    if (cells := len(strengths) * len(steps or USUAL_STEPS) * len(scales)) > MOST_CELLS:
        raise UserError(f"--strength, --steps, --cfg: make {cells} cells; take at most {MOST_CELLS}")
    return strengths, steps, scales


def numbers(name: str, text: str, least: float, most: float, kind: Callable[[str], Any] = float) -> list[Any]:
    """Those in a list parted by commas, each once; raises UserError, with the option's name, for anything else."""
    try:
        found = list(dict.fromkeys(map(kind, text.split(","))))
    except ValueError:
        found = []
    if not found or not all(least <= number <= most for number in found):
        what = "whole numbers" if kind is int else "numbers"
        example = {"--strength": "0.5,0.7,1", "--steps": "2,4,8"}.get(name, "1,1.6")
        raise UserError(f"{name} {text!r}: write {what} from {least:g} to {most:g}, parted by commas: {example}")
    return found


def choose(
    model: ImageModel, own: list[float] | None, renoises: bool, steps: int, scale: float
) -> tuple[list[float] | None, Sampler]:
    """The timesteps, where a student says its own, and the sampler, which needs none otherwise."""
    if own:
        return spread_timesteps(model, own, steps), Sampler("student", steps, scale)
    return None, Sampler("lcm" if renoises else default_sampler(model).kind, steps, scale)


def at_strengths(
    model: ImageModel, loras: Sequence[tuple[LoRAFile, float]], strengths: Sequence[float]
) -> Iterator[tuple[float, ImageModel]]:
    """The model with the first LoRA at each strength and the others at theirs, from the same weights every time."""
    names = {name for file, _ in loras for name in file.lora}
    weights = {name: model.network.get_submodule(name).weight.data for name in names}
    kept = {name: weight.cpu().clone() for name, weight in weights.items()}
    for strength in strengths:
        for name, weight in weights.items():
            weight.copy_(kept[name])
        first = [(file, strength) for file, _ in loras[:1]]
        yield strength, with_loras(model, [*first, *loras[1:]], tell if strength == strengths[0] else lambda told: None)


def tell(told: str) -> None:
    print(f"fewstep: {told}", file=sys.stderr)


def make_scene(order: Sweep, model: ImageModel, prompts: list[str], guided: bool, device: torch.device) -> Scene:
    """Puts the model onto the device, and embeds what is asked for once."""
    asked: Asked = prompts or (None if order.label is None else [class_number(model, order.label)])
    count = len(asked) if asked else max(1, model.num_classes)
    clip = Clip(Path(order.clip), device) if order.clip else None
    if clip and model.kind != "text":
        raise UserError("--clip: compares pictures with prompts, and this model takes none")
    extractor, check = make_check(order, model, prompts)
    model.to(device)
    null = model.null_condition if guided else None
    if guided and null is None:
        raise UserError(f"--cfg {order.guidance}: the model has no null class to guide with; take 1")
    condition = model.conditions(range(count), asked)
    model.release()
    subjects = [model.label(index, asked) for index in range(count)]
    num = order.num or max(4, count)
    return Scene(subjects, condition, null, num, order.seed, clip or extractor, check, clip)


def make_check(order: Sweep, model: Any, prompts: list[str]) -> tuple[Extractor, Check]:
    """What tells pictures apart, and what is right in them: of drawn shapes, and of a run's classes in turn."""
    if model.kind == "text":
        of_shapes = model.image_size == shapes.IMAGE_SIZE
        small = math.prod(model.shape) <= MAX_FEATURES
        extractor: Any = AutoencoderExtractor(model.autoencoder) if small else Thumbnails()
        return extractor, check_scenes(prompts) if of_shapes else unchecked
    if order.label is None and is_run(order.base) and 0 < model.num_classes <= MAX_CLASSES:
        run = run_folder(order.base)
        data = read_run_recipe(run / RECIPE).data
        classifier = open_classifier(open_images(data, model), model, classifier_path(data, run.parent))
        return classifier, classifier.check
    return Thumbnails(), unchecked


def unchecked(images: Tensor, numbers: range) -> list[dict[str, bool]]:
    """Of pictures that no program reads."""
    return []


def draw_cell(model: ImageModel, sampler: Sampler, scene: Scene, strength: float | None, warm_up: bool) -> Cell:
    """Draws and judges; the seconds are those of drawing alone."""
    seconds = list[float]()
    if warm_up:
        next(draw(model, sampler, scene, seconds))
        seconds.clear()
    made = draw(model, sampler, scene, seconds)
    what = f"{scene.num} images of {sampler}" + ("" if strength is None else f" at strength {strength:g}")
    found = gather(made, scene.extractor, scene.num, what, check=scene.check, prompts=scene.subjects)
    values = {CLIP: scene.clip.score(found.features, scene.subjects)} if scene.clip else {}
    values |= measure(found, found, {"classes", "prompts", "scenes"}, intervals=False)[0]
    return Cell(strength, sampler, values | {SECONDS: sum(seconds) / scene.num}, found.pictures)


@torch.no_grad()
def draw(model: ImageModel, sampler: Sampler, scene: Scene, seconds: list[float]) -> Iterator[Tensor]:
    """uint8 images (B, C, H, W) on the CPU, and how long each batch took."""
    for first in range(0, scene.num, model.sampling_batch):
        part = range(first, min(first + model.sampling_batch, scene.num))
        rows = torch.tensor(part) % len(scene.subjects)
        began = time.perf_counter()
        noise = draw_noise(model, sampler.num_noises, part.start, part.stop, scene.seed)
        condition = {name: value[rows.to(value.device)] for name, value in scene.condition.items()}
        pixels = model.decode_pixels(sample(model, sampler, noise, condition, scene.null))
        finite = bool(pixels.isfinite().all())  # which waits for the device
        seconds.append(time.perf_counter() - began)
        if not finite:
            raise UserError(f"{sampler}: images {part[0]} to {part[-1]} are not finite; take a smaller strength or CFG")
        yield to_images(pixels).cpu()


def publish(
    order: Sweep,
    cells: list[Cell],
    measure: str | None,
    scene: Scene,
    loras: Sequence[tuple[LoRAFile, float]],
    out: Path,
) -> None:
    """Writes the three files, and prints the table and the best cell."""
    best = best_of(cells, measure) if measure else None
    chosen = {**best.settings, "measure": measure, "value": best.values[str(measure)]} if best else None
    facts = {
        "version": fewstep.__version__,
        "base": order.base if is_hub_id(order.base) else last_part(order.base),
        "loras": [{"file": file.path.name, "strength": strength} for file, strength in loras],
        "seed": scene.seed,
        "num": scene.num,
        "subjects": list(scene.subjects),
        "cells": [each.facts for each in cells],
        "best": chosen,
    }
    lines, whole = rows(cells), json.dumps(facts, indent=2)
    write_text(out / RESULTS, whole + "\n")
    write_text(out / TABLE, markdown_table(lines))
    save_png(picture(cells, measure, best), out / PICTURE, {"fewstep": whole})
    Console().print(terminal_table(lines, cells.index(best) if best else None))
    if best:
        told = [f"{name} {value:g}" for name, value in best.settings.items() if value is not None]
        print(f"best by {measure}: {', '.join(told)}")
    else:
        print("no best cell: neither CLIP (--clip) nor drawn shapes say what is right; --best names another measure")
    tell_done(f"{out / PICTURE}, {out / TABLE} and {out / RESULTS}")
