"""`fewstep benchmark`: how fast a distillation is on this machine."""

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fewstep.commands.options import Benchmark as Order
from fewstep.commands.places import check_writable, free_place
from fewstep.commands.ranks import check_ranks
from fewstep.commands.runs import device_memory, pick_device
from fewstep.commands.teachers import find_outline
from fewstep.errors import UserError
from fewstep.files import write_text
from fewstep.models.outline import Outline
from fewstep.networks.compiling import prepare_compiling
from fewstep.networks.precision import DTYPES
from fewstep.recipes.schema import DistillRecipe
from fewstep.runtime.distributed import joined, num_ranks, rank, ranks_here
from fewstep.training.benchmarking import WAYS, Timing, make_method, matrix_rate, parts_of, time_ways
from fewstep.training.optimization import check_optimizer
from fewstep.training.parallel import check_shard
from fewstep.training.planning import plan

GB = 1e9


def benchmark(recipe: DistillRecipe, asked: Order) -> None:
    """Prints a table, and writes its numbers where that is asked for."""
    if recipe.kind != "distill":
        raise UserError(f"recipe {asked.recipe}: is of the kind {recipe.kind}; benchmarks are of distillations")
    if asked.out:
        free_place(asked.out, asked.out, Path.exists, asked.overwrite)
        check_writable(asked.out.parent)
    for optimizer in (recipe.student.optimizer, recipe.critic.optimizer):
        check_optimizer(optimizer)
    outline, told = find_outline(recipe, asked.recipe, asked.architecture)
    device = pick_device(recipe.device)
    with joined(device, recipe.parallel.stall_minutes):
        _measure(recipe, asked, outline, told, device)


def _measure(recipe: DistillRecipe, asked: Order, outline: Outline, told: str, device: torch.device) -> None:
    """On this rank; the first one tells."""
    num, here = num_ranks(), ranks_here()
    check_ranks(recipe, num)
    if shared := recipe.parallel.shard != "none":
        check_shard(recipe, num, here)
    ways, found = _ways(asked.ways, device, shared), plan(recipe, outline, num_ranks=num, machines=num // here)
    memory = device_memory(device) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory < found.peak:
        has, takes = f"{memory / GB:.1f} GB", f"{found.peak / GB:.1f} GB ({found.where})"
        raise UserError(f"device: has {has}, and this recipe takes {takes}; ask `fewstep plan` what takes less")
    method = make_method(recipe, outline, device)
    rate, facts = matrix_rate(device, DTYPES[recipe.precision]), {**_machine(device), "teacher": told}
    facts |= {"ranks": num, "shard": recipe.parallel.shard}
    each = f" by {num} ranks" if num > 1 else ""
    print(f"{asked.recipe}: {told}, batches of {recipe.batch_size}{each}, {recipe.precision}, on {facts['device']}")
    numbers: dict[str, dict[str, Any]] = {}
    for way, timing in time_ways(method, parts_of(recipe, outline, device), asked.cycles, ways):
        if isinstance(timing, str):
            print(f"{way}: {timing}")
        else:
            numbers[way] = _numbers(recipe, timing, found.cycle, rate)
    Console().print(_table(numbers))
    print(*_lines(recipe, numbers, rate), sep="\n")
    if asked.out and rank() == 0:
        write_text(asked.out, json.dumps({**facts, "settings": asked.set_, "ways": numbers}, indent=2) + "\n")
        print(f"wrote {asked.out}")


def _ways(asked: str | None, device: torch.device, shared: bool) -> Sequence[str]:
    """Those that are asked for, or all of a GPU; raises UserError for others."""
    ways = asked.split(",") if asked else WAYS if device.type == "cuda" and not shared else WAYS[:1]
    if unknown := [way for way in ways if way not in WAYS]:
        raise UserError(f"--ways {unknown[0]!r}: write some of {', '.join(WAYS)}")
    if device.type != "cuda" and (of_cuda := [way for way in ways if "graphs" in way]):
        raise UserError(f"--ways {of_cuda[0]}: is for CUDA; here are eager and compiled")
    if shared and [*ways] != ["eager"]:
        raise UserError(f"--ways {asked}: ranks that share weights are timed eager alone")
    if any("compiled" in way for way in ways):
        prepare_compiling(device)
    return ways


def _machine(device: torch.device) -> dict[str, Any]:
    """Of what the numbers are."""
    host = {"host": platform.processor() or platform.machine(), "torch": torch.__version__}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **host}
    threads = torch.get_num_threads()
    return {"device": f"the CPU, {threads} thread{'s' * (threads > 1)}", **host, "threads": threads}


def _numbers(recipe: DistillRecipe, timing: Timing, cycle: float, rate: float) -> dict[str, Any]:
    """By name; operations and their rate are of floating-point numbers but for `operations`."""
    return {
        "seconds_per_cycle": timing.cycle,
        "seconds": timing.seconds,
        "samples_per_second": recipe.batch_size * recipe.student_every / timing.cycle,
        "peak_memory_gb": timing.peak / GB,
        "tflop_per_cycle": cycle / 1e12,
        "tflops": cycle / timing.cycle / 1e12,
        "matrix_tflops": rate / 1e12,
        "utilisation": cycle / timing.cycle / rate,
        "operations": timing.operations,
        "busy": timing.busy,
    }


ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "seconds a cycle": lambda numbers: f"{numbers['seconds_per_cycle']:.3g}",
    "least and most": lambda numbers: f"{min(numbers['seconds']):.3g} to {max(numbers['seconds']):.3g}",
    "samples a second": lambda numbers: f"{numbers['samples_per_second']:.3g}",
    "peak memory, GB": lambda numbers: f"{numbers['peak_memory_gb']:.3g}",
    "TFLOP a cycle": lambda numbers: f"{numbers['tflop_per_cycle']:.3g}",
    "TFLOP/s": lambda numbers: f"{numbers['tflops']:.3g}",
    "of products of matrices": lambda numbers: f"{numbers['utilisation']:.1%}",
    "operations started": lambda numbers: f"{numbers['operations']:,.0f}",
    "time in kernels": lambda numbers: "–" if numbers["busy"] is None else f"{numbers['busy']:.0%}",
}


def _table(numbers: dict[str, dict[str, Any]]) -> Table:
    table = Table("", *numbers, show_header=True)
    for title, told in ROWS.items():
        table.add_row(title, *map(told, numbers.values()))
    return table


def _lines(recipe: DistillRecipe, numbers: dict[str, dict[str, Any]], rate: float) -> Iterator[str]:
    num, student = len(next(iter(numbers.values()))["seconds"]), recipe.student
    shared = student.stops == "shared" and student.timesteps != "random" and student.num_timesteps > 1
    stops = ", all stops equally often" if shared else ""
    reach = f"products of matrices reach {rate / 1e12:.3g} TFLOP/s here"
    yield f"{num} cycles of {recipe.student_every} steps{stops}; {reach}"
    if num_ranks() > 1:
        yield f"peak memory, TFLOP and operations are those of the first of {num_ranks()} ranks"
    if len(numbers) > 1 and "eager" in numbers:
        own = {way: each["seconds_per_cycle"] for way, each in numbers.items()}
        yield ", ".join(f"{way} {own['eager'] / own[way]:.2f} times as fast" for way in own if way != "eager")
    if recipe.regression_weight:
        yield "the losses on pairs (regression_weight) are left out"
