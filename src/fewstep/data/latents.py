"""Captioned images encoded by an autoencoder, on disk: written once, then read instead of the images.

latents.json  00000.safetensors  00001.safetensors ...: `latent` (rows, C, H, W) fp16 with captions, ROWS images in each
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.images import ImageSet, Unusable
from fewstep.data.shards import ROWS, Rows, open_shard, save_shard, shard_rows
from fewstep.errors import UserError
from fewstep.files import written_whole
from fewstep.seeding import generator

DESCRIPTION = "latents.json"
Encode = Callable[[Tensor, Tensor], Tensor]
"""From uint8 images (B, 3, R, R) and unit noise (B, C, H, W) to latents: a sample of the posterior, scaled."""


@dataclass(frozen=True)
class LatentSet:
    """Captioned latents by index, in memory-mapped files."""

    rows: Rows
    captions: list[str]

    @property
    def length(self) -> int:
        return self.rows.length

    def batch(self, indices: Tensor) -> dict[str, Any]:
        """{"latent": (B, C, H, W) fp16, "caption": [B strings]}."""
        return self.rows.fetch(indices) | {"caption": [self.captions[index] for index in indices.tolist()]}


def write_latents(
    images: ImageSet,
    encode: Encode,
    space: dict[str, Any],
    out: Path,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    dropped: dict[str, int] | None = None,
    batch_size: int = 8,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Writes the latents of captioned images into the folder `out`, or goes on with it; returns its description.

    `space` is the model's `latent_space`; the noise of image i is a function of (seed, i). Unusable images are left out
    and counted in the description's `dropped`, on top of those given. Raises UserError if `out` holds something else.
    """
    plan = {**space, "seed": seed, "num_images": images.length, "rows_per_file": ROWS, **(settings or {})}
    _start(out, json.loads(json.dumps(plan)))
    shards = shard_rows(out, images.length, ROWS)
    for path, rows in shards.items():
        if not path.exists():
            latents, facts = _encode_rows(images, encode, tuple(space["shape"]), rows, seed, batch_size, report)
            save_shard(path, {"latent": latents}, facts)
        report(rows.stop)
    return _finish(out, plan, list(shards), Counter(dropped))


def _start(out: Path, plan: dict[str, Any]) -> None:
    """Makes the folder, or checks that it is of the same plan."""
    if (out / DESCRIPTION).exists():
        old = read_description(out)
        changed = [f"{key}: {old.get(key)} -> {plan[key]}" for key in plan if old.get(key) != plan[key]]
        if changed:
            raise UserError(f"{out}: holds latents made otherwise ({'; '.join(changed)}); choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: holds other files; choose another --out")
    else:
        _write_description(out, {**plan, "complete": False})
    for torn in out.glob(".*.tmp"):  # of a run that was killed
        torn.unlink()


def _encode_rows(
    images: ImageSet,
    encode: Encode,
    shape: tuple[int, ...],
    rows: range,
    seed: int,
    batch_size: int,
    report: Callable[[int], None],
) -> tuple[Tensor, dict[str, Any]]:
    """The latents of one file, and its captions and counts."""
    latents, captions = [torch.empty(0, *shape, dtype=torch.float16)], []
    dropped: Counter[str] = Counter()
    for chunk in torch.arange(rows.start, rows.stop).split(batch_size):
        usable: dict[int, Tensor] = {}
        for index in chunk:
            try:
                batch = images.batch(index[None])
            except Unusable as error:
                dropped[error.reason] += 1
                continue
            usable[int(index)] = batch["image"]
            captions += batch["caption"]
        if usable:
            noise = [torch.randn(shape, generator=generator(seed, "latent", index)) for index in usable]
            latents.append(encode(torch.cat(list(usable.values())), torch.stack(noise)).half().cpu())
        report(int(chunk[-1]) + 1)
    return torch.cat(latents), {"captions": captions, "dropped": dropped}


def _finish(out: Path, plan: dict[str, Any], paths: list[Path], dropped: Counter[str]) -> dict[str, Any]:
    """Counts what is there, and declares the folder complete."""
    all_facts = [open_shard(path)[1] for path in paths]
    for facts in all_facts:
        dropped += Counter(facts["dropped"])
    count = sum(len(facts["captions"]) for facts in all_facts)
    if not count:
        raise UserError(f"{out}: no image is left; {describe_dropped(dropped)}")
    description = {**plan, "complete": True, "count": count, "dropped": dict(dropped)}
    _write_description(out, description)
    return description


def describe_dropped(dropped: dict[str, int]) -> str:
    """`dropped: 300 smaller than 1024 pixels, 2 unsafe`."""
    return "dropped: " + (", ".join(f"{number:,} {reason}" for reason, number in dropped.items()) or "none")


def is_latents(source: Path) -> bool:
    """Whether `write_latents` made this folder."""
    return (source / DESCRIPTION).is_file()


def load_latents(folder: Path, space: dict[str, Any]) -> LatentSet:
    """The latents in `folder`, for a model with this `latent_space`; raises UserError if they are not, or not whole."""
    description = read_description(folder)
    for key, what in (("autoencoder", "another autoencoder"), ("shape", "another size")):
        wanted = space[key]
        if description.get(key) != wanted:
            raise UserError(
                f"{folder}: latents of {what} ({key} {description.get(key)}, the model has {wanted}); "
                "encode the images again with `fewstep data latents`"
            )
    if not description.get("complete"):
        raise UserError(f"{folder}: not all images are encoded yet; run the same `fewstep data latents` again")
    shards, captions = [], []
    for path in shard_rows(folder, description["num_images"], description["rows_per_file"]):
        tensors, facts = open_shard(path)
        if tuple(tensors["latent"].shape) != (len(facts["captions"]), *space["shape"]):
            raise UserError(f"{path}: damaged; remove it and run the same `fewstep data latents` again")
        shards.append(tensors)
        captions += facts["captions"]
    return LatentSet(Rows.of(shards), captions)


def read_description(folder: Path) -> dict[str, Any]:
    """The content of latents.json; raises UserError if it is damaged."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        return dict(description)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / DESCRIPTION}: can't be read; remove the folder and encode again") from error


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    with written_whole(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n")
