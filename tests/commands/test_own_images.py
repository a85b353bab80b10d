"""One's own images with the recipes of digits and shapes: what was found is told, what can't be meant is refused."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from command_line import Run, refused
from fewstep.models.loading.pretrained import open_model
from fewstep.recipes.loading import load_recipe, read_run_recipe
from image_sets import encoded, write_captioned, write_files

TWO = "--set num_steps=2 --set batch_size=2"
STUDENT = f"{TWO} --set init_from=null"  # no pairs are drawn
OWN = "--set data.source=photos"
CLASSES = "photos: 6 RGB images, 20x16; 2 classes: 0 cat (3), 1 dog (3)"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in a folder per class, larger than the digits."""
    folder = tmp_path_factory.mktemp("workshop")
    photos = [encoded(Image.new("RGB", (20, 16), (40 * index, 90, 200))) for index in range(6)]
    write_files(folder / "photos", {f"{'cat' if i % 2 else 'dog'}/{i}.png": photo for i, photo in enumerate(photos)})
    return folder


def test_the_digits_recipe_does_not_shrink_photos_without_a_word(run: Run) -> None:
    classes = "--set model.num_classes=2"
    line = f"fewstep teach digits-teacher --out teacher {OWN} {classes} {TWO}"
    refused(run(line), "photos: images of 20x16 would be shrunk to 8x8", "--set model.image_size=16")
    assert not Path("teacher").exists()
    told = run(f"{line} --set model.image_size=16 --set model.channels=3")
    assert told[:2] == (0, f"{CLASSES}; cropped to 16x16\n")
    told = run(f"fewstep teach digits-teacher --out small {OWN} {classes} {TWO} --set model.image_size=8")
    assert told[:2] == (0, f"{CLASSES}; resized and cropped to 8x8, made grey\n")


def test_a_recipe_of_ones_own_says_the_size_or_is_refused(run: Run) -> None:
    model = {"block_out_channels": [8, 8], "norm_num_groups": 4}
    recipe = {"kind": "teach", "model": model, "num_steps": 1, "batch_size": 2, "data": {"source": "photos"}}
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    refused(run("fewstep teach own.yaml --out own"), "would be shrunk to 8x8")
    Path("own.yaml").write_text(yaml.safe_dump(recipe | {"model": model | {"image_size": 8}}))
    code, told, _ = run("fewstep teach own.yaml --out own")
    assert code == 0
    assert "its 2 classes are not used (model.num_classes is 0); resized and cropped to 8x8, made grey" in told
    assert run("fewstep teach own.yaml --out own --resume --set num_steps=1")[0] == 0


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("distill digits-1step", ["teacher: digits-teacher is trained on digits", "photos", "--set teacher=digits-t"]),
        ("distill shapes-1step", ["teacher: shapes-teacher is trained on shapes", "photos"]),
        ("teach shapes-teacher", ["model.autoencoder: shapes-autoencoder is trained on shapes", "photos"]),
    ],
)
def test_what_is_trained_on_other_images_is_no_teacher_of_these(run: Run, line: str, fragments: list[str]) -> None:
    """Told before the teacher's recipe is run."""
    refused(run(f"fewstep {line} {OWN}"), *fragments)
    assert not Path("runs").exists()


def test_names_of_class_folders_reach_teacher_student_and_pictures(run: Run) -> None:
    settings = "--set model.image_size=8 --set model.num_classes=2"
    assert run(f"fewstep teach digits-teacher {OWN} {TWO} {settings}")[0] == 0
    assert run(f"fewstep distill digits-1step {OWN} {STUDENT}")[0] == 0
    assert open_model("runs/digits-1step").class_names == ["cat", "dog"]
    assert run("fewstep sample runs/digits-1step --class dog --num 1")[0] == 0
    assert run("fewstep sample runs/digits-1step --class 1 --num 1 --out one.png")[0] == 0
    assert Path("samples/00000.png").read_bytes() == Path("one/00000.png").read_bytes()
    refused(run("fewstep sample runs/digits-1step --class dgo --num 1"), "did you mean 'dog'?")
    refused(run(f"fewstep teach digits-teacher --out t {OWN} {TWO} {settings} --set samples.prompts=p.txt"), "p.txt")
    Path("p.txt").write_text("a cat")
    line = f"fewstep teach digits-teacher --out t {OWN} {TWO} {settings} --set samples.prompts=p.txt"
    refused(run(line), "samples.prompts: the model takes no text")
    assert not Path("t").exists()


def test_an_autoencoder_is_not_smaller_than_its_images_either(run: Run) -> None:
    write_captioned(Path("large"), [Image.new("RGB", (40, 40))], ["a cat"])
    line = f"fewstep teach shapes-autoencoder --set data.source=large {TWO}"
    refused(run(line), "large: images of 40x40 would be shrunk to 32x32")
    told = run(f"{line} --set model.image_size=32")
    assert told[:2] == (0, "large: 1 RGB images with captions of metadata.csv, 40x40; resized to 32x32\n")


def test_a_teacher_that_is_named_or_trained_on_these_images_distils(run: Run) -> None:
    teach = f"fewstep teach digits-teacher {OWN} --set model.num_classes=0 {TWO}"
    assert run(f"{teach} --set model.image_size=8")[0] == 0
    assert "photos: 6 RGB images" in run(f"fewstep distill digits-1step {OWN} {STUDENT}")[1]
    Path("photos").rename("others")
    others = f"fewstep distill digits-1step --out runs/named {STUDENT} --set data.source=others"
    refused(run(others), "teacher: digits-teacher is trained on photos, not on data.source=others")
    assert run(f"{others} --set teacher=runs/digits-teacher")[0] == 0
    assert run(f"{others} --set teacher=digits-teacher --out runs/known")[0] == 0


def test_what_the_user_gave_is_told_from_what_the_recipe_says(tmp_path: Path) -> None:
    shipped = load_recipe("digits-teacher", ["model.channels=3", "data={source: photos}"])
    assert [shipped.gives(key) for key in ("model.channels", "data.source")] == [True, True]
    assert shipped.gives("model")
    assert not any(shipped.gives(key) for key in ("model.image_size", "seed", "data.split"))
    (tmp_path / "own.yaml").write_text("kind: teach\nmodel: {image_size: 16}\nnum_steps: 1\nbatch_size: 1\n")
    own = load_recipe(str(tmp_path / "own.yaml"))
    assert [own.gives(key) for key in ("model.image_size", "model.channels")] == [True, False]
    assert read_run_recipe(tmp_path / "own.yaml").gives("model.image_size")
    (tmp_path / "heir.yaml").write_text("extends: digits-teacher\ndata: {source: photos}\n")
    (tmp_path / "last.yaml").write_text("extends: heir.yaml\nmodel: {image_size: 16}\n")
    heir, last = (load_recipe(str(tmp_path / name)) for name in ("heir.yaml", "last.yaml"))
    assert [heir.gives("data.source"), heir.gives("model.image_size"), heir.model.image_size] == [True, False, 8]
    assert [last.gives("data.source"), last.gives("model.image_size"), last.model.image_size] == [True, True, 16]
    assert load_recipe("digits-teacher") == load_recipe("digits-teacher", ["model.image_size=8"])
