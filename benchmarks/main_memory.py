"""CPU seconds of a cycle of DMD2 of a small SDXL, with the student updated and averaged in main memory, and without.

PYTHONPATH=src:benchmarks python benchmarks/main_memory.py [ROUNDS]

One thread, float32, batch 1, one average; both take turns cycle by cycle in one process, with the same stops, medians
of CPU time. Here main memory is the device's own: what is told are copies of memory, not a way over PCIe.
"""

import statistics
import sys
import time

import torch
from lora_seconds import SETTINGS, make

from fewstep.runtime.ema import EMA
from fewstep.runtime.main_memory import MainMemory
from fewstep.training.optimization import Optimizer
from fewstep.training.parallel import offload

SETTINGS["student"]["ema_decay"] = 0.999
WORK = {
    "gradients to main memory": (MainMemory, "take"),
    "AdamW": (Optimizer, "_update"),
    "weights back": (MainMemory, "give"),
    "averages": (EMA, "update"),
}


def timed(seconds, owner, name):
    """Has a method note what each of its calls takes."""
    function = getattr(owner, name)

    def call(self, *given):
        start = time.process_time()
        found = function(self, *given)
        seconds.append((self, time.process_time() - start))
        return found

    setattr(owner, name, call)


def main(rounds):
    torch.set_num_threads(1)
    methods = {"on the device": make(None, "step"), "in main memory": make(None, "step")}
    moved = methods["in main memory"]
    print(f"offloaded: {offload(moved) / 1e6:.0f} MB")
    text = moved.model.text_condition(["a cat"])
    batch = {"latent": torch.randn(1, *moved.model.shape), "text": text["text"], "pooled": text["pooled"]}
    for method in methods.values():
        method.step([(range(1), batch)], 0)  # warms up
    found = {name: [] for name in WORK}
    for name, (owner, method) in WORK.items():
        timed(found[name], owner, method)
    seconds = {name: [] for name in methods}
    for each in range(1, rounds + 1):
        for name in sorted(methods, reverse=bool(each % 2)):
            start = time.process_time()
            for step in range(5 * each, 5 * each + 5):
                methods[name].step([(range(1), batch)], step)
            seconds[name].append(time.process_time() - start)
    states = [method.state_dict()["student"] for method in methods.values()]
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))
    table(methods, seconds, found)


def table(methods, seconds, found):
    ours = methods["in main memory"]
    num = sum(p.numel() for p in ours.student.parameters()) / 1e6
    ratios = [a / b for a, b in zip(seconds["in main memory"], seconds["on the device"], strict=True)]
    print(f"{num:.1f} M parameters, torch {torch.__version__}, {len(ratios)} rounds\n\n| | median CPU s |\n|---|--:|")
    for name, each in seconds.items():
        print(f"| a cycle, {name} | {statistics.median(each):.2f} |")
    print(f"| the ratio of a round | {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |")
    of_ours = (ours.student_optimizer, ours.student_optimizer.main_memory, ours.ema)
    for name, calls in found.items():
        each = statistics.median([taken for owner, taken in calls if any(owner is one for one in of_ours)])
        print(f"| {name} | {each:.3f}, {1e3 * each / num:.2f} ms per million weights |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
