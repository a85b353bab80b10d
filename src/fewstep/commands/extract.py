"""`fewstep extract`: a LoRA of what a student was fine-tuned by, and what it leaves out."""

import json
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from fewstep.commands.options_files import Extract
from fewstep.commands.places import check_writable, tell_done
from fewstep.commands.runs import check_alike, check_asked, check_file, pick_device
from fewstep.data.texts import load_prompts
from fewstep.errors import UserError
from fewstep.export.card import Provenance, last_part
from fewstep.export.extraction import Call, Extracted, all_layers, extract, observing, output_errors, recording
from fewstep.export.lora import FORMATS, header, write_lora
from fewstep.export.single_file import version_of
from fewstep.models.image_model import DESCRIPTION, LORA, Asked, ImageModel, read_description
from fewstep.models.loading.hub import is_hub_id
from fewstep.models.loading.pretrained import configured, is_loadable, open_model
from fewstep.models.lora_files import LoRAFile, apply_lora
from fewstep.models.sampler import default_sampler, generate
from fewstep.networks.families import use_family
from fewstep.networks.lora import LoRA
from fewstep.networks.lora_layers import PRESETS, find_targets
from fewstep.networks.precision import INFERENCE_DTYPES
from fewstep.runtime.runs import find
from fewstep.runtime.tracking import progress_bar

ALL = "all"
"""Targets with the first layer, the last and the time's: at most 5 % of the squared change, without which the output is
two to six times as far from the student's (benchmarks/extract_cpu_2026-11-26.md)."""
CLASSES = "classes"  # in place of prompts
CHECKED = 8  # images, others than those that the inputs are of
UNKNOWN = ("recipe", "step", "ema", "scores", "teacher_guidance_scale")  # of a model that may be of any making


def extract_lora(order: Extract) -> None:
    """Writes the LoRA that makes BASE most like STUDENT, whole or not at all."""
    check_file(order.file, order.overwrite)
    check_writable(order.file.absolute().parent)
    if order.dtype not in INFERENCE_DTYPES:
        raise UserError(f"--dtype {order.dtype}: write {', '.join(INFERENCE_DTYPES)}")
    use_family(order.family)
    device, dtype = pick_device(order.device), INFERENCE_DTYPES[order.dtype]
    prompts = load_prompts(order.data, field="--data") if order.data and order.data != CLASSES else []
    base, student = open_pair(order, prompts)
    ends = order.targets if order.targets in PRESETS else order.targets.split(",")
    names = all_layers(student.network) if order.targets == ALL else find_targets(student.network, ends)
    moments, seen = look(student, names, order, prompts or None, device) if order.data else ({}, [])
    states = base.network.state_dict(), student.network.state_dict()

    def made(weights: dict[str, Any]) -> Extracted:
        with progress_bar("extracting", len(names)) as show:
            return extract(*states, names, weights, order.rank, dtype, device, lambda done: show(done, {}))

    candidates = [made(weights) for weights in ([moments, {}] if moments else [{}])]
    if not candidates[0].lora:
        raise UserError(f"{order.student}: its target layers are those of {order.base}; name the model that was tuned")
    found, errors = best_of(candidates, base, seen, device)
    facts = {"rank": order.rank, "targets": order.targets, **found.facts(order.rank), **errors}
    told = metadata(order, found.lora, student, facts)
    write_lora(order.file, found.lora, base.network, base.part, told, FORMATS[base.kind != "text"], dtype)
    tell(facts)
    asked = " --prompt 'a photo of a cat'" if base.kind == "text" else ""
    asked += f" --config {quote(order.config)}" if order.config else ""
    tell_done(str(order.file), f"sample {quote(order.base)} --lora {quote(str(order.file))}{asked}")


def open_pair(order: Extract, prompts: list[str]) -> tuple[ImageModel, ImageModel]:
    """Base and student on the CPU; raises UserError unless the student may be the base, tuned in full."""
    sources = [order.base, order.student]
    folder = Path(order.student) if is_loadable(order.student) else find(order.student).folder
    if (folder / DESCRIPTION).is_file() and LORA in read_description(folder):
        raise UserError(f"{order.student}: was trained as a LoRA; `fewstep export --to lora` writes it as it is")
    base, student = (open_model(source, order.config if source in configured(sources) else None) for source in sources)
    check_alike(sources, [base, student])
    if not student.timesteps:
        raise UserError(f"{order.student}: is no few-step student (it has no timesteps); name it behind its base")
    ours, theirs = ({n: list(each.shape) for n, each in m.network.state_dict().items()} for m in (base, student))
    if odd := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        sizes = f"{odd[0]} is {theirs.get(odd[0], 'not there')}, in {order.base} {ours.get(odd[0], 'not there')}"
        raise UserError(f"{order.student}: is of another size or family: {sizes}; name what it was tuned from")
    levels = base.denoiser.schedule.levels
    pairs = zip(base.denoiser.coefficients(levels), student.denoiser.coefficients(levels), strict=True)
    if not all(torch.allclose(*pair, atol=1e-4) for pair in pairs):
        raise UserError(f"{order.student}: predicts other things than {order.base} (epsilon, v); no LoRA changes that")
    if order.data == CLASSES and base.kind == "text":
        raise UserError("--data classes: a text-to-image model takes a file of prompts")
    if order.data:
        check_asked(base, None, prompts)
    return base, student


def look(
    student: ImageModel, names: list[str], order: Extract, asked: Asked, device: torch.device
) -> tuple[dict[str, Any], list[Call]]:
    """Second moments of the layers' inputs, and calls of the network for other images: of what the student draws."""
    student.to(device)
    how = (default_sampler(student), range(order.num), order.seed, asked)
    with progress_bar("drawing", order.num) as show, observing(student.network, names) as moments:
        generate(student, *how, report=lambda done: show(done, {}))
    with recording(student.denoiser.network) as seen:
        generate(student, how[0], range(order.num, order.num + CHECKED), order.seed, asked)
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
    without, of = output_errors(base.denoiser.network, seen), list[dict[float, float]]()
    for each in candidates:
        file = LoRAFile(Path(), dict(each.lora), "")
        apply_lora(base, file, 1.0)
        of.append(output_errors(base.denoiser.network, seen))
        apply_lora(base, file, -1.0)
    best = min(range(len(of)), key=lambda number: sum(error**2 for error in of[number].values()))
    told = {"output_error": of[best], "output_error_without": without, "weighted": best == 0}
    return candidates[best], told | {"output_error_weighted": of[0], "output_error_plain": of[-1]}


def metadata(order: Extract, lora: LoRA, student: Any, facts: dict[str, Any]) -> dict[str, str]:
    """What stands in the header: what UIs look for, where it comes from, and what it leaves out."""
    base, name = (given if is_hub_id(given) else last_part(given) for given in (order.base, order.student))
    made = Provenance(teacher=base, recipe="", timesteps=student.timesteps, guidance_scale=1, step=0, ema="")
    told = made.metadata()
    if student.kind == "text":
        parts, prediction = student.pipeline, student.pipeline.scheduler.config.get("prediction_type", "epsilon")
        version = version_of(parts.components, parts.text_encoder, prediction)
        told = header(order.file, lora, made, version, prediction, student.image_size)
    known = {key: value for key, value in told.items() if key.removeprefix("fewstep.") not in UNKNOWN}
    return known | {"fewstep.student": name, "fewstep.extraction": json.dumps(facts)}


def tell(facts: dict[str, Any]) -> None:
    """Prints what the file leaves out, and what that does to the network's output."""
    worst, value = next(iter(facts["worst"].items()))
    small = f" ({facts['smaller_layers']} smaller layers have what rank they can)" if facts["smaller_layers"] else ""
    print(f"rank {facts['rank']} leaves out {facts['error']:.1%} of the change of {facts['layers']} layers{small}")
    print(f"at most {value:.1%}, of {worst}; {facts['outside_targets']:.2%} of the squared change lies in no target")
    for t, error in facts.get("output_error", {}).items():
        without = facts["output_error_without"][t]
        print(f"network's output at timestep {t:g}: {error:.2%} from the student's, {without:.2%} without the LoRA")
    if facts.get("weighted") is False:
        print("this is the plain SVD: weighted by the layers' inputs, the outputs are further from the student's")
