"""The rows of a table in the making: files of what was read of some hundred images each, which a stop does not lose."""

import csv
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.shards import Report, ShardFolder, below, digest, naming_damage, open_shard, save_shard
from fewstep.errors import UserError
from fewstep.evaluation.gathering import GRID_IMAGES, Gathered, Gathering, Numbers, Probe, fitted, read, split
from fewstep.evaluation.within import Draw, Within
from fewstep.files import folder_lock, write_text
from fewstep.models.image_model import Asked
from fewstep.models.sampler import Sampler
from fewstep.pictures import save_png, to_picture
from fewstep.stopping import remove

FILE_ROWS, FILE_BYTES = 500, 2**28  # images of a file, and their bytes: what a stop may lose
SUBJECTS = 8  # of a file of distances
NUMBERS = "numbers."
ROW = "row"  # as folders of shards are called
PLAN = ".plan.json"  # beside the images that are kept; hidden, so that it is no part of them
DrawStops = Callable[[range, Asked], Iterable[Sequence[Tensor]]]
"""As `Draw`, of every stop of a student's: as `generate_stops`."""


@dataclass(frozen=True)
class Entry:
    """What a row of the table is made of: images by number, and all that decides what they and their numbers are."""

    name: str
    sampler: Sampler | None  # None of images that something else made
    draw: Draw
    num: int
    plan: Mapping[str, Any]
    probes: Sequence[Probe]
    size: int  # pixels that images are brought to
    batch: int  # images that are drawn at once, of which a file has a multiple
    image_bytes: int  # of one image as it is drawn
    width: int  # numbers that are read of an image, about
    prompts: Sequence[str] = ()
    within: Within | None = None
    draw_stops: DrawStops | None = None
    """Of a row whose rollouts pass through the stops of other rows: the batches of these, and its own as the last."""

    @property
    def title(self) -> str:
        """As files are called."""
        sampler = f" {self.sampler}" if self.sampler and self.sampler.kind != "student" else ""
        return re.sub(r"[^\w.@=-]+", "-", f"{self.name}{sampler}").strip("-.") or "row"


@dataclass(frozen=True)
class RowFiles:
    """The files of an entry in OUT/rows, and where asked its images in OUT/images.

    Numbers are a function of the plan alone, bit for bit: whoever goes on with it, in how many processes, finds those
    of one that went through. The files of earlier `stops`, rows of their own, are written along with these; what lacks
    of them afterwards is theirs to make.
    """

    entry: Entry
    out: Path
    keep_images: bool = False
    stops: Sequence["RowFiles"] = ()

    @cached_property
    def plan(self) -> dict[str, Any]:
        entry = self.entry
        most = max(1, min(FILE_ROWS, FILE_BYTES // entry.image_bytes))
        per_file = max(entry.batch, most // entry.batch * entry.batch)
        facts = {"sampler": str(entry.sampler), "num_images": entry.num, "size": entry.size, "batch_size": entry.batch}
        probes = [each.identity for each in entry.probes]
        plan = {**entry.plan, **facts, "prompts": digest(list(entry.prompts)), "probes": probes}
        return plan | {"within": entry.within and entry.within.identity, "rows_per_file": per_file}

    @cached_property
    def images(self) -> Path:
        return self.out / "images" / self.entry.title

    @cached_property
    def folder(self) -> ShardFolder:
        path = self.out / "rows" / f"{self.entry.title}-{digest(self.plan)}"
        return ShardFolder(path, ROW, self.plan, self.entry.num, self.plan["rows_per_file"])

    @cached_property
    def pairs(self) -> ShardFolder | None:
        """Of the distances of images of one prompt or class: a row of each."""
        if self.entry.within is None:
            return None
        num = len(self.entry.within.subjects)
        plan = {**self.plan, "num_images": num, "rows_per_file": SUBJECTS}
        return ShardFolder(self.folder.path / "within", "within", plan, num, SUBJECTS)

    def share(self, rank: int, num_ranks: int) -> int:
        """The number of images that a rank makes."""
        return sum(map(len, list(self.folder.files.values())[rank::num_ranks]))

    def missing(self) -> int:
        """How many files are not there yet."""
        return sum(len(each.missing()) for each in (self.folder, self.pairs) if each)

    def fill(self, report: Report, rank: int = 0, num_ranks: int = 1) -> None:
        """Makes what lacks of a rank's share: every `num_ranks`-th file.

        Raises UserError if the disk has no room, if somebody makes the share already, or if images can't be judged;
        where nothing was made, nothing is left behind.
        """
        together = [*self.stops, self]
        try:
            for each in together:
                each.folder.start()
                if self.keep_images:
                    each._start_images()
            room = 4 * self.entry.width + (self.entry.image_bytes if self.keep_images else 0)
            self.folder.fill(self._make, room * len(together), report, rank, num_ranks)
            if self.pairs:
                self.pairs.start()
                self.pairs.fill(self._make_pairs, 100, lambda done: None, rank, num_ranks)
        except UserError:
            for each in together:
                if num_ranks == 1 and not any(path.exists() for path in each.folder.files):
                    each._remove_nothing()
            raise

    def _remove_nothing(self) -> None:
        remove(self.folder.path)
        if self.keep_images and not [*self.images.glob("*.png")]:
            remove(self.images)
        for path in (self.images.parent, self.folder.path.parent, self.out):
            with suppress(OSError):
                path.rmdir()

    def _start_images(self) -> None:
        """Removes files whose images are not all there, and the images of another plan; raises UserError for others."""
        told, there = json.dumps(self.plan), self.images / PLAN
        with folder_lock(self.images, wait=True):
            names = [path for path in self.images.iterdir() if not path.name.startswith(".")]
            if not there.exists() and names:
                raise UserError(f"{self.images}: holds other files; choose another --out, or leave --keep-images out")
            if names and there.read_text() != told:
                for path in names:
                    remove(path)
            write_text(there, told)
        for path, rows in self.folder.files.items():
            if path.exists() and not all(self._image(number).exists() for number in rows):
                path.unlink(missing_ok=True)

    def write_captions(self) -> None:
        """What the kept images were drawn for, as a folder of images has its captions."""
        if self.keep_images and self.entry.prompts:
            file, prompts = StringIO(), self.entry.prompts
            lines = ((self._image(number).name, prompts[number % len(prompts)]) for number in range(self.entry.num))
            csv.writer(file).writerows([("file_name", "text"), *lines])
            write_text(self.images / "metadata.csv", file.getvalue())

    def _image(self, number: int) -> Path:
        return self.images / f"{number:05d}.png"

    def _make(self, path: Path, rows: range, told: Report) -> None:
        entry, together = self.entry, [*self.stops, self]
        takings, asked = [Gathering(len(rows), 0) for _ in together], entry.prompts or None
        drawn = entry.draw_stops(rows, asked) if entry.draw_stops else ([each] for each in entry.draw(rows, asked))
        for batches in drawn:
            for each, taken, batch in zip(together, takings, batches, strict=True):
                each._take(taken, rows, batch)
            told(takings[-1].seen)
        for each, taken in zip(together, takings, strict=True):
            each._save(each.folder.path / path.name, taken.whole(each.entry.name), rows)

    def _take(self, taken: Gathering, rows: range, batch: Tensor) -> None:
        """Reads the next images (B, C, H, W) of a file of these rows."""
        entry = self.entry
        for images in split([batch]):
            numbers = rows[taken.seen : taken.seen + len(images)]
            if self.keep_images:
                for number, image in zip(numbers, images, strict=True):
                    save_png(to_picture(image), self._image(number))
            brought = fitted(images, entry.size)
            found = read(entry.probes, brought, numbers, entry.name)
            taken.add(found, brought[: max(0, GRID_IMAGES - numbers.start)], len(images))

    def _save(self, path: Path, made: Gathered, rows: range) -> None:
        if made.count != len(rows):
            raise UserError(f"{self.entry.name}: has {made.count} of the images {rows.start} to {rows.stop - 1}")
        columns = {f"{NUMBERS}{name}": each for name, each in made.numbers.items()}
        save_shard(path, {**columns, "pictures": made.pictures})

    def _make_pairs(self, path: Path, rows: range, told: Report) -> None:
        if within := self.entry.within:
            save_shard(path, dict(within.read(within.draw(self.entry.draw, self.entry.num, rows))))

    def gathered(self, num_groups: int) -> Gathered:
        """What all files hold; raises UserError if one is damaged or missing."""
        taken = Gathering(self.entry.num, num_groups)
        for path, rows in self.folder.files.items():
            tensors, _ = open_shard(path)
            found = below(tensors, NUMBERS)
            with naming_damage(path):
                if any(len(each) != len(rows) for each in found.values()):
                    raise ValueError("it has other rows")
                taken.add(found, tensors["pictures"], len(rows))
        parts = [open_shard(path)[0] for path in self.pairs.files] if self.pairs else []
        pairs: Numbers = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        return taken.whole(self.entry.name, self.entry.prompts, pairs)


def clear(out: Path) -> None:
    """Removes the files of rows from OUT, whose table stands; a folder of that name may hold what is not ours."""
    for plan in (out / "rows").glob(f"*/{ROW}.json"):
        remove(plan.parent)
    with suppress(OSError):
        (out / "rows").rmdir()


def wait_for(rows: Sequence[RowFiles], patience: float) -> int:
    """Waits for the files of other ranks while some come within `patience` seconds; how many still lack."""
    lacking, since = sum(each.missing() for each in rows), time.monotonic()
    while lacking and time.monotonic() - since < patience:
        time.sleep(min(0.5, patience / 4))
        if (now := sum(each.missing() for each in rows)) < lacking:
            lacking, since = now, time.monotonic()
    return lacking
