"""The base of everything that a recipe can hold."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable, refuses unknown keys and wrong types; the docstring under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _place(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path")
    return os.path.expanduser(text)


UserPath = Annotated[str, AfterValidator(_place)]
"""A path, literally, in which `~` is the home folder; hub ids and names of recipes pass unchanged."""
