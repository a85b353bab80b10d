"""Whatever a user gets wrong is one line that names it and says what is right; exit code 2, and nothing is touched."""

import errno
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
import torch
import yaml
from PIL import Image

from command_line import fewstep
from command_line import refused as told_in_one_line
from fewstep.data.settings import DataSettings
from fewstep.errors import Interrupted
from fewstep.evaluation.judge import classifier_path

MODEL = {"num_classes": 10, "null_class": True, "block_out_channels": [8, 8], "norm_num_groups": 4}
LOOP = {"num_steps": 2, "batch_size": 4, "data": {"source": "digits"}}
TEACHER = {"kind": "teach", "model": MODEL, "class_dropout": 0.1, **LOOP}
STUDENT = {"kind": "distill", "teacher": "teacher", **LOOP}
SET = "--set data.source=set --set model.image_size=8"
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes, a teacher's run and its student's run."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "t.yaml").write_text(yaml.safe_dump(TEACHER))
    (folder / "d.yaml").write_text(yaml.safe_dump(STUDENT))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fewstep("teach t.yaml --out teacher")[0] == 0
        assert fewstep("distill d.yaml --out student")[0] == 0
    return folder


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file with its time of change and its content, and every folder."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"") for path in folder.rglob("*")
    }


@pytest.fixture
def refused(place: Path) -> Refused:
    """Runs a command that must be refused with one line that holds the given fragments; returns the line."""

    def run(command: str, *fragments: str) -> str:
        before = snapshot(place)
        code, output, error = fewstep(command)
        told_in_one_line((code, error), *fragments)
        assert error.startswith("fewstep: ")
        assert output == ""
        assert snapshot(place) == before
        return error

    return run


def pictures(folder: str, num_classes: int = 10) -> Path:
    """A folder with a folder per class, one grey picture in each."""
    for label in range(num_classes):
        Path(folder, f"{label:02d}").mkdir(parents=True)
        Image.new("L", (10, 12), 20 * label).save(Path(folder, f"{label:02d}", "picture.png"))
    return Path(folder)


def damage(run: str, file: str, content: bytes | None = None) -> Path:
    """Replaces a file of a run by `content`, or cuts it in half; returns its path. No manifest tells of it."""
    path = next(Path(run).rglob(file))
    for manifest in Path(run).rglob("manifest.json"):
        manifest.unlink()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    return path


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "fragments"),
    [
        ("distill nothing-like-it --out x", ["nothing-like-it", "`fewstep recipes` lists them"]),
        ("teach there-is-no.yaml --out x", ["there-is-no.yaml", "YAML file"]),
        ("teach d.yaml --out x", ["d.yaml", "is for `fewstep distill`"]),
        ("distill t.yaml --out x", ["t.yaml", "is for `fewstep teach`"]),
        ("teach t.yaml --out x --set num_step=5", ["num_step: unknown key", "did you mean 'num_steps'?"]),
        ("distill d.yaml --out x --set student.optimizer.warmup=1", ["optimizer.warmup:", "mean 'warmup_steps'?"]),
        ("teach t.yaml --out x --set optimizer=3", ["optimizer: must hold keys (lr, ", "not 3"]),
        ("teach t.yaml --out x --set model.attention=[true]", ["model: attention has 1 entries, block_out_channels 2"]),
        ("teach t.yaml --out x --set model.image_size=9", ["model: image_size 9 can't be halved"]),
        ("teach t.yaml --out x --set =5", ["--set '=5'", "write key=value"]),
        ("recipes check t.yaml --set sed=1", ["sed: unknown key", "did you mean 'seed'?"]),
        ("recipes show", ["fewstep recipes show NAME"]),
        ("recipes print t.yaml", ["fewstep recipes check NAME"]),
    ],
)
def test_a_mistake_in_a_recipe_names_the_key_and_what_is_right(
    refused: Refused, command: str, fragments: list[str]
) -> None:
    refused(command, *fragments)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (["student.timesteps=[90]"], ["student.timesteps", "between 0.002 and 80"]),
        (["student.timesteps=[80,0.001]", "student.num_timesteps=2"], ["student.timesteps", "between 0.002 and 80"]),
        (["student.timesteps=[40]"], ["student.timesteps", "the first must be sigma_max = 80, not 40"]),
        (["gan.feature_layer=unet.nowhere"], ["gan.feature_layer", "'unet.nowhere'", "'unet.down_blocks.1'"]),
        (["gan.student_weight=0"], ["student_weight and critic_weight: set both, or both to 0"]),
        (["teacher=nowhere"], ["teacher: 'nowhere' is neither a folder nor the name of a recipe"]),
        (["teacher=digits-1step"], ["teacher: ", "'digits-1step' does not train one"]),
        (["teacher=student"], ["teacher: student is a few-step student"]),
        (["prompts.source=prompts.txt"], ["prompts: the teacher takes no text"]),
        (["data.source=null"], ["data.source: null will do only for text-to-image"]),
        (["teacher=."], [".: not a run folder (it has no recipe.yaml)"]),
        (["precision=float16"], ["precision: ", "'float32' or 'bfloat16', not 'float16'"]),
        (["init_from=nowhere"], ["init_from: nowhere: no such run folder"]),
        (["init_from=teacher"], ["init_from: teacher", "holds no student", "`fewstep distill`"]),
        (["init_from=student@1"], ["init_from: student: has no checkpoint @1; it has @2"]),
        (["init_from=student@best-fid"], ["init_from: student: has no checkpoint @best-fid", "was not evaluated"]),
        (["evaluation.every=1", "evaluation.features=none.pt"], ["none.pt: not a readable TorchScript file"]),
    ],
)
def test_a_distillation_that_does_not_fit_is_refused_before_it_starts(
    refused: Refused, settings: list[str], fragments: list[str]
) -> None:
    refused(f"distill d.yaml --out x {' '.join(f'--set {setting}' for setting in settings)}", *fragments)


def test_guiding_a_teacher_without_null_class_is_refused(refused: Refused) -> None:
    assert fewstep("teach t.yaml --out plain --set model.null_class=false --set class_dropout=0")[0] == 0
    refused("distill d.yaml --out x --set teacher=plain --set guidance_scale=2", "guidance_scale", "no null class")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"a: [b", "can't be read as YAML"),
        (b"\xff\xfe\x00", "can't be read as YAML"),
        (b"", "a recipe is a mapping of keys to values"),
        (b"- 1", "a recipe is a mapping of keys to values"),
        (b"num_steps: 2", "kind: must be teach, teach-text, teach-autoencoder, distill, regress, not None"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(refused: Refused, content: bytes, fragment: str) -> None:
    Path("mine.yaml").write_bytes(content)
    refused("teach mine.yaml --out x", "mine.yaml", fragment)


# --- data ------------------------------------------------------------------------------------------------------------


def parquet(labels: list = [0], path: str = "set.parquet") -> None:  # noqa: B006
    datasets.Dataset.from_dict({"image": [b""] * len(labels), "label": labels}).to_parquet(path)


def write(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(content)


def cut_tar() -> None:
    with tarfile.open("cut.tar", "w") as tar:
        for folder in sorted(pictures("set").iterdir()):
            tar.add(folder / "picture.png", f"{folder.name}.png")
    damage(".", "cut.tar")


def torn_shard() -> None:
    Path("shards").mkdir()
    parquet(path="shards/0.parquet")
    Path("shards/1.parquet").write_bytes(b"garbage")


def flat() -> None:
    Path("flat").mkdir()
    Image.new("L", (8, 8)).save("flat/a.png")


NO_INDICES = [["a"] * 10, [-1, *range(9)], [None, *range(9)], [n + 0.5 for n in range(10)]]


@pytest.mark.parametrize(
    ("make", "settings", "fragments"),
    [
        (None, "source=nowhere", ["nowhere: no such file or folder (data.source)"]),
        (None, "source=null", ["data.source: null will do only for text-to-image"]),
        (lambda: write("notes/a.txt", b"x"), "source=notes", ["notes: no images here", "folder of images"]),
        (lambda: write("notes/a.txt", b"x"), "source=notes/a.txt", ["notes/a.txt: no images here"]),
        *(
            (partial(write, f"bad.{end}", content), f"source=bad.{end}", [f"can't be read as {kind}"])
            for end, kind in (("parquet", "parquet"), ("tar", "webdataset"))
            for content in (b"garbage", b"")
        ),
        (cut_tar, "source=cut.tar", ["cut.tar: can't be read as webdataset"]),
        (torn_shard, "source=shards", ["shards: can't be read as parquet"]),
        (lambda: pictures("set", 5), "source=set", ["set: has 5 classes", "the model has 10", "model.num_classes"]),
        (lambda: pictures("set", 11), "source=set", ["set: has 11 classes", "the model has 10", "model.num_classes"]),
        (None, "source=digits --set model.channels=3", ["data.source: the digits are 1x8x8", "3x8x8"]),
        (flat, "source=flat", ["flat: no column of labels", "data.label_column"]),
        *(
            (partial(parquet, labels), "source=set.parquet", ["'label' must hold class indices"])
            for labels in NO_INDICES
        ),
        *(
            (
                parquet,
                f"source=set.parquet --set data.{each}=a",
                [f"no column 'a' (data.{each}); it has image, label"],
            )
            for each in ("image_column", "label_column")
        ),
        (parquet, "source=set.parquet --set data.image_column=label", ["column 'label' holds no images"]),
        (lambda: pictures("set"), "source=set --set data.split=test", ["data.split", "'test'", "'train'"]),
    ],
)
def test_data_that_do_not_fit_are_named(
    refused: Refused, make: Callable[[], object] | None, settings: str, fragments: list[str]
) -> None:
    if make:
        make()
    refused(f"teach t.yaml --out x --set data.{settings}", *fragments)


@pytest.mark.parametrize("content", [b"text", b"", None, "16 bits"])
def test_an_image_that_can_not_be_read_is_named(refused: Refused, content: bytes | str | None) -> None:
    pictures("set")
    if content == "16 bits":  # which would be clipped
        Image.new("I;16", (8, 8), 1000).save("set/03/picture.png")
    else:
        damage("set/03", "picture.png", content)
    wanted = "8-bit" if content == "16 bits" else "replace or remove it"
    refused(f"teach t.yaml --out x {SET}", "set/03/picture.png", wanted)


# --- runs ------------------------------------------------------------------------------------------------------------

VERBS = ["sample {}", "evaluate {}"]


@pytest.mark.parametrize("command", VERBS)
def test_a_folder_that_is_no_run_is_refused(refused: Refused, command: str) -> None:
    Path("empty").mkdir()
    refused(command.format("nowhere"), "nowhere: no such run folder", "fewstep teach")
    refused(command.format("t.yaml"), "t.yaml: no such run folder", "fewstep teach")
    refused(command.format("empty"), "empty: not a run folder (it has no recipe.yaml)", "fewstep teach")


@pytest.mark.parametrize("command", VERBS)
def test_a_run_without_checkpoint_says_how_to_get_one(refused: Refused, command: str) -> None:
    shutil.rmtree("student/checkpoints")
    refused(command.format("student"), "student: the run has no checkpoint yet", "--resume")


@pytest.mark.parametrize("command", [*VERBS, "distill d.yaml --resume --out {}"])
def test_a_run_without_recipe_is_refused(refused: Refused, command: str) -> None:
    Path("student/recipe.yaml").unlink()
    refused(command.format("student"), "student: not a run folder (it has no recipe.yaml)")


@pytest.mark.parametrize("command", ["evaluate {}", "distill d.yaml --resume --out {}"])
@pytest.mark.parametrize("content", [b"garb: [age", b"", b"\xff\xfe\x00", None])
def test_a_damaged_recipe_of_a_run_is_named(refused: Refused, command: str, content: bytes | None) -> None:
    damage("student", "recipe.yaml", content)
    refused(command.format("student"), "student/recipe.yaml: ")


@pytest.mark.parametrize("command", [*VERBS, "distill d.yaml --out x --set teacher={}"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model.safetensors", b""),
        ("fewstep.json", b"garbage"),
        ("fewstep.json", b"{}"),
        ("fewstep.json", b'{"config": {}}'),
    ],
)
def test_a_damaged_model_is_named(refused: Refused, command: str, file: str, content: bytes | None) -> None:
    damage("teacher", file, content)
    line = refused(command.format("teacher"), "teacher/checkpoints/00000002/model: the model is damaged")
    assert "name another checkpoint's model folder" in line


def test_a_missing_weight_file_is_told(refused: Refused) -> None:
    next(Path("student").rglob("*.safetensors")).unlink()
    line = "student/checkpoints/00000002: model/unet/diffusion_pytorch_model.safetensors is missing"
    refused("sample student", line, "there is no other checkpoint")
    next(Path("student").rglob("manifest.json")).unlink()
    refused("sample student", "student/checkpoints/00000002/model/unet lacks 119 tensors")


def test_a_run_whose_bytes_are_not_what_was_written_starts_no_other(refused: Refused) -> None:
    path = next(Path("student").rglob("state.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    wanted = "init_from: student/checkpoints/00000002: state.pt has other bytes than were written"
    refused("distill d.yaml --out x --set init_from=student", wanted)


def test_a_run_without_a_whole_checkpoint_says_so(place: Path) -> None:
    folder = damage("student", "state.pt").parent
    code, _, errors = fewstep("distill d.yaml --out student --resume")
    assert code == 2
    named, last = errors.splitlines()
    assert named == f"fewstep: {folder}: state.pt is torn or missing; it is set aside as {folder.name}.damaged"
    assert last == "fewstep: student: no checkpoint of it is whole; choose another --out to begin anew"


def test_damaged_metrics_are_named(refused: Refused) -> None:
    damage("student", "metrics.jsonl", b"garbage}\n")
    refused("distill d.yaml --out student --resume", "student/metrics.jsonl: can't be read; remove it")


def test_a_torn_checkpoint_beside_a_whole_one_changes_nothing(place: Path) -> None:
    assert fewstep("sample student --out before.png --num 3")[0] == 0
    torn = shutil.copytree("student/checkpoints/00000002", "student/checkpoints/.00000003.tmp")
    damage(str(torn), "*.safetensors")
    assert fewstep("sample student --out after.png --num 3")[0] == 0
    assert Path("before.png").read_bytes() == Path("after.png").read_bytes()


def test_resuming_with_a_changed_recipe_lists_the_changes(refused: Refused) -> None:
    refused(
        "distill d.yaml --out student --resume --set num_steps=4 --set student.optimizer.lr=0.1",
        "student: --resume with a changed recipe",
        "num_steps: 2 -> 4",
        "student.optimizer.lr: 2e-06 -> 0.1",
        "choose another --out",
    )


def test_resuming_a_run_of_another_kind_says_only_that(refused: Refused) -> None:
    refused("teach t.yaml --out student --resume", "(kind: distill -> teach)")


def test_a_target_that_exists_is_not_overwritten(refused: Refused) -> None:
    refused("distill d.yaml --out student", "student: exists already", "--resume")
    refused("teach t.yaml --out teacher", "teacher: exists already", "--resume")


@pytest.mark.parametrize(
    "command", ["teach t.yaml", "teach t.yaml --resume", "distill d.yaml", "evaluate teacher", "sample teacher"]
)
def test_an_output_below_a_file_is_refused_before_any_work(refused: Refused, command: str) -> None:
    refused(f"{command} --out t.yaml/x", "--out: ", "t.yaml is not a folder that can be written to")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", ["teach t.yaml", "distill d.yaml", "evaluate teacher", "sample teacher"])
def test_an_output_in_a_locked_folder_is_refused(refused: Refused, command: str) -> None:
    Path("locked").mkdir(mode=0o500)
    refused(f"{command} --out locked/x", "--out: ", "locked is not a folder that can be written to")


def test_a_picture_is_not_written_over_a_folder(refused: Refused) -> None:
    refused("sample student --out teacher", "--out teacher: is a folder; name a PNG file")


def test_resume_starts_in_an_empty_folder(place: Path) -> None:
    Path("new").mkdir()
    assert fewstep("teach t.yaml --out new --resume")[0] == 0
    assert Path("new/checkpoints/00000002/state.pt").is_file()


def test_a_named_teacher_keeps_the_recipe_that_it_was_run_with(place: Path) -> None:
    Path("teacher").rename("digits-teacher")
    before = snapshot(place / "digits-teacher")
    assert fewstep("distill d.yaml --out x --set teacher=digits-teacher")[0] == 0
    Path("runs").mkdir()
    Path("digits-teacher").rename("runs/digits-teacher")
    assert fewstep("distill d.yaml --out runs/x --set teacher=digits-teacher")[0] == 0
    assert [*snapshot(place / "runs/digits-teacher").values()] == [*before.values()]


def test_a_stop_in_the_teachers_run_says_how_the_students_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object, **kwargs: object) -> None:
        raise Interrupted("stopped at step 3; continue with --resume --out runs/digits-teacher")

    monkeypatch.setattr("fewstep.commands.runs.start_run", stopped)
    code, _, error = fewstep("distill d.yaml --out x --set teacher=digits-teacher")
    assert code == 130
    assert error == "fewstep: stopped while teaching digits-teacher; the same command goes on with it\n"


# --- what the verbs are asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["foo", "heun", "heun:", "heun:0", "ddim:-1", "heun:1.5", "ddim:²", "student:1"])
def test_a_bad_sampler_says_how_to_write_one(refused: Refused, text: str) -> None:
    refused(f"sample teacher --sampler {text}", f"sampler '{text}'", "for example heun:18")
    refused(f"evaluate student --sampler {text}", f"sampler '{text}'", "for example heun:18")


def test_a_student_takes_no_sampler(refused: Refused) -> None:
    refused("sample student --sampler heun:18", "--sampler heun:18", "its own timesteps")


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_out_of_range_is_refused(refused: Refused, label: int) -> None:
    refused(f"sample student --label {label}", f"--class {label}: the model has 10 classes, counted from 0")


@pytest.mark.parametrize("command", ["sample student", "evaluate student"])
def test_an_unknown_device_names_the_known_ones(refused: Refused, command: str) -> None:
    refused(f"{command} --device gpu", "device 'gpu'", "auto, cpu or cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        "teach t.yaml --out x --set device=cuda",
        "distill d.yaml --out x --set device=cuda",
        "sample student --device cuda",
        "evaluate student --device cuda",
    ],
)
def test_cuda_without_a_gpu_is_refused(refused: Refused, command: str) -> None:
    refused(command, "device: no CUDA GPU here; use device=cpu")


@pytest.mark.parametrize("features", ["nothing.pt", "t.yaml", "student", "classifyer"])
def test_features_that_are_no_torchscript_are_refused(refused: Refused, features: str) -> None:
    refused(f"evaluate student --features {features}", f"{features}: not a readable TorchScript file", "--features")


def test_a_damaged_classifier_is_named(refused: Refused) -> None:
    damaged = classifier_path(DataSettings(), Path())
    damaged.write_bytes(b"garbage")
    refused("evaluate student", f"{damaged}: not a classifier of these images; remove it")


def test_runs_of_different_images_are_not_judged_together(refused: Refused) -> None:
    free = "--set model.num_classes=0 --set model.null_class=false --set class_dropout=0"
    assert fewstep(f"teach t.yaml --out free {free}")[0] == 0
    refused("evaluate student free", "free: ", "(1, 8, 8, 0)", "(1, 8, 8, 10)", "judge it apart")
    refused("evaluate free", "features: the classifier serves 1 to 100 classes, the model has 0", "TorchScript file")


def test_too_few_real_images_to_judge_with_are_counted(refused: Refused) -> None:
    pictures("set")
    assert fewstep(f"teach t.yaml --out few {SET}")[0] == 0
    refused("evaluate few", "data.source: has 10 images; judging needs at least 40")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "run/x"),
            "run/x: can't be written (No space left on device)",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "a file: can't be written (No space left on device)"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: can't be read or written (Permission denied)"),
        (OSError("two\nlines"), "a file: can't be read or written (OSError: two lines)"),
    ],
)
def test_an_error_of_the_system_is_one_line_wherever_it_comes_from(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, error: OSError, line: str
) -> None:
    monkeypatch.setattr("fewstep.commands.recipes.recipes", Mock(side_effect=error))
    assert refused("recipes") == f"fewstep: {line}\n"


def test_a_folder_in_the_place_of_a_file_is_named(refused: Refused) -> None:
    Path("teacher", "evaluations.jsonl").mkdir()
    refused("sample teacher@best-fid", "teacher/evaluations.jsonl: can't be read or written (Is a directory)")


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["teach", "sample", "evaluate", "teech", "sample teacher --num 0", "teach t.yaml --sett a=1"]
)
def test_a_wrong_call_exits_with_2_and_points_at_help(place: Path, command: str) -> None:
    before = snapshot(place)
    code, _, error = fewstep(command)
    assert code == 2
    assert "--help" in error
    assert "Traceback" not in error
    assert snapshot(place) == before
