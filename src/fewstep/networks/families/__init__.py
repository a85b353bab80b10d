"""The families by name; a new one is a module here and a name in the first line, or comes from outside.

From outside it comes with an installed package, as an entry point of its name in the group `fewstep.families`, or as
the user says it, MODULE:NAME. A model folder has the name alone, by which nothing is imported but what is installed.
"""

import os
import sys
from collections.abc import Callable
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
        _add(entry.value, entry.load)
    return FAMILIES.get(name)


def use_family(reference: str | None) -> None:
    """Makes MODULE:NAME known, installed or in the current folder; None changes nothing. UserError if there is none."""
    if reference is None:
        return
    _add(reference, lambda: imported(reference))


def imported(reference: str) -> Any:
    """What MODULE:NAME is; raises whatever the module does."""
    module, _, name = reference.partition(":")
    sys.path.append(os.getcwd())  # behind all else: a file here never takes an installed module's place
    try:
        return getattr(import_module(module), name)
    finally:
        sys.path.remove(os.getcwd())


def _add(reference: str, load: Callable[[], Any]) -> None:
    try:
        family = load()
    except Exception as error:  # whatever the module itself raises
        raise UserError(f"family {reference}: can't be imported ({brief(error)}); write MODULE:NAME") from error
    if not isinstance(family, Family):
        raise UserError(f"family {reference}: is a {type(family).__name__}, not a Family")
    FAMILIES[family.name] = family
