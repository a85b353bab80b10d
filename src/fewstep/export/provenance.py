"""What an exported model came from, as it stands in its card and in the metadata of its weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fewstep
from fewstep.errors import UserError

SAMPLER = "LCM's: predict x0, then renoise it with fresh noise to the next timestep"


@dataclass(frozen=True)
class Score:
    """A metric of the exported checkpoint, with its 95 % interval where one is known."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


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
    scores: list[Score] = field(default_factory=list)
    """By the run itself, as it trained."""
    table: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `fewstep evaluate`: the real images and this model."""
    version: str = fewstep.__version__

    def metadata(self) -> dict[str, str]:
        """Strings by name, for safetensors headers and `fewstep.json`."""
        return {
            "fewstep.version": self.version,
            "fewstep.teacher": self.teacher,
            "fewstep.recipe": self.recipe,
            "fewstep.timesteps": json.dumps(self.timesteps),
            "fewstep.teacher_guidance_scale": f"{self.guidance_scale:g}",
            "fewstep.guidance_scale": "none: pass 0 or 1",
            "fewstep.sampler": SAMPLER,
            "fewstep.step": str(self.step),
            "fewstep.ema": self.ema,
            "fewstep.license": self.license,
            "fewstep.scores": json.dumps({s.name: {"value": s.value, "interval": s.interval} for s in self.scores}),
        }


def read_scores(evaluations: Sequence[dict[str, float]], step: int, ema: str | None = None) -> dict[str, float]:
    """The run's own metrics at `step`; {} if it was not judged there.

    Those of the average `ema` are `ema0.99995_fid`, those of the first one `fid`.
    """
    line = next((line for line in reversed(evaluations) if line["step"] == step), {})
    prefix = f"ema{ema}_" if ema else ""
    named = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
    return {name: value for name, value in named.items() if name != "step" and not name.startswith("ema")}


def read_table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of the real images and of the model `name` in a folder of `fewstep evaluate`.

    Raises UserError if it holds no such row.
    """
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
