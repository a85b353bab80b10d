"""`fewstep extract`: a LoRA of what a student was fine-tuned by, and what it leaves out."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from fewstep.commands.options import Extract
from fewstep.commands.runs import check_alike, check_asked, check_writable, pick_device, tell_done
from fewstep.data.texts import load_prompts
from fewstep.errors import UserError
from fewstep.export.card import Provenance, last_part
from fewstep.export.extraction import Call, Extracted, all_layers, calls, extract, observing, output_errors
from fewstep.export.lora import FORMATS, header, write_lora
from fewstep.export.single_file import version_of
from fewstep.models.image_model import DESCRIPTION, LORA, Asked, ImageModel, read_description
from fewstep.models.loading.hub import is_hub_id
from fewstep.models.loading.pretrained import SUFFIX, configured, is_loadable, open_model
from fewstep.models.lora_files import LoRAFile, apply_lora
from fewstep.networks.families import use_family
from fewstep.networks.lora import LoRA
from fewstep.networks.lora_layers import PRESETS, find_targets
from fewstep.networks.precision import INFERENCE_DTYPES
from fewstep.runtime.runs import find
from fewstep.runtime.tracking import progress_bar

ALL, CLASSES = "all", "classes"
CHECKED = 8  # images, others than those that the inputs are of
WORST = 5  # layers that are named
UNKNOWN = ("recipe", "step", "ema", "scores", "teacher_guidance_scale")  # of a model that may be of any making


def extract_lora(order: Extract) -> None:
    """Writes the LoRA that makes BASE most like STUDENT, whole or not at all."""
    check_order(order)
    use_family(order.family)
    device = pick_device(order.device)
    prompts = load_prompts(order.data, field="--data") if order.data and order.data != CLASSES else []
    base, student = open_pair(order, prompts)
    names = targets(student.network, order.targets)
    with progress_bar("drawing", order.num + CHECKED if order.data else 0) as show:
        moments, seen = look(student, names, order, prompts or None, device, counting(show))
    states = base.network.state_dict(), student.network.state_dict()
    weightings = [moments, {}] if moments else [{}]
    with progress_bar("extracting", len(names) * len(weightings)) as show:
        dtype, report = INFERENCE_DTYPES[order.dtype], counting(show)
        candidates = [extract(*states, names, each, order.rank, dtype, device, report) for each in weightings]
    if not candidates[0].lora:
        raise UserError(f"{order.student}: its target layers are those of {order.base}; name the model that was tuned")
    found, seen_errors = best_of(candidates, base, seen, device)
    facts = describe(order, found) | seen_errors
    lora = {name: change.with_alpha(order.alpha or change.rank) for name, change in found.lora.items()}
    told = metadata(order, lora, student, facts)
    write_lora(order.file, lora, base.network, base.part, told, layout(order, base), INFERENCE_DTYPES[order.dtype])
    tell(found, facts)
    asked = " --prompt 'a photo of a cat'" if base.kind == "text" else ""
    asked += f" --config {quote(order.config)}" if order.config else ""
    tell_done(str(order.file), f"sample {quote(order.base)} --lora {quote(str(order.file))}{asked}")


def targets(network: Any, named: str) -> list[str]:
    """The layers of a preset, or those whose names end so.

    `all` is the first and the last layer, and the time's, too: at most 5 % of the squared change, without which the
    output is two to six times as far from the student's (benchmarks/extract_cpu_2026-11-26.md).
    """
    if named == ALL:
        return all_layers(network)
    return find_targets(network, named if named in PRESETS else named.split(","))


def counting(show: Callable[[int, dict[str, float]], None]) -> Callable[[], None]:
    """What is called when one more is done."""
    numbers = count(1)
    return lambda: show(next(numbers), {})


def check_order(order: Extract) -> None:
    """Raises UserError for what can't be, or a file that can't be written."""
    if order.file.suffix != SUFFIX:
        raise UserError(f"{order.file}: a LoRA's name ends in {SUFFIX}")
    if order.file.exists() and (order.file.is_dir() or not order.overwrite):
        raise UserError(f"{order.file}: exists already; replace a file with --overwrite, or choose another place")
    check_writable(order.file.absolute().parent)
    if order.dtype not in INFERENCE_DTYPES:
        raise UserError(f"--dtype {order.dtype}: write {', '.join(INFERENCE_DTYPES)}")
    if order.format not in (None, *FORMATS):
        raise UserError(f"--format {order.format}: write {' or '.join(FORMATS)}")


def open_pair(order: Extract, prompts: list[str]) -> tuple[ImageModel, ImageModel]:
    """Base and student on the CPU; raises UserError unless the student may be the base, tuned in full."""
    sources = [order.base, order.student]
    folder = Path(order.student) if is_loadable(order.student) else find(order.student).folder
    if (folder / DESCRIPTION).is_file() and LORA in read_description(folder):
        raise UserError(f"{order.student}: was trained as a LoRA; `fewstep export --to lora` writes it as it is")
    base, student = (open_model(source, order.config if source in configured(sources) else None) for source in sources)
    check_alike(sources, [base, student])
    if not student.timesteps:
        raise UserError(
            f"{order.student}: is no few-step student (it has no timesteps); name the student behind its base"
        )
    ours, theirs = (
        {name: list(tensor.shape) for name, tensor in m.network.state_dict().items()} for m in (base, student)
    )
    if odd := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        sizes = f"{odd[0]} is {theirs.get(odd[0], 'not there')}, in {order.base} {ours.get(odd[0], 'not there')}"
        raise UserError(
            f"{order.student}: is of another size or family: {sizes}; name the model that it was tuned from"
        )
    levels = base.denoiser.schedule.levels
    pairs = zip(base.denoiser.coefficients(levels), student.denoiser.coefficients(levels), strict=True)
    if not all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in pairs):
        raise UserError(f"{order.student}: predicts other things than {order.base} (epsilon, v); no LoRA changes that")
    if order.data == CLASSES and base.kind == "text":
        raise UserError("--data classes: a text-to-image model takes a file of prompts")
    if order.data:
        check_asked(base, None, prompts)
    layout(order, base)
    return base, student


def layout(order: Extract, base: ImageModel) -> str:
    """Of the file; raises UserError where there is no such one of the model."""
    if order.format == "kohya" and base.kind != "text":
        raise UserError("--format kohya: is a layout of SD and SDXL; leave it out for a pixel model")
    return order.format or FORMATS[base.kind != "text"]


def look(
    student: ImageModel,
    names: list[str],
    order: Extract,
    asked: Asked,
    device: torch.device,
    report: Callable[[], None],
) -> tuple[dict[str, Any], list[Call]]:
    """Second moments of the layers' inputs, and calls of the network for other images: of what the student draws."""
    if not order.data:
        return {}, []
    student.to(device)
    with observing(student.network, names) as moments:
        for _ in calls(student, range(order.num), order.seed, asked, report):
            pass
    seen = list(calls(student, range(order.num, order.num + CHECKED), order.seed, asked, report))
    student.to(torch.device("cpu"))
    student.release()
    return moments, seen


def best_of(
    candidates: list[Extracted], base: ImageModel, seen: list[Call], device: torch.device
) -> tuple[Extracted, dict[str, Any]]:
    """The LoRA whose network's output is nearest to the student's, and all errors by timestep.

    The first is the best for every layer on its own, which need not be the best for all of them in a row.
    """
    if not seen:
        return candidates[0], {}
    base.to(device)
    errors = [output_errors(base.denoiser.network, seen)]
    for each in candidates:
        file = LoRAFile(Path(), dict(each.lora), "")
        apply_lora(base, file, 1.0)
        errors.append(output_errors(base.denoiser.network, seen))
        apply_lora(base, file, -1.0)
    without, *of = errors
    best = min(range(len(of)), key=lambda number: sum(error**2 for error in of[number].values()))
    names = {"output_error": of[best], "output_error_without": without, "weighted": best == 0}
    return candidates[best], names | {"output_error_weighted": of[0], "output_error_plain": of[-1]}


def describe(order: Extract, found: Extracted) -> dict[str, Any]:
    """What the file says of itself."""
    worst = sorted(found.errors, key=found.errors.__getitem__, reverse=True)[:WORST]
    told = {"rank": order.rank, "targets": order.targets, "layers": len(found.lora)}
    told |= {"smaller_layers": found.clamped, "error": found.error, "outside_targets": found.outside}
    return told | {"worst": {name: found.errors[name] for name in worst}}


def metadata(order: Extract, lora: LoRA, student: Any, facts: dict[str, Any]) -> dict[str, str]:
    """What stands in the header: what UIs look for, where it comes from, and what it leaves out."""
    base, name = (given if is_hub_id(given) else last_part(given) for given in (order.base, order.student))
    made = Provenance(teacher=base, recipe="", timesteps=student.timesteps, guidance_scale=1, step=0, ema="")
    told = made.metadata()
    if student.kind == "text":
        pipeline = student.pipeline
        prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
        version = version_of(pipeline.components, pipeline.text_encoder, prediction)
        told = header(order.file, lora, made, version, prediction, student.image_size)
    known = {key: value for key, value in told.items() if key.removeprefix("fewstep.") not in UNKNOWN}
    return known | {"fewstep.student": name, "fewstep.extraction": json.dumps(facts)}


def tell(found: Extracted, facts: dict[str, Any]) -> None:
    """Prints what the file leaves out, and what that does to the network's output."""
    worst, value = next(iter(facts["worst"].items()))
    ranks = f" ({found.clamped} smaller layers have what rank they can)" if found.clamped else ""
    print(f"rank {facts['rank']} leaves out {found.error:.1%} of the change of {len(found.lora)} layers{ranks}")
    print(f"at most {value:.1%}, of {worst}; {found.outside:.2%} of the squared change lies in no target layer")
    for t, error in facts.get("output_error", {}).items():
        without = facts["output_error_without"][t]
        print(f"network's output at timestep {t:g}: {error:.2%} from the student's, {without:.2%} without the LoRA")
    if facts.get("weighted") is False:
        print("this is the plain SVD: weighted by the layers' inputs, the outputs are further from the student's")
