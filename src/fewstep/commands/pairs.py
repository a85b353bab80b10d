"""`fewstep data pairs`: noise and what a teacher's ODE makes of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.commands.options_files import Pairs
from fewstep.commands.places import check_writable, tell_done
from fewstep.commands.runs import pick_device, place_of_rank
from fewstep.data.pairs import Given, write_pairs
from fewstep.data.texts import load_prompts
from fewstep.errors import UserError
from fewstep.models.image_model import ImageModel
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import open_model
from fewstep.models.pixel_model import PixelModel
from fewstep.models.sampler import MULTISTEP, RENOISING, Sampler, parse_sampler, sample
from fewstep.networks.families import use_family
from fewstep.networks.precision import INFERENCE_DTYPES
from fewstep.runtime.tracking import Report, progress_bar
from fewstep.seeding import Draws, generator
from fewstep.stopping import advising


def pairs(given: Pairs, report: Report | None = None) -> None:
    """Draws this rank's share of pairs into a folder, or goes on with it; prints what is there."""
    out, num = given.out, given.num
    check_writable(out)
    sampler = parse_sampler(given.sampler)
    if given.precision not in INFERENCE_DTYPES:
        raise UserError(f"--precision {given.precision!r}: write {', '.join(INFERENCE_DTYPES)}")
    use_family(given.family)
    model = open_model(given.teacher, given.teacher_config)
    _check(model, given.teacher, sampler)
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
    quiet = report if rank == 0 else lambda done, metrics: None
    bar = progress_bar("draw pairs", -(-num // num_ranks), quiet)
    with advising(f"the same command goes on with {out}"), bar as show:
        missing = write_pairs(*made, lambda done: show(done, {}))
    if missing:
        print(f"{out}: done; {missing} files of other ranks are not there yet")
    else:
        tell_done(f"{out}, {num:,} pairs", f"distill RECIPE --set regression.pairs={out}")


def _conditions(given: Pairs, model: PixelModel | LatentModel) -> Given:
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


def _check(model: ImageModel, teacher: str, sampler: Sampler) -> None:
    """Raises UserError if the teacher can't be sampled so."""
    if model.timesteps:
        raise UserError(f"--teacher {teacher}: is a few-step student; name its teacher")
    if sampler.kind in RENOISING:
        raise UserError(f"--sampler {sampler}: adds fresh noise at every step, and a pair has one; take euler or ddim")
    if sampler.kind in MULTISTEP and model.denoiser.schedule.betas is None:
        raise UserError(f"--sampler {sampler}: is for text-to-image teachers; take heun, euler or ddim")
    if sampler.guidance_scale != 1 and model.null_condition is None:
        raise UserError(f"--sampler {sampler}: the teacher has no null class to guide with; leave out the @")
