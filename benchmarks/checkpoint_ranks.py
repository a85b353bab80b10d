"""What ranks wait for a checkpoint, what each copies, writes and reads of it, and the memory that this takes.

PYTHONPATH=src python benchmarks/checkpoint_ranks.py [RANKS] [WIDTH]

Ranks of one thread on one CPU, gloo, float32: a distillation of pixels with a GAN and two averages, replicated and
with shared weights, trained for one step. Told per rank: seconds until training goes on, of a run's first checkpoint
and of later ones, and until it is whole; MB copied, the most MB that were held above those of training, and MB written;
then, in new processes, seconds of resuming, the MB that method and state hold behind it, and how many more were held
on the way. MB held are anonymous memory, looked at every millisecond: not what is mapped from files.
"""

import ctypes
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

import torch

from fewstep.embedded.sources import digits
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.checkpoint import checkpoints
from fewstep.runtime.distributed import joined, num_ranks, rank
from fewstep.runtime.tracking import Metrics
from fewstep.runtime.writing import Writer
from fewstep.training import loop
from fewstep.training.batches import image_batches
from fewstep.training.dmd2 import DMD2
from fewstep.training.parallel import divide
from fewstep.training.roles import make_roles
from fewstep.training.settings import EvaluationSettings, ParallelSettings

PORT = 29617


def method_of(kind, width):
    recipe = load_recipe("digits-4step", ["student.ema_decay=[0.99, 0.9]", "batch_size=4"])
    config = load_recipe("digits-teacher", [f"model.block_out_channels=[{width}, {2 * width}]"]).model
    torch.manual_seed(0)
    roles = make_roles(PixelModel(config, build_unet(config)), num_stops=4, divided=kind != "none")
    shared = ParallelSettings(shard=kind)
    units = divide(roles, shared, torch.device("cpu"), torch.float32, True) if kind != "none" else None
    model = PixelModel(config, build_unet(config))
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, seed=0)
    return (units.given_to(method) if units else method), image_batches(digits(), recipe)


def anonymous():
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
    return held()


def held():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) / 1e3


class Watched:
    """Inside, the most anonymous memory, in MB."""

    def __enter__(self):
        self.most, self.on = held(), True
        self.thread = Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while self.on:
            self.most = max(self.most, held())
            time.sleep(0.001)

    def __exit__(self, *error):
        self.on = False
        self.thread.join()


def write(run, kind, width):
    method, batch_at = method_of(kind, width)
    rows = range(4)[rank() * 4 // num_ranks() : (rank() + 1) * 4 // num_ranks()]
    method.step([(rows, batch_at(0, rows))], 0)
    live, found = anonymous(), []
    with Writer(run) as writer, Watched() as watched:
        for step in (1, 2, 3):
            start = time.perf_counter()
            loop._save(method, Metrics(None), writer, step, EvaluationSettings())
            waited = time.perf_counter() - start
            while writer.thread and writer.thread.is_alive():
                time.sleep(0.001)
            found.append((waited, time.perf_counter() - start))
    copied = sum(buffer.nbytes for buffer in writer.buffers.values()) / 1e6
    first, later, whole = found[0][0], min(each[0] for each in found[1:]), min(each[1] for each in found[1:])
    return f"{first:.2f} | {later:.2f} | {whole:.1f} | {copied:.0f} | {watched.most - live:.0f}"


def read(run, kind, width):
    before, (method, _) = anonymous(), method_of(kind, width)
    given = [method, Metrics(None), run, rank() == 0][: len(inspect.signature(loop._resume).parameters)]
    with Watched() as watched:
        start = time.perf_counter()
        loop._resume(*given)
        seconds = time.perf_counter() - start
    behind = anonymous()
    return f"{seconds:.1f} | {behind - before:.0f} | {watched.most - behind:.0f}"


def work(number, num, job, run, kind, width, answers):
    told = {"RANK": number, "WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    os.environ |= {name: str(value) for name, value in told.items()}
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), stall_minutes=10):
        answers.put((number, job(run, kind, width)))


def of_ranks(num, *given):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    started = [spawn.Process(target=work, args=(number, num, *given, answers)) for number in range(num)]
    for process in started:
        process.start()
    found = dict(answers.get() for _ in started)
    for process in started:
        process.join()
    return [found[number] for number in range(num)]


def main(num, width):
    print(
        "| way | rank | waited first, s | later, s | whole, s | copied, MB | above training, MB | shard, MB |", end=""
    )
    print(" resumed, s | held, MB | and on the way, MB |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for kind in ("none", "full") if num > 1 else ("none",):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            written = of_ranks(num, write, Path(folder), kind, width)
            shards = sorted((checkpoints(Path(folder))[-1] / "state").glob("*.safetensors"))
            sizes = [f"{path.stat().st_size / 1e6:.0f}" for path in shards] + ["0"] * num
            resumed = of_ranks(num, read, Path(folder), kind, width)
            for number in range(num):
                cells = [kind, str(number), written[number], sizes[number], resumed[number]]
                print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(int([*sys.argv, 2][1]), int([*sys.argv, 2, 192][2]))
