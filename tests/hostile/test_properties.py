"""Whatever comes in works or is told in one line, and text stays text: a few cases of each here, the rest when slow."""

import io
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from PIL import Image

from command_line import fewstep
from fewstep.data.texts import load_prompts
from fewstep.errors import UserError
from fewstep.recipes.loading import FOLDER, load_recipe, recipe_names
from image_sets import encoded, load, write_files
from small_runs import bounded, make_place


def words(text: str) -> list[str]:
    return text.split()


TEXT = some.text(some.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)
WORDS = some.sampled_from(
    words(
        "kind teach distill regress teacher data source num_steps seed model student timesteps optimizer lr gan every "
        "digits image_size evaluation extends null ~ prompts 2026-11-26 1e3 1_0 0x1F 0o7 yes no .inf .nan << &a *a"
    )
)
SCALARS = some.none() | some.booleans() | some.integers() | some.floats() | TEXT | WORDS | some.dates()
TREES = some.recursive(
    SCALARS,
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(WORDS | TEXT, inner, max_size=6),
    max_leaves=12,
)
EDITS = some.lists(
    some.tuples(some.floats(0, 1), some.integers(0, 12), some.binary(max_size=12)), min_size=1, max_size=4
)
"""Where, how many bytes go, and what comes instead."""


def mutated(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, instead in edits:
        start = int(where * len(content))
        content = content[:start] + instead + content[start + gone :]
    return content


@contextmanager
def folder() -> Iterator[Path]:
    """For files of one case."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def told(work: Callable[[], Any]) -> Any:
    """What it gives, or None for a mistake told in one line."""
    try:
        with bounded(20):
            return work()
    except UserError as error:
        print(error)
        return None


def text_stays_text(text: str) -> None:
    recipe = told(lambda: load_recipe("digits-teacher", [f"data.source={text}"]))
    if recipe is not None and text not in ("", "null"):
        assert recipe.data.source == os.path.expanduser(text)
    if len(text) > 0 and text.isalnum():
        assert recipe is not None


def lists_of_prompts_stay(prompts: list[str]) -> None:
    lines = [each.strip() for each in (" ".join(each.splitlines()) for each in prompts)]
    lines = [each for each in lines if each and not each.startswith("\ufeff")]
    with folder() as place:
        (place / "p.txt").write_text("\n".join(lines), encoding="utf-8")
        assert (told(lambda: load_prompts(str(place / "p.txt"))) or []) == lines


def any_bytes_as_prompts(content: bytes) -> None:
    with folder() as place:
        for end in ("txt", "csv", "tsv", "parquet"):
            (place / f"p.{end}").write_bytes(content)
            found = told(lambda name=f"p.{end}": load_prompts(str(place / name)))
            assert found is None or all(isinstance(each, str) for each in found)


def any_override(override: str) -> None:
    told(lambda: load_recipe("digits-1step", [override]))


def any_tree_as_recipe(tree: object) -> None:
    any_bytes_as_recipe(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))


def any_bytes_as_recipe(content: bytes) -> None:
    with folder() as place:
        (place / "r.yaml").write_bytes(content)
        told(lambda: load_recipe(str(place / "r.yaml")))


def a_shipped_recipe_with_edits(case: tuple[str, list]) -> None:
    any_bytes_as_recipe(mutated((FOLDER / f"{case[0]}.yaml").read_bytes(), case[1]))


@cache
def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((20, 16)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def a_picture_with_edits(case: tuple[str, list]) -> None:
    with folder() as place:
        write_files(place, {"p/a.png": picture("PNG"), f"p/b.{case[0].lower()}": mutated(picture(case[0]), case[1])})
        told(lambda: load(place / "p", 8, 3).batch(torch.tensor([0, 1])))


def any_metadata(content: bytes) -> None:
    with folder() as place:
        pictures = {f"p/{index}.png": encoded(Image.new("RGB", (8, 8))) for index in range(2)}
        write_files(place, pictures | {"p/metadata.csv": content})
        told(lambda: load(place / "p", 8, 3).batch(torch.tensor([0])))


def any_words_as_a_command(words: list[str]) -> None:
    with bounded(20):
        code, _, error = fewstep(shlex.join(words))
    assert code in (0, 2), error
    assert code == 0 or words == ["recipes"] or (error.startswith("fewstep: ") and error.count("\n") == 1), error


VERBS = some.sampled_from(
    [["sample"], ["export"], ["recipes"], ["recipes", "show"], ["recipes", "check"], ["import", "edm"]]
)
OPTIONS = words(
    "--out --num --seed --class --steps --sampler --guidance --compare --device --set --prompt --prompts --to --ema "
    "--dtype --shard-size --license --evaluation --raw --overwrite"
)
VALUES = words(
    "student student@2 student@best-fid teacher d.yaml out.png out 1 -1 2 0 heun:2 digits-1step diffusers single-file "
    "float16 mit cpu a=b seed=1 nan ~ / ."
)
COMMANDS = some.tuples(VERBS, some.lists(some.sampled_from(OPTIONS + 2 * VALUES) | TEXT, max_size=6)).map(
    lambda parts: parts[0] + parts[1]
)
Image.init()
FORMATS = [kind for kind in words("PNG JPEG WEBP GIF TIFF AVIF BMP") if kind in Image.SAVE]
PIECES = [*words('file_name text label , 0.png 1.png " ../0.png a 1'), "\n", "\r", "\ufeff"]
ROWS = some.lists(some.sampled_from(PIECES), max_size=14)
PROPERTIES: list[tuple[some.SearchStrategy, Callable[[Any], None], int]] = [
    (TEXT | WORDS, text_stays_text, 600),
    (some.lists(TEXT, max_size=5), lists_of_prompts_stay, 300),
    (some.binary(max_size=80) | TEXT.map(str.encode), any_bytes_as_prompts, 300),
    (
        TEXT
        | some.tuples(WORDS, TEXT | WORDS).map("=".join)
        | some.tuples(WORDS, WORDS, TEXT).map("{0[0]}.{0[1]}={0[2]}".format),
        any_override,
        600,
    ),
    (TREES, any_tree_as_recipe, 400),
    (some.binary(max_size=60) | TEXT.map(str.encode), any_bytes_as_recipe, 400),
    (some.tuples(some.sampled_from(recipe_names()), EDITS), a_shipped_recipe_with_edits, 400),
    (some.tuples(some.sampled_from(FORMATS), EDITS), a_picture_with_edits, 400),
    (ROWS.map(lambda parts: "".join(parts).encode()) | some.binary(max_size=60), any_metadata, 200),
    (COMMANDS, any_words_as_a_command, 400),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where commands find runs; what they write goes to the same place."""
    here = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        make_place("label", here)
        yield


@pytest.mark.parametrize("num", [5, pytest.param(None, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize(("strategy", "check", "many"), PROPERTIES, ids=[check.__name__ for _, check, _ in PROPERTIES])
def test_it_works_or_is_told(
    place: None, strategy: some.SearchStrategy, check: Callable[[Any], None], many: int, num: int | None
) -> None:
    bounds = settings(
        max_examples=num or many, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    bounds(given(strategy)(check))()
