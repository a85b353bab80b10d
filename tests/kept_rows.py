"""Latents and pairs as tests make them: 11 rows, each a function of its number, in the files of tests/data/conftest."""

from pathlib import Path

import torch
from torch import Tensor

from fewstep.data import latents, pairs
from fewstep.data.decoding import Unusable
from fewstep.data.images import ImageSet

NUM = 11
SPACE = {"autoencoder": "a1", "shape": [4, 2, 2], "image_size": 4, "seed": 5, "min_side": 1024}
PLAN = {"teacher": "a1", "sampler": "euler:50@8", "shape": [2, 3, 3], "seed": 5, "num_pairs": NUM}
PROMPTS: pairs.Given = {"prompt": [f"prompt {index}" for index in range(NUM)]}
CAPTIONS = [f"caption {index}" for index in range(NUM)]


def captioned(broken: tuple[int, ...] = ()) -> ImageSet:
    """Image i is all i; those that are `broken` can't be fetched."""

    def fetch(indices: Tensor) -> Tensor:
        for index in indices.tolist():
            if index in broken:
                raise Unusable(f"image {index}", "not a readable 8-bit image")
        return indices.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)

    return ImageSet(fetch, None, NUM, CAPTIONS)


def encode(images: Tensor, noise: Tensor) -> Tensor:
    return images.float().mean(dim=(1, 2, 3))[:, None, None, None] + 0.1 * noise


def draw(noise: Tensor, given: pairs.Given) -> Tensor:
    """x0 depends on the noise and on the number that is in the prompt."""
    numbers = torch.tensor([float(text.split()[1]) for text in given["prompt"]])
    return noise.square() + numbers[:, None, None, None]


def load_latents(out: Path, **asked: object) -> latents.LatentSet:
    return latents.load_latents(out, SPACE | asked)


def load_pairs(out: Path, teacher: str = "a1", sampler: str = "euler:50@8", shape: tuple = (2, 3, 3)) -> pairs.PairSet:
    return pairs.load_pairs(out, teacher, sampler, shape)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
