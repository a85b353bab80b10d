"""What people write in recipes and on the command line is what they get: rows 11, 12 and 13 and their kinds."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from PIL import Image

from command_line import fewstep, refused
from fewstep.cli.verbs import VERBS, at_home, is_place
from fewstep.commands.distill import open_batches
from fewstep.errors import UserError
from fewstep.models.pixel_model import PixelModel
from fewstep.recipes.loading import documented, dump, load_recipe
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


def mistake(name: str, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(UserError) as error:
        load_recipe(name, overrides)
    return str(error.value)


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
        recipe["teacher"] = "digits-teacher"
    if PLACES[key] == "regress":
        recipe["regression"] = {"pairs": "p", "sampler": "s", "lpips": "l"}
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
    hints = {
        f"{name} {key}": hint
        for name, verb in VERBS.items()
        for key, hint in get_type_hints(verb.order, include_extras=True).items()
    }
    names = "out|recipe|path|compare|config|runs|features|run|evaluation|file|model|source|teacher|prompts"
    places = [key for key in hints if re.fullmatch(f".* ({names}|teacher_config)", key)]
    assert len(places) > 25
    assert [key for key in places if not is_place(hints[key])] == []
    assert not is_place(hints["sample prompt"])
    assert at_home(["~/a", "b", "~/c@5"]) == [str(Path.home() / "a"), "b", f"{Path.home()}/c@5"]


# --- row 11: text stays text -----------------------------------------------------------------------------------------

TEXTS = ["set #2", "2026-11-26", "1e3", "yes", "007", "a: b", "[x]", "{x}", "Null", "!x", "*a", "'q'", " lead", "1:30"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"row-11-{text}")
def test_where_a_setting_is_text_it_is_the_text_as_typed_and_as_saved(text: str) -> None:
    typed = load_recipe("digits-1step", [f"data.source={text}", f"data.split={text}", f"data.label_column={text}"])
    assert (typed.data.source, typed.data.split, typed.data.label_column) == (text, text, text)
    Path("saved.yaml").write_text(dump(typed))
    assert load_recipe("saved.yaml") == typed


@pytest.mark.parametrize(
    "text",
    ["2026-11-26", "1e3", "yes", "007", "0x10", "1_0", "1:30", "Null", "3.10"],
    ids=lambda text: f"row-11-{text}",
)
def test_where_a_setting_is_text_it_is_the_text_that_stands_in_the_file(text: str) -> None:
    Path("own.yaml").write_text(f"kind: teach\ndescription: {text}\ndata: {{source: {text}, image_column: {text}}}\n")
    recipe = load_recipe("own.yaml")
    assert (recipe.description, recipe.data.source, recipe.data.image_column) == (text, text, text)


def test_only_the_word_null_is_null(home: Path) -> None:
    typed = [load_recipe("digits-1step", [f"init_from={text}"]).init_from for text in ("null", "~", "Null", "'null'")]
    assert typed == [None, str(home), "Null", "'null'"]
    Path("own.yaml").write_text("extends: digits-1step\ninit_from:\ndata: {source: ~, label_column: 'null'}")
    recipe = load_recipe("own.yaml")
    assert (recipe.init_from, recipe.data.source, recipe.data.label_column) == (None, str(home), "null")


@pytest.mark.parametrize("source", ["set #2", "2026-11-26"], ids=lambda text: f"row-11-{text}")
def test_row_11_trains_on_the_folder_that_was_typed(source: str) -> None:
    assert fewstep(f"teach t.yaml --out run --set 'data.source={source}'")[0] == 0
    assert load_recipe("run/recipe.yaml").data.source == source


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        *(("optimizer.lr=1e-5", 1e-5), ("optimizer.lr=1E5", 1e5), ("optimizer.lr=.5", 0.5), ("optimizer.lr=5", 5.0)),
        *(("seed=010", 10), ("seed=08", 8), ("num_steps=1e3", 1000), ("num_steps=1_000", 1000)),
        *(("model.null_class=no", False), ("model.null_class=off", False), ("model.null_class=False", False)),
        ("model.attention=[off, no]", [False, False]),
        ("optimizer.betas=[1e-1, .9]", (0.1, 0.9)),
        ("evaluation.every=~", None),
        ("optimizer={lr: 1e-5, decay: linear}", 1e-5),
    ],
)
def test_where_a_number_is_wanted_a_number_is_read_typed_or_in_a_file(typed: str, value: object) -> None:
    key, _, text = typed.partition("=")
    above, _, last = key.rpartition(".")
    Path("own.yaml").write_text(f"kind: teach\n{f'{above}:' if above else ''}\n{'  ' if above else ''}{last}: {text}")
    key = "optimizer.lr" if key == "optimizer" else key
    for recipe in (load_recipe("t.yaml", [typed]), load_recipe("own.yaml")):
        assert (setting(recipe, key), type(setting(recipe, key))) == (value, type(value))


@pytest.mark.parametrize("typed", ["1:30", "0x10", "yes", "true", "2026-11-26", "1.5", "", "[1]", "one"])
def test_what_is_no_number_is_none(typed: str) -> None:
    refused(fewstep(f"teach t.yaml --set 'num_steps={typed}'"), "num_steps: input should be a valid integer")


# --- row 12: every key once, and no more than a recipe ---------------------------------------------------------------

NINE = "\n".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]" for b, c in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(
            "data: {source: one}\nseed: 1\ndata: {source: two}", "line 4: 'data' stands in line 2", id="row-12"
        ),
        pytest.param("model:\n  channels: 1\n  channels: 3", "line 4: 'channels' stands in line 3", id="row-12-nested"),
        pytest.param("data: {split: a, split: b}", "line 2: 'split' stands in line 2", id="row-12-in-one-line"),
        pytest.param("a: &a {}\nb: {<<: *a, <<: *a}", "line 3: '<<' stands in line 3", id="row-12-merged-twice"),
        pytest.param("seed: 1\n'seed': 1", "line 3: 'seed' stands in line 2", id="row-12-quoted"),
        ("---\nseed: 2", "a second document begins"),
        ("a: *b", "*b stands for nothing above it"),
        ("a: &a [*a]", "*a stands for nothing above it"),
        (f"a: &a [{'x,' * 9}]\n{NINE}", "more than 10000 values"),
        ("a: " + "[" * 3000, "line 2: more than 20 brackets or keys within one another"),
        ("a: " + "{a: " * 3000, "line 2: more than 20 brackets"),
        ("? " * 3000, "more than 20 brackets"),
        ("#" * 2**20, "larger than the 1048576 bytes"),
        ("a: [" + "x," * 20_000 + "]", "more than 10000 values"),
        ("description: " + "y" * 500_000, "description: string should have at most 4096 characters"),
        ("\tseed: 1", "line 2: found a tab character"),
        ("description: a\0b", "byte 26: control characters are not allowed"),
        ("description: \udce9", "byte 25: incomplete UTF-8"),
        (
            "seed: !!python/object/apply:os.getcwd []",
            "line 2: tag:yaml.org,2002:python/object/apply:os.getcwd is a tag",
        ),
        ("? [a]\n: 1", "line 2: a key is a single word"),
        ("<<: 3", "line 2: << takes mappings"),
        ("<<: [{seed: 1}]\nseeds: 2", "seeds: unknown key, did you mean 'seed'?"),
        ("model: [1, 2]", "model: must hold keys (image_size, channels, "),
        ("seed: {a: 1}", "seed is a single value and holds no keys, such as 'a'"),
    ],
)
def test_a_file_that_can_not_be_meant_is_refused_in_one_line(content: str, told: str) -> None:
    Path("own.yaml").write_bytes(f"kind: teach\n{content}".encode(errors="surrogateescape"))
    refused(fewstep("teach own.yaml"), "own.yaml: ", told)


def test_anchors_and_merges_do_what_they_say_and_an_override_changes_one_of_them() -> None:
    Path("own.yaml").write_text(
        "kind: distill\nteacher: t\nstudent:\n  optimizer: &o {lr: 1e-3, eps: 1e-6}\n"
        "critic:\n  optimizer: {<<: *o, lr: 2e-3}\n"
    )
    recipe = load_recipe("own.yaml", ["student.optimizer.eps=1e-7"])
    both = [(each.optimizer.lr, each.optimizer.eps) for each in (recipe.student, recipe.critic)]
    assert both == [(1e-3, 1e-7), (2e-3, 1e-6)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_mark_of_the_byte_order_is_no_part_of_the_first_key(encoding: str) -> None:
    Path("own.yaml").write_text("kind: teach\ndescription: größer\n", encoding=encoding)
    assert load_recipe("own.yaml").description == "größer"


# --- limits, and values that change nothing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        *((f"{key}={value}", f"{key}: input should be a finite number") for key in ("kl_weight", "optimizer.lr")
          for value in ("nan", ".inf", "1e400")),
        (f"seed={2**63}", f"seed: input should be less than {2**63}"),
        (f"seed={'9' * 5000}", "seed: input should be"),
        ("batch_size=100000", "batch_size: input should be less than or equal to 65536"),
        ("num_steps=100000000000", "num_steps: input should be less than or equal to 1000000000"),
        ("model.image_size=100000", "model.image_size: input should be less than or equal to 8192"),
        (f"model.block_out_channels=[{'8,' * 13}]", "model.block_out_channels: list should have at most 12 items"),
        ("model.latent_channels=100000", "model.latent_channels: input should be less than or equal to 256"),
        ("grid_images=1000000", "grid_images: input should be less than or equal to 10000"),
        (f"description={'x' * 5000}", "description: string should have at most 4096 characters"),
        (f"{'x' * 5000}=1", "unknown key"),
        (f"data.source={'x' * 5000}", "data.source: string should have at most 4096 characters"),
        ("data.source=", "data.source: '' is no path"),
        ("a\nb=1", "a\\nb: unknown key"),
        ("optimizer.lr=[\n", "--set optimizer.lr: '[\\n' is not a YAML value"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_what_is_too_large_for_any_run_is_told_with_its_limit(typed: str, told: str) -> None:
    answer = fewstep(f"teach shapes-autoencoder --set '{typed}'")
    refused(answer, told)
    assert len(answer[2]) < 400


@pytest.mark.parametrize(
    ("name", "typed", "told"),
    [
        (
            "digits-1step",
            "dm.noise.min_index=20",
            "dm.noise.min_index changes nothing, for the distribution is lognormal",
        ),
        ("digits-1step", "critic.noise.shift=3", "critic.noise.shift changes nothing"),
        ("shapes-1step", "critic.noise.mean=0", "critic.noise.mean changes nothing, for the distribution is index"),
        (
            "digits-1step",
            "evaluation.features=f.pt",
            "evaluation.features changes nothing, for evaluation.every is null",
        ),
        ("shapes-1step", "evaluation={num_samples: 50}", "evaluation.num_samples changes nothing"),
        ("shapes-1step", "evaluation={time_share: 0.5}", "evaluation.time_share changes nothing"),
        ("digits-1step", "evaluation.clip=folder", "evaluation.clip changes nothing, for evaluation.every is null"),
        ("digits-1step", "evaluation.scorers=[a:B]", "evaluation.scorers changes nothing"),
        ("digits-1step", "evaluation={every: 5, clip_prefix: A}", "clip_prefix changes nothing, for evaluation.clip"),
        ("sdxl-4step", "student.optimizer.decay_start=0.5", "student.optimizer.decay_start changes nothing, for decay"),
        ("sd15-1step", "gan.feature_layer=unet.mid_block", "gan.feature_layer changes nothing, for both weights are 0"),
        ("digits-1step", "critic.condition_on_stop=yes", "condition_on_stop changes nothing, for the student has one"),
        ("digits-1step", "regression={pairs: p, sampler: s}", "regression changes nothing, for regression_weight is 0"),
        ("digits-teacher", "model.attention_head_dim=16", "model.attention_head_dim changes nothing"),
    ],
)
def test_a_value_that_changes_nothing_is_refused_where_the_user_gave_it(name: str, typed: str, told: str) -> None:
    assert told in mistake(name, typed)
    key, _, value = typed.partition("=")
    nested = f"{key.replace('.', ': {')}: {value}" + "}" * key.count(".")
    Path("own.yaml").write_text(f"extends: {name}\n{nested}\n")
    assert told in mistake("own.yaml")
    Path("heir.yaml").write_text("extends: own.yaml\nseed: 1\n")  # which may change what the one below has said
    assert load_recipe("heir.yaml").seed == 1


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("digits-1step", ["dm.noise.distribution=index", "critic.optimizer.decay=constant"]),
        ("digits-4step", ["student.num_timesteps=1", "student.timesteps=null"]),
        ("imagenet64-1step", ["gan.student_weight=0", "gan.critic_weight=0"]),
        ("imagenet64-1step-long-a", ["evaluation.num_samples=500", "evaluation.every=null"]),
        ("digits-1step", ["dm.noise.min_index=0", "evaluation.num_samples=1000"]),
    ],
)
def test_what_others_say_and_what_a_run_holds_may_change_nothing(name: str, overrides: list[str]) -> None:
    recipe = load_recipe(name, overrides)
    Path("recipe.yaml").write_text(dump(recipe))
    assert load_recipe("recipe.yaml") == recipe


# --- what was meant --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("distill digits-1step --set lr=1", "did you mean 'student.optimizer.lr' or 'critic.optimizer.lr'?"),
        ("teach digits-teacher --set lr=1", "did you mean 'optimizer.lr'?"),
        ("teach digits-teacher --set optimizer.learning_rate=1", "did you mean 'optimizer.lr'?"),
        ("distill digits-1step --set optimizer.lr=1", "did you mean 'student.optimizer' or 'critic.optimizer'?"),
        ("teach digits-teacher --set model.size=16", "did you mean 'model.image_size'?"),
        ("teach digits-teacher --set resolution=16", "did you mean 'model.image_size'?"),
        ("teach digits-teacher --set steps=16", "did you mean 'num_steps'?"),
        ("teach digits-teacher --set epochs=16", "did you mean 'num_steps'?"),
        ("teach digits-teacher --set source=x", "did you mean 'data.source'?"),
        ("distill digits-1step --set regresion.pairs=x", "did you mean 'regression'?"),
        ("distill digits-1step --set source=x", "did you mean 'data.source' or 'prompts.source'?"),
        ("teach digits", "no recipe or YAML file 'digits', did you mean 'digits-teacher'?"),
        (
            "distill digits",
            "did you mean 'digits-1step' or 'digits-1step-init' or 'digits-4step' or 'digits-4step-lora'?",
        ),
        ("teach shape", "did you mean 'shapes-autoencoder' or 'shapes-teacher'?"),
        ("teach digits-1step", "is for `fewstep distill digits-1step`, not for `fewstep teach`"),
        ("distill digits-teacher", "is for `fewstep teach digits-teacher`, not for `fewstep distill`"),
    ],
)
def test_a_wrong_name_tells_the_right_one(line: str, told: str) -> None:
    refused(fewstep(line), told)
    assert not Path("runs").exists()


def test_an_average_of_more_than_any_number_is_refused() -> None:
    assert "student.ema_decay: takes a number" in mistake("digits-1step", f"student.ema_decay={'9' * 400}")


def test_a_teacher_whose_recipe_lies_here_is_told_to_be_taught() -> None:
    refused(
        fewstep("distill digits-1step --set teacher=runs/t"), "'runs/t' is neither", "; `fewstep teach t.yaml` makes"
    )


def test_embeddings_of_a_teacher_without_text_are_refused(tiny_model: PixelModel) -> None:
    with pytest.raises(UserError, match="embeddings: the teacher takes no text"):
        open_batches(load_recipe("digits-1step", ["embeddings.max_gb=1"]), tiny_model, Path())
