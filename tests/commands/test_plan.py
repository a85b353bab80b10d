"""`fewstep plan` and what `distill` tells and refuses by it."""

import re
from pathlib import Path

import pytest

from command_line import fewstep, refused
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.recipes.loading import load_recipe

FEW = "--set batch_size=4 --set num_steps=1 --set student_every=1"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def teacher(**changes: object) -> str:
    config = load_recipe("digits-teacher").model.model_copy(update=changes)
    PixelModel(config, build_unet(config)).save(Path("teacher"))
    return "--set teacher=teacher"


def test_what_is_told_of_a_recipe_whose_teacher_is_not_there() -> None:
    code, told, errors = fewstep(f"plan digits-1step {FEW} --tflops 0.001")
    assert (code, errors) == (0, "")
    assert told.startswith("digits-1step: the teacher of digits-teacher, batches of 4 in one part, float32\n")
    assert (
        "trained: 0.4 M of the student + 0.4 M of the critic + 0.0 M of the discriminator; the teacher has 0.4" in told
    )
    cycle, each = (
        float(re.search(pattern, told)[1]) for pattern in (r"a cycle of 1 ([\d.]+)", r"TFLOP/s: ([\d.e+]+) s")
    )
    assert each == pytest.approx(cycle / 1e-3, rel=0.1)
    small = teacher(block_out_channels=[8], attention=[False])
    pairs = "regression.pairs=pairs --set regression.sampler=heun:18"
    assert "on pairs" not in told
    told = fewstep(f"plan digits-1step {FEW} {small} --set regression_weight=0.25 --set {pairs}")[1]
    assert told.startswith("digits-1step: the teacher in teacher, ")
    assert "losses on pairs (regression_weight) are not counted" in told


def test_advice_ends_at_the_first_setting_that_fits_and_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.commands.plan.SPARE", 0)
    small = teacher(block_out_channels=[8], attention=[False], layers_per_block=1)
    command = f"plan digits-1step {small} --set batch_size=16"
    peak, kept = (
        float(each) * 1e6
        for each in re.search(r"peak: ([\d.]+) MB, .* steps ([\d.]+) MB", fewstep(command)[1]).groups()
    )
    memory = f"--memory {(0.9 * kept + 0.1 * peak) / 2**30:.6f}"
    told = fewstep(f"{command} {memory}")[1]
    assert "it does not fit; cheapest first" in told
    fits = re.search("so this fits: (--set .*)", told)[1]
    assert fits == "--set accumulate=16 --set checkpointing=gan --set parallel.offload_student_optimizer=true"
    told = fewstep(f"{command} {memory} {fits}")[1]
    further = float(re.search(r"it fits; a further sample in a part takes ([\d.]+) MB", told)[1]) * 1e6
    assert 0 < further < kept / 4  # what is kept is no more, and in main memory still
    assert "none of these fits" in fewstep(f"{command} --memory 0.0001GB")[1]


def test_ranks_are_advised_to_share_weights_before_they_compute_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.commands.plan.SPARE", 0)
    few = "--set batch_size=4 --set student_every=1 --set student.ema_decay=0"
    command = (
        f"plan digits-1step {teacher(block_out_channels=[64], attention=[False], layers_per_block=1)} {few} --ranks 4"
    )
    told = fewstep(command)[1]
    assert "batches of 4, of which one of 4 ranks has 1 in one part, float32\n" in told
    assert re.search(
        r"a rank sends in a mean step [\d.]+ MB in messages round a ring \(2.0 sums\), and small ones", told
    )
    peak = float(re.search(r"peak: ([\d.]+) MB", told)[1])
    assert sum(map(float, re.findall(r"([\d.]+) *│$", told, re.MULTILINE))) == pytest.approx(peak, abs=0.05)
    told = fewstep(f"{command} --memory {0.7 * peak * 1e6 / 2**30:.6f}")[1]
    assert "so this fits: --set parallel.shard=full\n" in told
    machines = fewstep(f"{command} --machines 2 --set parallel.shard=hybrid")[1]
    kinds = re.search(r"round a ring \(([\d.]+) gathers, ([\d.]+) reductions, ([\d.]+) sums\)", machines)
    assert kinds[2] == kinds[3]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (
            ["batch_size=2", "student_every=2", "gan.real_share=0.5", "gan.independent_noise=false"],
            ["critic.samples=cycle", "gan.features=frozen"],
        ),
        pytest.param(
            ["batch_size=1", "student_every=2", "student.backward_simulation=false", "gan.independent_noise=true"],
            ["gan.features=frozen", "gan.independent_noise=false"],
            marks=pytest.mark.slow,
        ),
        (["batch_size=2", "gan.student_weight=0", "gan.critic_weight=0"], ["critic.samples=cycle"]),
    ],
    ids=["a share of the reals", "an odd batch without simulation", "no GAN"],
)
def test_further_settings_go_with_the_recipe_or_are_left_out(settings: list[str], left: list[str]) -> None:
    given = teacher(block_out_channels=[8], attention=[False], layers_per_block=1)
    line = f"plan digits-1step {given} {' '.join(f'--set {each}' for each in settings)}"
    code, told, errors = fewstep(f"{line} --memory 24GB --arithmetic")
    assert (code, errors) == (0, "")
    assert re.search(r"it fits; a further sample in a part takes [\d.]+ MB, so that parts of about [\d,]+ fit", told)
    assert re.findall(r"times the arithmetic: (\S+) \(", told) == left


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("plan digits-1step --memory much", ["--memory 'much'", "24GB"]),
        ("plan digits-1step --memory 0GB", ["--memory '0GB'"]),
        ("plan digits-1step --memory=", ["--memory ''"]),
        ("plan digits-1step --tflops 0", ["--tflops"]),
        ("plan digits-1step --ranks 0", ["--ranks", "a whole number from 1 to 1,024"]),
        ("plan digits-1step --ranks 3", ["3 ranks don't divide batch_size 64; take 63"]),
        ("plan digits-1step --ranks 4 --machines 3", ["--machines 3: don't divide 4 ranks equally"]),
        ("plan digits-1step --set parallel.shard=full", ["parallel.shard: one rank", "--ranks"]),
        ("plan digits-1step --ranks 4 --set parallel.shard=hybrid", ["parallel.shard: hybrid", "set full"]),
        ("plan digits-1step --architecture flux", ["--architecture 'flux'", "sdxl"]),
        ("plan digits-teacher", ["recipe digits-teacher: is of the kind teach", "distillations"]),
        ("plan sdxl-1step-init", ["regress", "distillations"]),
        ("plan digits-1step --set teacher=somewhere", ["teacher: somewhere is not here", "--architecture"]),
    ],
)
def test_bad_input(line: str, fragments: list[str]) -> None:
    refused(fewstep(line), *fragments)


def test_a_device_that_is_surely_too_small_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = f"distill digits-1step {FEW} {teacher()} --set device=cpu"
    monkeypatch.setattr("fewstep.commands.distill.device_memory", lambda device: 10**6)
    refused(fewstep(command), "device: has 0.0 GB", "`fewstep plan digits-1step --memory 0GB`")
    assert not list(Path("runs").glob("*/[!.]*"))
    monkeypatch.setattr("fewstep.commands.distill.device_memory", lambda device: 10**9)
    code, told, _ = fewstep(f"{command} --set init_from=null", whole=True)
    lines = [line for line in told.splitlines() if line.startswith("plan: ")]
    assert (code, len(lines)) == (0, 3)
    monkeypatch.setattr("fewstep.commands.distill.place", lambda: (0, 4))
    monkeypatch.setattr("fewstep.commands.distill.device_memory", lambda device: 5 * 10**6)
    refused(fewstep(f"{command} --out four"), "device: has 0.0 GB", "--memory 0GB --ranks 4`")
    size = float(re.search("a checkpoint takes ([\\d.]+) GB", lines[1])[1])
    written = sum(path.stat().st_size for path in Path("runs/digits-1step/checkpoints").rglob("*.*"))
    assert size == pytest.approx(written / 1e9, abs=0.005)
    assert "student's turn" in lines[2]


def test_on_a_processor_the_summary_takes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.commands.distill.plan", lambda *_: pytest.fail("a step was run"))
    code, told, _ = fewstep(f"distill digits-1step {FEW} {teacher()} --set device=cpu --set init_from=null", whole=True)
    assert code == 0
    assert (
        "plan: trains 0.4 M of the student, 0.4 M of the critic, 0.0 M of the discriminator; the teacher has 0.4 M"
        in told
    )
    assert "plan: `fewstep plan digits-1step` tells memory and arithmetic" in told
