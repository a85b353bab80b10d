"""Pictures of runs, folders and single files: the numbers that `generate` gives, with what they are in their text."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from command_line import Tell, fewstep, refused
from fewstep import __version__
from fewstep.export.single_file import write_single_file
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.pixel_model import PixelModel
from fewstep.models.sampler import Sampler, default_sampler, generate
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig
from fewstep.pictures import grid
from tiny_pipelines import TINY

CONFIG = {"num_classes": 3, "null_class": True, "block_out_channels": [8, 8], "norm_num_groups": 4}
GRID = PixelModel(PixelModelConfig(**CONFIG), build_unet(PixelModelConfig(**CONFIG))).denoiser.schedule.grid(4).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixel models and tiny SD ones, teachers and students, in folders and in a file."""
    place = tmp_path_factory.mktemp("models")
    students = {"one": [80.0], "four": GRID, "uneven": [80.0, 1.0]}
    for seed, (name, timesteps) in enumerate({"teacher": None, **students}.items()):
        pixel_model(seed, timesteps).save(place / name)
    pixel_model(9, None, num_classes=4).save(place / "classes")
    pixel_model(9, None, image_size=16).save(place / "large")
    for name, names in {"named": ["tabby cat", "dog", "2"], "twice": ["crane", "maillot", "crane"]}.items():
        model = pixel_model(1, [80.0])
        PixelModel(model.config, model.network, [80.0], names).save(place / name)
    pipeline = TINY["sd"](place / "scratch")
    pipeline.save_pretrained(place / "text")
    torch.manual_seed(5)
    for parameter in pipeline.unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    student = LatentModel(pipeline, [999.0, 749.0, 499.0, 249.0])
    student.save(place / "text-student")
    write_single_file(student, place / "student.safetensors", {}, torch.float32)
    return place


def pixel_model(seed: int, timesteps: list[float] | None, **changes: int) -> PixelModel:
    torch.manual_seed(seed)
    config = PixelModelConfig(**{**CONFIG, **changes})
    return PixelModel(config, build_unet(config), timesteps)


@pytest.fixture
def command(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Runs `sample` in an empty folder, where `@name` is one of the models; gives exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    return lambda line: fewstep("sample " + re.sub("(^| )@", rf"\1{models}/", line))[::2]


def picture(path: Path) -> Tensor:
    """(C, H, W)."""
    array = np.array(Image.open(path))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def singles(folder: Path, pattern: str = "*.png") -> Tensor:
    return torch.stack([picture(path) for path in sorted(folder.glob(pattern))])


def settings(path: Path) -> dict:
    return json.loads(Image.open(path).text["fewstep"])


def parameters(path: Path) -> tuple[str, dict[str, str]]:
    """The prompt and the settings as A1111's reader takes them apart (its published expression)."""
    *prompt, last = Image.open(path).text["parameters"].split("\n")
    return "\n".join(prompt), dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))


# --- class models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "one", "four"])
def test_pictures_are_those_of_generate_in_grid_and_single_files(
    command: Tell, models: Path, tmp_path: Path, name: str
) -> None:
    assert command(f"@{name} --num 7 --seed 5 --out sub/x.png") == (0, "")
    model = load(models / name)
    expected = generate(model, default_sampler(model), range(7), seed=5)
    assert torch.equal(singles(tmp_path / "sub" / "x"), expected)
    assert np.array_equal(
        np.array(Image.open(tmp_path / "sub" / "x.png")), np.array(grid(expected, 7, list("0120120")))
    )
    assert [settings(tmp_path / "sub" / "x" / f"{i:05d}.png")["class"] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("option", ["--class", "--label"])
def test_one_class_by_either_name(command: Tell, models: Path, tmp_path: Path, option: str) -> None:
    assert command(f"@one {option} 2 --out twos.png") == (0, "")
    expected = generate(load(models / "one"), Sampler("student", 1), range(40), asked=[2])
    assert torch.equal(singles(tmp_path / "twos"), expected)
    assert parameters(tmp_path / "twos.png")[0] == "class 2"


@pytest.mark.parametrize(
    ("asked", "number", "name"), [("'tabby cat'", 0, "tabby cat"), ("1", 1, "dog"), ("2", 2, "2"), ("dog", 1, "dog")]
)
def test_a_class_by_its_name_or_its_number(
    command: Tell, models: Path, tmp_path: Path, asked: str, number: int, name: str
) -> None:
    assert command(f"@named --class {asked} --num 2 --compare @one") == (0, "")
    expected = generate(load(models / "named"), Sampler("student", 1), range(2), asked=[number])
    assert torch.equal(singles(tmp_path / "samples", "*-1.png"), expected)
    of_one = settings(tmp_path / "samples" / "00001-1.png")
    assert (of_one["class"], of_one["class_name"]) == (number, name)
    assert parameters(tmp_path / "samples.png")[0] == f"class {name}"


def test_names_of_classes_go_from_folder_to_student(models: Path, tmp_path: Path) -> None:
    student = load(models / "named").student(load(models / "teacher").denoiser, [80.0])
    student.save(tmp_path / "student")
    assert load(tmp_path / "student").class_names == ["tabby cat", "dog", "2"]
    assert load(models / "one").class_names is None


def test_what_a_picture_is_stands_in_it(command: Tell, tmp_path: Path) -> None:
    assert command("@teacher --class 1 --num 2 --seed 3 --sampler ddim:5@2.5") == (0, "")
    path = tmp_path / "samples" / "00001.png"
    prompt, shown = parameters(path)
    assert prompt == "class 1"
    told = {"Steps": "5", "Sampler": "DDIM", "CFG scale": "2.5", "Seed": "3", "Model": "teacher"}
    assert shown == {**told, "Version": f"fewstep {__version__}", "Image": "1"}
    whole = settings(path)
    assert re.fullmatch("[0-9a-f]{16}", whole.pop("fingerprint"))
    how = {"sampler": "ddim", "num_steps": 5, "timesteps": None, "guidance_scale": 2.5}
    assert whole == {"class": 1, "model": "teacher", **how, "seed": 3, "index": 1, "version": __version__}


def test_steps_are_the_teachers(command: Tell, models: Path, tmp_path: Path) -> None:
    teacher = load(models / "teacher")
    for line, sampler in {
        "--steps 3": Sampler("heun", 3),
        "--sampler ddim --steps 3": Sampler("ddim", 3),
        "--sampler ddim@2 --steps 3": Sampler("ddim", 3, 2.0),
        "--sampler ddim:3 --guidance 2": Sampler("ddim", 3, 2.0),
    }.items():
        assert command(f"@teacher --num 3 {line} --overwrite") == (0, "")
        assert torch.equal(singles(tmp_path / "samples"), generate(teacher, sampler, range(3))), line


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_of_several_even_steps_takes_other_numbers(
    command: Tell, models: Path, tmp_path: Path, steps: int
) -> None:
    assert command(f"@four --num 3 --steps {steps}") == (0, "")
    student = load(models / "four")
    student.timesteps = student.denoiser.schedule.grid(steps).tolist()
    assert torch.equal(singles(tmp_path / "samples"), generate(student, Sampler("student", steps), range(3)))
    assert settings(tmp_path / "samples.png")["models"][0]["timesteps"] == student.timesteps


def test_fingerprints_tell_models_apart_by_any_weight(command: Tell, models: Path, tmp_path: Path) -> None:
    model, found = load(models / "one"), []
    for name in ("same", "other"):
        model.save(tmp_path / name)
        assert command(f"{tmp_path}/{name} --num 1 --grid-only --overwrite") == (0, "")
        found.append(settings(tmp_path / "samples.png")["models"][0]["fingerprint"])
        model.network.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] += 1
    assert found[0] != found[1]
    assert not (tmp_path / "samples").exists()


# --- text models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["@text-student", "@student.safetensors --config @text"])
def test_a_text_student_is_the_same_from_its_folder_and_from_its_file(
    command: Tell, models: Path, tmp_path: Path, source: str
) -> None:
    (tmp_path / "more.txt").write_text("späť: \u732b\n")
    assert command(f"{source} --prompt 'a cat' --prompt 'a, mat' --prompts more.txt --num 5 --seed 1") == (0, "")
    student = load(models / "text-student")
    prompts = ["a cat", "a, mat", "späť: \u732b"]
    expected = generate(student, Sampler("student", 4), range(5), 1, prompts)
    assert (singles(tmp_path / "samples").int() - expected.int()).abs().max() <= 1
    third, shown = parameters(tmp_path / "samples" / "00002.png")
    assert third == "späť: \u732b"
    assert (shown["Steps"], shown["Sampler"], shown["CFG scale"]) == ("4", "LCM", "1")
    fourth = settings(tmp_path / "samples" / "00003.png")
    assert (fourth["prompt"], fourth["index"], fourth["timesteps"]) == ("a cat", 3, [999, 749, 499, 249])
    assert settings(tmp_path / "samples.png")["prompts"] == prompts
    assert len(settings(tmp_path / "samples.png")["columns"]) == 5


def test_of_text_there_are_four_pictures_or_one_per_prompt(command: Tell, tmp_path: Path) -> None:
    assert command("@text-student --steps 1 --prompt cat") == (0, "")
    assert len(singles(tmp_path / "samples")) == 4
    (tmp_path / "six.txt").write_text("a\nb\nc\nd\ne\nf\n")
    assert command("@text-student --steps 1 --prompts six.txt --overwrite") == (0, "")
    assert len(singles(tmp_path / "samples")) == 6
    assert command("@text-student --steps 1 --prompt a --prompt b --prompt c --num 11 --overwrite") == (0, "")
    assert len(settings(tmp_path / "samples.png")["columns"]) == 9  # a column per prompt


# --- two models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "other", "together", "alone"),
    [
        ("@four --steps 2", "@teacher", "--sampler ddim:4@2", ("", "--sampler ddim:4@2")),
        ("@teacher --steps 3", "@one", "--guidance 3", ("--guidance 3", "")),
        ("@four --steps 2", "@four", "", ("", "")),
        ("@teacher --steps 3", "@teacher", "--sampler ddim", ("--sampler ddim", "--sampler ddim --steps 3")),
    ],
)
def test_each_of_two_models_draws_what_it_draws_alone(
    command: Tell, tmp_path: Path, first: str, other: str, together: str, alone: tuple[str, str]
) -> None:
    for line, name in (
        (f"{first} {alone[0]}", "a"),
        (f"{other} {alone[1]}", "b"),
        (f"{first} --compare {other} {together}", "both"),
    ):
        assert command(f"{line} --num 7 --seed 2 --out {name}.png") == (0, "")
    pictures = [singles(tmp_path / name) for name in "ab"]
    for number, alone_drawn in enumerate(pictures, 1):
        assert torch.equal(singles(tmp_path / "both", f"*-{number}.png"), alone_drawn)
    canvas = picture(tmp_path / "both.png")
    in_turn = torch.stack(pictures, dim=1).flatten(0, 1)
    heads = settings(tmp_path / "both.png")["columns"]
    assert len(heads) == 6  # three classes, each of both
    assert np.array_equal(canvas[0], np.array(grid(in_turn, 6, [str(i // 2 % 3) for i in range(14)], heads)))


def test_the_columns_of_two_models_are_named(command: Tell, tmp_path: Path) -> None:
    assert command("@four --compare @teacher --sampler ddim:2@3 --num 2") == (0, "")
    whole = settings(tmp_path / "samples.png")
    assert whole["columns"] == ["four student:4", "teacher ddim:2@3"] * 2
    assert [facts["sampler"] for facts in whole["models"]] == ["student", "ddim"]
    _, shown = parameters(tmp_path / "samples.png")
    assert shown["Columns"] == '"four student:4 | teacher ddim:2@3 | four student:4 | teacher ddim:2@3"'
    assert settings(tmp_path / "samples" / "00001-2.png")["model"] == "teacher"


def test_a_text_teacher_beside_its_student_in_a_file(command: Tell, models: Path, tmp_path: Path) -> None:
    line = "@text --steps 3 --guidance 2 --compare @student.safetensors --config @text --prompt cat --num 2"
    assert command(line) == (0, "")
    teacher, student = load(models / "text"), load(models / "text-student")
    drawn = [(teacher, Sampler("ddim", 3, 2.0)), (student, Sampler("student", 4))]
    for number, (model, sampler) in enumerate(drawn, 1):
        expected = generate(model, sampler, range(2), asked=["cat"])
        assert (singles(tmp_path / "samples", f"*-{number}.png").int() - expected.int()).abs().max() <= 1


def test_one_model_is_on_the_device_at_a_time(command: Tell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The device is stood in for by a name: `to` is told where each model goes."""
    there: set[int] = set()

    def to(model: PixelModel, device: torch.device) -> None:
        (there.discard if device.type == "cpu" else there.add)(id(model))
        assert len(there) <= 1

    monkeypatch.setattr(PixelModel, "to", to)
    monkeypatch.setattr("fewstep.commands.sample.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(
        "fewstep.commands.sample.generate",
        lambda model, *rest: torch.full((7, 1, 8, 8), id(model) in there, dtype=torch.uint8),
    )
    assert command("@four --compare @teacher --num 7") == (0, "")
    assert singles(tmp_path / "samples").all()  # each was there when it drew
    assert not there


# --- what is in the way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("@one --steps 4", ["--steps 4", "one-step student", "timestep 80"]),
        ("@uneven --steps 4", ["--steps 4", "not evenly spaced"]),
        ("@four --sampler ddim:4", ["--sampler ddim:4", "its own timesteps"]),
        ("@four --compare @one --sampler ddim:4", ["--sampler ddim:4", "its own timesteps"]),
        ("@teacher --steps 4 --sampler ddim:4", ["--steps 4", "says its steps already"]),
        ("@teacher --sampler ddim", ["sampler 'ddim'", "for example heun:18"]),
        ("@teacher --sampler fast --steps 4", ["sampler 'fast:4'", "for example heun:18"]),
        ("@four --steps 1001", ["--steps 1001", "1000 noise levels"]),
        ("@text --prompt cat --sampler dpm++:1001", ["--steps 1001", "1000 noise levels"]),
        ("@teacher --class 3", ["--class 3", "3 classes"]),
        ("@teacher --class ''", ["--class : ", "3 classes"]),
        (f"@teacher --class {'9' * 5000}", ["3 classes"]),
        ("@named --class 'taby cat'", ["--class taby cat", "did you mean 'tabby cat'?"]),
        ("@named --class DOG", ["did you mean 'dog'?"]),
        ("@named --class xyzzy", ["3 classes", "from 'tabby cat' to '2'"]),
        ("@twice --class crane", ["classes 0, 2 have this name", "give the number"]),
        ("@named --compare @twice", ["'crane' of class 0", "'tabby cat' of class 0"]),
        ("@teacher --prompt cat", ["--prompt", "--class"]),
        ("@text", ["--prompt"]),
        ("@text --prompt cat --class 1", ["--prompt", "no --class"]),
        ("@text --prompts gone.txt", ["--prompts gone.txt", "can't be read"]),
        ("@text --prompts list.pdf", ["--prompts list.pdf", ".csv"]),
        ("@teacher --compare @classes", ["classes: makes", "4 classes", "3 classes"]),
        ("@teacher --compare @large", ["large: makes", "1x16x16", "1x8x8"]),
        ("@teacher --compare @text", ["--prompt"]),
        ("@text --compare @teacher --prompt cat", ["takes no text"]),
        ("@teacher --compare nowhere", ["nowhere: no such run folder"]),
        ("@teacher --config @text", ["only a single .safetensors file"]),
        ("@teacher --out x", ["--out x", ".png"]),
        ("@teacher --out folder", ["--out folder", "is a folder"]),
        ("@teacher --out folder.png", ["--out folder.png", "holds other things (notes.txt)", "--grid-only"]),
        ("@teacher --out numbers.png", ["--out numbers.png", "holds other things (00000.png)"]),
        ("@teacher --out file.png", ["--out file.png", "a file"]),
    ],
)
def test_what_can_not_be_is_one_line_and_nothing_is_written(
    command: Tell, tmp_path: Path, line: str, fragments: list[str]
) -> None:
    for folder, name in (("folder", "notes.txt"), ("numbers", "00000.png"), (".", "file")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    refused(command(line), *fragments)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_drawn_before_is_not_overwritten_without_being_told(command: Tell, tmp_path: Path) -> None:
    assert command("@one --num 3") == (0, "")
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert command("@one --num 1 --seed 1") == (0, "")
    assert command("@one --num 1 --seed 2") == (0, "")
    assert command("@one --num 1 --seed 2 --out x.png") == (0, "")
    refused(command("@one --num 1 --seed 3 --out x.png"), "--out x.png: exists already", "--overwrite")
    (tmp_path / "x.png").unlink()
    refused(command("@one --num 1 --seed 3 --out x.png"), "--out x.png: exists already", "--overwrite")
    assert command("@one --num 1 --seed 3 --out x.png --grid-only") == (0, "")
    assert {path: path.read_bytes() for path in first} == first
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "samples-2.png",
        "samples-3.png",
        "samples.png",
        "x.png",
    ]
    assert sorted(path.name for path in tmp_path.glob("samples-*/*")) == ["00000.png", "00000.png"]


def test_pictures_of_the_last_time_make_room_if_told_and_others_stay(command: Tell, tmp_path: Path) -> None:
    assert command("@one --num 5") == (0, "")
    assert command("@one --num 2 --compare @four --overwrite") == (0, "")
    names = [f"0000{index}-{number}.png" for index in range(2) for number in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    assert command("@teacher --num 1 --sampler dpm++:4 --overwrite")[0] == 2  # found out only when it draws
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    Image.new("L", (8, 8)).save(tmp_path / "samples" / "00009.png")
    refused(command("@one --num 2 --overwrite"), "holds other things (00009.png)")
    assert command("@one --num 2 --grid-only --overwrite") == (0, "")
    assert len(list((tmp_path / "samples").iterdir())) == 5
    assert not (tmp_path / "samples-2.png").exists()


def test_what_comes_into_the_folder_meanwhile_stays(
    command: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*rest: object) -> Tensor:
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / "notes.txt").write_text("precious")
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr("fewstep.commands.sample.generate", slow)
    assert command("@one --num 1") == (0, "")
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"00000.png", "notes.txt"}


def test_ctrl_c_leaves_whole_pictures(
    command: Tell, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PixelModel, "sampling_batch", 2)
    asked = []

    def interrupted(model: PixelModel, sampler: Sampler, indices: range, *rest: int | None) -> Tensor:
        asked.append(indices)
        if indices.start >= 4:
            raise KeyboardInterrupt
        return generate(model, sampler, indices, *rest)

    monkeypatch.setattr("fewstep.commands.sample.generate", interrupted)
    assert command("@one --num 7")[0] == 130
    assert asked == [range(2), range(2, 4), range(4, 6)]
    assert torch.equal(singles(tmp_path / "samples"), generate(load(models / "one"), Sampler("student", 1), range(4)))
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [f"0000{index}.png" for index in range(4)]


def test_a_disk_that_fills_is_one_line(command: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(command("@one --num 2"), "00000.png: can't be written")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_checkpoints_model_folder_is_named_by_its_run(command: Tell, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "one", tmp_path / "run" / "checkpoints" / "00000500" / "model")
    assert command("run/checkpoints/00000500/model --num 1") == (0, "")
    assert settings(tmp_path / "samples.png")["models"][0]["model"] == "run@500"
