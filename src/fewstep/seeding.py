"""Randomness as a function of (seed, purpose, step, rank), so that resuming is exact and ranks need not talk."""

import hashlib

import torch


def generator(
    seed: int, purpose: str, step: int = 0, rank: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator for one purpose at one step; leave `rank` at 0 for what all ranks must draw alike."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{rank}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
