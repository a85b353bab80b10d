"""`fewstep export`: a student for where people use models."""

import re
import shlex
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from pydantic import BaseModel

from fewstep.commands.options_files import Export
from fewstep.commands.places import check_writable, tell_done
from fewstep.commands.runs import check_file
from fewstep.errors import UserError
from fewstep.evaluation.intervals import wilson_interval
from fewstep.export.card import (
    Provenance,
    check_license,
    interface_settings,
    last_part,
    lora_settings,
    read_best,
    read_scores,
    read_table,
)
from fewstep.export.diffusers_folder import Format, check_folder, write_diffusers_folder
from fewstep.export.lora import FORMATS, header, write_lora
from fewstep.export.single_file import version_of
from fewstep.export.stored import StoredModel, open_stored
from fewstep.files import size
from fewstep.metric_table import METRICS
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import WEIGHT_SUFFIXES, load
from fewstep.models.sampler import parse_sampler
from fewstep.networks.precision import INFERENCE_DTYPES
from fewstep.pictures import is_picture
from fewstep.recipes.loading import read_run_recipe
from fewstep.recipes.schema import StudentRecipe
from fewstep.runtime.checkpoint import EVALUATIONS, RECIPE, STATES, check_run, load_state, state_path, step_name
from fewstep.runtime.ema import ema_name
from fewstep.runtime.runs import Found, find, run_folder
from fewstep.runtime.shards import all_rows
from fewstep.runtime.tracking import progress_bar, read_metrics
from fewstep.settings import is_path

TARGETS = ("diffusers", "single-file", "lora")


def export(given: Export) -> None:
    """Writes the student of RUN, RUN@STEP or RUN@best-METRIC as a diffusers folder, a single file or a LoRA."""
    target, dtype = check_options(given)
    recipe = student_recipe(run_folder(given.run))
    found = find(given.run, None if given.ema == first_decay(recipe) else given.ema)
    found.check(found.folder.name, *(STATES if given.raw else []))
    raw = load_state(found.checkpoint)["method"]["student"] if given.raw else {}
    tensors = {name: all_rows(tensor) for name, tensor in raw.items()}
    stored = open_stored(found.folder, (state_path(found.checkpoint), tensors) if given.raw else None)
    provenance = trace(found, stored, recipe, given)
    if target == "lora":
        export_lora(found, stored, provenance, recipe, given, dtype)
        return
    if stored.lora and dtype == torch.bfloat16:
        print("fewstep: --dtype bfloat16: rounds away up to half of what a LoRA changes; take float16", file=sys.stderr)
    with progress_bar("exporting", 2 * len(stored.tensors)) as show:
        numbers = count(1)

        def report() -> None:
            show(next(numbers), {})

        if target == "single-file":
            write_file(stored, given.out, provenance, dtype, report)
        else:
            written = Format(dtype, given.shard_size or Format.shard_size)
            write_diffusers_folder(stored, given.out, provenance, written, newest_grid(found), given.overwrite, report)
    tell(given.out, stored, provenance, target)


def newest_grid(found: Found) -> Path | None:
    """The last picture of the run that is not younger than the model; a link is none, nor is what else has the name."""
    grids = sorted((found.run / "samples").glob("*.png"), reverse=True)
    return next((path for path in grids if path.stem <= step_name(found.step) and is_picture(path)), None)


def tell(out: Path, stored: StoredModel, provenance: Provenance, target: str) -> None:
    """Prints what was written and how it is used."""
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    prompt = " --prompt 'a photo of a cat'" if stored.index else ""
    if target == "single-file":
        print(interface_settings(provenance.timesteps, stored.prediction))
        prompt += f" --config {shlex.quote(str(stored.folder))}"
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    tell_done(f"{out} ({megabytes:,.{0 if megabytes > 10 else 2}f} MB)", f"sample {shlex.quote(str(out))}{prompt}")


def export_lora(
    found: Found, stored: StoredModel, provenance: Provenance, recipe: StudentRecipe, given: Export, dtype: torch.dtype
) -> None:
    """Writes what the run trained beside its base, and prints how it is used."""
    if recipe.kind != "distill" or not recipe.lora:
        what = "was trained whole, not as a LoRA; `fewstep extract BASE STUDENT` makes one of the difference"
        raise UserError(f"{found.run}: {what}")
    lora = {name: change.with_alpha(recipe.lora.alpha) for name, change in stored.lora.items()}
    told, part, prompt = provenance.metadata(), stored.family.part, ""
    if stored.index:
        version = version_of(stored.index, stored.parts["text_encoder"].network, stored.prediction)
        told = header(given.out, lora, provenance, version, stored.prediction, stored.description["image_size"])
        prompt = " --prompt 'a photo of a cat'"
        prompt += f" --config {shlex.quote(recipe.teacher_config)}" if recipe.teacher_config else ""
    layout = given.format or ("kohya" if stored.index else "diffusers")
    dtype = torch.float32 if layout == "diffusers" and not given.dtype else dtype
    write_lora(given.out, lora, stored.parts[part].network, part, told, layout, dtype)
    if stored.index:
        print(lora_settings(given.out, provenance.timesteps, stored.prediction, provenance.best))
    beside = found.run.parent / recipe.teacher  # as recipes name those that are taught here
    base, out = shlex.quote(str(beside if beside.exists() else recipe.teacher)), shlex.quote(str(given.out))
    tell_done(f"{out} ({size(given.out.stat().st_size)})", f"sample {base} --lora {out}{prompt}")


def check_options(given: Export) -> tuple[str, torch.dtype]:
    """Target and type of the weights; raises UserError for what can't be, or a place that can't be written to.

    Folders are float32 by default, for then `from_pretrained(DIR)` opens them without a variant and draws what the run
    drew; single files are float16, which is what ComfyUI and A1111 compute in. LoRAs are float16 with an alpha beside
    them (an error of 0.03 % of the change); in diffusers' layout alpha / rank is in the second matrix, whose numbers
    float16 would round five times as much.
    """
    is_file = given.out.suffix.lower() in WEIGHT_SUFFIXES
    target = given.to or TARGETS[is_file]
    if target not in TARGETS:
        raise UserError(f"--to {target}: write {' or '.join(TARGETS)}")
    if given.format and (target != "lora" or given.format not in FORMATS):
        raise UserError(f"--format {given.format}: is of --to lora; write {' or '.join(FORMATS)}")
    if target == "diffusers" and is_file:
        raise UserError(f"{given.out}: is a file's name, and --to diffusers writes a folder; change one of them")
    name = given.dtype or ("float32" if target == "diffusers" else "float16")
    if name not in INFERENCE_DTYPES:
        raise UserError(f"--dtype {name}: write {', '.join(INFERENCE_DTYPES)}")
    if given.raw and given.ema:
        raise UserError(f"--ema {given.ema}: --raw takes the weights as trained, not an average; leave out one")
    check_license(given.license)
    check_writable(given.out.absolute().parent)
    if target != "diffusers" and given.shard_size:
        raise UserError("--shard-size: a single file has no shards")
    if target != "diffusers":
        check_file(given.out, given.overwrite)
    elif given.shard_size and not re.fullmatch(r"[1-9]\d*[KMGT]B", given.shard_size):
        raise UserError(f"--shard-size {given.shard_size}: write a number and KB, MB, GB or TB, for example 5GB")
    else:
        check_folder(given.out, given.overwrite)
    return target, INFERENCE_DTYPES[name]


def student_recipe(run: Path) -> StudentRecipe:
    """The recipe of a run; raises UserError if it makes no student."""
    check_run(run)
    recipe = read_run_recipe(run / RECIPE)
    if not isinstance(recipe, StudentRecipe):
        raise UserError(f"{run}: holds no few-step student; distil it first (`fewstep distill`), and export that run")
    return recipe


def trace(found: Found, stored: StoredModel, recipe: StudentRecipe, given: Export) -> Provenance:
    """Where the model comes from, in what may be published."""
    run = found.run
    judged = [] if given.raw else read_metrics(run / EVALUATIONS)  # which are of the averaged weights
    num, base = recipe.evaluation.num_samples, stored.base_model
    if recipe.kind == "distill":
        guidance = recipe.guidance_scale
    else:  # of a regression: the teacher's on the pairs
        guidance = parse_sampler(recipe.regression.sampler).guidance_scale
    settings = recipe.lora if recipe.kind == "distill" else None
    results = given.evaluation or (run if (run / "results.json").is_file() else None)
    best = read_best(results) if results else {}
    return Provenance(
        teacher=base or last_part(recipe.teacher),
        recipe=yaml.safe_dump(published(recipe, base), sort_keys=False),
        timesteps=stored.description["timesteps"],
        guidance_scale=guidance,
        step=found.step,
        ema="raw" if given.raw else found.ema or first_decay(recipe),
        kind=recipe.kind,
        lora=f"rank {settings.rank}, alpha {settings.alpha:g}" if settings else "",
        base_model=base,
        license=given.license,
        scores={
            name: (value, wilson_interval(value, of.cases(num)) if (of := METRICS.get(name)) and of.per_fake else None)
            for name, value in read_scores(judged, found.step, found.ema).items()
        },
        table=read_table(results, run.name) if results and not best else [],
        best=best,
    )


def published(settings: BaseModel, base_model: str | None) -> dict[str, Any]:
    """The settings with only the last parts of their paths; the teacher's id on the hub is none."""
    content = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            content[name] = published(value, base_model)
        elif is_path(field) and value not in (None, base_model):
            content[name] = last_part(value)
    return content


def first_decay(recipe: StudentRecipe) -> str:
    """The name of the average in `model/`."""
    decays = recipe.student.ema_decay
    return ema_name(decays[0] if isinstance(decays, list) else decays)


def write_file(
    stored: StoredModel, out: Path, provenance: Provenance, dtype: torch.dtype, report: Callable[[], None]
) -> None:
    """The student as one file in the original layout; raises UserError if that has no place for it."""
    from fewstep.export.single_file import write_single_file

    if not stored.index:
        raise UserError("--to single-file: is a layout of SD and SDXL; for a pixel model write --to diffusers")
    stored.check_numbers(report)
    student = cast(LatentModel, load(stored.folder))
    for name, tensor in stored.parts[stored.family.part].tensors.items():
        if tensor.raw is not None or tensor.change is not None:  # in place of the averages
            student.network.load_state_dict({name: tensor.read()}, strict=False)
    write_single_file(student, out, provenance.metadata(), dtype)
