"""The base of everything that a recipe can hold."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable, refuses unknown keys and wrong types; the docstring under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
