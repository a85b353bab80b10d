"""Latents on disk: a function of (seed, image) whatever the batches and stops, and only for the model they are of."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.data.latents import write_latents
from fewstep.data.shards import open_shard, save_shard
from fewstep.errors import UserError
from fewstep.seeding import generator
from kept_rows import NUM, SPACE, captioned, encode, load_latents


def latent(index: int, seed: int = 5) -> Tensor:
    return (index + 0.1 * torch.randn(4, 2, 2, generator=generator(seed, "latent", index))).half()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_batch_holds_latents_and_captions_of_its_images(batch_size: int, tmp_path: Path) -> None:
    description = write_latents(captioned(), encode, SPACE, tmp_path / "out", batch_size=batch_size)
    assert (description["count"], description["dropped"]) == (NUM, {})
    latents = load_latents(tmp_path / "out")
    batch = latents.batch(torch.tensor([10, 0, 4, 4, 7]))
    assert batch["caption"] == ["caption 10", "caption 0", "caption 4", "caption 4", "caption 7"]
    assert batch["latent"].dtype == torch.float16
    assert torch.equal(batch["latent"], torch.stack([latent(index) for index in (10, 0, 4, 4, 7)]))
    assert latents.length == NUM


@pytest.mark.parametrize("broken", [(0,), (4, 5, 6, 7), (3, 10)])
def test_unusable_images_are_left_out_and_counted(broken: tuple[int, ...], tmp_path: Path) -> None:
    description = write_latents(captioned(broken), encode, SPACE, tmp_path / "out", dropped={"unsafe": 7}, batch_size=3)
    assert description["count"] == NUM - len(broken)
    assert description["dropped"] == {"unsafe": 7, "not a readable 8-bit image": len(broken)}
    assert json.loads((tmp_path / "out" / "latents.json").read_text()) == description
    latents = load_latents(tmp_path / "out")
    kept = [index for index in range(NUM) if index not in broken]
    assert latents.captions == [f"caption {index}" for index in kept]
    everything = latents.batch(torch.arange(latents.length))["latent"]
    assert torch.equal(everything, torch.stack([latent(index) for index in kept]))


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image is left; dropped: 11 not a readable"):
        write_latents(captioned(tuple(range(NUM))), encode, SPACE, tmp_path / "out")


def test_a_file_with_fewer_captions_than_latents_is_damaged(tmp_path: Path) -> None:
    write_latents(captioned(), encode, SPACE, tmp_path)
    tensors, facts = open_shard(tmp_path / "00002.safetensors")
    save_shard(tmp_path / "00002.safetensors", tensors, {**facts, "captions": facts["captions"][1:]})
    with pytest.raises(UserError, match=r"00002\.safetensors: missing or damaged"):
        load_latents(tmp_path)
