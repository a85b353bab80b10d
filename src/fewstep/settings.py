"""The base of everything that a recipe can hold."""

import os
from typing import Annotated, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Settings(BaseModel):
    """Immutable, refuses unknown keys and wrong types; the docstring under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _place(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path")
    return os.path.expanduser(text)


UserPath = Annotated[str, AfterValidator(_place)]
"""A path, literally, in which `~` is the home folder; hub ids and names of recipes pass unchanged."""


def is_path(field: FieldInfo) -> bool:
    """Whether a field is a `UserPath`, or one that may be null."""
    kinds = [getattr(kind, "__metadata__", ()) for kind in get_args(field.annotation)]
    return any(mark in get_args(UserPath) for marks in (field.metadata, *kinds) for mark in marks)
