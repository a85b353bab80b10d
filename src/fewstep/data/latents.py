"""What images and texts are encoded to, on disk: written once, then read instead of them.

latents.json  00000.safetensors  00001.safetensors ...: `latent` (rows, C, H, W) fp16 with captions, ROWS images in each
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.decoding import Unusable
from fewstep.data.images import ImageSet
from fewstep.data.shards import ROWS, Report, Rows, ShardFolder, chunks, digest, naming_damage, open_shard, save_shard
from fewstep.errors import UserError
from fewstep.seeding import generator

TEXTS_PER_BATCH = 64
Embed = Callable[[list[str]], dict[str, Tensor]]
Encode = Callable[[Tensor, Tensor], Tensor]
"""From uint8 images (B, 3, R, R) and unit noise (B, C, H, W) to latents: a sample of the posterior, scaled."""


@dataclass(frozen=True)
class LatentSet:
    """Captioned latents by index, in memory-mapped files."""

    rows: Rows
    captions: list[str]
    found: str

    @property
    def length(self) -> int:
        return self.rows.length

    def batch(self, indices: Tensor) -> dict[str, Any]:
        """{"latent": (B, C, H, W) fp16, "caption": [B strings]}."""
        return self.rows.fetch(indices) | {"caption": [self.captions[index] for index in indices.tolist()]}


def write_latents(
    images: ImageSet,
    encode: Encode,
    plan: dict[str, Any],
    out: Path,
    dropped: dict[str, int] | None = None,
    batch_size: int = 8,
    report: Report = lambda done: None,
    place: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Writes the latents of captioned images into the folder `out`, or goes on with it; returns its description.

    Of several ranks each writes its own share (`place`: its number, and how many there are), and the description of one
    that others are not done with has no `count`.

    `plan` is the model's `latent_space` with a `seed`, and what else decides; the noise of image i is a function of
    (seed, i). Unusable images are left out and counted in the description's `dropped`, on top of those given. Raises
    UserError if `out` holds something else, as it does if the captions are others than when it was begun.
    """
    captions = digest((images.captions or [])[: images.length])
    plan = {**plan, "num_images": images.length, "rows_per_file": ROWS, "captions": captions}
    folder = ShardFolder(out, "latents", plan, images.length, ROWS)
    folder.start()

    def make(path: Path, rows: range, told: Report) -> None:
        latents, facts = _encode_rows(images, encode, plan, rows, batch_size, told)
        save_shard(path, {"latent": latents}, facts)

    folder.fill(make, 2 * math.prod(plan["shape"]), report, *place)
    if not all(path.exists() for path in folder.files):
        return folder.plan
    all_facts = [open_shard(path)[1] for path in folder.files]
    left_out = sum((Counter(facts["dropped"]) for facts in all_facts), Counter(dropped))
    count = sum(len(facts["captions"]) for facts in all_facts)
    if not count:
        raise UserError(f"{out}: no image is left; {describe_dropped(left_out)}")
    description = {**folder.plan, "complete": True, "count": count, "dropped": dict(left_out)}
    folder.describe(description)
    return description


def _encode_rows(
    images: ImageSet, encode: Encode, plan: dict[str, Any], rows: range, batch_size: int, report: Report
) -> tuple[Tensor, dict[str, Any]]:
    """The latents of one file, and its captions and counts."""
    latents, captions = [torch.empty(0, *plan["shape"], dtype=torch.float16)], []
    dropped: Counter[str] = Counter()
    for chunk in chunks(rows, batch_size):
        usable: dict[int, Tensor] = {}
        for index in chunk:
            try:
                batch = images.batch(torch.tensor([index]))
            except Unusable as error:
                dropped[error.reason] += 1
                continue
            usable[index] = batch["image"]
            captions += batch["caption"]
        if usable:
            noise = [torch.randn(plan["shape"], generator=generator(plan["seed"], "latent", row)) for row in usable]
            latents.append(encode(torch.cat(list(usable.values())), torch.stack(noise)).half().cpu())
        report(chunk.stop - rows.start)
    return torch.cat(latents), {"captions": captions, "dropped": dropped}


def describe_dropped(dropped: dict[str, int]) -> str:
    """`dropped: 300 smaller than 1024 pixels, 2 unsafe`."""
    return "dropped: " + (", ".join(f"{number:,} {reason}" for reason, number in dropped.items()) or "none")


def is_latents(source: Path) -> bool:
    """Whether `write_latents` made this folder."""
    return (source / "latents.json").is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """The content of latents.json, or nothing where there is none; raises UserError if it is damaged."""
    return ShardFolder.open(folder, "latents", {}).plan if is_latents(folder) else {}


def load_latents(folder: Path, space: dict[str, Any]) -> LatentSet:
    """The latents in `folder`, for a model with this `latent_space`; raises UserError if they are not, or not whole."""
    wanted = {"autoencoder": ("autoencoder", space["autoencoder"]), "shape": ("size", space["shape"])}
    kept = ShardFolder.open(folder, "latents", wanted)
    if not kept.plan.get("complete"):
        raise UserError(f"{folder}: not all images are encoded yet; run the same `fewstep data latents` again")
    shards, captions = [], []
    for path in kept.files:
        tensors, facts = open_shard(path)
        with naming_damage(path):
            if tuple(tensors["latent"].shape) != (len(facts["captions"]), *space["shape"]):
                raise ValueError("it has other rows")
        shards.append(tensors)
        captions += facts["captions"]
    found = f"{folder}: {len(captions):,} latents with captions, of images of {space['image_size']} pixels"
    return LatentSet(Rows(shards), captions, found)


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
    return Rows([open_shard(path)[0] for path in kept.files])
