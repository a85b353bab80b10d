"""Latents on disk: a function of (seed, image) whatever the batches and stops, and only for the model they are of."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.data import latents as module
from fewstep.data.images import ImageSet, Unusable
from fewstep.data.latents import is_latents, load_latents, write_latents
from fewstep.errors import UserError
from fewstep.seeding import generator

NUM = 11
SPACE = {"autoencoder": "a1", "shape": [4, 2, 2], "image_size": 4}


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 4)


def captioned(broken: tuple[int, ...] = ()) -> ImageSet:
    """Image i is all i; those that are `broken` can't be fetched."""

    def fetch(indices: Tensor) -> Tensor:
        for index in indices.tolist():
            if index in broken:
                raise Unusable(f"image {index}", "not a readable 8-bit image")
        return indices.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)

    return ImageSet(fetch, None, NUM, [f"caption {index}" for index in range(NUM)])


def encode(images: Tensor, noise: Tensor) -> Tensor:
    return images.float().mean(dim=(1, 2, 3))[:, None, None, None] + 0.1 * noise


def latent(index: int, seed: int = 0) -> Tensor:
    return (index + 0.1 * torch.randn(4, 2, 2, generator=generator(seed, "latent", index))).half()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killing(after: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[Tensor, Tensor], Tensor]:
    """An encoder that dies at its call number `after`."""
    calls = iter(range(after))

    def encoder(images: Tensor, noise: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise error
        return encode(images, noise)

    return encoder


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_batch_holds_latents_and_captions_of_its_images(batch_size: int, tmp_path: Path) -> None:
    description = write_latents(captioned(), encode, SPACE, tmp_path / "out", seed=5, batch_size=batch_size)
    assert (description["count"], description["dropped"]) == (NUM, {})
    latents = load_latents(tmp_path / "out", SPACE)
    batch = latents.batch(torch.tensor([10, 0, 4, 4, 7]))
    assert batch["caption"] == ["caption 10", "caption 0", "caption 4", "caption 4", "caption 7"]
    assert batch["latent"].dtype == torch.float16
    assert torch.equal(batch["latent"], torch.stack([latent(index, seed=5) for index in (10, 0, 4, 4, 7)]))
    assert latents.length == NUM


@pytest.mark.parametrize("after", range(6))
def test_a_stopped_run_goes_on_to_the_same_bytes(after: int, tmp_path: Path) -> None:
    write_latents(captioned(), encode, SPACE, tmp_path / "whole", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        write_latents(captioned(), killing(after), SPACE, tmp_path / "parts", batch_size=2)
    with pytest.raises(UserError, match="not all images are encoded yet; run the same"):
        load_latents(tmp_path / "parts", SPACE)
    assert sum(path.suffix == ".safetensors" for path in (tmp_path / "parts").iterdir()) == after // 2
    (tmp_path / "parts" / ".00001.safetensors.1234.tmp").write_bytes(b"torn")
    finished: list[int] = []
    write_latents(captioned(), encode, SPACE, tmp_path / "parts", batch_size=2, report=finished.append)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert finished == sorted(finished)
    assert finished[-1] == NUM


def test_a_finished_folder_is_not_encoded_again(tmp_path: Path) -> None:
    write_latents(captioned(), encode, SPACE, tmp_path / "out")
    before = files(tmp_path / "out")
    write_latents(captioned(), killing(0), SPACE, tmp_path / "out")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("broken", [(0,), (4, 5, 6, 7), (3, 10)])
def test_unusable_images_are_left_out_and_counted(broken: tuple[int, ...], tmp_path: Path) -> None:
    description = write_latents(captioned(broken), encode, SPACE, tmp_path / "out", dropped={"unsafe": 7}, batch_size=3)
    assert description["count"] == NUM - len(broken)
    assert description["dropped"] == {"unsafe": 7, "not a readable 8-bit image": len(broken)}
    assert json.loads((tmp_path / "out" / "latents.json").read_text()) == description
    latents = load_latents(tmp_path / "out", SPACE)
    kept = [index for index in range(NUM) if index not in broken]
    assert latents.captions == [f"caption {index}" for index in kept]
    everything = latents.batch(torch.arange(latents.length))["latent"]
    assert torch.equal(everything, torch.stack([latent(index) for index in kept]))


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image is left; dropped: 11 not a readable"):
        write_latents(captioned(tuple(range(NUM))), encode, SPACE, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"settings": {"min_side": 512}}, "min_side: 1024 -> 512"),
        ({"space": SPACE | {"autoencoder": "b2"}}, "autoencoder: a1 -> b2"),
        ({"images": replace(captioned(), captions=["caption"] * NUM)}, "captions: [0-9a-f]{16} -> [0-9a-f]{16}"),
        ({"images": replace(captioned(), length=NUM - 1)}, "num_images: 11 -> 10"),
    ],
)
def test_changed_settings_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    arguments = {"images": captioned(), "encode": encode, "space": SPACE, "settings": {"min_side": 1024}}
    write_latents(out=tmp_path, **arguments)
    before = files(tmp_path)
    with pytest.raises(UserError, match=message):
        write_latents(out=tmp_path, **(arguments | change))
    assert files(tmp_path) == before


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        write_latents(captioned(), encode, SPACE, tmp_path)
    assert list(files(tmp_path)) == ["thesis.tex"]
    assert not is_latents(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder": "b2"}, "another autoencoder .a1. than asked for .b2"),
        ({"shape": [4, 3, 3]}, r"another size .\[4, 2, 2\]. than asked for .\[4, 3, 3\]"),
    ],
)
def test_latents_of_another_model_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    write_latents(captioned(), encode, SPACE, tmp_path)
    with pytest.raises(UserError, match=message):
        load_latents(tmp_path, SPACE | change)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, None])
def test_a_damaged_or_missing_file_is_named_and_made_anew(keep: int | None, tmp_path: Path) -> None:
    write_latents(captioned(), encode, SPACE, tmp_path)
    before = files(tmp_path)
    path = tmp_path / "00001.safetensors"
    path.unlink() if keep is None else path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"00001\.safetensors: missing or damaged"):
        load_latents(tmp_path, SPACE)
    path.unlink(missing_ok=True)
    write_latents(captioned(), encode, SPACE, tmp_path)
    assert files(tmp_path) == before


def test_files_are_mapped_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 1024)

    def big(images: Tensor, noise: Tensor) -> Tensor:
        return images.float().mean(dim=(1, 2, 3))[:, None, None, None].expand(-1, 4, 1024, 1024)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    space = SPACE | {"shape": [4, 1024, 1024]}  # 8 MB an image
    write_latents(captioned(), big, space, tmp_path)
    before = resident()
    latents = load_latents(tmp_path, space)
    assert latents.batch(torch.tensor([3]))["latent"].unique().tolist() == [3]
    assert resident() - before < 40
