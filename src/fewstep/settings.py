"""The base of everything that a recipe can hold."""

import os
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

MAX_TEXT = 4096  # characters, as of a path


class Written(str):
    """What stands in a file or behind --set for a value: text, until the setting that takes it says otherwise."""

    read: Callable[[], Any]

    def __new__(cls, text: str, read: Callable[[], Any]) -> "Written":
        """The text as it stands there, and what YAML makes of it, when it is asked for."""
        written = super().__new__(cls, text)
        written.read = read
        return written

    @cached_property
    def meant(self) -> Any:
        """What YAML makes of it, with texts in it as they stand there; raises UserError if that is nothing."""
        found = self.read()
        return found.meant if isinstance(found, Written) else found


class Settings(BaseModel):
    """Immutable, refuses unknown keys and wrong types; the docstring under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, str_max_length=MAX_TEXT
    )

    def idle(self) -> dict[str, str]:
        """The settings, by dotted key, that nothing looks at as the others stand, and why."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _as_the_fields_have_it(cls, given: Any) -> Any:
        if isinstance(given, Written):
            given = given.meant
        fields = cls.model_fields
        if not isinstance(given, dict):
            return given
        return {key: _as(fields[key].annotation, value) if key in fields else value for key, value in given.items()}


def _as(hint: Any, value: Any) -> Any:
    """A value for a field of that type: text, if the field can be text, as it stands there; `null` is null."""
    if isinstance(value, list):
        return [_as(hint, each) for each in value]
    if not isinstance(value, Written):
        return value
    if not _takes_text(hint) or (_takes_list(hint) and isinstance(value.meant, list)):
        return _as(hint, value.meant)
    null = value in ("null", "") and type(None) in get_args(hint) and value.meant is None
    return None if null else str(value)


def _takes_text(hint: Any) -> bool:
    return hint is str or isinstance(hint, str) or any(_takes_text(each) for each in get_args(hint))


def _takes_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(_takes_list(each) for each in get_args(hint))


def _place(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path")
    return os.path.expanduser(text)


UserPath = Annotated[str, AfterValidator(_place)]
"""A path, literally, in which `~` is the home folder; hub ids and names of recipes pass unchanged."""
Count = Annotated[int, Field(ge=1, le=10**9)]
"""Of steps, or of updates."""
Few = Annotated[int, Field(ge=1, le=256)]
"""Of blocks and of groups."""
Width = Annotated[int, Field(ge=1, le=16_384)]
"""Of a layer in channels."""
Levels = Annotated[list[Width], Field(min_length=1, max_length=12)]
"""The width of each level of a network."""


def is_path(field: FieldInfo) -> bool:
    """Whether a field is a `UserPath`, or one that may be null."""
    kinds = [getattr(kind, "__metadata__", ()) for kind in get_args(field.annotation)]
    return any(mark in get_args(UserPath) for marks in (field.metadata, *kinds) for mark in marks)
