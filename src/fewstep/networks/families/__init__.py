"""The families, by the class of their pipeline; a new one is a module here and a name in this line."""

from fewstep.networks.families.stable_diffusion import SD, SDXL
from fewstep.networks.family import Family

FAMILIES: dict[str, Family] = {family.pipeline: family for family in (SD, SDXL)}
