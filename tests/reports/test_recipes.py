"""What people write in recipes and on the command line is what they get: rows 11, 12 and 13 and their kinds."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from PIL import Image

from command_line import fewstep
from fewstep.cli.verbs import VERBS, at_home, is_place
from fewstep.recipes.loading import documented, load_recipe
from image_sets import encoded, write_files

TINY = {
    "kind": "teach",
    "model": {"image_size": 8, "block_out_channels": [8, 8], "norm_num_groups": 4},
    "num_steps": 1,
    "batch_size": 2,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with pictures in it, and a recipe in the working directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    grey = {f"{index}.png": encoded(Image.new("L", (8, 8), index)) for index in range(2)}
    for place in ("home/photos", "here/set", "here/set #2", "here/2026-11-26"):
        write_files(tmp_path / place, grey)
    Path("t.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path / "home"


def setting(recipe: object, key: str) -> object:
    """The value at a dotted key."""
    return {name: value for name, value, _ in documented(recipe)}[key]  # type: ignore[arg-type]


# --- row 13: the home folder -----------------------------------------------------------------------------------------

PLACES = {
    "data.source": "teach",
    "evaluation.features": "teach",
    "model.autoencoder": "teach-text",
    "model.tokenizer": "teach-text",
    "embeddings.folder": "teach-text",
    "teacher": "distill",
    "teacher_config": "distill",
    "init_from": "distill",
    "prompts.source": "distill",
    "regression.pairs": "regress",
    "regression.lpips": "regress",
    "regression.decoder": "regress",
}


@pytest.mark.parametrize("key", PLACES, ids=lambda key: f"row-13-{key}")
def test_the_home_folder_in_every_path_of_a_recipe(key: str, home: Path) -> None:
    recipe: dict = {"kind": PLACES[key], "evaluation": {"every": 1}}
    if PLACES[key] in ("distill", "regress"):
        recipe |= {"teacher": "digits-teacher", "regression": {"pairs": "p", "sampler": "s", "lpips": "l"}}
    *above, last = key.split(".")
    at = recipe
    for part in above:
        at = at.setdefault(part, {})
    at[last] = "~/x"
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    assert setting(load_recipe("own.yaml"), key) == f"{home}/x"
    at[last] = "a"
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    assert setting(load_recipe("own.yaml", [f"{key}=~/y"]), key) == f"{home}/y"


@pytest.mark.parametrize("name", ["owner/name", "shapes-teacher", "a~b", "./~", "dir/~x", "~nobody-of-that-name/x"])
def test_what_is_not_in_the_home_folder_passes_unchanged(name: str) -> None:
    assert load_recipe("digits-1step", [f"teacher={name}"]).teacher == name


def test_a_recipe_extends_one_in_the_home_folder(home: Path) -> None:
    (home / "base.yaml").write_text(yaml.safe_dump({**TINY, "seed": 3}))
    Path("heir.yaml").write_text("extends: ~/base.yaml\nnum_steps: 2")
    assert load_recipe("heir.yaml").seed == 3


def test_row_13_teach_with_out_and_source_in_the_home_folder(home: Path) -> None:
    (home / "t.yaml").write_text(yaml.safe_dump({**TINY, "data": {"source": "~/photos"}}))
    assert fewstep("teach '~/t.yaml' --out='~/x'")[0] == 0
    assert (home / "x" / "recipe.yaml").is_file()
    assert yaml.safe_load((home / "x" / "recipe.yaml").read_text())["data"]["source"] == f"{home}/photos"
    assert sorted(path.name for path in Path().iterdir()) == ["2026-11-26", "set", "set #2", "t.yaml"]


def test_row_13_every_option_that_is_a_path_is_known_as_one() -> None:
    texts = {
        f"{name} {key}": hint
        for name, verb in VERBS.items()
        for key, hint in get_type_hints(verb.order, include_extras=True).items()
        if not is_place(hint) and "str" in str(hint)
    }
    no_places = (
        "action|caption|classes|column|device|dtype|ema|license|precision|prompt$|sampler|set_|shard|split|to$|type"
    )
    assert [key for key in texts if not re.search(no_places, key)] == []
    assert at_home(["~/a", "b", "~/c@5"]) == [str(Path.home() / "a"), "b", f"{Path.home()}/c@5"]
