"""A student's model folder as a folder that `DiffusionPipeline.from_pretrained` opens, with its card."""

from __future__ import annotations  # diffusers is imported only where a scheduler is made

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.export.card import Card, Provenance, model_card
from fewstep.export.stored import Part, StoredModel
from fewstep.export.weights import planned, write_shards
from fewstep.files import read_json, written_folder
from fewstep.models.image_model import DESCRIPTION, write_description
from fewstep.models.loading.hub import PIPELINE
from fewstep.models.loading.pipeline import library_class

if TYPE_CHECKING:
    from diffusers import LCMScheduler

CARD, SAMPLES, EXPORT = "README.md", "samples.png", "export"
PIXEL_PIPELINE = "pipeline"  # of its own class, in pipeline.py
VP_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Format:
    """How weights are written."""

    dtype: torch.dtype = torch.float32
    shard_size: str = "5GB"


def write_diffusers_folder(
    stored: StoredModel,
    out: Path,
    provenance: Provenance,
    written: Format,
    grid: Path | None = None,
    overwrite: bool = False,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Writes the student to `out`, whole or not at all, and not before all its numbers were looked at.

    `grid` is a picture of its samples; `report` is called twice per tensor. Raises UserError for a number that is not
    finite or too large for float16, and if `out` can't be written or is there, but for an export to be overwritten.
    """
    check_folder(out, overwrite)
    stored.check_numbers(report)
    with written_folder(out) as folder:
        index, named = (_latent_index if stored.index else _pixel_index)(stored, folder)
        _write_json(folder / PIPELINE, index)
        for part in sorted(path for path in stored.folder.iterdir() if path.is_dir()):
            if part.name in stored.parts:
                metadata = provenance.metadata() if part.name == stored.family.part else {}
                _convert(stored.parts[part.name], part, folder / part.name, written, metadata, report)
            elif part.name in stored.family.others and part.name != "scheduler":
                shutil.copytree(part, folder / part.name, copy_function=_copy)
        write_description(folder, stored.description | {EXPORT: provenance.metadata()})
        if grid:
            shutil.copyfile(grid, folder / SAMPLES)
        facts = (index["_class_name"], written.dtype, named, index.get("num_classes", 0), SAMPLES if grid else None)
        told = (stored.prediction, stored.description.get("class_names") or ())
        (folder / CARD).write_text(model_card(Card(out.name, *facts, *told), provenance), "utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Without where it was once loaded from, which says whose machine that was."""
    kept = {key: value for key, value in content.items() if not re.search("(_or_path|_file|_dir)$", key)}
    path.write_text(json.dumps(kept, indent=2) + "\n")


def _copy(source: str, target: str) -> None:
    """A file of a part without weights."""
    if source.endswith("_config.json"):
        _write_json(Path(target), read_json(Path(source)))
    else:
        shutil.copyfile(source, target)


def _convert(
    part: Part, source: Path, target: Path, written: Format, metadata: dict[str, str], report: Callable[[], None]
) -> None:
    """The configuration and the weights of a part."""

    def read(name: str) -> Tensor:
        report()
        return part.tensors[name].read()

    target.mkdir()
    _write_json(target / "config.json", read_json(source / "config.json"))
    of_transformers = type(part.network).__module__.startswith("transformers.")
    metas = {name: stored.meta for name, stored in sorted(part.tensors.items())}
    plan, stem = planned(metas, written.dtype), "model" if of_transformers else "diffusion_pytorch_model"
    write_shards(target, stem, plan, read, written.shard_size, metadata)


def _latent_index(stored: StoredModel, folder: Path) -> tuple[dict[str, Any], bool]:
    """Writes the scheduler; gives the pipeline's parts, and whether the timesteps must be named in a call."""
    config = read_json(stored.folder / "scheduler" / "scheduler_config.json")
    scheduler, named = lcm_scheduler(config, [int(t) for t in stored.description["timesteps"]])
    scheduler.save_pretrained(folder / "scheduler")
    unused = {part: [None, None] for part in UNUSED if part in stored.index}
    index = stored.index | unused | {"scheduler": ["diffusers", "LCMScheduler"]}
    if "safety_checker" in index:
        index["requires_safety_checker"] = False  # it would warn at every opening
    return index, named


def lcm_scheduler(config: dict[str, Any], timesteps: list[int]) -> tuple[LCMScheduler, bool]:
    """The scheduler of a student, with the schedule of any VP scheduler's `config`; and whether a call must name them.

    For `num_inference_steps` K it takes t_k = (N - floor(k N / K)) (t_0 + 1) / N - 1 by itself, where N is its
    `original_inference_steps`, a divisor of t_0 + 1: the smallest for which these are `timesteps`, so that it refuses
    most other counts. Where there is none, N = 1: it refuses all counts but one, and `timesteps` must be named.
    Raises UserError for a timestep 0, where the boundary condition of consistency models makes it skip the network.
    """
    if timesteps[-1] == 0:
        raise UserError(f"timesteps {timesteps}: at 0 diffusers' LCMScheduler gives its input back; end above 0")
    ddim = library_class("DDIMScheduler").from_config(config, rescale_betas_zero_snr=False)
    settings = {key: ddim.config[key] for key in VP_SETTINGS}
    settings["rescale_betas_zero_snr"] = config.get("rescale_betas_zero_snr", False)
    first = timesteps[0] + 1
    if first < len(ddim.betas):  # the grid starts at t_0, the schedule stays that of all times
        settings |= {"num_train_timesteps": first, "trained_betas": ddim.betas.tolist()}
    # SD's pipeline asks for the offset, which is unused; by the scaling c_skip <= 2.5e-9 from t = 1 on.
    settings |= {"steps_offset": 1, "timestep_scaling": 1e4}
    kind = library_class("LCMScheduler")
    for steps in range(len(timesteps), first + 1):
        if first % steps == 0:
            scheduler = kind(**settings, original_inference_steps=steps)
            scheduler.set_timesteps(len(timesteps))
            if scheduler.timesteps.tolist() == timesteps:
                return kind(**settings, original_inference_steps=steps), False
    return kind(**settings, original_inference_steps=1), True


def _pixel_index(stored: StoredModel, folder: Path) -> tuple[dict[str, Any], bool]:
    """Writes the pipeline's class; gives what it is made of, and that no call need name the timesteps."""
    import diffusers

    shutil.copyfile(Path(__file__).with_name("pixel_pipeline.py"), folder / f"{PIXEL_PIPELINE}.py")
    made_of = {"_class_name": [PIXEL_PIPELINE, "FewstepPixelPipeline"], "_diffusers_version": diffusers.__version__}
    config, timesteps = stored.description["config"], stored.description["timesteps"]
    settings = {"timesteps": timesteps, "sigma_data": config["sigma_data"], "num_classes": config["num_classes"]}
    return made_of | {part: ["diffusers", kind] for part, kind in stored.family.weights.items()} | settings, False


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises UserError if an export can't take the place `out`: of nothing, of an empty folder, or of an export."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_export = False
    with suppress(UserError):
        is_export = EXPORT in read_json(out / DESCRIPTION)
    if not is_export:
        raise UserError(f"{out}: exists already and is no export, so it is never replaced; choose another place")
    if not overwrite:
        raise UserError(f"{out}: exists already; replace it with --overwrite, or choose another place")
