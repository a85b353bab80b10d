"""What a run waits for a checkpoint, as a share of one with a checkpoint per 500 steps, with any source tree.

PYTHONPATH=src python benchmarks/checkpoint_seconds.py [SAVES] [SYSTEM ...]

One thread of training, float32. Told per checkpoint: seconds until training goes on, seconds until it is whole, what
steps beside a write take longer than others, the share of 500 steps, the state's size, and the memory at its highest
above that of training alone. The first checkpoint, which also writes what is not trained, stands in a row of its own.
"""

import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from cpu_step import digits, sdxl

from fewstep.runtime.sharding import share_of
from fewstep.runtime.tracking import Metrics
from fewstep.training import loop
from fewstep.training.guard import Guard
from fewstep.training.settings import EvaluationSettings

STEPS = 10  # between two checkpoints here; a rate of a checkpoint per 500 is reckoned from it
EVERY = 500


def memory(reset=False):
    """MB, now and at the highest since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return [int(lines[name].split()[0]) / 1e3 for name in ("VmRSS", "VmHWM")]


class Run:
    def __init__(self, name, folder):
        torch.manual_seed(0)
        self.method, self.batch_at, self.size = (digits if "digits" in name else sdxl)(name)
        self.metrics, self.guard, self.step, self.folder = Metrics(folder / "metrics.jsonl"), Guard(10), 0, folder
        self.writer = None
        with suppress(ImportError):  # of trees from before, which wait for all
            from fewstep.runtime.writing import Writer

            self.writer = Writer(folder)

    def train(self, until=None):
        """Seconds per step; of as many steps as `until` says are to come."""
        start, num = time.perf_counter(), 0
        while num < STEPS or (until and until()):
            part = [(range(self.size), self.batch_at(self.step, range(self.size)))]
            self.metrics.add(self.guard.add(self.method.step(part, self.step)))
            self.step, num = self.step + 1, num + 1
        self.metrics.sums, self.metrics.counts = {}, {}
        return (time.perf_counter() - start) / num

    def save(self):
        """Seconds until training goes on, and until all is written; MB above those of training alone."""
        memory(reset=True)
        now, _ = memory()
        start = time.perf_counter()
        loop._save(self.method, self.metrics, self.writer or self.folder, self.step, EvaluationSettings())
        waited = time.perf_counter() - start
        while self.writer and self.writer.thread.is_alive():
            time.sleep(0.001)
        whole = time.perf_counter() - start
        return waited, whole, memory()[1] - now

    def beside(self):
        """Seconds per step while a checkpoint is written, and until it is whole."""
        loop._save(self.method, self.metrics, self.writer, self.step, EvaluationSettings())
        return self.train(self.writer.thread.is_alive)


def main(saves, names):
    torch.set_num_threads(1)
    with suppress(ImportError):
        from fewstep.runtime.allocation import keep_freed_memory

        keep_freed_memory()
    print("| system | waited, s | whole, s | of 500 steps | s per step | beside a write | state, MB | peak, MB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            run = Run(name, Path(folder))
            run.train()
            seconds = run.train()
            state = share_of(run.method.state_dict(), 0, 1).num_bytes / 1e6
            found = []
            for each in range(saves + 1):
                found.append(run.save())
                if each in (0, saves):
                    waited, whole, peak = (statistics.median(column) for column in zip(*(found[-each:]), strict=True))
                    beside = f"{run.beside():.3f}" if run.writer else "–"
                    told = [f"{name}, {'later' if each else 'first'}", f"{waited:.3f}", f"{whole:.3f}"]
                    told += [f"{waited / (EVERY * seconds + waited):.3%}", f"{seconds:.3f}", beside]
                    print("|", " | ".join([*told, f"{state:.0f}", f"{peak:.0f}"]), "|", flush=True)
                run.train()


if __name__ == "__main__":
    main(int([*sys.argv, 5][1]), sys.argv[2:] or ("digits-1step", "digits-4step", "sdxl"))
