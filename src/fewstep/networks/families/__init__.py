"""The families by name; a new one is a module here and a name in the first line, or comes from outside.

From outside it comes with an installed package, as an entry point of its name in the group `fewstep.families`, or as
the user says it, MODULE:NAME. A model folder has the name alone, by which nothing is imported but what is installed.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from fewstep.errors import UserError, brief
from fewstep.networks.families.edm import PIXELS
from fewstep.networks.families.stable_diffusion import SD, SDXL
from fewstep.networks.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL, PIXELS)}
GROUP = "fewstep.families"


def find_family(name: str) -> Family | None:
    """The family of that name, if it is known here or to an installed package."""
    for entry in entry_points(group=GROUP, name=name) if name not in FAMILIES else ():
        with _importing(entry.value):
            family = entry.load()
        _add(entry.value, family)
    return FAMILIES.get(name)


def use_family(reference: str | None) -> None:
    """Makes the family MODULE:NAME known, of an installed module or one in the current folder; None changes nothing.

    Raises UserError if there is none.
    """
    if reference is None:
        return
    module, _, name = reference.partition(":")
    sys.path.append(os.getcwd())  # behind all else: a file here never takes an installed module's place
    try:
        with _importing(reference):
            family = getattr(import_module(module), name)
    finally:
        sys.path.remove(os.getcwd())
    _add(reference, family)


@contextmanager
def _importing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the module itself raises
        raise UserError(f"family {what}: can't be imported ({brief(error)}); write MODULE:NAME") from error


def _add(reference: str, family: Any) -> None:
    if not isinstance(family, Family):
        raise UserError(f"family {reference}: is a {type(family).__name__}, not a Family")
    FAMILIES[family.name] = family
