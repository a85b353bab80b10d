"""Tensors in many safetensors files: written whole or not at all, read by row without loading them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.files import written_whole

ROWS = 1024  # of one file: 134 MB of SDXL's latents, 650 MB of its text embeddings in float32


def shard_rows(folder: Path, num_rows: int, size: int, suffix: str = ".safetensors") -> dict[Path, range]:
    """The files for `num_rows` rows, and the rows of each: `size`, and what is left in the last."""
    starts = range(0, num_rows, size)
    return {folder / f"{n:05d}{suffix}": range(num_rows)[start : start + size] for n, start in enumerate(starts)}


def save_shard(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
    """Writes tensors (rows, ...) with facts as JSON beside them."""
    with written_whole(path) as temporary:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, {"facts": json.dumps(facts)})


def open_shard(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of one file, memory-mapped, and its facts; raises UserError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, for it is no dict
            return tensors, json.loads(file.metadata()["facts"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: missing or damaged; remove it and run the command that wrote it again, which makes only this anew"
        ) from error


@dataclass(frozen=True)
class Rows:
    """The rows of several shards as if they were one: `starts` (shards,) are the numbers of their first rows."""

    shards: list[dict[str, Tensor]]
    starts: Tensor
    length: int

    @staticmethod
    def of(shards: Sequence[dict[str, Tensor]]) -> "Rows":
        """Shards in their order; empty ones are left out."""
        full = [shard for shard in shards if len(next(iter(shard.values())))]
        ends = torch.tensor([len(next(iter(shard.values()))) for shard in full]).cumsum(0)
        return Rows(full, torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]]), int(ends[-1]))

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Tensors (B, ...) of the rows `indices` (B,), copied out of the files."""
        numbers = torch.searchsorted(self.starts, indices, right=True) - 1
        places = list(zip(numbers.tolist(), (indices - self.starts[numbers]).tolist(), strict=True))
        return {name: torch.stack([self.shards[n][name][row] for n, row in places]) for name in self.shards[0]}
