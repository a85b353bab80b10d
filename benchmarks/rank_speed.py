"""Seconds of a cycle by one rank and by two of one thread each, on this machine, in turn.

PYTHONPATH=src python benchmarks/rank_speed.py [ROUNDS] [ROWS ...]

The SDXL of 54 M parameters of cpu_step.py, at ROWS rows of latents a rank: two ranks compute twice the rows of one. A
cycle is the student's update and the critic's up to the next; every round has the next stop. Told are medians, and
of samples per second those of two over those of one. Of the digits `fewstep benchmark digits-4step` tells the same.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from cpu_step import sdxl

from fewstep.runtime import launching
from fewstep.runtime.distributed import joined, num_ranks, rank
from fewstep.training.dmd2 import DMD2


def child(rounds: int, rows: int) -> None:
    """The seconds of each cycle behind one that warms up, on standard output of the first rank."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), 5):
        one, batch_at, _ = sdxl("sdxl")
        total, own = rows * num_ranks(), range(rank() * rows, (rank() + 1) * rows)
        roles = type("Roles", (), {name: getattr(one, name) for name in ("teacher", "student", "critic")})
        roles.discriminator, roles.feature_layer = one.discriminator, one.feature_layer
        method = DMD2(one.settings, one.model, roles, 1000, total, seed=0)
        batch = {name: value.expand(rows, *value.shape[1:]) for name, value in batch_at(0, range(1)).items()}
        for cycle in range(rounds + 1):
            start = time.perf_counter()
            for step in range(5):
                method.step([(own, batch)], 5 * cycle + step, method.turn(5 * cycle + step, stop=cycle % 4))
            if cycle and rank() == 0:
                with Path(os.environ["SECONDS"]).open("a") as file:
                    file.write(f"{time.perf_counter() - start}\n")


def main(rounds: int, sizes: list[int]) -> None:
    launching.COMMAND = [sys.executable, __file__]
    print(
        "| rows a rank | one rank, s a cycle | two, s a cycle | samples a second of two over one |\n|--:|--:|--:|--:|"
    )
    for rows in sizes:
        found = []
        for num in (1, 2):
            with TemporaryDirectory() as place:
                os.environ |= {"SECONDS": f"{place}/seconds", "OMP_NUM_THREADS": "1"}
                assert launching.launch(["--child", str(rounds), str(rows)], num) == 0
                seconds = [float(line) for line in Path(place, "seconds").read_text().split()]
            found.append(statistics.median(seconds))
        one, two = found
        print(f"| {rows} | {one:.2f} | {two:.2f} | {2 * one / two:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*map(int, sys.argv[2:]))
    else:
        main(int((sys.argv[1:] or ["4"])[0]), [*map(int, sys.argv[2:])] or [1, 2, 4])
