"""The life of a run and of a command line: rows 14, 15, 16 and 27 of what people reported, and their kinds."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from command_line import OF_EVERY_RUN, fewstep, refused
from fewstep.cli.verbs import run
from fewstep.commands import runs
from fewstep.commands.distill import distill
from fewstep.commands.runs import check_target, naming_memory
from fewstep.commands.teach import teach
from fewstep.errors import Interrupted, UserError
from fewstep.files import folder_lock
from fewstep.recipes.loading import documented, load_recipe, read_run_recipe
from fewstep.runtime.checkpoint import checkpoints
from fewstep.runtime.tracking import read_metrics
from fewstep.training.dmd2 import DMD2
from fewstep.training.teacher import TeacherTraining
from steps import curves, interrupt_at, last_state, quiet, same

MODEL = {"num_classes": 10, "null_class": True, "block_out_channels": [8, 8], "norm_num_groups": 4}
LOOP = {"num_steps": 4, "batch_size": 4, "log_every": 2, "grid_images": 4, "data": {"source": "digits"}}
GAN = {"gan": {"student_weight": 0.1, "critic_weight": 0.1}, "student": {"ema_decay": [0.9, 0.5]}}
RECIPES = {
    "t": {"kind": "teach", "model": MODEL, "class_dropout": 0.1, **LOOP},
    "d": {"kind": "distill", "teacher": "teacher", "student_every": 3, **LOOP, **GAN},
    "p": {"kind": "teach", "model": {**MODEL, "num_classes": 0, "null_class": False, "image_size": 8}, **LOOP},
}
VERBS = {"t": teach, "d": distill, "p": teach}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, a folder of pictures, and of each recipe a whole run and one that was stopped behind step 2."""
    folder = tmp_path_factory.mktemp("workshop")
    RECIPES["p"]["data"] = {"source": "photos"}
    (folder / "photos").mkdir()
    for index in range(5):
        Image.new("L", (8, 8), 40 * index).save(folder / "photos" / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, content in RECIPES.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
            run = "teacher" if name == "t" else f"{name}-whole"
            recipe = load_recipe(f"{name}.yaml")
            VERBS[name](recipe, Path(run), report=quiet)
            with pytest.raises(Interrupted):
                VERBS[name](recipe, Path(f"{name}-stopped"), report=interrupt_at(1))
    return folder


@pytest.fixture(autouse=True)
def place(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the workshop."""
    shutil.copytree(workshop, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


# --- one writer at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        pytest.param("two", "distill d.yaml --out two --set seed=1", id="row-14-the-same-distillation-twice"),
        pytest.param("two", "teach t.yaml --out two", id="row-14-relative-a-teacher-twice"),
        pytest.param("d-stopped", "distill d.yaml --out d-stopped --resume", id="row-14-relative-resumed-twice"),
    ],
)
def test_a_second_process_in_a_run_is_refused_before_it_loads_a_model(
    folder: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in ("distill.open_teacher", "teach.build_unet"):
        monkeypatch.setattr(f"fewstep.commands.{verb}", lambda *args: pytest.fail("loaded"))
    with folder_lock(Path(folder)):
        before = sorted(Path(folder).rglob("*"))
        refused(fewstep(line), f"{folder}: process {os.getpid()} writes there; wait for its end, or stop it")
        assert sorted(Path(folder).rglob("*")) == before


def test_row_14_the_first_of_two_runs_is_what_it_would_be_alone() -> None:
    answers: list[tuple] = []

    def second(step: int, metrics: dict[str, float]) -> None:
        answers.append(fewstep("distill d.yaml --out two --set seed=1"))

    distill(load_recipe("d.yaml"), Path("two"), report=second)
    assert len(answers) == 4
    for answer in answers:
        refused(answer, "two: process", "writes there")
    assert curves(Path("two")) == curves(Path("d-whole"))
    assert read_run_recipe(Path("two/recipe.yaml")).seed == 0


def test_row_14_relative_pairs_of_one_folder_are_drawn_by_one() -> None:
    line = "data pairs --teacher teacher --num 4 --sampler heun:2 --out pairs"
    with folder_lock(Path("pairs"), ".0.lock"):
        refused(fewstep(line), f"pairs: process {os.getpid()} writes there")
    assert not Path("pairs/00000.safetensors").exists()
    assert fewstep(line)[0] == 0


def test_a_folder_that_was_made_for_a_run_that_never_began_is_gone() -> None:
    refused(fewstep("distill d.yaml --out new/x --set teacher=nowhere"), "teacher: 'nowhere'")
    assert not Path("new").exists()


# --- going on --------------------------------------------------------------------------------------------------------


FREE = {
    "log_every": 1,
    "sample_every": 3,
    "checkpoint_every": 1,
    "device": "cpu",
    "grid_images": 7,
    "max_skipped": 5,
    "description": "more",
    "checkpointing": "blocks",
    "samples.prompts": None,
}


def test_row_15_what_changes_no_number_may_change_and_stands_in_the_recipe() -> None:
    changes = " ".join(f"--set {key}={'null' if value is None else value}" for key, value in FREE.items())
    answer = fewstep(f"distill d.yaml --out d-stopped --resume {changes}")
    assert answer[0] == 0, answer
    assert same(last_state(Path("d-stopped"))["method"], last_state(Path("d-whole"))["method"])
    found = {key: value for key, value, _ in documented(read_run_recipe(Path("d-stopped/recipe.yaml")))}
    assert FREE.items() <= found.items()


@pytest.mark.parametrize("name", [pytest.param("d", id="row-15-distill-with-a-GAN"), "t"])
def test_row_15_more_steps_are_those_of_a_longer_run(name: str) -> None:
    run = Path("more")
    shutil.copytree("teacher" if name == "t" else "d-whole", run)
    verb = "teach" if name == "t" else "distill"
    assert fewstep(f"{verb} {name}.yaml --out more --resume --set num_steps=8")[0] == 0
    assert fewstep(f"{verb} {name}.yaml --out at-once --set num_steps=8")[0] == 0
    assert same(last_state(run), last_state(Path("at-once")))
    assert curves(run) == curves(Path("at-once"))
    first, second = (checkpoints(each)[-1] for each in (run, Path("at-once")))
    for model in first.glob("model*"):
        weights = [load_file(next((each / model.name).rglob("*.safetensors"))) for each in (first, second)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("decay", "change", "wanted"),
    [
        pytest.param({}, "num_steps=3", "num_steps: 4 -> 3", id="row-15-relative-fewer-steps"),
        pytest.param({}, "num_steps=8", "", id="row-15-relative-more-steps"),
        pytest.param({}, "accumulate=2", "", id="row-15-relative-less-memory"),
        pytest.param({}, "embeddings.max_gb=1.5", "", id="row-15-relative-what-is-kept"),
        pytest.param({}, "batch_size=2", "batch_size: 4 -> 2…--set init_from=d-whole", id="row-15-relative-batch"),
        pytest.param(
            {"decay": "cosine"},
            "num_steps=8",
            "num_steps: 4 -> 8…choose another --out, with --set init_from=d-whole in place of --resume",
            id="row-15-relative-a-rate-that-falls",
        ),
        pytest.param({"decay": "linear", "decay_start": 0.9}, "num_steps=8", "", id="row-15-relative-not-yet"),
    ],
)
def test_what_would_have_made_another_past_names_the_way(decay: dict, change: str, wanted: str) -> None:
    recipe = yaml.safe_load(Path("d-whole/recipe.yaml").read_text())
    recipe["student"]["optimizer"] |= decay
    for path in ("d-whole/recipe.yaml", "d.yaml"):
        Path(path).write_text(yaml.safe_dump(recipe))
    if wanted:
        line = f"distill d.yaml --out d-whole --resume --set {change}"
        refused(fewstep(line), "d-whole: --resume with a changed recipe", *wanted.split("…"))
    else:
        check_target(Path("d-whole"), load_recipe("d.yaml", [change]), resume=True)


def test_row_15_relative_the_way_that_is_named_is_one() -> None:
    assert fewstep("distill d.yaml --out other --set batch_size=2 --set init_from=d-whole --set num_steps=1")[0] == 0


def test_row_15_relative_a_moved_folder_of_the_same_pictures() -> None:
    Path("photos").rename("moved")
    assert fewstep("teach p.yaml --out p-stopped --resume --set data.source=moved")[0] == 0
    assert same(last_state(Path("p-stopped")), last_state(Path("p-whole")))
    assert read_run_recipe(Path("p-stopped/recipe.yaml")).data.source == "moved"


def test_row_15_relative_a_moved_folder_of_other_pictures() -> None:
    shutil.copytree("photos", "other")
    Path("other/4.png").unlink()
    line = "teach p.yaml --out p-stopped --resume --set data.source=other"
    refused(fewstep(line), "p-stopped: --resume with a changed recipe (data.source: photos -> other)")


def test_pictures_that_changed_under_a_run_are_told() -> None:
    Image.new("L", (8, 8)).save("photos/another.png")
    told = "p-stopped: photos has other files than the run began with; put them back, or choose another --out"
    refused(fewstep("teach p.yaml --out p-stopped --resume"), told)
    Path("photos/another.png").unlink()
    assert fewstep("teach p.yaml --out p-stopped --resume")[0] == 0


def test_a_moved_teacher_is_the_same_and_a_changed_one_is_told() -> None:
    Path("teacher").rename("moved")
    assert fewstep("distill d.yaml --out d-stopped --resume --set teacher=moved")[0] == 0
    assert same(last_state(Path("d-stopped")), last_state(Path("d-whole")))
    assert fewstep("teach t.yaml --out teacher --set seed=3")[0] == 0
    told = "d-stopped: the teacher is not the one that the run began with; choose another --out"
    refused(fewstep("distill d.yaml --out d-stopped --resume --set num_steps=8"), told)


def test_a_run_of_an_earlier_version_goes_on() -> None:
    Path("p-stopped/facts.json").unlink()
    assert fewstep("teach p.yaml --out p-stopped --resume")[0] == 0
    Path("p-stopped/facts.json").write_text("garbage")
    refused(fewstep("teach p.yaml --out p-stopped --resume"), "p-stopped/facts.json: can't be read; remove it")


def test_evaluations_of_other_numbers_of_images_are_not_compared() -> None:
    recipe, line = Path("d-stopped/recipe.yaml"), "distill d.yaml --out d-stopped --resume --set evaluation.every=2"
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(content | {"evaluation": {"every": 1, "num_samples": 20}}))
    Path("d-stopped/evaluations.jsonl").write_text('{"step": 1, "fid": 2.0}\n')
    told = "(evaluation.num_samples: 20 -> 30)"  # and no word of `every`
    refused(fewstep(f"{line} --set evaluation.num_samples=30"), told)


# --- what a run tells ------------------------------------------------------------------------------------------------


def test_a_pipe_gets_a_line_per_log_line_and_the_end_names_what_comes_next() -> None:
    code, output, errors = fewstep("distill d.yaml --out run --set log_every=1", whole=True)
    assert code == 0
    told = [line.split(", ")[0] for line in errors.splitlines()]
    assert told == [f"run: {step}/4" for step in range(1, 5)]
    assert " left, dm_loss " in errors.splitlines()[3]
    plan, graphs, told = output.splitlines()[:3], output.splitlines()[3], output.splitlines()[4:]
    assert all(line.startswith("plan: ") for line in plan)
    assert graphs.startswith("graphs: ")
    assert told == [
        "wrote run, 4 steps",
        "next: fewstep sample run",
        "next: fewstep report run",
        "next: fewstep evaluate teacher run",
        "next: fewstep export run run-diffusers",
    ]


def test_metrics_hold_rates_seconds_and_memory() -> None:
    line = "distill d.yaml --out run --set critic.optimizer.lr=1e-3 --set student.optimizer.warmup_steps=3"
    assert fewstep(f"{line} --set log_every=1 --set student.optimizer.lr=0.1")[0] == 0
    lines = read_metrics(Path("run/metrics.jsonl"))
    assert [each["learning_rate"] for each in lines] == pytest.approx([0.025, 0.025, 0.025, 0.05])  # steps 1 and 4
    assert [each["critic_learning_rate"] for each in lines] == [1e-3] * 4
    assert all(0 <= each["data_wait"] <= each["seconds_per_step"] for each in lines)
    assert all(0 < each["seconds_per_step"] < 10 and 0.05 < each["peak_memory_gb"] < 50 for each in lines)
    assert "learning_rate" in read_metrics(Path("teacher/metrics.jsonl"))[0]
    assert "critic_learning_rate" not in read_metrics(Path("teacher/metrics.jsonl"))[0]


def test_tensorboard_shows_the_lines_of_a_run_that_was_resumed() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = "distill d.yaml --out run --set tensorboard=true --set sample_every=2 --set log_every=1"
    assert fewstep(f"{line} --set num_steps=2")[0] == 0
    assert fewstep(f"{line} --resume")[0] == 0
    board = EventAccumulator("run/tensorboard").Reload()
    lines = read_metrics(Path("run/metrics.jsonl"))
    names = {name for each in lines for name in each} - {"step"}
    assert {"denoising_loss", "critic_learning_rate", "gap", "x0_std"} <= names
    for name in names:
        points = {each.step: each.value for each in board.Scalars(f"training/{name}")}
        assert points == pytest.approx({each["step"]: each[name] for each in lines if name in each})
    assert [[each.step for each in board.Images(name)] for name in ("samples", "panels")] == [[2, 4]] * 2


def test_a_missing_tensorboard_is_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.runtime.tensorboard.find_spec", lambda name: None)
    told = "tensorboard: the package is missing; pip install fewstep[tensorboard], or tensorboard=false"
    refused(fewstep("teach t.yaml --out run --set tensorboard=true"), told)
    assert not Path("run").exists()


# --- what runs out ---------------------------------------------------------------------------------------------------

NO_MEMORY = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "(asked for 2.50 GiB)"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
        "4096",
    ),
    (MemoryError(), "run: out of memory; "),
]


@pytest.mark.parametrize(("error", "wanted"), NO_MEMORY)
def test_out_of_memory_names_the_settings_that_take_less(
    error: Exception, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(DMD2, "step", step)
    answer = fewstep("distill d.yaml --out run --set batch_size=8 --set accumulate=2")
    refused(answer, wanted, "--resume with a larger accumulate (2) and checkpointing=gan or blocks, or begin anew with")
    refused(
        answer,
        "precision=bfloat16 or optimizer.kind=adamw8bit or a lora or a smaller batch_size (8); `fewstep plan run/",
    )
    answer = fewstep("distill d.yaml --out run-3 --set batch_size=8 --set parallel.max_rows_per_part=3")
    refused(answer, "--resume with a smaller parallel.max_rows_per_part (3) and checkpointing=gan or blocks")
    answer = fewstep("distill d.yaml --out run-1 --set batch_size=8 --set parallel.max_rows_per_part=1")
    refused(answer, "--resume with checkpointing=gan or blocks")
    recipe = load_recipe("d.yaml", ["device=cuda", "batch_size=1"])
    monkeypatch.setattr(runs, "pick_device", torch.device)
    where = r"with parallel\.offload_student_optimizer=true and checkpointing=gan or blocks"
    with pytest.raises(UserError, match=where), naming_memory(Path("run"), recipe):
        raise error
    monkeypatch.undo()


@pytest.mark.parametrize(("error", "wanted"), NO_MEMORY)
def test_out_of_memory_in_other_verbs(error: Exception, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("fewstep.commands.sample.generate", drawn)
    refused(fewstep("sample teacher"), wanted.removeprefix("run: "), "out of memory", "--device cpu")


def test_another_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TeacherTraining, "step", lambda *args, **named: 1 / 0)
    monkeypatch.setattr("sys.argv", ["fewstep", "teach", "t.yaml", "--out", "run"])
    with pytest.raises(ZeroDivisionError):
        run()


def test_a_disk_without_room_for_a_checkpoint_is_told_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoints(Path("d-stopped"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(1000))
    answer = fewstep("distill d.yaml --out d-stopped --resume")
    line = answer[2].splitlines()[-1]
    assert answer[0] == 2
    assert "of a checkpoint, but only 1000 bytes of disk are free" in line
    assert "too few; make room and --resume, which goes on from the checkpoint before it" in line
    assert checkpoints(Path("d-stopped")) == before
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["tracking.to_line", "writing.write_shard"])
def test_a_disk_that_fills_up_is_told_and_the_last_checkpoint_stands(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(values: dict | Path, *args: object) -> str:
        if (
            isinstance(values, dict) and "step" in values and values["step"] <= 2
        ):  # what is there is read and written again
            return json.dumps(values) + "\n"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"fewstep.runtime.{name}", full)
        code, _, errors = fewstep("distill d.yaml --out d-stopped --resume --set checkpoint_every=1")
    line = errors.splitlines()[-1]
    assert code == 2
    assert "d-stopped/" in line
    assert "can't be written ([Errno 28] No space left on device); " in line
    assert " of disk are free" in line
    assert not list(Path("d-stopped").rglob(".*"))
    assert fewstep("distill d.yaml --out d-stopped --resume")[0] == 0
    assert same(last_state(Path("d-stopped")), last_state(Path("d-whole")))


def test_damaged_checkpoints_are_gone_when_a_newer_one_is_whole() -> None:
    Path("d-stopped/checkpoints/00000001.damaged").mkdir()
    Path("d-stopped/frozen.damaged").mkdir()
    assert fewstep("distill d.yaml --out d-stopped --resume")[0] == 0
    assert not list(Path("d-stopped").rglob("*.damaged"))


# --- signals ---------------------------------------------------------------------------------------------------------

ENTRIES = (["-c", "from fewstep.cli import main; main()"], ["-m", "fewstep"])
SWALLOWING = """
import os, signal, time
try:
    os.kill(os.getpid(), {number})
    time.sleep(5)
except BaseException as error:  # as libraries do whose modules load lazily
    raise ImportError("cannot load module more than once per process") from None
"""


def start(*words: str, entry: int = 0, **more: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["modules", *sys.path])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, *ENTRIES[entry], *words], **{**pipes, **more})


@pytest.mark.parametrize("entry", [0, 1], ids=["fewstep", "python -m fewstep"])
@pytest.mark.parametrize("module", ["typer", "torch"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_row_16_a_signal_in_an_import_is_one_line(number: int, module: str, entry: int) -> None:
    Path("modules").mkdir()
    Path(f"modules/{module}.py").write_text(SWALLOWING.format(number=int(number)))
    process = start("distill", "d.yaml", "--out", "run", entry=entry)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (128 + number, "", "fewstep: stopped\n")
    assert not Path("run").exists()


@pytest.mark.slow
def test_row_16_a_signal_at_20_moments_of_a_start_is_one_line() -> None:
    moments = random.Random(0)
    for index in range(20):
        number = (signal.SIGINT, signal.SIGTERM)[index % 4 == 3]
        process = start("distill", "d.yaml", "--out", "run", "--resume", "--set", "num_steps=1000000", entry=index % 2)
        time.sleep(moments.uniform(0.1, 8))  # Python's own start takes a few hundredths of a second
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        line = OF_EVERY_RUN.sub("", errors)
        assert (process.returncode, line.count("\n"), line[:16]) == (128 + number, 1, "fewstep: stopped"), errors
        assert not [*Path("run").rglob(".*")]


LEAVINGS = """
import os, signal, sys, time
from pathlib import Path
from fewstep import files, stopping
stopping.end_on_signals()
folder, file = files.written_folder(Path("folder")), files.written_whole(Path("file"))
with files.folder_lock(Path("made/run")), folder as a, file as b:
    with stopping.advising("the same command goes on"):
        (a / "inside").touch(), b.touch()
        assert len([*Path().glob("**/.*")]) == 3
        {how}
        os.kill(os.getpid(), {number})
        time.sleep(5)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["", "with stopping.undisturbed(): os.kill(os.getpid(), {number}); print('done')"])
def test_row_16_relative_a_signal_leaves_nothing_hidden_behind(number: int, how: str) -> None:
    before = set(Path().rglob("*"))
    script = LEAVINGS.format(how=how.format(number=int(number)), number=int(number))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (128 + number, "fewstep: stopped; the same command goes on\n")
    assert set(Path().rglob("*")) == before


def test_row_16_relative_a_signal_that_the_shell_ignores_is_ignored() -> None:
    Path("modules").mkdir()
    Path("modules/typer.py").write_text(f"import os, sys\nos.kill(os.getpid(), {int(signal.SIGINT)})\nsys.exit(7)")
    process = start("recipes", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert (*process.communicate(timeout=60), process.returncode) == ("", "", 7)


# --- weights that are no numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["distill d.yaml --out run --set teacher=broken", "sample broken"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_row_27_relatives_a_tensor_that_is_not_finite_is_named_when_it_is_opened(value: float, line: str) -> None:
    shutil.copytree(checkpoints(Path("teacher"))[-1] / "model", "broken")
    path = next(Path("broken").rglob("*.safetensors"))
    weights = load_file(path)
    weights["conv_out.weight"].view(-1)[3] = value
    save_file(weights, path)
    refused(fewstep(line), "broken/unet: conv_out.weight holds NaN or infinity; fetch the model again")
    assert not Path("run").exists()


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_version_and_the_traceback_on_demand() -> None:
    assert fewstep("--version")[:2] == (0, "fewstep 0.1.0\n")
    for line in ("--debug teach nothing", "teach nothing --debug"):
        code, _, errors = fewstep(line)
        assert code == 2
        assert errors.startswith("Traceback")
        assert errors.splitlines()[-1].startswith("fewstep: no recipe or YAML file 'nothing'")


def test_a_closed_pipe_and_a_terminal_without_unicode_are_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("recipes", "check", "d.yaml", stdout=write)
    os.close(write)
    assert process.communicate(timeout=60)[1] == ""
    shutil.copy("d.yaml", "dé.yaml")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = start("recipes", "check", "dé.yaml", env=environment)
    answer = process.communicate(timeout=60)
    assert (*answer, process.returncode) == ("d\\xe9.yaml: a valid distill recipe\n", "", 0)
