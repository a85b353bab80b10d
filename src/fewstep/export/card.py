"""What an exported model came from, as it stands in the metadata of its weights and in its README.md."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import fewstep
from fewstep.errors import UserError
from fewstep.metric_table import METRICS
from fewstep.models.loading.hub import is_hub_id

SAMPLER = "LCM's: predict x0, then renoise it with fresh noise to the next timestep"
VARIANTS = {
    torch.float32: "",
    torch.float16: ', variant="fp16", dtype=torch.float16',
    torch.bfloat16: ", dtype=torch.bfloat16",
}
TAGS = {
    "StableDiffusionPipeline": ["text-to-image", "stable-diffusion"],
    "StableDiffusionXLPipeline": ["text-to-image", "stable-diffusion-xl"],
}
CARD = """---
{front}---

# {card.name}

A {what} model that draws in {steps}, distilled from `{made.teacher}` by DMD2.
{picture}
## Use

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({opening})
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
picture = pipeline({call}).images[0]
picture.save("picture.png")
```

{advice}

## How it was made

| | |
|---|---|
| teacher | `{made.teacher}` |
| method | DMD2 ([arXiv 2405.14867](https://arxiv.org/abs/2405.14867)) |
| timesteps | {timesteps} |
| guidance (CFG) of the student | {own_guidance} |
| guidance (CFG) of the teacher, in training | {guidance} |
| sampler | {sampler} |
| checkpoint | step {made.step} (critic updates) |
| weights | {weights}; {dtype} |
| made by | fewstep {made.version} |

## Metrics

{metrics}

## Limits

It was trained for exactly {steps} at these timesteps, and is worse at any other. It takes no guidance and no negative \
prompt. It has what its teacher has of biases and gaps, and less variety than its teacher.

## Licence

{license}

## Recipe

```yaml
{made.recipe}```
"""
NOTES = """\
Arrows say which way is better. Intervals are of 95 %: Wilson's of shares; a jackknife's over the generated images of \
FID, by `fewstep evaluate` alone. The row `real` is the noise floor: real images against real images. Numbers in the \
features of one network don't compare with those in another's."""
PIXELS = """\
`trust_remote_code=True` runs `pipeline.py`, a short file in this folder: read it first. The timesteps are the model's \
own; `generator` seeds the noise, `num_inference_steps` may be less than {count}."""
NAMED = """\
The timesteps must be named as above, with these numbers: they are not evenly spaced, so diffusers' `LCMScheduler` \
can't find them, and refuses a call with `num_inference_steps` above 1."""
EVEN = """\
The timesteps need not be named: the scheduler in this folder takes them for `num_inference_steps={count}`. Keep \
`LCMScheduler`, and keep guidance off."""
Interval = Sequence[float] | None


@dataclass(frozen=True)
class Provenance:
    """How the student was made; `guidance_scale` is the teacher's in training, for the student takes none."""

    teacher: str
    """As the recipe names it."""
    recipe: str
    """All of it, as YAML."""
    timesteps: list[float]
    guidance_scale: float
    step: int
    """Of the checkpoint: critic updates."""
    ema: str
    """Decay of the averaged weights; `raw` for the weights as trained."""
    license: str = "other"
    scores: dict[str, tuple[float, Interval]] = field(default_factory=dict)
    """By the run itself, as it trained, with their 95 % intervals where they are known."""
    table: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `fewstep evaluate`: the real images and this model."""
    version: str = fewstep.__version__

    def metadata(self) -> dict[str, str]:
        """Strings by name, for safetensors headers and `fewstep.json`."""
        scores = {name: {"value": value, "interval": interval} for name, (value, interval) in self.scores.items()}
        facts = {name: str(getattr(self, name)) for name in ("version", "teacher", "recipe", "step", "ema", "license")}
        facts |= {"timesteps": json.dumps(self.timesteps), "teacher_guidance_scale": f"{self.guidance_scale:g}"}
        facts |= {"guidance_scale": "none: pass 0 or 1", "sampler": SAMPLER, "scores": json.dumps(scores)}
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
        rows = json.loads(path.read_text())
        kept = [row for row in rows if row["model"] in ("real", name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not there, or not written by `fewstep evaluate`; name its --out folder") from error
    if not any(row["model"] == name for row in kept):
        there = ", ".join(str(row["model"]) for row in rows)
        raise UserError(f"{path}: has no row {name!r}; it has {there}")
    return kept


@dataclass(frozen=True)
class Card:
    """What the card says of the folder beside its provenance."""

    name: str
    kind: str | list[str]
    """The pipeline's class; a list where it lies in the folder."""
    dtype: torch.dtype
    name_timesteps: bool
    """Whether a call must name them."""
    num_classes: int = 0
    picture: str | None = None


def model_card(card: Card, made: Provenance) -> str:
    """The whole text."""
    text, count = isinstance(card.kind, str), len(made.timesteps)
    front = {
        "license": made.license,
        "library_name": "diffusers",
        **({"base_model": made.teacher} if is_hub_id(made.teacher) else {}),
        "pipeline_tag": "text-to-image" if text else "unconditional-image-generation",
        "tags": [*TAGS.get(str(card.kind), []), "fewstep", "dmd2", "distillation", "few-step"],
    }
    times = f"timesteps={[int(t) for t in made.timesteps]}" if card.name_timesteps else f"num_inference_steps={count}"
    terms = f"`{made.license}`, as said by who exported it; the terms of the teacher go on to apply."
    if made.license == "other":
        terms = f"`other`: the licence of the teacher, `{made.teacher}`, applies, and that of the training data."
    pixel_call = "class_labels=[0]" if card.num_classes else ""
    return CARD.format(
        card=card,
        made=made,
        front=yaml.safe_dump(front, sort_keys=False),
        what="text-to-image" if text else "pixel",
        steps=f"{count} step{'s' if count > 1 else ''}",
        picture=f"\n![samples]({card.picture})\n" if card.picture else "",
        opening=json.dumps(card.name) + VARIANTS[card.dtype] + ("" if text else ", trust_remote_code=True"),
        call=f'"a photo of a cat", {times}, guidance_scale=0' if text else pixel_call,
        advice=(NAMED if card.name_timesteps else EVEN if text else PIXELS).format(count=count),
        timesteps=", ".join(f"{t:g}" for t in made.timesteps),
        own_guidance="none: pass `guidance_scale=0`" if text else "none",
        guidance="none" if made.guidance_scale == 1 else f"{made.guidance_scale:g}",
        sampler=SAMPLER,
        weights="as trained" if made.ema == "raw" else f"averaged, EMA {made.ema}",
        dtype=str(card.dtype).removeprefix("torch."),
        metrics=metrics(made),
        license=terms,
    )


def metrics(made: Provenance) -> str:
    """The run's own scores and the rows of an evaluation, as tables."""
    parts = []
    if made.scores:
        where = "by the run itself, on the images that `evaluation` in the recipe says"
        rows = [[_named(name), f"{value:.4g}", _interval(i)] for name, (value, i) in made.scores.items()]
        parts.append(f"Of step {made.step}, {where}:\n\n" + _table(["metric", "value", "95 % interval"], rows))
    if made.table:  # what is not a single value stays in results.json
        names = [key for key, value in made.table[-1].items() if value is not None and not isinstance(value, dict)]
        rows = [[_cell(row, name) for name in names] for row in made.table]
        parts.append("By `fewstep evaluate`:\n\n" + _table(list(map(_named, names)), rows))
    return "\n\n".join([*parts, NOTES]) if parts else "None were computed. `fewstep evaluate` computes them."


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _named(name: str) -> str:
    """A column, with the way that is better."""
    arrow = {"lower": " ↓", "higher": " ↑"}[METRICS[name].better] if name in METRICS else ""
    return name.replace("_", " ") + arrow


def _interval(interval: Interval) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "–"


def _cell(row: dict[str, Any], name: str) -> str:
    """A value, with its interval where one is known."""
    value, interval = row.get(name), (row.get("intervals") or {}).get(name)
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text} ({_interval(interval)})" if interval else text
