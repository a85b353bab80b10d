"""`recipes show` prints what loads again; `recipes new` writes recipes that fit the images, and says what they cost."""

import re
from pathlib import Path

import pytest
from PIL import Image

from command_line import fewstep, refused
from fewstep.commands import recipes as verb
from fewstep.recipes import new
from fewstep.recipes.loading import documented, explained, load_recipe, recipe_names
from image_sets import encoded, write_files


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for pictures, RGB of 10x9 in three classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new, "SECONDS", 0)
    pictures = {f"{'abc'[i % 3]}/{i}.png": encoded(Image.new("RGB", (10, 9), (5 * i, 90, 200))) for i in range(24)}
    write_files(tmp_path / "photos", pictures)
    return tmp_path


@pytest.mark.parametrize("overrides", [[], ["seed=3", "description=a: b #1\nsecond 'line'", "data.source=007"]])
@pytest.mark.parametrize("name", recipe_names())
def test_what_is_shown_can_be_saved_and_loads_to_the_same(name: str, overrides: list[str]) -> None:
    recipe = load_recipe(name, overrides)
    Path("saved.yaml").write_text("\n".join(explained(recipe)))
    assert load_recipe("saved.yaml") == recipe
    assert Path("saved.yaml").read_text().startswith("kind: ")


def test_a_recipe_is_shown_with_the_meaning_of_each_setting_above_it() -> None:
    code, shown, _ = fewstep("recipes show digits-1step --set student.optimizer.lr=1e-5")
    assert code == 0
    meanings = {text for _, _, text in documented(load_recipe("digits-1step")) if text}
    for text in meanings:
        assert text in " ".join(re.sub("^ *# ?", "", line) for line in shown.splitlines())
    assert "    # Peak learning rate. ImageNet-64: 2e-6, SD 1.5 stage 1: 1e-5, SDXL: 5e-7.\n    lr: 1.0e-05\n" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_new_recipes_fit_the_images_are_explained_and_never_replace_others() -> None:
    code, told, _ = fewstep("recipes new pets --from digits-1step --source photos")
    assert code == 0
    assert "photos: 24 RGB images, 10x9; 3 classes: 0 a (8), 1 b (8), 2 c (8); resized and cropped to 8x8" in told
    assert re.findall(r"(\S+): ([\d,]+) steps, about \d+ (?:minutes|hours) here", told) == [
        ("pets-teacher.yaml", "1,000"),
        ("pets-1step.yaml", "1,600"),
        ("pets-4step.yaml", "1,200"),
    ]
    ends = [f"next: fewstep {line}.yaml" for line in ("teach pets-teacher", "distill pets-1step", "distill pets-4step")]
    assert told.splitlines()[-4:] == ["wrote pets-teacher.yaml, pets-1step.yaml, pets-4step.yaml", *ends]
    teacher, one, four = (load_recipe(f"pets-{end}.yaml") for end in ("teacher", "1step", "4step"))
    model = teacher.model
    assert (model.image_size, model.channels, model.num_classes, model.null_class) == (8, 3, 3, True)
    assert model.sigma_data == pytest.approx(0.5, abs=0.02)
    assert model.attention == [False, False]
    assert one.teacher == four.teacher == "runs/pets-teacher"
    assert (one.student.num_timesteps, four.student.num_timesteps, four.critic.condition_on_stop) == (1, 4, True)
    assert one.gan.student_weight == 0.15
    assert one.evaluation.every is None  # for there are too few images
    written = Path("pets-1step.yaml").read_text()
    refused(fewstep("recipes new pets --source photos"), "pets-teacher.yaml: exists already")
    assert Path("pets-1step.yaml").read_text() == written


@pytest.mark.parametrize(("size", "device"), [(8, "cpu"), (16, "cuda"), (32, "cpu"), (64, "cuda")])
def test_what_is_written_loads_to_what_is_meant_at_every_size_judged_where_it_can_be(size: int, device: str) -> None:
    grey = {f"{'ab'[i % 2]}/{i}.png": encoded(Image.new("L", (8, 8), 2 * i)) for i in range(100)}
    write_files(Path("many"), grey)
    suggested = new.suggest("x", "many", size, device)
    for end, recipe in suggested.recipes.items():
        Path(f"{end}.yaml").write_text(new.text(recipe, suggested.notes, "head"))
        assert load_recipe(f"{end}.yaml") == recipe
        assert recipe.num_steps % 4 == 0
        assert (end == "teacher") == (recipe.evaluation.every is None)
    model = suggested.recipes["teacher"].model
    levels = [size // 2**level for level in range(len(model.attention))]
    assert [level for level, on in zip(levels, model.attention, strict=True) if on] == [
        level for level in levels if level in (8, 16) and size > 8
    ]
    assert (model.channels, model.num_classes) == (1, 2)
    weight, scaled = suggested.recipes["1step"].gan.student_weight, 3e-3 * 12_288 / size**2
    assert weight == pytest.approx(min(scaled, 0.15), rel=0.04)


@pytest.mark.parametrize(
    ("sides", "size"), [((20, 30), 16), ((28, 28), 32), ((30, 30), 32), ((64, 64), 32), ((6, 6), 8), ((500, 400), 32)]
)
def test_the_size_is_that_power_of_two_which_the_images_have(sides: tuple[int, int], size: int) -> None:
    write_files(Path("some"), {"a.png": encoded(Image.new("RGB", sides))})
    assert new.suggest("x", "some", None, "cpu").recipes["teacher"].model.image_size == size


@pytest.mark.parametrize(
    ("name", "end"), [("sdxl-4step", "4step"), ("imagenet64-1step", "1step"), ("sdxl-1step-init", "1step-init")]
)
def test_a_recipe_like_one_whose_teacher_is_brought_along_is_one_file(name: str, end: str) -> None:
    code, told, _ = fewstep(f"recipes new mine --from {name} --source photos --teacher models/tuned.safetensors")
    assert (code, told) == (0, f"wrote mine-{end}.yaml\nnext: fewstep distill mine-{end}.yaml\n")
    own, shipped = load_recipe(f"mine-{end}.yaml"), load_recipe(name)
    told = {"teacher": "models/tuned.safetensors", "description": f"mine, as {name}"}
    assert own == shipped.model_copy(update={**told, "data": shipped.data.model_copy(update={"source": "photos"})})
    assert "extends" not in Path(f"mine-{end}.yaml").read_text()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("new", "`fewstep recipes show NAME`, `fewstep recipes check NAME`, `fewstep recipes new NAME`"),
        ("new pets", "takes your images as --source photos"),
        ("new pets --source nowhere", "nowhere: no such file or folder"),
        ("new ../pets --source photos", "'../pets': is the beginning of file names"),
        ("new pets --source photos --size 24", "--size 24: write 8, 16, 32, 64"),
        (
            "new pets --source photos --from digits",
            "did you mean 'digits-1step' or 'digits-1step-init' or 'digits-4step' or 'digits-4step-lora'?",
        ),
        ("new pets --source photos --from digits-teacher", "is for `fewstep teach digits-teacher`"),
        ("new pets --from sdxl-4step --source nowhere", "nowhere: no such file or folder"),
        ("new pets --source photos --set seed=1", "--set: is for show and check"),
        ("show digits-1step --source photos", "--source, --size and --teacher: are for `fewstep recipes new NAME`"),
        ("new pets --source photos --from shapes-1step", "--teacher: shapes-teacher is trained on other images"),
        ("new pets --from sdxl-4step --size 64", "--size: is the teacher's, which sdxl-4step does not teach"),
    ],
)
def test_what_can_not_be_made_is_told_and_nothing_is_written(line: str, told: str) -> None:
    refused(fewstep(f"recipes {line}"), told)
    assert list(Path().glob("*.yaml")) == []


def test_durations_are_told_in_what_people_plan_by() -> None:
    assert [verb._duration(minutes) for minutes in (0.2, 7.4, 99, 100, 3000)] == [
        *("1 minutes", "7 minutes", "99 minutes", "2 hours", "50 hours")
    ]
