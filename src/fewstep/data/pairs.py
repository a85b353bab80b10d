"""Pairs of unit noise and what a teacher's ODE makes of it, on disk: written once, read by row while training.

pairs.json  00000.parquet  00001.parquet ...: `noise` and `x0` (C, H, W) as bytes of little-endian float16, with
`prompt` or `label`. All pairs are float16, as in the paper: of latents, and of pixels, where it errs by a thirtieth of
a grey level. Other programs read them so, with the shape from pairs.json:

    table = pandas.read_parquet("pairs/00000.parquet")      or datasets.load_dataset("parquet", data_files=...)
    x0 = np.frombuffer(table.x0[0], "<f2").reshape(4, 128, 128)
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.shards import Report, ShardFolder, chunks, digest, naming_damage
from fewstep.errors import UserError
from fewstep.files import written_whole
from fewstep.seeding import generator

FILE_BYTES = 2**24  # 64 pairs of SDXL: what a stop may lose
MAX_ROWS = 1024
GROUP_BYTES = 2**18  # what is read at once for one row: one pair of SDXL
Given = dict[str, list[Any]]
"""What pairs are drawn for: {"prompt": [N strings]}, {"label": [N classes]}, or {} of an unconditional teacher."""
Draw = Callable[[Tensor, Given], Tensor]
"""From unit noise (B, C, H, W) and what is given for each to x0, by a teacher's ODE sampler."""


def write_pairs(
    draw: Draw,
    given: Given,
    plan: dict[str, Any],
    out: Path,
    batch_size: int = 8,
    rank: int = 0,
    num_ranks: int = 1,
    report: Report = lambda done: None,
) -> int:
    """Writes every `num_ranks`-th file of pairs into `out`, or goes on with it; returns how many files still lack.

    `plan` says how they are made, with `shape`, `seed` and `num_pairs`; the noise of pair i is a function of (seed, i),
    and rounded to float16 before the teacher sees it, so that the pair is exact. Raises UserError if `out` holds
    something else, or if a sample is not finite.
    """
    bytes_per_row = 4 * math.prod(plan["shape"])
    num_rows = max(1, min(MAX_ROWS, FILE_BYTES // bytes_per_row))
    layout = {"rows_per_file": num_rows, "rows_per_group": max(1, min(num_rows, GROUP_BYTES // bytes_per_row))}
    plan = {**plan, "conditions": f"{next(iter(given), 'none')} {digest(given)}", "dtype": "float16", **layout}
    folder = ShardFolder(out, "pairs", plan, plan["num_pairs"], num_rows, ".parquet")
    folder.start()

    def make(path: Path, rows: range, told: Report) -> None:
        parts = []
        for chunk in chunks(rows, batch_size):
            parts.append(_draw(draw, given, plan, chunk))
            told(chunk.stop - rows.start)
        noise, x0 = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        _save(path, {"noise": noise, "x0": x0}, _rows(given, rows), plan)

    folder.fill(make, bytes_per_row, report, rank, num_ranks)
    return len(folder.missing())


def _draw(draw: Draw, given: Given, plan: dict[str, Any], rows: range) -> tuple[Tensor, Tensor]:
    """Noise and x0 (B, C, H, W) in float16 of these pairs."""
    draws = (generator(plan["seed"], "pair", index) for index in rows)
    noise = torch.stack([torch.randn(plan["shape"], generator=each) for each in draws]).half()
    x0 = draw(noise.float(), _rows(given, rows)).half().cpu()
    broken = [index for index, each in zip(rows, x0, strict=True) if not each.isfinite().all()]
    if broken:
        raise UserError(f"pair {broken[0]}: the teacher's x0 is not finite; give another --precision or --sampler")
    return noise, x0


def _rows(given: Given, rows: range) -> Given:
    return {name: cells[rows.start : rows.stop] for name, cells in given.items()}


def _save(path: Path, tensors: dict[str, Tensor], given: Given, plan: dict[str, Any]) -> None:
    """One file, with checksums, for noise and what is damaged look alike."""
    import pyarrow
    from pyarrow import parquet

    cells = {name: [row.tobytes() for row in tensor.numpy().astype("<f2")] for name, tensor in tensors.items()}
    columns = {name: pyarrow.array(rows, pyarrow.binary()) for name, rows in cells.items()}
    table = pyarrow.table({**columns, **given}, metadata={"fewstep": json.dumps(plan)})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with written_whole(path) as temporary:
        parquet.write_table(table, temporary, row_group_size=plan["rows_per_group"], **plain)


@dataclass(frozen=True)
class PairSet:
    """Pairs by index; `given` is in memory, the rest is read from memory-mapped files, a group of rows at a time."""

    plan: dict[str, Any]
    metadata: dict[Path, Any]
    given: Given

    @property
    def length(self) -> int:
        return int(self.plan["num_pairs"])

    def batch(self, indices: Tensor) -> dict[str, Any]:
        """{"noise", "x0": (B, C, H, W) float16}, and "caption": [B strings] or "label": (B,).

        Raises UserError if what is read is damaged.
        """
        read, size = cache(self._read), self.plan["rows_per_group"]
        places = [divmod(index, self.plan["rows_per_file"]) for index in indices.tolist()]
        rows = [[cells[row % size] for cells in read(file, row // size)] for file, row in places]
        arrays = [np.stack([np.frombuffer(cell, "<f2") for cell in cells]) for cells in zip(*rows, strict=True)]
        noise, x0 = (torch.from_numpy(array.reshape(-1, *self.plan["shape"])) for array in arrays)
        given = {name: [cells[index] for index in indices.tolist()] for name, cells in self.given.items()}
        told = {"caption": given["prompt"]} if "prompt" in given else {k: torch.tensor(v) for k, v in given.items()}
        return {"noise": noise, "x0": x0, **told}

    def _read(self, number: int, group: int) -> list[list[Any]]:
        """The bytes of noise and x0 of one group of rows of file `number`."""
        path = list(self.metadata)[number]
        with naming_damage(path):
            columns = _open(path, self.metadata[path]).read_row_group(group, columns=["noise", "x0"])
            return [[cell.as_buffer() for cell in columns[name]] for name in ("noise", "x0")]


def open_folder(
    folder: Path, teacher: str, sampler: str, shape: tuple[int, ...], num: int | None = None
) -> ShardFolder:
    """The folder of pairs of the teacher with this fingerprint by this sampler, and of so many where a number is asked.

    Raises UserError if they are not.
    """
    wanted: dict[str, tuple[str, Any]] = {"teacher": ("teacher", teacher), "sampler": ("sampler", sampler)}
    wanted |= {"shape": ("shape", list(shape))} | ({"num_pairs": ("number", num)} if num else {})
    return ShardFolder.open(folder, "pairs", wanted, ".parquet")


def load_pairs(folder: Path, teacher: str, sampler: str, shape: tuple[int, ...], num: int | None = None) -> PairSet:
    """What `open_folder` finds; raises UserError as it does, if files lack, or if one is damaged."""
    kept = open_folder(folder, teacher, sampler, shape, num)
    if missing := kept.missing():
        told = f"{len(missing)} of {len(kept.files)} files are not there yet"
        raise UserError(f"{folder}: {told}; run the same `fewstep data pairs` again")
    given: Given = {}
    metadata = {}
    for path, rows in kept.files.items():
        num_groups = math.ceil(len(rows) / kept.plan["rows_per_group"])
        with naming_damage(path):
            file = _open(path)
            metadata[path], names = file.metadata, set(file.schema_arrow.names) - {"noise", "x0"}
            if (file.metadata.num_rows, file.metadata.num_row_groups) != (len(rows), num_groups):
                raise ValueError("it has other rows")
            for name, cells in file.read(columns=list(names)).to_pydict().items():
                given.setdefault(name, []).extend(cells)
    return PairSet(kept.plan, metadata, given)


def _open(path: Path, metadata: Any = None) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path, metadata=metadata, memory_map=True, page_checksum_verification=True)
