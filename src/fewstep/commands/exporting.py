"""`fewstep export`: a student for where people use models."""

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import cast

import torch

from fewstep.commands.options import Export
from fewstep.commands.runs import check_writable
from fewstep.errors import UserError
from fewstep.evaluation.metrics import wilson_interval
from fewstep.export.card import Provenance, read_scores, read_table
from fewstep.export.diffusers_folder import Format, check_folder, write_diffusers_folder
from fewstep.export.stored import StoredModel, open_stored
from fewstep.metric_table import METRICS
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import SUFFIX, load
from fewstep.models.sampler import parse_sampler
from fewstep.recipes.loading import read_run_recipe
from fewstep.recipes.schema import DistillRecipe, StudentRecipe
from fewstep.runtime.checkpoint import EVALUATIONS, RECIPE, check_run, load_state, step_name
from fewstep.runtime.ema import ema_name
from fewstep.runtime.runs import Found, find, run_folder
from fewstep.runtime.tracking import progress_bar, read_metrics

TARGETS = ("diffusers", "single-file")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(text: str, target: str, out: Path, options: Export) -> None:
    """Writes the student of RUN, RUN@STEP or RUN@best-METRIC to `out`: a diffusers folder or a single file."""
    dtype = check_options(target, out, options)
    recipe = student_recipe(run_folder(text))
    found = find(text, None if options.ema == first_decay(recipe) else options.ema)
    found.check(found.folder.name, *(["state.pt"] if options.raw else []))
    raw = load_state(found.checkpoint, lazy=True)["method"]["student"] if options.raw else None
    stored = open_stored(found.folder, raw and (found.checkpoint / "state.pt", raw))
    provenance = trace(found, stored, recipe, options)
    with progress_bar("exporting", 2 * len(stored.tensors)) as show:
        numbers = count(1)

        def report() -> None:
            show(next(numbers), {})

        if target == "single-file":
            write_file(stored, out, provenance, dtype, report)
        else:
            written = Format(dtype, options.shard_size or Format.shard_size)
            grids = sorted(path for path in (found.run / "samples").glob("*.png") if path.stem <= step_name(found.step))
            grid = grids[-1] if grids else None  # the last picture that is not younger than the model
            write_diffusers_folder(stored, out, provenance, written, grid, options.overwrite, report)
    print(f"wrote {out}")


def check_options(target: str, out: Path, options: Export) -> torch.dtype:
    """The type of the weights; raises UserError for what can't be asked for, or a place that can't be written to.

    Folders are float32 by default, for then `from_pretrained(DIR)` opens them without a variant and draws what the run
    drew; single files are float16, which is what ComfyUI and A1111 compute in.
    """
    if target not in TARGETS:
        raise UserError(f"--to {target}: write {' or '.join(TARGETS)}")
    name = options.dtype or ("float32" if target == "diffusers" else "float16")
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: write {', '.join(DTYPES)}")
    if options.raw and options.ema:
        raise UserError(f"--ema {options.ema}: --raw takes the weights as trained, not an average; leave out one")
    check_writable(out.absolute().parent)
    if target == "diffusers":
        if options.shard_size and not re.fullmatch(r"[1-9]\d*[KMGT]B", options.shard_size):
            raise UserError(f"--shard-size {options.shard_size}: write a number and KB, MB, GB or TB, for example 5GB")
        check_folder(out, options.overwrite)
    else:
        check_file(out, options)
    return DTYPES[name]


def check_file(out: Path, options: Export) -> None:
    """Raises UserError if `out` can't be a single file."""
    if options.shard_size:
        raise UserError("--shard-size: a single file has no shards")
    if out.suffix != SUFFIX:
        raise UserError(f"{out}: a single file's name ends in {SUFFIX}")
    if out.exists() and (out.is_dir() or not options.overwrite):
        raise UserError(f"{out}: exists already; replace a file with --overwrite, or choose another place")


def student_recipe(run: Path) -> StudentRecipe:
    """The recipe of a run; raises UserError if it makes no student."""
    check_run(run)
    recipe = read_run_recipe(run / RECIPE)
    if not isinstance(recipe, StudentRecipe):
        raise UserError(f"{run}: holds no few-step student; distil it first (`fewstep distill`), and export that run")
    return recipe


def trace(found: Found, stored: StoredModel, recipe: StudentRecipe, options: Export) -> Provenance:
    """Where the model comes from."""
    run = found.run
    judged = [] if options.raw else read_metrics(run / EVALUATIONS)  # which are of the averaged weights
    num = recipe.evaluation.num_samples
    if isinstance(recipe, DistillRecipe):
        guidance = recipe.guidance_scale
    else:  # of a regression: the teacher's on the pairs
        guidance = parse_sampler(recipe.regression.sampler).guidance_scale
    results = options.evaluation or (run if (run / "results.json").is_file() else None)
    return Provenance(
        teacher=recipe.teacher,
        recipe=(run / RECIPE).read_text(),
        timesteps=stored.description["timesteps"],
        guidance_scale=guidance,
        step=found.step,
        ema="raw" if options.raw else found.ema or first_decay(recipe),
        license=options.license,
        scores={
            name: (value, wilson_interval(value, num) if name in METRICS and METRICS[name].per_fake else None)
            for name, value in read_scores(judged, found.step, found.ema).items()
        },
        table=read_table(results, run.name) if results else [],
    )


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
    raw = {tensor.name: tensor.raw for tensor in stored.tensors if tensor.raw is not None}
    student.network.load_state_dict(raw, strict=False)
    write_single_file(student, out, provenance.metadata(), dtype)
