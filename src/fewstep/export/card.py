"""What an exported model came from, as it stands in the metadata of its weights and in its README.md."""

import difflib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

import fewstep
from fewstep.errors import UserError
from fewstep.files import read_json, read_text
from fewstep.metric_table import METRICS

SAMPLER = "LCM's: predict x0, then renoise it with fresh noise to the next timestep"
VARIANTS = {torch.float16: ', variant="fp16", dtype=torch.float16', torch.bfloat16: ", dtype=torch.bfloat16"}
TAGS = {
    "StableDiffusionPipeline": ["text-to-image", "stable-diffusion"],
    "StableDiffusionXLPipeline": ["text-to-image", "stable-diffusion-xl"],
}
Interval = Sequence[float] | None


@cache
def texts() -> dict[str, str]:
    """Those of `card.md`, by name."""
    parts = re.split(r"^%% (\w+)\n", Path(__file__).with_suffix(".md").read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def check_license(name: str) -> None:
    """Raises UserError unless the hub knows the licence, naming the nearest one that it knows."""
    known = yaml.safe_load(Path(__file__).with_name("licenses.yaml").read_text())
    if name not in known:
        near = difflib.get_close_matches(name.lower().replace(" ", "-"), known, 1)
        hint = f", did you mean {near[0]!r}?" if near else ": write other, or an id like mit or openrail++"
        raise UserError(f"--license {name!r}: the hub knows no such licence{hint}")


def steps_text(count: float) -> str:
    return f"{count:g} step{'s' * (count != 1)}"


def last_part(path: str) -> str:
    """What is published of a path of any system: not where it lies, nor whose home it is."""
    *above, last = re.split(r"[/\\]", path.rstrip("/\\"))
    return "~" if path == os.path.expanduser("~") or above[-1:] in (["home"], ["Users"]) else last


@dataclass(frozen=True)
class Provenance:
    """How the student was made; `guidance_scale` is the teacher's in training, for the student takes none."""

    teacher: str  # as the recipe names it, without where it lies
    recipe: str  # all of it, as YAML, likewise
    timesteps: list[float]
    guidance_scale: float
    step: int  # of the checkpoint: critic updates of DMD2
    ema: str  # decay of the averaged weights; `raw` for the weights as trained
    kind: str = "distill"  # of the recipe
    lora: str = ""  # rank and alpha, where low-rank weights were trained
    base_model: str | None = None  # the teacher's id on the hub, if it came from there
    license: str = "other"
    scores: dict[str, tuple[float, Interval]] = field(default_factory=dict)  # by the run itself, with 95 % intervals
    table: list[dict[str, Any]] = field(default_factory=list)  # `fewstep evaluate`: the real images and this model
    best: dict[str, Any] = field(default_factory=dict)  # `fewstep sweep`: strength, steps and cfg, by which measure
    version: str = fewstep.__version__

    @property
    def merged(self) -> str:
        """What was done with low-rank weights, of a whole model."""
        return f"; a LoRA ({self.lora}), merged in float32" if self.lora else ""

    def metadata(self) -> dict[str, str]:
        """Strings by name, for safetensors headers and `fewstep.json`."""
        scores = {name: {"value": value, "interval": interval} for name, (value, interval) in self.scores.items()}
        facts = {name: str(getattr(self, name)) for name in ("version", "teacher", "recipe", "step", "ema", "license")}
        facts |= {"timesteps": json.dumps(self.timesteps), "teacher_guidance_scale": f"{self.guidance_scale:g}"}
        facts |= {"guidance_scale": "none: pass 0 or 1", "sampler": SAMPLER, "scores": json.dumps(scores)}
        facts |= {"base_model": self.base_model} if self.base_model else {}
        facts |= {"recommended": json.dumps(self.best)} if self.best else {}
        facts |= {"lora": self.lora} if self.lora else {}
        return {f"fewstep.{name}": fact for name, fact in facts.items()}


def read_scores(evaluations: Sequence[dict[str, float]], step: int, ema: str | None = None) -> dict[str, float]:
    """The run's own metrics at `step`; {} if it was not judged there.

    Those of the average `ema` are `ema0.99995_fid`, those of the first one `fid`.
    """
    line = next((line for line in reversed(evaluations) if line["step"] == step), {})
    prefix = f"ema{ema}_" if ema else ""
    named = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
    return {name: value for name, value in named.items() if name != "step" and not name.startswith("ema")}


def read_table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of the real images and of the model `name`, which must be there, in a folder of `fewstep evaluate`."""
    path = folder / "results.json"
    try:
        rows = json.loads(read_text(path))
        kept = [row for row in rows if row["model"] in ("real", name)]
        for row in kept:
            known = {of: interval for of, interval in (row.get("intervals") or {}).items() if interval}
            row["intervals"] = {of: (float(low), float(high)) for of, (low, high) in known.items()}
        there = ", ".join(str(row["model"]) for row in rows)
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not there, or not written by `fewstep evaluate`; name its --out folder") from error
    if not any(row["model"] == name for row in kept):
        raise UserError(f"{path}: has no row {name!r}; it has {there}")
    return kept


def read_best(folder: Path) -> dict[str, Any]:
    """The best cell in a folder of `fewstep sweep`, with its measure and the value; {} where there is none."""
    with suppress(UserError):
        best = read_json(folder / "results.json").get("best")
        if isinstance(best, dict) and all(type(best.get(name)) in (int, float) for name in ("steps", "cfg", "value")):
            return best
    return {}


def told_best(best: dict[str, Any]) -> str:
    """What a sweep recommends, in one sentence; "" without one."""
    if not best:
        return ""
    strength = "" if best.get("strength") is None else f"strength {best['strength']:g}, "
    what = str(best.get("measure")).replace("_", " ")
    found = f"{strength}{steps_text(best['steps'])}, CFG {best['cfg']:g}"
    return f" Of those compared by `fewstep sweep`, {found} had the best {what}: {best['value']:.3f}."


@dataclass(frozen=True)
class Card:
    """What the card says of the folder beside its provenance."""

    name: str
    kind: str | list[str]  # the pipeline's class; a list where it lies in the folder
    dtype: torch.dtype
    name_timesteps: bool  # whether a call must name them
    num_classes: int = 0
    picture: str | None = None
    prediction: str = "epsilon"
    class_names: Sequence[str] = ()


def model_card(card: Card, made: Provenance) -> str:
    """The whole text."""
    text, count, say = isinstance(card.kind, str), len(made.timesteps), texts()
    times = f"timesteps={[int(t) for t in made.timesteps]}" if card.name_timesteps else f"num_inference_steps={count}"
    advice = say["named" if card.name_timesteps else "even" if text else "pixels"].format(count=count)
    if str(card.kind) in TAGS:
        advice += say["interfaces"].format(settings=interface_settings(made.timesteps, card.prediction))
    if card.class_names:
        names = (f"{number} {' '.join(name.split())}" for number, name in enumerate(card.class_names))
        advice += say["classes"].format(names=", ".join(names))
    return say["card"].format(
        card=card,
        made=made,
        front=yaml.safe_dump(front_matter(card, made), sort_keys=False),
        what="text-to-image" if text else "pixel",
        steps=steps_text(count),
        picture=f"\n![samples]({card.picture})\n" if card.picture else "",
        opening=json.dumps(card.name) + VARIANTS.get(card.dtype, "") + ("" if text else ", trust_remote_code=True"),
        call=f'"a photo of a cat", {times}, guidance_scale=0' if text else "class_labels=[0]" * bool(card.num_classes),
        advice=advice,
        timesteps=", ".join(f"{t:g}" for t in made.timesteps),
        own_guidance="none: pass `guidance_scale=0`" if text else "none",
        guidance="none" if made.guidance_scale == 1 else f"{made.guidance_scale:g}",
        sampler=SAMPLER,
        weights=("as trained" if made.ema == "raw" else f"averaged, EMA {made.ema}") + made.merged,
        dtype=str(card.dtype).removeprefix("torch."),
        metrics=metrics(made) if made.scores or made.table or made.best else say["unjudged"].strip(),
        license=say["teacher_terms" if made.license == "other" else "own_terms"].format(made=made),
        **{name: line.format(made=made) for name, line in yaml.safe_load(say[made.kind]).items()},
    )


def front_matter(card: Card, made: Provenance) -> dict[str, Any]:
    """What the hub reads; of a licence that it does not know it wants a name and, where there is one, a link."""
    text, base, dmd2 = isinstance(card.kind, str), made.base_model, made.kind == "distill"
    link = {"license_link": f"https://huggingface.co/{base}"} if base else {}
    return {
        "license": made.license,
        **({"license_name": "that-of-the-teacher"} | link if made.license == "other" else {}),
        "library_name": "diffusers",
        **({"base_model": base} if base else {}),
        "pipeline_tag": "text-to-image" if text else "unconditional-image-generation",
        "tags": [*TAGS.get(str(card.kind), []), "fewstep", *["dmd2"] * dmd2, "distillation", "few-step"],
    }


def lora_settings(file: Path, timesteps: Sequence[float], prediction: str, best: dict[str, Any]) -> str:
    """What draws the student by its LoRA in each UI and in diffusers, in one line."""
    settings = interface_settings(timesteps, prediction, f"fewstep sample BASE --lora {file.name}")
    times = ", ".join(f"{t:g}" for t in timesteps)
    return texts()["lora"].format(
        name=file.stem, file=file.name, timesteps=times, settings=settings
    ).strip() + told_best(best)


def interface_settings(
    timesteps: Sequence[float], prediction: str = "epsilon", draw: str = "fewstep sample FILE.safetensors"
) -> str:
    """What draws the student from its single file in ComfyUI and A1111, by the formulas of their schedulers.

    `draw` is the command that does where they can't.
    """
    count, say = len(timesteps), texts()
    schedules = {
        "own": timesteps,
        "uniform": [999 * (count - k) / count for k in range(count)],
        "twentieth": [999 - 20 * (50 * k // count) for k in range(count)],
    }
    trailing = list(timesteps) == [999 - 1000 * k // count for k in range(count)]
    steps = {name: ", ".join(f"{t:g}" for t in each) for name, each in schedules.items()}
    told = say["trailing" if trailing else "elsewhere"].format(count=steps_text(count), draw=draw, **steps).strip()
    return told + (say["velocity"].rstrip() if trailing and prediction == "v_prediction" else "")


def metrics(made: Provenance) -> str:
    """The run's own scores and the rows of an evaluation, as tables."""
    parts = []
    if made.scores:
        where = "by the run itself, on the images that `evaluation` in the recipe says"
        rows = [[_named(name), f"{value:.4g}", _interval(i)] for name, (value, i) in made.scores.items()]
        parts.append(f"Of step {made.step}, {where}:\n\n" + _table(["metric", "value", "95 % interval"], rows))
    if made.table:  # what is not a single value stays in results.json
        names = [key for key, value in made.table[-1].items() if isinstance(value, str | int | float)]
        rows = [[_cell(row, name) for name in names] for row in made.table]
        parts.append("By `fewstep evaluate`:\n\n" + _table(list(map(_named, names)), rows))
    parts += [told_best(made.best).strip()] if made.best else []
    return "\n\n".join([*parts, texts()["notes"].strip()])


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _named(name: str) -> str:
    """A column, with the way that is better."""
    arrow = {"lower": " ↓", "higher": " ↑", "zero": " →0"}[METRICS[name].better] if name in METRICS else ""
    return name.replace("_", " ") + arrow


def _interval(interval: Interval) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "–"


def _cell(row: dict[str, Any], name: str) -> str:
    """A value, with its interval where one is known."""
    value, interval = row.get(name), row["intervals"].get(name)
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else last_part(str(value))
    return f"{text} ({_interval(interval)})" if interval else text
