"""Embeddings of a list of texts, kept on disk so that every text is embedded once."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.shards import ROWS, Rows, open_shard, save_shard, shard_rows
from fewstep.errors import UserError

TEXTS_PER_BATCH = 64
Embed = Callable[[list[str]], dict[str, Tensor]]


def cached_embeddings(
    texts: list[str],
    embed: Embed,
    fingerprint: str,
    folder: Path,
    max_gb: float,
    report: Callable[[int], None] = lambda done: None,
) -> Rows | None:
    """What `embed` makes of every text, from `folder`, where it is written first if need be; None if over `max_gb`.

    `fingerprint` is of whatever `embed` depends on. Raises UserError if the disk has no room, before writing.
    """
    bytes_per_text = sum(tensor.nbytes for tensor in embed([""]).values())
    if len(texts) * bytes_per_text > max_gb * 1e9:
        return None
    digest = hashlib.blake2b(json.dumps([fingerprint, ROWS, texts]).encode(), digest_size=8).hexdigest()
    shards = shard_rows(folder / f"embeddings-{digest}", len(texts), ROWS)
    missing = {path: rows for path, rows in shards.items() if not path.exists()}
    _check_room(folder, sum(map(len, missing.values())) * bytes_per_text)
    for path, rows in missing.items():
        save_shard(path, _embed(texts[rows.start : rows.stop], embed))
        report(rows.stop)
    return Rows.of([open_shard(path)[0] for path in shards])


def _embed(texts: list[str], embed: Embed) -> dict[str, Tensor]:
    parts = [embed(texts[start : start + TEXTS_PER_BATCH]) for start in range(0, len(texts), TEXTS_PER_BATCH)]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def _check_room(folder: Path, num_bytes: int) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    free = shutil.disk_usage(nearest).free
    if num_bytes > free:
        raise UserError(
            f"{folder}: {num_bytes / 1e9:.1f} GB of text embeddings, but only {free / 1e9:.1f} GB of disk are free; "
            "name another embeddings.folder, or set embeddings.max_gb=0 to embed prompts at every step"
        )
