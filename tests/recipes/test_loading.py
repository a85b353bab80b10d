"""Recipes: found, checked, overridden and printed; each mistake names its key and the nearest right one."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fewstep.errors import UserError
from fewstep.recipes.loading import differences, documented, dump, find, load_recipe, parse, read_run_recipe
from fewstep.recipes.loading import recipe_names as names_of_recipes

NAMES = names_of_recipes()
LR = ["student.optimizer.lr=1e-3"]
TEACH, DISTILL = {"kind": "teach"}, {"kind": "distill", "teacher": "digits-teacher"}


def mistake(make: Callable[[], object]) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- finding and printing --------------------------------------------------------------------------------------------


def test_the_packaged_recipes_are_the_yaml_files_of_the_package() -> None:
    assert {"digits-teacher", "digits-1step", "digits-4step"} <= set(NAMES)
    assert all(find(name).name == f"{name}.yaml" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_holds_what_its_file_says_documented_and_its_dump_is_the_same(
    name: str, tmp_path: Path
) -> None:
    def contains(settings: dict, written: dict) -> bool:
        return all(
            contains(settings[key], value) if isinstance(value, dict) else settings[key] == value
            for key, value in written.items()
        )

    recipe, path = load_recipe(name), tmp_path / "recipe.yaml"
    written = yaml.safe_load(find(name).read_text())
    written.pop("extends", None)
    with_images = load_recipe(name, ["data.source=x"]) if "gan" in written else recipe  # without there is no GAN
    assert contains(with_images.model_dump(mode="json"), written | ({"data": {}} if "gan" in written else {}))
    assert recipe.description
    assert [key for key, _, text in documented(recipe) if not text and key != "kind"] == []
    path.write_text(dump(recipe))
    assert read_run_recipe(path) == load_recipe(str(path)) == recipe
    assert dump(read_run_recipe(path)) == dump(recipe)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "paper's" in find(name).read_text().split("description:")[1].split("\n")[0]]
)
def test_what_says_that_it_is_the_papers_draws_the_gans_noise_apart(name: str) -> None:
    recipe = load_recipe(name)
    gan = recipe.gan if recipe.kind == "distill" else None
    assert not (gan and gan.student_weight) or gan.independent_noise
    assert recipe.student.ema_decay == 0
    if gan:
        levels = (recipe.critic.noise, recipe.dm.noise)
        assert [(each.distribution, each.min_index, each.max_index) for each in levels] == [
            ("index", 0, 999),
            ("index", 20, 980),
        ]


def test_documented_goes_down_to_single_values() -> None:
    settings = {key: (value, text) for key, value, text in documented(load_recipe("digits-1step", LR))}
    assert settings["student.optimizer.lr"][0] == 1e-3
    assert settings["student.optimizer.lr"][1].startswith("Peak learning rate.")
    assert "student" not in settings
    assert not any("\n" in text for _, text in settings.values())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        *(("digits-techer", "digits-teacher"), ("digits1step", "digits-1step"), ("digit-4step", "digits-4step")),
        *(("sdxl4", "sdxl-4step"), ("xyz", None)),
    ],
)
def test_an_unknown_recipe_names_the_nearest_if_any_is_near(wrong: str, right: str | None) -> None:
    guess = f", did you mean {right!r}?" if right else ""
    expected = f"no recipe or YAML file {wrong!r}{guess}; `fewstep recipes` lists them"
    assert mistake(lambda: load_recipe(wrong)) == expected


# --- one over another ------------------------------------------------------------------------------------------------


def test_a_recipe_is_laid_over_those_that_it_extends_and_overrides_over_all(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "extends: digits-4step\nnum_steps: 7\nseed: 3\nstudent: {timesteps: [80, 2, 1, 0.5]}"
    )
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nseed: 4\nbatch_size: 5\ndata: {source: pictures}")
    recipe, base = load_recipe(str(tmp_path / "b.yaml"), ["batch_size=6"]), load_recipe("digits-4step")
    assert sorted(differences(base, recipe)) == [
        "batch_size: 64 -> 6",
        "data.source: digits -> pictures",
        "num_steps: 1200 -> 7",
        "seed: 0 -> 4",
        "student.timesteps: [80.0, 2.5, 0.8, 0.3] -> [80.0, 2.0, 1.0, 0.5]",
    ]
    assert "extends" not in dump(recipe)  # what a run keeps, and what is shown, is resolved
    assert "extends" not in [key for key, _, _ in documented(recipe)]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("extends: mine.yaml", "extends: goes round in a circle (mine.yaml -> mine.yaml)"),
        ("extends: other.yaml", "circle (mine.yaml -> other.yaml -> mine.yaml)"),
        (
            "extends: digits-1stp",
            "mine.yaml: extends: no recipe or YAML file 'digits-1stp', did you mean 'digits-1step'?",
        ),
        ("extends: digits-1step\nkind: teach", "teacher: unknown key (and 6 more)"),
        ("extends: digits-1step\nnum_step: 1", "num_step: unknown key, did you mean 'num_steps'?"),
        (
            "num_steps: 3\na: [b\nc: d",
            "mine.yaml: can't be read as YAML (line 3: did not find expected ',' or ']')",
        ),
    ],
)
def test_what_can_not_be_read_or_extended_so_is_refused(tmp_path: Path, content: str, fragment: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    (tmp_path / "other.yaml").write_text("extends: mine.yaml")
    assert fragment in mistake(lambda: load_recipe(str(tmp_path / "mine.yaml")))


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("num_steps=7", "num_steps", 7),
        ("student.optimizer.lr=1e-3", "student.optimizer.lr", 1e-3),
        ("student.optimizer.lr=2.5E-4", "student.optimizer.lr", 2.5e-4),
        ("student.optimizer.betas=[0, 0.99]", "student.optimizer.betas", (0.0, 0.99)),
        ("gan.independent_noise=true", "gan.independent_noise", True),
        ("gan.independent_noise=no", "gan.independent_noise", False),
        ("gan.feature_layer=unet.mid_block", "gan.feature_layer", "unet.mid_block"),
        ("gan.feature_layer=null", "gan.feature_layer", None),
        ("data.source=a=b", "data.source", "a=b"),
        ("checkpointing=blocks", "checkpointing", "blocks"),
        ("evaluation.every=30", "evaluation.every", 30),  # a group that the file leaves out
    ],
)
def test_an_override_is_read_as_yaml(override: str, key: str, value: object) -> None:
    found = {name: setting for name, setting, _ in documented(load_recipe("digits-1step", [override]))}[key]
    assert found == value
    assert type(found) is type(value)


def test_an_override_changes_nothing_else() -> None:
    old, new = (load_recipe("digits-4step", [f"critic.noise.mean={mean}"]) for mean in (-0.5, -0.4))
    assert differences(old, new) == ["critic.noise.mean: -0.5 -> -0.4"]
    assert [key for key in differences(load_recipe("digits-4step"), new) if "critic.noise.mean" not in key] == []


def test_of_overrides_the_last_of_a_key_holds_and_all_are_checked_together() -> None:
    assert load_recipe("digits-1step", ["seed=1", "seed=2"]).seed == 2
    recipe = load_recipe("digits-1step", ["student.timesteps=[80, 5e-1]", "student.num_timesteps=2"])
    assert recipe.student.timesteps == [80.0, 0.5]


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("num_steps", "write key=value, for example num_steps=1000"),
        ("=1", "write key=value, for example num_steps=1000"),
        (" =1", "write key=value, for example num_steps=1000"),
        ("num_steps.x=1", "num_steps is a single value and holds no keys"),
        ("student.timesteps=[1", "'[1' is not a YAML value"),
    ],
)
def test_an_override_that_can_not_be_says_how_to_write_one(override: str, fragment: str) -> None:
    assert fragment in mistake(lambda: load_recipe("digits-1step", [override]))


# --- mistakes --------------------------------------------------------------------------------------------------------


def student(**settings: object) -> dict:
    return {**DISTILL, "student": settings}


KINDS = "teach, teach-text, teach-autoencoder, distill, regress"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        # unknown keys name the nearest beside them
        ({**TEACH, "num_step": 1}, "num_step: unknown key, did you mean 'num_steps'?"),
        ({**TEACH, "optimizer": {"xyz": 1}}, "optimizer.xyz: unknown key"),
        ({**TEACH, "model": {"chanels": 1}}, "model.chanels: unknown key, did you mean 'model.channels'?"),
        ({**TEACH, "guidance_scale": 2}, "guidance_scale: unknown key"),
        ({**TEACH, "distill": 2}, "distill: unknown key"),
        ({**DISTILL, "distill": 2}, "distill: unknown key, did you mean 'diversity'?"),  # the nearest there is
        ({**DISTILL, "studnet": {}}, "studnet: unknown key, did you mean 'student'?"),
        (
            student(optimizer={"weight_decya": 0}),
            "student.optimizer.weight_decya: unknown key, did you mean 'student.optimizer.weight_decay'?",
        ),
        (
            {**DISTILL, "gan": {"critics_weight": 1}},
            "gan.critics_weight: unknown key, did you mean 'gan.critic_weight'?",
        ),
        ({**TEACH, "sed": 1, "num_step": 1}, "sed: unknown key, did you mean 'seed'? (and 1 more)"),
        # wrong values name what the key takes
        ({**TEACH, "num_steps": "many"}, "num_steps: …integer…"),
        ({**TEACH, "num_steps": 1.5}, "num_steps: …integer…"),
        ({**TEACH, "num_steps": 0}, "num_steps: …greater than or equal to 1…"),
        ({**TEACH, "device": "gpu"}, "device: …'auto', 'cpu' or 'cuda'…"),
        ({**TEACH, "optimizer": {"betas": [0.9]}}, "optimizer.betas.1: …required…"),
        ({**TEACH, "model": {"channels": 2}}, "model.channels: …1 or 3…"),
        ({**TEACH, "model": {"attention": [True, "maybe"]}}, "model.attention.1: …boolean…"),
        ({**TEACH, "ema_decay": 1}, "ema_decay: …less than 1…"),
        (
            {**TEACH, "data": "digits"},
            "data: …must hold keys (source, split, image_column, …), not 'digits'",
        ),
        (student(timesteps=80), "student.timesteps: takes a list of times, random, or null, not 80"),
        (student(timesteps=[80, "x"]), "student.timesteps: takes a list of times, random, or null, not [80, 'x']"),
        (student(timesteps="rand"), "student.timesteps: takes a list of times, random, or null, not 'rand'"),
        ({**DISTILL, "guidance_scale": 0.5}, "guidance_scale: …greater than or equal to 1…"),
        ({**TEACH, "optimizer": {"betas": [2, 0.9]}}, "optimizer.betas.0: …less than 1…"),
        ({**TEACH, "class_dropout": 0.1}, "class_dropout: …null_class…"),
        ({"kind": "distill"}, "teacher: …required…"),
        # a recipe is of one kind
        *((content, f"kind: must be {KINDS}, not None") for content in ({}, {"num_steps": 3}, {1: 2})),
        ({"kind": "learn"}, f"kind: must be {KINDS}, not 'learn'"),
        # timesteps decrease and are as many as the student steps
        (student(timesteps=[80, 1]), "student: timesteps has 2 entries, but num_timesteps is 1"),
        (student(timesteps=[80], num_timesteps=2), "student: timesteps has 1 entries, but num_timesteps is 2"),
        (student(timesteps=[1, 80], num_timesteps=2), "student: timesteps must decrease, which [1.0, 80.0] does not"),
        (student(timesteps=[80, 80], num_timesteps=2), "student: timesteps must decrease, which [80.0, 80.0] does not"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_its_key(content: dict, line: str) -> None:
    told = mistake(lambda: parse(content, "mine")).removeprefix("recipe mine: ")
    assert re.fullmatch(".*".join(map(re.escape, line.split("…"))), told), told


# --- differences -----------------------------------------------------------------------------------------------------


def test_differences_are_dotted_keys_with_both_values_or_the_kinds() -> None:
    old, new = (
        parse({**DISTILL, **more}, "") for more in ({"num_steps": 3}, {"num_steps": 5, "student": {"timesteps": [80]}})
    )
    assert differences(old, parse({**DISTILL, "num_steps": 3}, "")) == []
    assert sorted(differences(old, new)) == ["num_steps: 3 -> 5", "student.timesteps: None -> [80.0]"]
    assert differences(parse(TEACH, "a"), old) == ["kind: teach -> distill"]


@pytest.mark.parametrize("value", ["lean", "[conv1, to_q]", '["null", 1e3]', "[]"])
def test_a_setting_of_a_word_or_of_a_list_of_words_takes_either(value: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: digits-4step-lora\nlora: {{targets: {value}}}\n")
    ways = (str(tmp_path / "mine.yaml"), []), ("digits-4step-lora", [f"lora.targets={value}"])
    if value == "[]":
        for name, overrides in ways:
            with pytest.raises(UserError, match=r"lora\.targets"):
                load_recipe(name, overrides)
    else:
        expected = {"lean": "lean", "[conv1, to_q]": ["conv1", "to_q"], '["null", 1e3]': ["null", "1e3"]}[value]
        assert [load_recipe(*way).lora.targets for way in ways] == [expected] * 2
