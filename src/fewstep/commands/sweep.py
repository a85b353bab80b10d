"""`fewstep sweep`: one LoRA, or a model, at several strengths, steps and guidance scales, on the same noise."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import fewstep
from fewstep.commands.options import Sweep
from fewstep.commands.places import check_writable, free_place, tell_done
from fewstep.commands.runs import check_asked, class_number, pick_device
from fewstep.data.texts import check_lengths, load_prompts
from fewstep.embedded import shapes
from fewstep.embedded.sources import open_images
from fewstep.errors import UserError
from fewstep.evaluation.cells import CLIP, SECONDS, Cell, best_of, choose_measure, picture, table
from fewstep.evaluation.clip import Clip
from fewstep.evaluation.extractors import MAX_FEATURES, AutoencoderExtractor, Extractor, Thumbnails, open_classifier
from fewstep.evaluation.gathering import Check, CheckProbe, FeatureProbe, Probe, gather
from fewstep.evaluation.judge import MAX_CLASSES, check_scenes, classifier_path
from fewstep.evaluation.metrics import MIN_PER_PROMPT, measure
from fewstep.export.card import last_part
from fewstep.files import write_text
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.loading.hub import is_hub_id
from fewstep.models.loading.pretrained import open_model
from fewstep.models.lora_files import LoRAFile, open_loras, with_loras
from fewstep.models.sampler import NotFinite, Sampler, default_sampler, generate, spread_timesteps
from fewstep.networks.families import use_family
from fewstep.pictures import save_png
from fewstep.recipes.loading import read_run_recipe
from fewstep.runtime.checkpoint import RECIPE
from fewstep.runtime.runs import is_run, run_folder
from fewstep.runtime.tracking import progress_bar

RESULTS, PICTURE, TABLE = "results.json", "grid.png", "table.md"
MOST_CELLS, MOST_STEPS, MOST_SCALE, MOST_STRENGTH = 400, 1000, 1000.0, 100.0
USUAL_STEPS = [2, 4, 8]
FEW = 16  # prompts or classes, of which a cell has as many images as a diversity takes
Loras = Sequence[tuple[LoRAFile, float]]


@dataclass(frozen=True)
class Scene:
    """What every cell draws, number 0 .. num-1 of a seed, and what it is judged by."""

    asked: Asked
    subjects: Sequence[str]  # prompts or classes, in turn
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
    kind: Any = "student" if own else "lcm" if loras else default_sampler(model).kind
    samplers = [Sampler(kind, *each) for each in product(steps or ([len(own)] if own else USUAL_STEPS), scales)]
    times = {each.num_steps: spread_timesteps(model, own, each.num_steps) for each in samplers} if own else {}
    clip = Clip(Path(order.clip), device) if order.clip else None
    scene, cells = make_scene(order, model, prompts, clip), list[Cell]()
    model.to(device)
    if max(scales) > 1 and model.null_condition is None:
        raise UserError(f"--cfg {order.guidance}: the model has no null class to guide with; take 1")
    with progress_bar("sweep", len(strengths) * len(samplers)) as show:
        for strength, tuned in at_strengths(model, loras, strengths):
            for sampler in samplers:
                drawer = tuned.student(tuned.denoiser, times[sampler.num_steps]) if own else tuned
                cells.append(draw(drawer, Cell(strength if loras else None, sampler), scene, warm_up=not cells))
                named = choose_measure(cells, order.best)  # a wrong --best is told early
                show(len(cells), {})
    publish(order, cells, named, scene, loras, out)


def parse_axes(order: Sweep) -> tuple[list[float], list[int], list[float]]:
    """Strengths, steps and guidance scales; raises UserError for no list of numbers, or too many cells."""
    if order.strength is not None and not order.lora:
        raise UserError("--strength: is a LoRA's; name one with --lora, or leave it out")
    strength = "1" if order.strength is None else order.strength
    strengths = numbers("--strength", strength, -MOST_STRENGTH, MOST_STRENGTH, "0.5,0.7,1")
    steps = [] if order.steps is None else numbers("--steps", order.steps, 1, MOST_STEPS, "2,4,8", int)
    scales = numbers("--cfg", order.guidance, 1, MOST_SCALE, "1,1.6")
    if (cells := len(strengths) * len(steps or USUAL_STEPS) * len(scales)) > MOST_CELLS:
        raise UserError(f"--strength, --steps, --cfg: make {cells} cells; take at most {MOST_CELLS}")
    return strengths, steps, scales


def numbers(
    name: str, text: str, least: float, most: float, example: str, kind: Callable[[str], Any] = float
) -> list[Any]:
    """Those in a list parted by commas, each once; raises UserError, with the option's name, for anything else."""
    with suppress(ValueError):
        found = list(dict.fromkeys(map(kind, text.split(","))))
        if all(least <= number <= most for number in found):
            return found
    what = f"{'whole ' * (kind is int)}numbers from {least:g} to {most:g}"
    raise UserError(f"{name} {text!r}: write {what}, parted by commas: {example}")


def at_strengths(model: ImageModel, loras: Loras, strengths: Sequence[float]) -> Iterator[tuple[float, ImageModel]]:
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


def make_scene(order: Sweep, model: Any, prompts: list[str], clip: Clip | None) -> Scene:
    """With what tells pictures apart, and what is right in them: of drawn shapes, and of a run's classes in turn."""
    if clip and model.kind != "text":
        raise UserError("--clip: compares pictures with prompts, and this model takes none")
    asked: Asked = prompts or (None if order.label is None else [class_number(model, order.label)])
    count = len(asked) if asked else max(1, model.num_classes)
    extractor: Extractor = Thumbnails()
    check: Check = lambda images, numbers: []  # noqa: E731
    if model.kind == "text":
        extractor = AutoencoderExtractor(model.autoencoder) if math.prod(model.shape) <= MAX_FEATURES else extractor
        check = check_scenes(prompts) if model.image_size == shapes.IMAGE_SIZE else check
    elif asked is None and is_run(order.base) and 0 < model.num_classes <= MAX_CLASSES:
        run = run_folder(order.base)
        data = read_run_recipe(run / RECIPE).data
        extractor = classifier = open_classifier(open_images(data, model), model, classifier_path(data, run.parent))
        check = classifier.check
    subjects = [model.label(index, asked) for index in range(count)]
    num = order.num or count * (MIN_PER_PROMPT if count <= FEW else 1)
    return Scene(asked, subjects, num, order.seed, clip or extractor, check, clip)


def draw(model: ImageModel, cell: Cell, scene: Scene, warm_up: bool) -> Cell:
    """The cell, drawn and judged; the seconds are those of drawing alone. Of what is not finite it stays empty."""
    try:
        if warm_up:
            generate(model, cell.sampler, range(min(scene.num, model.sampling_batch)), scene.seed, scene.asked)
        began = time.perf_counter()
        images = generate(model, cell.sampler, range(scene.num), scene.seed, scene.asked)
        seconds = (time.perf_counter() - began) / scene.num
    except NotFinite:
        tell(f"{cell}: its images are not finite, so it stays empty; take a smaller strength or CFG")
        return cell
    probes: list[Probe] = [FeatureProbe(scene.extractor), CheckProbe(scene.check, "")]
    found = gather([images], probes, scene.num, str(cell), prompts=scene.subjects)
    values = {CLIP: scene.clip.score(found.features, scene.subjects).mean().item()} if scene.clip else {}
    values |= measure(found, found, {"classes", "prompts", "scenes"}, intervals=False)[0]
    return replace(cell, values=values | {SECONDS: seconds}, pictures=found.pictures)


def publish(order: Sweep, cells: list[Cell], named: str | None, scene: Scene, loras: Loras, out: Path) -> None:
    """Writes the three files, and prints the table and the best cell; raises UserError where no cell is finite."""
    if not any(cell.values for cell in cells):
        raise UserError("sweep: no cell's images are finite; take other weights, or float32")
    best = best_of(cells, named) if named else None
    facts = {
        "version": fewstep.__version__,
        "base": order.base if is_hub_id(order.base) else last_part(order.base),
        "loras": [{"file": file.path.name, "strength": strength} for file, strength in loras],
        "seed": scene.seed,
        "num": scene.num,
        "subjects": list(scene.subjects),
        "cells": [cell.facts for cell in cells],
        "best": {**best.settings, "measure": named, "value": best.values[str(named)]} if best else None,
    }
    whole, told = json.dumps(facts, indent=2), table(cells)
    write_text(out / RESULTS, whole + "\n")
    write_text(out / TABLE, told)
    save_png(picture(cells, named, best), out / PICTURE, {"fewstep": whole})
    print(told, end="")
    if scene.num < (least := MIN_PER_PROMPT * len(scene.subjects)):
        print(f"no diversity, which takes {MIN_PER_PROMPT} images of each: --num {least}")
    if best:
        settings = [f"{name} {value:g}" for name, value in best.settings.items() if value is not None]
        print(f"best by {named}: {', '.join(settings)}")
    else:
        print("no best cell: neither CLIP (--clip) nor drawn shapes say what is right; --best names another measure")
    tell_done(f"{out / PICTURE}, {out / TABLE} and {out / RESULTS}")
