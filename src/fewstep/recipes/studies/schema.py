"""What a study can hold; every field is documented where it is declared."""

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from fewstep.settings import Settings, UserPath


def _plain(name: str) -> str:
    if not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
        raise ValueError(f"{name!r} is no name of a folder, such as my-pairs")
    return name


Name = Annotated[str, AfterValidator(_plain)]
"""Of a folder in OUT."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Changes = dict[str, Any]
"""Settings over those of a recipe, nested or dotted."""


class Prepared(Settings):
    """What is made once, before any run: a recipe's run, pairs of a teacher, or latents; the keys say which."""

    run: UserPath | None = None
    """A recipe, by name or as a YAML file, which is run into OUT under its name."""
    set: Changes = {}
    """Of `run`: settings over its own."""
    pairs: Name | None = None
    """Of `teacher` by `sampler`, `num` of them, as `fewstep data pairs` draws them."""
    latents: Name | None = None
    """Of the first `num` images that `autoencoder` was trained on."""
    teacher: UserPath | None = None
    sampler: str | None = None
    autoencoder: UserPath | None = None
    num: int | None = Field(None, ge=1, le=10**9)

    @property
    def kind(self) -> str:
        """Which of the three."""
        return next(kind for kind in KEYS if getattr(self, kind))

    @model_validator(mode="after")
    def _keys_are_of_one_kind(self) -> Self:
        kinds = [kind for kind in KEYS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"takes one of {', '.join(KEYS)}, and has {' and '.join(kinds) or 'none'}")
        needed, given = KEYS[kinds[0]], self.model_fields_set - {kinds[0]}
        if wrong := sorted((given - needed) | (needed - {"set"} - given)):
            takes = ", ".join(sorted(needed))
            raise ValueError(f"{wrong[0]}: {kinds[0]} takes {takes}" + ("" if wrong[0] in given else ", and lacks it"))
        return self


KEYS = {"run": {"set"}, "pairs": {"teacher", "num", "sampler"}, "latents": {"autoencoder", "num"}}
"""By the key that says what is made, the others that go with it."""


class RowSettings(Settings):
    """A row of the table: one recipe, run with every seed."""

    name: str = Field(min_length=1, max_length=100)
    recipe: UserPath | None = None
    """By default the study's."""
    set: Changes = {}
    """Over the study's `set`."""


class StudySettings(Settings):
    """Recipes x seeds, judged alike."""

    description: str = ""
    """One line for `fewstep ablate list`."""
    prepare: list[Prepared] = []
    """Made in this order. What is made lies in OUT under its name, by which recipes may call it in data.source,
    model.autoencoder, teacher, init_from and regression.pairs."""
    teacher: UserPath | None = None
    """Judged, too, by each of `samplers`: rows without a deviation."""
    samplers: list[str] = []
    """As `fewstep evaluate --sampler` has them; by default heun:18, or ddim:50 of text to image."""
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, max_length=1000)
    """Of the rows; what is prepared has that of its recipe."""
    num_samples: int = Field(5000, ge=100, le=10**6)
    """Images of a run that are judged."""
    features: UserPath | None = None
    """As `fewstep evaluate --features`."""
    recipe: UserPath | None = None
    """Of all rows that do not say their own."""
    set: Changes = {}
    """Settings of all rows, over those of their recipes."""
    rows: list[RowSettings] = Field(min_length=1, max_length=1000)
