"""`fewstep benchmark`: how fast a distillation is on this machine."""

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fewstep.commands.options import Benchmark as Order
from fewstep.commands.places import check_writable, free_place
from fewstep.commands.runs import pick_device
from fewstep.commands.teachers import find_outline
from fewstep.errors import UserError
from fewstep.files import write_text
from fewstep.networks.precision import DTYPES
from fewstep.recipes.schema import DistillRecipe
from fewstep.training.benchmarking import Timing, make_method, matrix_rate, parts_of, time_cycles
from fewstep.training.optimization import check_optimizer
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
    found = plan(recipe, outline)
    if (memory := _memory(device)) < found.peak:
        has, takes = f"{memory / GB:.1f} GB", f"{found.peak / GB:.1f} GB ({found.where})"
        raise UserError(f"device: has {has}, and this recipe takes {takes}; ask `fewstep plan` what takes less")
    method = make_method(recipe, outline, device)
    timing = time_cycles(method, parts_of(recipe, outline, device), asked.cycles)
    rate = matrix_rate(device, DTYPES[recipe.precision])
    facts, numbers = {**_machine(device), "teacher": told}, _numbers(recipe, timing, found.cycle, rate)
    print(f"{asked.recipe}: {told}, batches of {recipe.batch_size}, {recipe.precision}, on {facts['device']}")
    Console().print(_table(numbers))
    print(*_lines(recipe, timing, rate), sep="\n")
    if asked.out:
        write_text(asked.out, json.dumps({**facts, "settings": asked.set_, **numbers}, indent=2) + "\n")
        print(f"wrote {asked.out}")


def _memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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


def _table(numbers: dict[str, Any]) -> Table:
    table = Table("", "eager", show_header=True)
    for title, text in {
        "seconds a cycle": f"{numbers['seconds_per_cycle']:.3g}",
        "samples a second": f"{numbers['samples_per_second']:.3g}",
        "peak memory, GB": f"{numbers['peak_memory_gb']:.3g}",
        "TFLOP a cycle": f"{numbers['tflop_per_cycle']:.3g}",
        "TFLOP/s": f"{numbers['tflops']:.3g}",
        "of products of matrices": f"{numbers['utilisation']:.1%}",
        "operations started": f"{numbers['operations']:,.0f}",
        "time in kernels": "–" if numbers["busy"] is None else f"{numbers['busy']:.0%}",
    }.items():
        table.add_row(title, text)
    return table


def _lines(recipe: DistillRecipe, timing: Timing, rate: float) -> Iterator[str]:
    least, most = min(timing.seconds), max(timing.seconds)
    yield (
        f"{len(timing.seconds)} cycles of {recipe.student_every} steps, {least:.3g} to {most:.3g} s each, all stops "
        f"equally often; products of matrices reach {rate / 1e12:.3g} TFLOP/s here"
    )
    if recipe.regression_weight:
        yield "the losses on pairs (regression_weight) are left out"
