"""Models on the Hugging Face hub: an id `owner/name` to a local diffusers folder, of which nothing is executed."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, brief
from fewstep.files import read_json
from fewstep.models.loading.files import check_files

PIPELINE = "model_index.json"
ID = re.compile(r"(\w[\w.-]*)/\w[\w.-]*")


def is_hub_id(source: str | Path) -> bool:
    """Whether it reads `owner/name` and can't be a path: there is no folder `owner` here."""
    owner = ID.fullmatch(str(source))
    return owner is not None and not Path(owner[1]).exists()


def fetch_index(name: str) -> Path:
    """The folder of a hub model with its `model_index.json` alone: enough to see what it is."""
    folder = _fetch(name, [PIPELINE])
    if not (folder / PIPELINE).is_file():
        raise UserError(f"{name}: on the hub, but no diffusers model (it has no {PIPELINE})")
    return folder


def fetch(name: str, parts: Iterable[str], weights: Iterable[str]) -> Path:
    """The folder of a hub model with the files of these parts, and the weights of those in `weights`.

    Only safetensors, JSON and text; half-precision copies only where there is nothing else.
    """
    parts, weights = list(parts), list(weights)
    wanted = [PIPELINE, *(f"{part}/*{suffix}" for part in parts for suffix in (".json", ".txt"))]
    folder = _fetch(name, wanted + [f"{part}/*.safetensors" for part in weights], ignore="*/*.*.safetensors")
    for variant in (".fp16", ""):  # then any
        if lacking := [part for part in weights if not any((folder / part).glob("*.safetensors"))]:
            folder = _fetch(name, [f"{part}/*{variant}*.safetensors" for part in lacking])
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's class and parts."""
    if not (folder / PIPELINE).exists():
        raise UserError(f"{folder}: is damaged (it has no {PIPELINE})")
    check_files(folder, [PIPELINE])
    return read_json(folder / PIPELINE)


def _fetch(name: str, wanted: list[str], ignore: str | None = None) -> Path:
    """What matches, from the hub or, where that can't be reached, from what it gave before."""
    from huggingface_hub import errors, logging, snapshot_download

    logging.set_verbosity_error()  # what matters is raised
    try:  # one listing without retries: `hf_hub_download` would wait half a minute for a hub that is not there
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=ignore))
    except errors.GatedRepoError as error:
        advice = "do so, and log in with `hf auth login`"
        raise UserError(f"{name}: the hub wants its terms accepted first; {advice}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{name}: no such folder here, and no such model on the hub, or a private one") from error
    except Exception as error:  # no network, no such host, no answer in time, offline mode, a full disk
        why = f"the hub can't be reached ({brief(error)})"
        raise UserError(f"{name}: no such folder here, and {why}; name a local folder") from error
