"""`fewstep benchmark`: the recipe's own steps, on random weights, and numbers that hold."""

import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from command_line import fewstep, refused
from fewstep.commands.teachers import of_recipe
from fewstep.recipes.loading import load_recipe
from fewstep.training.benchmarking import make_method, matrix_rate, parts_of, time_cycles, time_ways
from fewstep.training.fakes import Turn
from fewstep.training.planning import plan
from replays import CPU as Recording  # noqa: N811 - in place of a GPU

CPU = torch.device("cpu")
FEW = ["batch_size=4", "device=cpu"]
SMALL = ["model.block_out_channels=[8, 8]", "model.norm_num_groups=4"]
TWO = ["student.num_timesteps=2", "student.timesteps=null"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_cycle_is_what_the_recipe_does_with_numbers_that_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    away = "parallel.offload_student_optimizer=true"
    recipe = load_recipe("digits-4step", [*FEW, "student_every=2", "accumulate=2", *TWO, away])
    outline = of_recipe(load_recipe("digits-teacher", SMALL))
    method, parts = make_method(recipe, outline, CPU), parts_of(recipe, outline, CPU)
    assert [rows for rows, _ in parts] == [range(2), range(2, 4)]
    assert method.student_optimizer.main_memory
    assert all(p.isfinite().all() and p.device == CPU for p in method.student.parameters())
    seen, lines = Counter[tuple[int, int]](), []
    step = method.step

    def watched(given: list, number: int, turn: Turn, run: object) -> dict:
        seen[turn.stop, number % 2] += 1
        lines.append(step(given, number, turn, run))
        return lines[-1]

    method.step = watched
    timing = time_cycles(method, parts, 3)
    assert len(timing.seconds) == 4  # at least three, both stops equally often
    assert seen == {(stop, number): 4 for stop in range(2) for number in range(2)}  # to warm up, twice, counted
    assert all(line[name] == 0 for line in lines for name in line if name.startswith("skipped"))
    assert all(line["denoising_loss"].isfinite() for line in lines)
    assert timing.cycle == pytest.approx(sum(timing.seconds) / 4)
    assert timing.operations > 1000
    assert timing.busy is None
    assert timing.peak > 1e8


def test_ways_are_timed_in_turn_and_one_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("digits-4step", [*FEW, "student_every=2", *TWO])
    outline, machines = of_recipe(load_recipe("digits-teacher", SMALL)), []
    monkeypatch.setattr(
        "fewstep.training.benchmarking.CUDA", lambda device: (machines.append(Recording()), machines[-1])[1]
    )
    method = make_method(recipe, outline, CPU)
    found = dict(time_ways(method, parts_of(recipe, outline, CPU), 3, ["eager", "graphs"]))
    assert [len(timing.seconds) for timing in found.values()] == [4, 4]
    assert machines[0].recorded == 4  # kinds of steps: two stops, of student and critic
    assert machines[0].replays == 8 + 4  # those that are timed, and those whose operations are counted
    monkeypatch.setattr(Recording, "record", lambda self, function: (_ for _ in ()).throw(RuntimeError("refused")))
    ((_, told),) = time_ways(method, parts_of(recipe, outline, CPU), 1, ["graphs"])
    assert told == "graphs: off, a step can't be recorded (RuntimeError: refused)"


@pytest.mark.parametrize(
    "stops", [["student.stops=mixed"], ["student.timesteps=random", "critic.condition_on_stop=false"]]
)
def test_samples_at_several_stops_or_at_random_times_are_timed_as_they_are_drawn(stops: list[str]) -> None:
    recipe = load_recipe("digits-4step", [*FEW, "student_every=2", *TWO, *stops])
    outline = of_recipe(load_recipe("digits-teacher", SMALL))
    method = make_method(recipe, outline, CPU)
    assert len(time_cycles(method, parts_of(recipe, outline, CPU), 3).seconds) == 3


def test_the_arithmetic_is_that_of_the_cycles_that_are_timed() -> None:
    """`plan` counts on shapes alone what torch's counter sees in the cycles themselves."""
    recipe = load_recipe("digits-4step", [*FEW, *TWO])
    outline = of_recipe(load_recipe("digits-teacher", SMALL))
    method, parts = make_method(recipe, outline, CPU), parts_of(recipe, outline, CPU)
    with FlopCounterMode(display=False) as counter:
        for stop in range(2):
            for number in range(recipe.student_every):
                method.step(parts, number, method.turn(number, stop))
    assert counter.get_total_flops() / 2 == pytest.approx(plan(recipe, outline).cycle, rel=0.02)


def test_products_of_matrices_take_the_time_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))  # a second between any two looks at the clock
    monkeypatch.setattr("fewstep.training.benchmarking.time.perf_counter", lambda: float(next(now)))
    monkeypatch.setattr("fewstep.training.benchmarking.SECONDS", 4)
    assert matrix_rate(CPU, torch.float32) == 2 * 1024**3


@pytest.mark.parametrize("name", ["sdxl-4step-lora", "sd15-1step", "imagenet64-1step"])
def test_every_kind_of_network_begins_finite(name: str) -> None:
    """Of a real outline, narrowed: nothing of it is read from anywhere."""
    recipe = load_recipe(name, ["device=cpu", "batch_size=1", "accumulate=1", *NARROW.get(name, [])])
    outline = of_recipe(load_recipe(TEACHERS[name], NARROW_TEACHERS[name]))
    method = make_method(recipe, outline, CPU)
    line = method.step(parts_of(recipe, outline, CPU), 0)
    assert line["skipped_student"] == line["skipped_critic"] == 0
    assert line["denoising_loss"].isfinite()


TEACHERS = {"sdxl-4step-lora": "shapes-teacher", "sd15-1step": "shapes-teacher", "imagenet64-1step": "digits-teacher"}
NARROW = {"sdxl-4step-lora": ["lora.rank=4", "prompts.source=null"]}
NARROW_TEACHERS = {
    "sdxl-4step-lora": ["model.block_out_channels=[16, 32]"],
    "sd15-1step": ["model.block_out_channels=[16, 32]", "model.architecture=sd"],
    "imagenet64-1step": SMALL,
}


def test_the_command_tells_a_table_and_writes_its_numbers() -> None:
    line = "benchmark digits-1step --set batch_size=4 --set device=cpu --set init_from=null --cycles 2 --out speed.json"
    code, told, errors = fewstep(line)
    assert (code, errors) == (0, "")
    assert told.startswith("digits-1step: the teacher of digits-teacher, batches of 4, float32, on the CPU, 1 thread")
    found = json.loads(Path("speed.json").read_text())
    facts, found = found, found["ways"]["eager"]
    assert list(facts["ways"]) == ["eager"]
    assert len(found["seconds"]) == 2
    every = load_recipe("digits-1step").student_every
    assert found["samples_per_second"] == pytest.approx(4 * every / found["seconds_per_cycle"])
    assert found["utilisation"] == pytest.approx(found["tflops"] / found["matrix_tflops"])
    assert found["tflops"] == pytest.approx(found["tflop_per_cycle"] / found["seconds_per_cycle"])
    assert facts["torch"] == torch.__version__
    assert f"{found['operations']:,.0f}" in told
    refused(fewstep(line), "--out speed.json: exists already")


def test_what_the_machine_can_t_hold_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.commands.benchmark.device_memory", lambda device: 10**7)
    monkeypatch.setattr("fewstep.commands.benchmark.make_method", None)
    refused(fewstep("benchmark digits-1step --set device=cpu"), "device: has 0.0 GB, and this recipe takes 0.", "plan")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("digits-teacher", "is of the kind teach; benchmarks are of distillations"),
        ("digits-9step", "digits-9step"),
        ("digits-1step --set teacher=mine", "say what it is like with --architecture sdxl, sd15 or sd21"),
        ("digits-1step --architecture sd4", "--architecture 'sd4': write"),
        ("digits-1step --cycles 0", "--cycles"),
        ("digits-1step --ways eager,fast", "--ways 'fast': write some of eager, graphs, compiled, compiled+graphs"),
        ("digits-1step --set device=cpu --ways graphs", "--ways graphs: is for CUDA"),
    ],
)
def test_mistakes_are_one_line(line: str, told: str) -> None:
    refused(fewstep(f"benchmark {line}"), told)


def test_each_rank_times_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("digits-4step", ["batch_size=12", "device=cpu", "accumulate=2"])
    outline = of_recipe(load_recipe("digits-teacher", SMALL))
    monkeypatch.setattr("fewstep.training.batches.num_ranks", lambda: 3)
    monkeypatch.setattr("fewstep.training.batches.rank", lambda: 1)
    parts = parts_of(recipe, outline, CPU)
    assert [rows for rows, _ in parts] == [range(4, 6), range(6, 8)]
    assert parts[0][1]["x0"].shape[0] == 2


@pytest.mark.slow
def test_ranks_are_timed_together(tmp_path: Path) -> None:
    """Replicated, and in shards; the operations of a rank are those of fewer rows, and what it tells the others."""
    line = "benchmark digits-4step --set device=cpu --set batch_size=8 --cycles 1 --ranks 2"
    for shard in ("none", "full"):
        words = shlex.split(f"{line} --set parallel.shard={shard} --out {shard}.json")
        done = subprocess.run([sys.executable, "-m", "fewstep", *words], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("8 by 2 ranks") == 1
        numbers = json.loads(Path(f"{shard}.json").read_text())
        assert (numbers["ranks"], numbers["shard"]) == (2, shard)
        assert numbers["ways"]["eager"]["seconds_per_cycle"] > 0
