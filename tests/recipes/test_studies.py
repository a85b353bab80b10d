"""Studies: found, resolved and checked before anything runs; what names a run's folder, and what does not."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from command_line import fewstep, refused
from fewstep.errors import UserError
from fewstep.recipes.loading import load_recipe
from fewstep.recipes.studies.loading import load_study, recipe_hash, study_names

TWO = {"recipe": "plain.yaml", "prepare": [{"run": "digits-teacher"}], "seeds": [0, 1]}
ROWS = [{"name": "five"}, {"name": "two", "set": {"student_every": 2}}]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.yaml").write_text("extends: digits-1step\ninit_from: null")


def study(**keys: object) -> str:
    """A file with a study of two rows, and these keys in it."""
    Path("mine.yaml").write_text(yaml.safe_dump({"rows": ROWS, **TWO, **keys}))
    return "mine.yaml"


# --- what names a folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", study_names())
def test_the_studies_of_the_package_are_whole_and_say_what_they_compare(name: str) -> None:
    found = load_study(name)
    assert found.settings.description
    assert len(found.rows) > 1
    folders = [row.folder(seed) for row in found.rows for seed in found.settings.seeds]
    assert len({*folders}) == len(folders)
    assert load_study(name, [], "7", 100).rows == found.rows  # neither seeds nor images are part of a recipe


def test_a_hash_is_of_what_differs_from_the_defaults_with_prepared_names_as_they_are_called() -> None:
    own = {"kind": "distill", "teacher": "digits-teacher", "description": "mine", "batch_size": 16, "log_every": 50}
    own |= {"gan": {"student_weight": 0, "critic_weight": 0}, "student": {"optimizer": {"lr": 0.5}}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    row = load_study(study(recipe="own.yaml", set={"num_steps": 9})).rows[0]
    said = {"teacher": "digits-teacher", "num_steps": 9, "batch_size": 16, "seed": 3}
    said |= {"gan": {"student_weight": 0.0, "critic_weight": 0.0}, "student": {"optimizer": {"lr": 0.5}}}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
    assert row.folder(3) == f"own-{digest}"
    said.pop("seed")  # 0 is the default
    assert row.folder(0) == f"own-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]}"


def test_neither_the_order_of_keys_nor_dots_nor_a_description_change_a_hash() -> None:
    one, other = ({"lr": 0.5, "betas": [0.5, 0.9]}, {"betas": [0.5, 0.9], "lr": 5e-1})
    Path("own.yaml").write_text("extends: plain.yaml\ndescription: mine")
    nested = {"name": "a", "set": {"num_steps": 9, "student": {"optimizer": one}}}
    dotted = {"name": "a", "set": {"student.optimizer": other, "num_steps": 9}}
    hashes = [load_study(study(rows=[row])).rows[0].folder(0) for row in (nested, dotted)]
    assert hashes[0] == hashes[1]
    own = load_study(study(rows=[{**nested, "recipe": "own.yaml"}])).rows[0]
    assert own.folder(0).removeprefix("own-") == hashes[0].removeprefix("plain-")


@pytest.mark.parametrize("num", [7, None])
def test_how_many_pairs_a_recipe_would_draw_is_no_part_of_a_hash_for_the_study_says_it(num: int | None) -> None:
    row = load_study("ablation-pixel").rows[0]
    assert load_recipe("digits-dmd").regression.num == 5000
    assert row.recipe.regression.num is None
    Path("own.yaml").write_text(yaml.safe_dump({"extends": "digits-dmd", "regression": {"num": num}}))
    pairs = {"pairs": "digits-pairs", "teacher": "digits-teacher", "num": 9, "sampler": "heun:18"}
    rows = [{"name": "own", "recipe": "own.yaml", "set": {"num_steps": 800}}]
    own = load_study(study(prepare=[*TWO["prepare"], pairs], rows=rows)).rows[0]
    assert own.folder(3).removeprefix("own-") == row.folder(3).removeprefix("digits-dmd-")


def test_what_a_recipe_builds_on_is_named_with_how_to_prepare_it() -> None:
    rows, prepare = [{"name": "own", "recipe": "digits-1step"}], [*TWO["prepare"], {"run": "digits-1step-init"}]
    with pytest.raises(UserError, match=r"init_from: .*; put {run: digits-1step-init} under prepare, or set null$"):
        load_study(study(rows=rows))
    with pytest.raises(UserError, match=r"regression.pairs: .*; put {pairs: digits-pairs, teacher: \.\.\., num:"):
        load_study(study(prepare=prepare, rows=rows))
    pairs = {"pairs": "digits-pairs", "teacher": "digits-teacher", "num": 9, "sampler": "heun:18"}
    assert load_study(study(prepare=[prepare[0], pairs, prepare[-1]], rows=rows)).rows[0].name == "own"


def test_seeds_and_settings_of_the_command_line_are_of_all_rows() -> None:
    found = load_study(study(set={"num_steps": 9, "batch_size": 8}), ["num_steps=7"], "4,2")
    assert found.settings.seeds == [4, 2]
    assert [(row.recipe.num_steps, row.recipe.batch_size) for row in found.rows] == [(7, 8)] * 2
    assert [row.recipe.student_every for row in found.rows] == [5, 2]
    assert found.rows[0].seeded(4) == load_recipe("plain.yaml", ["num_steps=7", "batch_size=8", "seed=4"])


def test_prepared_names_mean_folders_of_out_however_they_are_written(tmp_path: Path) -> None:
    found, out = load_study("ablation-text"), Path("out")
    recipe = found.rows[0].recipe
    placed = found.placed(recipe, out)
    assert (placed.data.source, placed.teacher, placed.init_from) == (
        *("out/shapes-latents", "out/shapes-teacher", "out/shapes-1step"),
    )
    assert recipe_hash(placed) != recipe_hash(recipe)
    assert found.placed(placed, out) == placed
    (tmp_path / "out" / "shapes-teacher").mkdir(parents=True)
    absolute = placed.model_copy(update={"teacher": str(tmp_path / "out" / "shapes-teacher")})
    assert found.placed(absolute, out) == placed
    assert found.placed(absolute, Path("moved")).teacher == absolute.teacher  # of another folder that is there
    assert found.placed(placed, Path("moved")).init_from == "moved/shapes-1step"  # gone from where it was
    chosen = found.placed(recipe.model_copy(update={"init_from": "shapes-1step@best-fid"}), out)
    assert chosen.init_from == "out/shapes-1step@best-fid"


# --- mistakes --------------------------------------------------------------------------------------------------------

GAN_OFF = {"gan": {"student_weight": 0, "critic_weight": 0}}
WRONG = [
    ({"recipe": "digits-1stp"}, "row 'five': no recipe or YAML file 'digits-1stp', did you mean 'digits-1step'?"),
    ({"recipe": None}, "row 'five': has no recipe; name one there, or under recipe"),
    ({"set": {"num_step": 9}}, "recipe plain.yaml: num_step: unknown key, did you mean 'num_steps'?"),
    ({"set": {"gan": {"wieght": 9}}}, "gan.wieght: unknown key"),
    ({"set": {"num_steps": "many"}}, "num_steps: input should be a valid integer"),
    ({"set": {"critic.condition_on_stop": True}}, "set: critic.condition_on_stop changes nothing in any row, for"),
    ({"rows": [{"name": "a", "set": {**GAN_OFF, "gan.real_share": 0.5}}]}, "row 'a': gan.real_share changes nothing"),
    ({"set": {"seed": 1}}, "set: seed is what runs of a row differ in; say seeds"),
    ({"rows": []}, "rows: list should have at least 1 item"),
    ({"rows": [*ROWS, {"name": "two"}]}, "rows: the name: two stands there twice"),
    ({"rows": [*ROWS, {"name": "5", "set": {"student_every": 5}}]}, "rows 'five' and '5' are the same recipe"),
    ({"rows": [{"nme": "a"}]}, "rows.0"),
    ({"seeds": [1, 0, 1]}, "seeds: 1 stands there twice"),
    ({"seeds": [-1]}, "seeds.0: input should be greater than or equal to 0"),
    ({"sedes": [1]}, "sedes: unknown key, did you mean 'seeds'?"),
    (
        {"prepare": []},
        "row 'five': teacher: 'digits-teacher' is neither prepared, nor a folder that is there; put {run:",
    ),
    ({"prepare": [{"run": "digits-techer"}]}, "prepare.0: no recipe or YAML file 'digits-techer', did you mean"),
    ({"prepare": [{"run": "digits-teacher", "num": 3}]}, "prepare.0: num: run takes set"),
    ({"prepare": [{"pairs": "p", "teacher": "digits-teacher", "num": 3}]}, "prepare.0: sampler: pairs takes num"),
    ({"prepare": [{"num": 3}]}, "prepare.0: takes one of run, pairs, latents, and has none"),
    ({"prepare": [{"run": "digits-teacher"}, {"run": "digits-teacher"}]}, "prepare.1.run: digits-teacher is prepared"),
    ({"prepare": [{"latents": "../x", "autoencoder": "y", "num": 1}]}, "'../x' is no name of a folder"),
    ({"set": {"data.source": "nowhere"}}, "row 'five': data.source: 'nowhere' is neither prepared"),
    ({"set": {"regression.num": 9}}, "set: regression.num is not the rows'; say num where prepare makes the pairs"),
    ({"set": {"init_from": "digits-techer"}}, "init_from: 'digits-techer' is neither prepared, nor a folder that is"),
    (
        {"rows": [{"name": "a", "recipe": "digits-dmd"}]},
        "row 'a': regression.pairs: 'digits-pairs' is neither prepared",
    ),
    ({"rows": [{"name": "a", "recipe": "shapes-autoencoder"}]}, "shapes-autoencoder trains an autoencoder"),
    ({"samplers": ["heun:3"]}, "samplers: changes nothing, for there is no teacher"),
    ({"teacher": "digits-teacher", "samplers": ["heun:3", "heun:3"]}, "samplers: heun:3 stands there twice"),
    ({"teacher": "digits-techer"}, "teacher: 'digits-techer' is neither prepared, nor a folder that is there, did you"),
    ({"teacher": "digits-teacher", "samplers": ["hoin:3"]}, "study mine: samplers: sampler 'hoin:3': write ddim:STEPS"),
    ({"teacher": "digits-teacher", "samplers": ["ddim:3@2"]}, "samplers: ddim:3@2 guides, and the teacher has no null"),
    ({"teacher": "digits-teacher", "samplers": ["unipc:3"]}, "samplers: unipc:3 is for text-to-image models"),
    ({"num_samples": 5}, "num_samples: input should be greater than or equal to 100"),
]


@pytest.mark.parametrize(("keys", "told"), WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_one_line_before_anything_is_written(keys: dict, told: str) -> None:
    refused(fewstep(f"ablate {study(**keys)}"), told)
    assert {path.name for path in Path().iterdir()} == {"mine.yaml", "plain.yaml"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "ablate ablation-pixl",
            "no study or YAML file 'ablation-pixl', did you mean 'ablation-pixel'?; there are abl",
        ),
        ("ablate nothing-like-it.yaml", "no study or YAML file 'nothing-like-it.yaml'; there are ablation-pixel"),
        ("ablate ema --seeds 0,0", "--seeds '0,0': write different whole numbers, parted by commas: 0,1,2"),
        ("ablate ema --seeds 0,x", "--seeds '0,x': write"),
        ("ablate ema --seeds=-1", "--seeds '-1': write"),
        ("ablate ema --seeds ''", "--seeds '': write"),
        ("ablate ema --jobs 0", "--jobs"),
        ("ablate ema --num-samples 5", "--num-samples"),
        ("ablate ema --set student.ema_decay=0", "rows 'none, as published' and '0.9' are the same recipe"),
        ("ablate ema --set num_steps", "--set 'num_steps': write key=value"),
        ("ablate ema --set student_evry=2", "student_evry: unknown key, did you mean 'student_every'?"),
        (
            "ablate digits-teacher.yaml",
            "prepare: digits-teacher is the name of the study's own folder; rename the file",
        ),
        ("ablate ema --out full", "full is not a folder that can be written to"),
    ],
)
def test_a_mistake_of_the_command_line_is_one_line(line: str, told: str) -> None:
    if "teacher.yaml" in line:
        Path(study()).rename("digits-teacher.yaml")
    Path("full").write_text("a file")
    refused(fewstep(line), told)


def test_a_list_of_them() -> None:
    code, output, _ = fewstep("ablate list")
    assert code == 0
    assert all(name in output for name in study_names())
