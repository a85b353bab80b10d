"""What is computed once and kept: folders of numbered files of rows, written whole or not at all, read by row."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.files import check_room, folder_lock, write_text, written_whole

ROWS = 1024  # of one file: 134 MB of SDXL's latents, 650 MB of its text embeddings in float32
Report = Callable[[int], None]
"""Told the number of rows that are done."""


def chunks(rows: range, size: int) -> list[range]:
    """The rows in their order, `size` at a time."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


@dataclass(frozen=True)
class ShardFolder:
    """A folder of files of `rows_per_file` rows, with a plan in `NAME.json`: all that decides what the rows are.

    A stop loses the file that is being made; the same command goes on with the next. Whoever writes locks the folder,
    of several ranks each its own share: every `num_ranks`-th file.
    """

    path: Path
    name: str
    plan: dict[str, Any]
    num_rows: int
    rows_per_file: int
    suffix: str = ".safetensors"

    @staticmethod
    def open(path: Path, name: str, wanted: dict[str, tuple[str, Any]], suffix: str = ".safetensors") -> "ShardFolder":
        """The folder as it was written, whose plan has the `wanted` values: {key: (what it is, value)}.

        Raises UserError if it is not there or can't be read, or if its plan is another.
        """
        description = path / f"{name}.json"
        if not description.exists():
            raise UserError(f"{path}: holds no {name} (no {description.name}); write them with `fewstep data {name}`")
        try:
            plan = dict(json.loads(description.read_text()))
            num_rows = int(plan["num_pairs" if name == "pairs" else "num_images"])
            rows_per_file = int(plan["rows_per_file"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            told = "remove its folder and run the command that wrote it again"
            raise UserError(f"{description}: can't be read; {told}") from error
        for key, (what, value) in wanted.items():
            if plan.get(key) != value:
                told = f"{name} of another {what} ({plan.get(key)}) than asked for ({value})"
                raise UserError(f"{path}: {told}; make others with `fewstep data {name}`")
        return ShardFolder(path, name, plan, num_rows, rows_per_file, suffix)

    @property
    def files(self) -> dict[Path, range]:
        """Every file and its rows."""
        parts = enumerate(chunks(range(self.num_rows), self.rows_per_file))
        return {self.path / f"{number:05d}{self.suffix}": part for number, part in parts}

    def missing(self) -> list[Path]:
        """The files that are not there yet."""
        return [path for path in self.files if not path.exists()]

    def start(self) -> None:
        """Writes the plan, or checks that the one there is the same; other ranks may do so at the same time.

        Raises UserError if the folder holds something else. What an older version did not write down is not compared.
        """
        plan = json.loads(json.dumps(self.plan))
        there = [path.suffix for path in self.path.iterdir()] if self.path.is_dir() else []  # before others write more
        if (self.path / f"{self.name}.json").exists():
            old = ShardFolder.open(self.path, self.name, {}).plan
            changed = [f"{key}: {old[key]} -> {plan[key]}" for key in plan if key in old and old[key] != plan[key]]
            if changed:
                told = f"holds {self.name} made otherwise ({'; '.join(changed)})"
                raise UserError(f"{self.path}: {told}; choose another --out")
        elif set(there) - {".tmp", ".lock"}:
            raise UserError(f"{self.path}: holds other files; choose another --out")
        else:
            self.describe(plan)

    def describe(self, description: dict[str, Any]) -> None:
        """Replaces the plan by itself with more in it."""
        write_text(self.path / f"{self.name}.json", json.dumps(description, indent=2) + "\n")

    def fill(
        self,
        make: Callable[[Path, range, Report], None],
        bytes_per_row: int,
        report: Report,
        rank: int = 0,
        num_ranks: int = 1,
        wait: bool = False,
        otherwise: str = "choose another --out",
    ) -> None:
        """Has `make` write each file that lacks of this rank's share.

        `report` is told the rows done of the share, `make` tells those of its file. Raises UserError, before anything
        is written, if the disk has no room (`otherwise` says what helps), or if somebody writes the share already;
        with `wait` it takes what that one has written.
        """
        share = dict(list(self.files.items())[rank::num_ranks])
        lacking = sum(len(rows) for path, rows in share.items() if not path.exists())
        if not lacking:
            return report(sum(map(len, share.values())))
        check_room(self.path, lacking * bytes_per_row, self.name, otherwise)
        with folder_lock(self.path, f".{rank}.lock", wait):
            done = 0
            for path, rows in share.items():
                for torn in self.path.glob(f".{path.name}.*.tmp"):  # of a writer that was killed, for we hold the lock
                    torn.unlink()
                if not path.exists():
                    make(path, rows, lambda told: report(done + told))  # noqa: B023, it is called before `done` changes
                done += len(rows)
                report(done)
        return None


def save_shard(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
    """Writes tensors (rows, ...) with facts as JSON beside them."""
    with written_whole(path) as temporary:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, {"facts": json.dumps(facts)})


def open_shard(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of one file, memory-mapped, and its facts; raises UserError if it is missing or damaged."""
    with naming_damage(path), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, for it is no dict
        return tensors, json.loads(file.metadata()["facts"])


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of them."""
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Names the file that can't be read, and what helps."""
    try:
        yield
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:  # pyarrow's are some of these
        told = "remove it and run the command that wrote it again, which makes only this anew"
        raise UserError(f"{path}: missing or damaged; {told}") from error


def digest(facts: Any) -> str:
    """16 hex digits of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


class Rows:
    """The rows of several shards, in their order, as if they were one; `starts` (shards,) has numbers of first rows."""

    def __init__(self, shards: Sequence[dict[str, Tensor]]):
        self.shards = [shard for shard in shards if len(next(iter(shard.values())))]
        ends = torch.tensor([0, *(len(next(iter(shard.values()))) for shard in self.shards)]).cumsum(0)
        self.starts, self.length = ends[:-1], int(ends[-1])

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Tensors (B, ...) of the rows `indices` (B,), copied out of the files."""
        numbers = torch.searchsorted(self.starts, indices, right=True) - 1
        places = list(zip(numbers.tolist(), (indices - self.starts[numbers]).tolist(), strict=True))
        return {name: torch.stack([self.shards[n][name][row] for n, row in places]) for name in self.shards[0]}
