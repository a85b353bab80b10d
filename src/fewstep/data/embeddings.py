"""Embeddings of a list of texts, kept on disk so that every text is embedded once."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.shards import ROWS, Report, Rows, ShardFolder, chunks, digest, open_shard, save_shard

TEXTS_PER_BATCH = 64
Embed = Callable[[list[str]], dict[str, Tensor]]


def cached_embeddings(
    texts: list[str], embed: Embed, fingerprint: str, folder: Path, max_gb: float, report: Report = lambda done: None
) -> Rows | None:
    """What `embed` makes of every text, from `folder`, where it is written first if need be; None if over `max_gb`.

    `fingerprint` is of whatever `embed` depends on. Several runs may ask at once: one embeds, the others wait for it.
    Raises UserError if the disk has no room, before writing.
    """
    bytes_per_text = sum(tensor.nbytes for tensor in embed([""]).values())
    if len(texts) * bytes_per_text > max_gb * 1e9:
        return None
    name = f"embeddings-{digest([fingerprint, ROWS, texts])}"
    kept = ShardFolder(folder / name, "text embeddings", {}, len(texts), ROWS)

    def make(path: Path, rows: range, told: Report) -> None:
        parts = [embed(texts[part.start : part.stop]) for part in chunks(rows, TEXTS_PER_BATCH)]
        save_shard(path, {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]})

    otherwise = "name another embeddings.folder, or set embeddings.max_gb=0 to embed prompts at every step"
    kept.fill(make, bytes_per_text, report, wait=True, otherwise=otherwise)
    return Rows.of([open_shard(path)[0] for path in kept.files])
