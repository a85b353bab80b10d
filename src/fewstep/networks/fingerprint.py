"""Hashes of networks: two that agree compute the same."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn


def fingerprint(
    networks: Iterable[nn.Module], *facts: object, first: int | None = None, dtype: torch.dtype | None = None
) -> str:
    """16 hex digits of the names, types, shapes and values of all weights, and of further facts by their repr.

    With `first`, of as many values of each weight only: no proof of equality, but quick for networks of any size. With
    `dtype` as if all weights were in it.
    """
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8)
    for network in networks:
        for name, value in network.state_dict().items():
            digest.update(f"{name} {dtype or value.dtype} {tuple(value.shape)}".encode())
            # bytes, so that bfloat16, which numpy does not know, will do, too
            digest.update(value.detach().reshape(-1)[:first].to(dtype).cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
