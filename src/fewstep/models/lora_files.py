"""LoRA files: safetensors with the low-rank changes of a network's weights, in one of several layouts."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.networks.lora import LoRA, LowRank

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # where diffusers looks for one
METADATA = "lora_adapter_metadata"  # in the header: JSON that diffusers hands to peft
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}


def write_diffusers_lora(path: Path, lora: LoRA, part: str, metadata: Mapping[str, str] | None = None) -> None:
    """In peft's names below the network's `part`, with alpha = rank, for readers without the metadata take scale 1."""
    plain = {name: change.with_alpha(change.rank) for name, change in sorted(lora.items())}
    tensors: dict[str, Tensor] = {}
    for name, change in plain.items():
        for piece, ending in PEFT.items():
            tensors[f"{part}.{name}.{ending}"] = getattr(change, piece).detach().contiguous()
    ranks = {name: change.rank for name, change in plain.items()}
    rank = max(ranks.values())
    odd = {name: each for name, each in ranks.items() if each != rank}
    config = {"r": rank, "lora_alpha": rank, "target_modules": list(plain), "rank_pattern": odd, "alpha_pattern": odd}
    told = {METADATA: json.dumps({f"{part}.{key}": value for key, value in config.items()})}
    save_file(tensors, path, {"format": "pt", **told, **(metadata or {})})


def read_lora(path: Path, part: str = "unet") -> dict[str, LowRank]:
    """The changes in a file of that layout."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, for it is no dict
    names = sorted(name.removesuffix(f".{PEFT['down']}") for name in tensors if name.endswith(PEFT["down"]))
    pairs = {name: [tensors[f"{name}.{ending}"] for ending in PEFT.values()] for name in names}
    return {name.removeprefix(f"{part}."): LowRank(down, up, down.shape[0]) for name, (down, up) in pairs.items()}
