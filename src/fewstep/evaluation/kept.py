"""The numbers of a model, kept beside it by all that they follow from, so that nothing is judged twice."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import fewstep
from fewstep.data.settings import DataSettings
from fewstep.evaluation.gathering import Gathering, fitted, read, split
from fewstep.evaluation.judge import MAX_REAL, Judge, Means, make_judge
from fewstep.files import read_json, write_text
from fewstep.models.image_model import Asked, ImageModel
from fewstep.models.sampler import Sampler, default_sampler, generate_batches, generate_stops

JUDGED = "judged.json"
REAL = "real"  # in the place of a sampler: real images against real ones


class Judging(NamedTuple):
    """How several models are judged alike, with what is kept for all of them in `folder`."""

    data: DataSettings
    means: Means
    folder: Path
    num: int

    def judge(self, model: ImageModel) -> Judge:
        return make_judge(self.data, model, self.means, self.folder, self.num, MAX_REAL)

    def by(self, data: DataSettings, sampler: Sampler | str | None) -> dict[str, Any]:
        """What numbers follow from, beside the model; `data` as it is called wherever the folder is."""
        named = {"data": data.model_dump(mode="json", exclude_defaults=True), "means": asdict(self.means)}
        of_images = {"num_samples": self.num, "seed": 0, "sampler": None if sampler is None else str(sampler)}
        facts = {**named, **of_images, "version": fewstep.__version__}
        return dict(json.loads(json.dumps(facts)))  # as it will be read again


class Kept(NamedTuple):
    """The record of one judgement in a file of several."""

    path: Path
    by: Mapping[str, Any]

    def read(self) -> dict[str, Any]:
        """It, or {} if there is none yet."""
        return next((each for each in self._all() if each.get("by") == self.by), {})

    def write(self, record: Mapping[str, Any]) -> None:
        """Puts it beside the others."""
        others = [each for each in self._all() if each.get("by") != self.by]
        write_text(self.path, json.dumps({"judged": [*others, {"by": self.by, **record}]}, indent=1) + "\n")

    def _all(self) -> list[dict[str, Any]]:
        return list(read_json(self.path).get("judged", [])) if self.path.is_file() else []


def values_of(judge: Judge, model: ImageModel, sampler: Sampler | None, num: int) -> dict[str, float]:
    """The metrics of a model, by its own sampler if none is named."""
    sampler = sampler or default_sampler(model)
    return judge.row("", sampler, partial(_draw, model, sampler), num, intervals=False).values


def values_of_stops(judge: Judge, model: ImageModel, num: int) -> list[dict[str, float]]:
    """The metrics of a student of several steps at each of its stops, of one rollout; the last is its own sample."""
    probes, own = judge.probes(judge.prompts, drawn=True), default_sampler(model)
    takings = [Gathering(num, num_groups=1) for _ in range(own.num_steps)]
    for batches in generate_stops(model, range(num), asked=judge.prompts or None):
        for taken, batch in zip(takings, batches, strict=True):
            for images in split([fitted(batch, judge.size)]):
                numbers = range(taken.seen, taken.seen + len(images))
                taken.add(read(probes, images, numbers, ""), images, len(images))
    fakes = [taken.whole("", judge.prompts) for taken in takings]
    if judge.within:
        groups = judge.within.draw(partial(_draw, model, own), num, range(len(judge.within.subjects)))
        fakes[-1] = replace(fakes[-1], pairs=judge.within.read(groups))
    return [judge.row_of("", own, fake, {}, intervals=False).values for fake in fakes]


def _draw(model: ImageModel, sampler: Sampler, numbers: range, asked: Asked) -> Iterable[Tensor]:
    return generate_batches(model, sampler, numbers, asked=asked)
