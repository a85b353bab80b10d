"""The README.md of an exported folder: what the model is, what it came from, how it is used."""

import json
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from fewstep.export.provenance import SAMPLER, Provenance
from fewstep.models.loading.hub import is_hub_id

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

# {name}

{intro}
{picture}
## Use

```python
{snippet}```

{advice}

## How it was made

| | |
|---|---|
| teacher | {teacher} |
| method | DMD2 ([arXiv 2405.14867](https://arxiv.org/abs/2405.14867)) |
| timesteps | {timesteps} |
| guidance (CFG) of the student | {own_guidance} |
| guidance (CFG) of the teacher, in training | {guidance} |
| sampler | {sampler} |
| checkpoint | step {step} (critic updates) |
| weights | {weights} |
| made by | fewstep {version} |

## Metrics

{metrics}

## Limits

{limits}

## Licence

{license}

## Recipe

```yaml
{recipe}```
"""


@dataclass(frozen=True)
class Card:
    """What the card says of the folder beside its provenance."""

    name: str
    kind: str | list[str]
    """The pipeline's class; a list where it lies in the folder."""
    dtype: torch.dtype
    name_timesteps: bool
    """Whether a call must name them."""
    description: dict[str, Any]
    picture: str | None = None

    @property
    def text(self) -> bool:
        return isinstance(self.kind, str)


def model_card(card: Card, provenance: Provenance) -> str:
    """The whole text."""
    count = len(provenance.timesteps)
    steps = f"{count} step{'s' if count > 1 else ''}"
    what = "text-to-image" if card.text else "pixel"
    return CARD.format(
        front=yaml.safe_dump(front_matter(card, provenance), sort_keys=False),
        name=card.name,
        intro=f"A {what} model that draws in {steps}, distilled from `{provenance.teacher}` by DMD2.",
        picture=f"\n![samples]({card.picture})\n" if card.picture else "",
        snippet=snippet(card, provenance),
        advice=advice(card, count),
        teacher=f"`{provenance.teacher}`",
        timesteps=", ".join(f"{t:g}" for t in provenance.timesteps),
        own_guidance="none: pass `guidance_scale=0`" if card.text else "none",
        guidance="none" if provenance.guidance_scale == 1 else f"{provenance.guidance_scale:g}",
        sampler=SAMPLER,
        step=provenance.step,
        weights=_weights(card.dtype, provenance.ema),
        version=provenance.version,
        metrics=metrics(provenance),
        limits=limits(provenance, steps),
        license=license_text(provenance),
        recipe=provenance.recipe,
    )


def _weights(dtype: torch.dtype, ema: str) -> str:
    kind = "as trained" if ema == "raw" else f"averaged, EMA {ema}"
    return f"{kind}; {str(dtype).removeprefix('torch.')}"


def front_matter(card: Card, provenance: Provenance) -> dict[str, Any]:
    """What the hub reads."""
    matter: dict[str, Any] = {"license": provenance.license, "library_name": "diffusers"}
    if is_hub_id(provenance.teacher):
        matter["base_model"] = provenance.teacher
    matter["pipeline_tag"] = "text-to-image" if card.text else "unconditional-image-generation"
    matter["tags"] = [*TAGS.get(str(card.kind), []), "fewstep", "dmd2", "distillation", "few-step"]
    return matter


def snippet(card: Card, provenance: Provenance) -> str:
    """What draws a picture; it stands in the folder beside the model's."""
    trust = "" if card.text else ", trust_remote_code=True"
    opening = f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(card.name)}{VARIANTS[card.dtype]}{trust})"
    call = _text_call(card, provenance) if card.text else _pixel_call(card)
    return (
        f"import torch\nfrom diffusers import DiffusionPipeline\n\n{opening}\n"
        f'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        f'picture = {call}.images[0]\npicture.save("picture.png")\n'
    )


def _text_call(card: Card, provenance: Provenance) -> str:
    timesteps = [int(t) for t in provenance.timesteps]
    steps = f"timesteps={timesteps}" if card.name_timesteps else f"num_inference_steps={len(timesteps)}"
    return f'pipeline("a photo of a cat", {steps}, guidance_scale=0)'


def _pixel_call(card: Card) -> str:
    return "pipeline(class_labels=[0])" if card.description["config"]["num_classes"] else "pipeline()"


def advice(card: Card, count: int) -> str:
    """What to know about the call."""
    if not card.text:
        return (
            "`trust_remote_code=True` runs `pipeline.py`, a short file in this folder: read it first. The timesteps "
            f"are the model's own; `generator` seeds the noise, `num_inference_steps` may be less than {count}."
        )
    if card.name_timesteps:
        return (
            "The timesteps must be named as above, with these numbers: they are not evenly spaced, so diffusers' "
            "`LCMScheduler` can't find them, and refuses a call with `num_inference_steps` above 1."
        )
    return (
        f"The timesteps need not be named: the scheduler in this folder takes them for `num_inference_steps={count}`. "
        "Keep `LCMScheduler`, and keep guidance off."
    )


def metrics(provenance: Provenance) -> str:
    """The run's own scores and the rows of an evaluation, as tables."""
    parts = []
    if provenance.scores:
        lines = [f"| {s.name.replace('_', ' ')} | {s.value:.4g} | {_interval(s.interval)} |" for s in provenance.scores]
        parts.append(
            f"Of step {provenance.step}, by the run itself, on the images that `evaluation` in the recipe says:\n\n"
            "| metric | value | 95 % interval |\n|---|---|---|\n" + "\n".join(lines)
        )
    if provenance.table:
        parts.append(_table(provenance.table))
    if not parts:
        return "None were computed. `fewstep evaluate` computes them."
    return "\n\n".join([*parts, NOTES])


NOTES = (
    "Intervals are of 95 %: Wilson's of shares; a jackknife's over the generated images of FID, by `fewstep evaluate` "
    "alone. The row `real` is the noise floor: real images against real images. Numbers in the features of one network "
    "don't compare with those in another's."
)


def _interval(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "–"


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows of results.json; what is not a single value stays there."""
    names = [name for name, value in rows[-1].items() if value is not None and not isinstance(value, dict)]
    head = f"| {' | '.join(name.replace('_', ' ') for name in names)} |\n|{'---|' * len(names)}\n"
    lines = [f"| {' | '.join(_cell(row, name) for name in names)} |" for row in rows]
    return "By `fewstep evaluate`:\n\n" + head + "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    """A value, with its interval where one is known."""
    value, interval = row.get(name), (row.get("intervals") or {}).get(name)
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text} ({_interval(interval)})" if interval else text


def limits(provenance: Provenance, steps: str) -> str:
    """What it can't do."""
    return (
        f"It was trained for exactly {steps} at these timesteps, and is worse at any other. It takes no guidance and "
        "no negative prompt. It has what its teacher has of biases and gaps, and less variety than its teacher."
    )


def license_text(provenance: Provenance) -> str:
    """The field, and whose terms hold."""
    if provenance.license == "other":
        return f"`other`: the licence of the teacher, `{provenance.teacher}`, applies, and that of the training data."
    return f"`{provenance.license}`, as said by who exported it; the terms of the teacher go on to apply."
