"""Pairs of noise and image are drawn by a teacher's sampler: on demand, or first, where a run needs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.commands.options_files import Pairs
from fewstep.commands.runs import pick_device, place_of_rank
from fewstep.data.pairs import Given, PairSet, load_pairs, open_folder, write_pairs
from fewstep.data.texts import load_prompts
from fewstep.errors import UserError
from fewstep.models.image_model import ImageModel
from fewstep.models.sampler import MULTISTEP, RENOISING, Sampler, parse_sampler, sample
from fewstep.networks.precision import INFERENCE_DTYPES
from fewstep.recipes.schema import StudentRecipe
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.seeding import Draws, generator
from fewstep.stopping import advising


def open_pairs(recipe: StudentRecipe, model: ImageModel, runs: Path) -> PairSet:
    """The pairs that the recipe is trained on, drawn first if its `regression.num` says how many."""
    settings: Any = recipe.regression
    draw_first(recipe, model, runs)
    sampler, folder = str(parse_sampler(settings.sampler)), folder_of_pairs(recipe, runs)
    return load_pairs(folder, model.fingerprint, sampler, model.shape, settings.num)


def folder_of_pairs(recipe: StudentRecipe, runs: Path) -> Path:
    """Where they are or will be: if they are drawn first, a bare name may mean a folder beside the run."""
    settings: Any = recipe.regression
    folder = Path(settings.pairs)
    beside = settings.num and not folder.exists() and folder.name == settings.pairs
    return runs / folder if beside else folder


def draw_first(recipe: StudentRecipe, model: ImageModel, runs: Path, report: Report | None = None) -> None:
    """Draws the pairs that lack of those a recipe says it makes; raises UserError if it can't, or they are others."""
    settings: Any = recipe.regression
    if not settings.num:
        return
    folder, sampler = folder_of_pairs(recipe, runs), parse_sampler(settings.sampler)
    there = (folder / "pairs.json").exists()
    if there and not open_folder(folder, model.fingerprint, str(sampler), model.shape, settings.num).missing():
        return
    if model.kind == "text":
        by_hand = f"fewstep data pairs --teacher {recipe.teacher} --num {settings.num} --sampler {sampler}"
        told = f"pairs of text need prompts; draw them with `{by_hand} --prompts FILE --out {settings.pairs}`"
        raise UserError(f"regression.num: {told}, and leave it out")
    check_sampler(model, sampler, "regression.sampler")
    given: dict[str, Any] = {"teacher": recipe.teacher, "num": settings.num, "sampler": settings.sampler, "out": folder}
    draw_pairs(model, Pairs(**given, device=recipe.device), sampler, report)


def draw_pairs(model: ImageModel, given: Pairs, sampler: Sampler, report: Report | None = None) -> int:
    """Draws this rank's share of a teacher's pairs, or goes on with it; gives the number of files that still lack."""
    out, num = given.out, given.num
    conditions = _conditions(given, model)
    schedule = type(model.denoiser.schedule).__name__
    plan: dict[str, Any] = {"teacher": model.fingerprint, "sampler": str(sampler), "schedule": schedule}
    plan |= {"precision": given.precision, "shape": list(model.shape), "seed": given.seed, "num_pairs": num}
    rank, num_ranks, device = place_of_rank(pick_device(given.device))
    dtype = INFERENCE_DTYPES[given.precision]
    model.encode_in(dtype)
    model.denoiser.to(dtype)
    model.to(device)
    made = (drawer(model, sampler), conditions, plan, out, given.batch_size or model.sampling_batch, rank, num_ranks)
    quiet = report or (None if rank == 0 else lambda done, metrics: None)
    bar = progress_bar("draw pairs", -(-num // num_ranks), quiet)
    with advising(f"the same command goes on with {out}"), bar as show:
        return write_pairs(*made, lambda done: show(done, {}))


def _conditions(given: Pairs, model: ImageModel) -> Given:
    """The prompts in turn, or the classes; raises UserError where they are not of the teacher's kind."""
    if model.kind == "text":
        if given.prompts is None:
            raise UserError("--prompts: a text-to-image teacher needs a file of prompts")
        prompts = load_prompts(given.prompts, given.prompt_column)
        return {"prompt": [prompts[index % len(prompts)] for index in range(given.num)]}
    if given.prompts is not None:
        raise UserError("--prompts: the teacher takes no text")
    if given.classes not in ("turn", "uniform"):
        raise UserError(f"--classes {given.classes!r}: write turn or uniform")
    draws = Draws(generator(given.seed, "pair classes"), range(given.num), given.num)
    turn = given.classes == "turn"
    condition = model.conditions(range(given.num)) if turn else model.draw_condition({}, draws)
    return {name: labels.tolist() for name, labels in condition.items()}


def drawer(model: ImageModel, sampler: Sampler) -> Callable[[Tensor, Given], Tensor]:
    """From unit noise and prompts or labels to x0."""

    def draw(noise: Tensor, given: Given) -> Tensor:
        labels = {name: torch.tensor(cells) for name, cells in given.items() if name == "label"}
        condition = model.encode_condition({"caption": given["prompt"]} if "prompt" in given else labels)
        with torch.no_grad():
            return sample(model, sampler, noise[None].to(model.device), condition)

    return draw


def check_sampler(model: ImageModel, sampler: Sampler, field: str = "--sampler") -> None:
    """Raises UserError if the teacher can't be sampled so."""
    if sampler.kind in RENOISING:
        raise UserError(f"{field} {sampler}: adds fresh noise at every step, and a pair has one; take euler or ddim")
    if sampler.kind in MULTISTEP and model.denoiser.schedule.betas is None:
        raise UserError(f"{field} {sampler}: is for text-to-image teachers; take heun, euler or ddim")
    if sampler.guidance_scale != 1 and model.null_condition is None:
        raise UserError(f"{field} {sampler}: the teacher has no null class to guide with; leave out the @")
