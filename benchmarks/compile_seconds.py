"""CPU seconds of a cycle (1 student and the critic's updates), eager against blocks compiled in place.

PYTHONPATH=src:benchmarks python benchmarks/compile_seconds.py ROUNDS NAME...

NAME is a recipe of pixels, of which the shapes and the batch are taken, or full, lean or official: the small SDXL of
lora_seconds.py. One thread, float32, random weights. Eager and compiled take turns, cycle by cycle in one process, on
one and the same method, and draw the same stops. A second run finds what the first has compiled in its cache.
"""

import statistics
import sys
import time

import lora_seconds
import torch

from fewstep.commands.teachers import find_outline
from fewstep.networks.compiling import prepare_compiling
from fewstep.recipes.loading import load_recipe
from fewstep.training.benchmarking import make_method, parts_of
from fewstep.training.roles import compile_roles, uncompile_roles

LORA = {name: {"rank": 16, "alpha": 16, "targets": name} for name in ("lean", "official")}


def make(name):
    """A method and the parts of its batch."""
    if name == "full" or name in LORA:
        method = lora_seconds.make(LORA.get(name), "step")
        text = method.model.text_condition(["a cat"])
        batch = {"latent": torch.randn(1, *method.model.shape), "text": text["text"], "pooled": text["pooled"]}
        return method, [(range(1), batch)]
    recipe, cpu = load_recipe(name, []), torch.device("cpu")
    outline, _ = find_outline(recipe, name, None)
    return make_method(recipe, outline, cpu), parts_of(recipe, outline, cpu)


def cycle(method, parts, number):
    every = method.settings.student_every
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(every * number, every * (number + 1)):
        method.step(parts, step)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(name, rounds):
    method, parts = make(name)
    warm = range(len(method.timesteps) + 1)  # of all stops, as far as they are drawn
    for number in warm:
        cycle(method, parts, number)
    blocks = compile_roles(method)
    first = sum(cycle(method, parts, number)[0] for number in warm)
    uncompile_roles(method)
    found = {"eager": [], "compiled": []}
    for number in range(len(warm), len(warm) + rounds):
        for how in sorted(found, reverse=number % 2 == 1):
            if how == "compiled":
                compile_roles(method)
            found[how].append(cycle(method, parts, number)[1])
            uncompile_roles(method)
    ratios = [ours / eager for ours, eager in zip(found["compiled"], found["eager"], strict=True)]
    size = sum(p.numel() for p in method.teacher.parameters()) / 1e6
    cells = [f"{statistics.median(seconds):.3f}" for seconds in found.values()]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print("|", " | ".join([name, f"{size:.1f}", str(blocks), *cells, spread, f"{first:.0f}"]), "|", flush=True)


def main(rounds, names):
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {prepare_compiling(torch.device('cpu'))}\n")
    print("| what | M | blocks | eager, CPU s | compiled | of eager, median (min to max) | first cycles, s |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in names:
        torch._dynamo.reset()
        measure(name, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
