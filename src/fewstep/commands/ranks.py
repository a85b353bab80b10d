"""What several ranks must have alike before they train together, each mistake told by the first."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

import fewstep
from fewstep.errors import UserError
from fewstep.recipes.loading import differences, dump, parse
from fewstep.runtime.distributed import num_ranks, of_first, told_to_first

LOCK = ".lock"
SIGHT = 10.0  # seconds that a file takes at most to be seen on other machines


def check_ranks(recipe: Any, ranks: int | None = None) -> None:
    """Raises UserError unless every rank has equally many rows of a batch, in equal parts, and a real image."""
    together = ranks or num_ranks()
    num, several = together * recipe.accumulate, recipe.accumulate > 1  # of max_rows_per_part there are always some
    if recipe.batch_size % num:
        many = f"{together} ranks{f' of accumulate={recipe.accumulate} parts' if several else ''}"
        told = f"{many} don't divide batch_size {recipe.batch_size}; take {recipe.batch_size // num * num or num}"
        raise UserError(f"{told}, or fewer {'parts' if several else 'ranks'}")
    reals = round(recipe.batch_size * recipe.gan.real_share) if recipe.kind == "distill" else recipe.batch_size
    if recipe.kind == "distill" and recipe.gan.student_weight and reals < together:
        raise UserError(f"gan.real_share: {reals} real images a step are too few for {together} ranks; raise it")


def check_alike_ranks(recipe: Any, run: Path, device: torch.device) -> None:
    """Raises UserError unless all ranks have one version and one recipe, see one folder, and have GPUs of their own.

    The folder is locked by the first, and the others know it by what is in the lock.
    """
    if num_ranks() == 1:
        return
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    own = {"version": fewstep.__version__, "recipe": dump(recipe), "lock": _seen(run / LOCK), "gpu": gpu}
    told = [json.loads(text) for text in told_to_first(json.dumps(own))]
    of_first(lambda: compare(told, run))


def _seen(lock: Path) -> str | None:
    """What is in it, once it is there."""
    end = time.monotonic() + SIGHT
    while time.monotonic() < end:
        with suppress(OSError):
            if text := lock.read_text():
                return text
        time.sleep(0.1)
    return None


def compare(ranks: Sequence[dict[str, Any]], run: Path) -> None:
    """Raises UserError for the first rank that is unlike the first of all."""
    first, gpus = ranks[0], dict[str, int]()
    for number, each in enumerate(ranks):
        if each["version"] != first["version"]:
            told = f"runs fewstep {each['version']}, and the first {first['version']}; install one version everywhere"
            raise UserError(f"rank {number}: {told}")
        if each["recipe"] != first["recipe"]:
            theirs, ours = (parse(yaml.safe_load(of["recipe"]), f"rank {number}") for of in (each, first))
            changed = "; ".join(differences(ours, theirs))
            raise UserError(f"rank {number}: has another recipe than the first ({changed}); start all with one command")
        if each["lock"] != first["lock"]:
            told = f"does not see the first one's {run}; take an --out that is one folder on all machines"
            raise UserError(f"rank {number}: {told}")
        if each["gpu"] and (other := gpus.setdefault(each["gpu"], number)) != number:
            told = f"has the GPU of rank {other}; start as many ranks as a machine has GPUs, or set device=cpu"
            raise UserError(f"rank {number}: {told}")
