"""Whatever a user gets wrong is one line that names it and says what is right; exit code 2, and nothing is touched."""

import errno
import os
import re
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
    for manifest in path.parents[len(path.parts) - 2].rglob("manifest.json") if "model" in path.parts else ():
        manifest.unlink()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    return path


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


def spoiled_picture(content: bytes | None) -> None:
    pictures("set")
    damage("set/03", "picture.png", content)


def deep_picture() -> None:
    """Of 16 bits, which would be clipped."""
    pictures("set")
    Image.new("I;16", (8, 8), 1000).save("set/03/picture.png")


def few_pictures() -> None:
    pictures("set")
    assert fewstep(f"teach t.yaml --out few {SET}")[0] == 0


NO_GPU = "device: no CUDA GPU here; use device=cpu"
RESUME = "distill d.yaml --resume --out {}"
WRITERS = ["distill d.yaml", "evaluate teacher", "sample teacher"]
CLASSIFIER = classifier_path(DataSettings(), Path())
Case = tuple[Callable[[], object] | None, str, str]
"""What is made or damaged first, a command, and what its line must hold, parted by `…`."""

# Recipes; of keys and values more in recipes/test_loading.py.
RECIPES: list[Case] = [
    *(
        (None, command, wanted)
        for command, wanted in [
            ("distill nothing-like-it --out x", "nothing-like-it…`fewstep recipes` lists them"),
            ("teach there-is-no.yaml --out x", "there-is-no.yaml…YAML file"),
            ("teach d.yaml --out x", "d.yaml…is for `fewstep distill d.yaml`"),
            ("distill t.yaml --out x", "t.yaml…is for `fewstep teach t.yaml`, not for `fewstep distill`"),
            ("teach t.yaml --out x --set num_step=5", "num_step: unknown key…did you mean 'num_steps'?"),
            (
                "distill d.yaml --out x --set student.optimizer.warmup=1",
                "optimizer.warmup:…mean 'student.optimizer.warmup_steps'?",
            ),
            ("teach t.yaml --out x --set optimizer=3", "optimizer: must hold keys (kind, lr, …not 3"),
            (
                "teach t.yaml --out x --set model.attention=[true]",
                "model: attention has 1 entries, block_out_channels 2",
            ),
            ("teach t.yaml --out x --set model.image_size=9", "model: image_size 9 can't be halved"),
            ("teach t.yaml --out x --set =5", "--set '=5'…write key=value"),
            ("recipes check t.yaml --set sed=1", "sed: unknown key…did you mean 'seed'?"),
            ("recipes show", "fewstep recipes show NAME"),
            ("recipes print t.yaml", "fewstep recipes check NAME"),
        ]
    ),
    *(
        (partial(write, "mine.yaml", content), "teach mine.yaml --out x", f"mine.yaml…{wanted}")
        for content, wanted in [
            (b"a: [b", "can't be read as YAML"),
            (b"\xff\xfe\x00", "can't be read as YAML"),
            (b"", "a recipe is a mapping of keys to values"),
            (b"- 1", "a recipe is a mapping of keys to values"),
            (b"num_steps: 2", "kind: must be teach, teach-text, teach-autoencoder, distill, regress, not None"),
        ]
    ),
    (
        lambda: fewstep("teach t.yaml --out plain --set model.null_class=false --set class_dropout=0"),
        "distill d.yaml --out x --set teacher=plain --set guidance_scale=2",
        "guidance_scale…no null class",
    ),
]

# A distillation that does not fit is refused before it starts.
DISTILLATIONS: list[Case] = [
    (None, f"distill d.yaml --out x {' '.join(f'--set {setting}' for setting in settings.split())}", wanted)
    for settings, wanted in [
        ("student.timesteps=[90]", "student.timesteps…between 0.002 and 80"),
        ("student.timesteps=[80,0.001] student.num_timesteps=2", "student.timesteps…between 0.002 and 80"),
        ("student.timesteps=[40]", "student.timesteps…the first must be sigma_max = 80, not 40"),
        ("gan.feature_layer=unet.nowhere", "gan.feature_layer…'unet.nowhere'…'unet.down_blocks.1'"),
        ("gan.student_weight=0", "student_weight and critic_weight: set both, or both to 0"),
        ("teacher=nowhere", "teacher: 'nowhere' is neither a folder nor the name of a recipe"),
        ("teacher=digits-1step", "teacher: …'digits-1step' does not train one"),
        ("teacher=student", "teacher: student is a few-step student"),
        ("prompts.source=prompts.txt", "prompts: the teacher takes no text"),
        ("data.source=null", "data.source: null will do only for text-to-image"),
        ("teacher=.", ".: not a run folder (it has no recipe.yaml)"),
        ("precision=float16", "precision: …'float32' or 'bfloat16', not 'float16'"),
        ("init_from=nowhere", "init_from: nowhere: no such run folder"),
        ("init_from=teacher", "init_from: teacher…holds no student…`fewstep distill`"),
        ("init_from=student@1", "init_from: student: has no checkpoint @1; it has @2"),
        ("init_from=student@best-fid", "init_from: student: has no checkpoint @best-fid…was not evaluated"),
        ("evaluation.every=1 evaluation.features=none.pt", "none.pt: not a readable TorchScript file"),
        ("device=cuda", NO_GPU),
    ]
]

NO_INDICES = [["a", None] * 5, [-1, *range(9)], [None, *range(9)], [n + 0.5 for n in range(10)]]
UNREADABLE = "set/03/picture.png…replace or remove it"
DATA: list[Case] = [
    (make, f"teach t.yaml --out x --set data.source={settings}", wanted)
    for make, settings, wanted in [
        (None, "nowhere", "nowhere: no such file or folder (data.source)"),
        (None, "null", "data.source: null will do only for text-to-image"),
        (lambda: write("notes/a.txt", b"x"), "notes", "notes: no images here…folder of images"),
        (lambda: write("notes/a.txt", b"x"), "notes/a.txt", "notes/a.txt: no images here"),
        *(
            (partial(write, f"bad.{end}", content), f"bad.{end}", f"can't be read as {kind}")
            for end, kind in (("parquet", "parquet"), ("tar", "a tar"))
            for content in (b"garbage", b"")
        ),
        (cut_tar, "cut.tar", "cut.tar: can't be read as a tar"),
        (torn_shard, "shards", "shards: can't be read as parquet"),
        (lambda: pictures("set", 5), "set", "set: has 5 classes…the model has 10…model.num_classes"),
        (lambda: pictures("set", 11), "set", "set: has 11 classes…the model has 10…model.num_classes"),
        (None, "digits --set model.channels=3", "data.source: the digits are 1x8x8…3x8x8"),
        (flat, "flat", "flat: no column of labels…data.label_column"),
        *((partial(parquet, labels), "set.parquet", "'label' must hold class indices") for labels in NO_INDICES),
        *(
            (parquet, f"set.parquet --set data.{each}=a", f"no column 'a' (data.{each}); it has")
            for each in ("image_column", "label_column")
        ),
        (parquet, "set.parquet --set data.image_column=label", "column 'label' holds no images"),
        (lambda: pictures("set"), "set --set data.split=test", "data.split…'test'…'train'"),
        *(
            (partial(spoiled_picture, content), "set --set model.image_size=8", UNREADABLE)
            for content in (b"text", b"", None)
        ),
        (deep_picture, "set --set model.image_size=8", "set/03/picture.png…8-bit"),
    ]
]

VERBS = ["sample {}", "evaluate {}"]
NO_RECIPE = "not a run folder (it has no recipe.yaml)"
DAMAGED_MODEL = "teacher/checkpoints/00000002/model…damaged"
RUNS: list[Case] = [
    (make, command.format(name), wanted)
    for commands, make, name, wanted in [
        (VERBS, None, "nowhere", "nowhere: no such run folder…fewstep teach"),
        (VERBS, None, "t.yaml", "t.yaml: no such run folder…fewstep teach"),
        (VERBS, Path("empty").mkdir, "empty", f"empty: {NO_RECIPE}…fewstep teach"),
        (
            VERBS,
            partial(shutil.rmtree, "student/checkpoints"),
            "student",
            "student: the run has no checkpoint yet…--resume",
        ),
        ([*VERBS, RESUME], Path("student/recipe.yaml").unlink, "student", f"student: {NO_RECIPE}"),
        *(
            ([VERBS[1], RESUME], partial(damage, "student", "recipe.yaml", content), "student", "student/recipe.yaml: ")
            for content in (b"garb: [age", b"", b"\xff\xfe\x00", None)
        ),
        *(
            (
                [*VERBS, "distill d.yaml --out x --set teacher={}"],
                partial(damage, "teacher", *file),
                "teacher",
                DAMAGED_MODEL,
            )
            for file in [
                ("diffusion_pytorch_model.safetensors", None),
                ("diffusion_pytorch_model.safetensors", b""),
                ("fewstep.json", b"garbage"),
                ("fewstep.json", b"{}"),
                ("fewstep.json", b'{"config": {}}'),
            ]
        ),
        (
            [RESUME],
            partial(damage, "student", "metrics.jsonl", b"garbage}\n"),
            "student",
            "student/metrics.jsonl: can't be read; remove it",
        ),
        (
            [f"{RESUME} --set num_steps=4 --set student.optimizer.lr=0.1"],
            None,
            "student",
            "student: --resume with a changed recipe (student.optimizer.lr: 2e-06 -> 0.1)…--set init_from=student",
        ),
        (["teach t.yaml --out {} --resume"], None, "student", "(kind: distill -> teach)"),
        (["distill d.yaml --out {}"], None, "student", "student: exists already…--resume"),
        (["teach t.yaml --out {}"], None, "teacher", "teacher: exists already…--resume"),
        (
            [f"{each} --out {{}}" for each in ("teach t.yaml", "teach t.yaml --resume", *WRITERS)],
            None,
            "t.yaml/x",
            "--out: …t.yaml is not a folder that can be written to",
        ),
        (["sample student --out {}"], None, "teacher", "--out teacher: is a folder; name a PNG file"),
    ]
    for command in commands
]

TORCHSCRIPT = "not a readable TorchScript file…--features"
ASKED: list[Case] = [
    *(
        (None, f"{verb} --sampler {text}", f"sampler '{text}'…for example heun:18")
        for text in ("foo", "heun", "heun:", "heun:0", "ddim:-1", "heun:1.5", "ddim:²", "student:1")
        for verb in ("sample teacher", "evaluate student")
    ),
    *(
        (None, f"sample student --label {label}", f"--class {label}: the model has 10 classes, counted from 0")
        for label in (10, -1)
    ),
    *((None, f"{each} student --device gpu", "device 'gpu'…auto, cpu or cuda") for each in ("sample", "evaluate")),
    *((None, f"{each} student --device cuda", NO_GPU) for each in ("sample", "evaluate")),
    (None, "teach t.yaml --out x --set device=cuda", NO_GPU),
    *(
        (None, f"evaluate student --features {features}", f"{features}: {TORCHSCRIPT}")
        for features in ("nothing.pt", "t.yaml", "classifyer")
    ),
    (None, "evaluate student --features student", "--features student: no folder of a CLIP or DINOv2 model"),
    (
        lambda: CLASSIFIER.write_bytes(b"garbage"),
        "evaluate student",
        f"{CLASSIFIER}: not a classifier of these images; remove it",
    ),
    (few_pictures, "evaluate few", "data.source: has 10 images; judging needs at least 40"),
]


@pytest.mark.parametrize(("make", "command", "wanted"), [*RECIPES, *DISTILLATIONS, *DATA, *RUNS, *ASKED])
def test_what_is_wrong_is_one_line_and_nothing_is_touched(
    refused: Refused, make: Callable[[], object] | None, command: str, wanted: str
) -> None:
    if torch.cuda.is_available() and NO_GPU in wanted:
        pytest.skip("there is a GPU")
    if make:
        make()
    refused(command, *wanted.split("…"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", ["teach t.yaml", *WRITERS])
def test_an_output_in_a_locked_folder_is_refused(refused: Refused, command: str) -> None:
    Path("locked").mkdir(mode=0o500)
    refused(f"{command} --out locked/x", "--out: ", "locked is not a folder that can be written to")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_missing_weight_file_is_told(refused: Refused) -> None:
    next(Path("student").rglob("unet/*.safetensors")).unlink()
    line = "student/checkpoints/00000002: model/unet/diffusion_pytorch_model.safetensors is missing"
    refused("sample student", line, "there is no other checkpoint")
    next(Path("student").rglob("manifest.json")).unlink()
    refused("sample student", "student/checkpoints/00000002/model/unet: holds no weights")


def test_a_run_whose_bytes_are_not_what_was_written_starts_no_other(refused: Refused) -> None:
    path = next(Path("student").rglob("state/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    wanted = "init_from: student/checkpoints/00000002: state/shard-00000.safetensors has other bytes than were written"
    refused("distill d.yaml --out x --set init_from=student", wanted)


def test_a_run_without_a_whole_checkpoint_says_so(place: Path) -> None:
    shard = next(Path("student").rglob("state/*.safetensors"))
    os.truncate(shard, 100)
    folder = shard.parents[1]
    code, _, errors = fewstep("distill d.yaml --out student --resume")
    assert code == 2
    named, last = errors.splitlines()
    told = rf"fewstep: {folder}: state/shard-00000.safetensors has 100 bytes instead of \d+"
    assert re.fullmatch(rf"{told}; it is set aside as {folder.name}\.damaged", named)
    assert last == "fewstep: student: no checkpoint of it is whole; choose another --out to begin anew"


def test_a_torn_checkpoint_beside_a_whole_one_changes_nothing(place: Path) -> None:
    assert fewstep("sample student --out before.png --num 3")[0] == 0
    torn = shutil.copytree("student/checkpoints/00000002", "student/checkpoints/.00000003.tmp")
    damage(str(torn), "*.safetensors")
    assert fewstep("sample student --out after.png --num 3")[0] == 0
    assert Path("before.png").read_bytes() == Path("after.png").read_bytes()


def test_resume_starts_in_an_empty_folder(place: Path) -> None:
    Path("new").mkdir()
    assert fewstep("teach t.yaml --out new --resume")[0] == 0
    assert Path("new/checkpoints/00000002/state/state.json").is_file()


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


def test_runs_of_different_images_are_not_judged_together(refused: Refused) -> None:
    free = "--set model.num_classes=0 --set model.null_class=false --set class_dropout=0"
    assert fewstep(f"teach t.yaml --out free {free}")[0] == 0
    refused("evaluate student free", "free: ", "of 0 classes", "of 10 classes", "models that are alike")
    refused("evaluate free", "features: the classifier serves 1 to 100 classes, the model has 0", "TorchScript file")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: can't be written (No space left on device)"),
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
    refused("sample teacher@best-fid", "teacher/evaluations.jsonl: can't be read")


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
