"""Finding and checking studies: every recipe is resolved, and every name in it known, before anything runs."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fewstep.errors import UserError
from fewstep.recipes.loading import idle_among, load_recipe, nested, over, read_override, recipe_names
from fewstep.recipes.mistakes import explain, nearest, shown
from fewstep.recipes.reading import read_file
from fewstep.recipes.schema import AnyRecipe
from fewstep.recipes.studies.schema import Prepared, RowSettings, StudySettings

FOLDER = Path(__file__).parent
PLACES = ("data.source", "model.autoencoder", "teacher", "init_from", "regression.pairs")
"""Settings that may name what a study prepares."""


@dataclass(frozen=True)
class Row:
    """A row of the table, and its recipe, in which what is prepared has its bare name."""

    name: str
    recipe_name: str
    recipe: Any

    def seeded(self, seed: int) -> Any:
        """The recipe of one of its runs."""
        return self.recipe.model_copy(update={"seed": seed})

    def folder(self, seed: int) -> str:
        """Of that run, in OUT: a function of the recipe alone, so that studies share runs."""
        return f"{self.recipe_name}-{recipe_hash(self.seeded(seed))}"


@dataclass(frozen=True)
class Making:
    """What is prepared: how, and the recipe of a run."""

    how: Prepared
    recipe: Any = None


@dataclass(frozen=True)
class Study:
    """A study whose recipes are resolved."""

    name: str
    settings: StudySettings
    prepared: dict[str, Making]
    rows: list[Row]

    def placed(self, recipe: Any, out: Path) -> Any:
        """The recipe with folders of `out` in the place of prepared names, or of the same folders, written otherwise.

        A folder that is gone, of a prepared name, is taken for the one in `out`: that was moved.
        """

        def place(value: str) -> str:
            path, at, choice = value.partition("@")
            there = out / Path(path).name
            same = path == there.name or not Path(path).exists() or Path(path).resolve() == there.resolve()
            return f"{there}{at}{choice}" if there.name in self.prepared and same else value

        return renamed(recipe, place)


def study_names() -> list[str]:
    """The studies that come with fewstep."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def settings_of(recipe: AnyRecipe) -> dict[str, Any]:
    """What a recipe says beyond the defaults, but for its description."""
    return recipe.model_dump(mode="json", exclude_defaults=True, exclude={"description"})


def recipe_hash(recipe: AnyRecipe) -> str:
    """8 hex digits of what it says, in whatever order."""
    return hashlib.sha256(json.dumps(settings_of(recipe), sort_keys=True).encode()).hexdigest()[:8]


def renamed(settings: Any, change: Callable[[str], str], places: Sequence[str] = PLACES) -> Any:
    """Settings with the values at these dotted keys changed, where there are any."""
    for key in places:
        first, _, rest = key.partition(".")
        if (value := getattr(settings, first, None)) is not None:
            new = renamed(value, change, [rest]) if rest else change(value)
            settings = settings.model_copy(update={first: new})
    return settings


def load_study(
    name: str, overrides: Sequence[str] = (), seeds: str | None = None, num_samples: int | None = None
) -> Study:
    """The study of that name, or in that YAML file, with `a.b=value` put into all rows, and other seeds or images.

    Raises UserError for whatever is wrong in it, or in a recipe of it.
    """
    path = _find(name)
    try:
        settings = StudySettings.model_validate(read_file(path))
    except ValidationError as error:
        raise UserError(f"study {name}: {explain(error, {None: StudySettings}, None)}") from error
    told: dict[str, Any] = {} if seeds is None else {"seeds": _parse_seeds(seeds)}
    told |= {} if num_samples is None else {"num_samples": num_samples}
    settings = settings.model_copy(update=told)
    try:
        _check_once("seeds", settings.seeds)
        prepared = _prepared(settings, path)
        if path.stem in prepared:
            raise UserError(f"prepare: {path.stem} is the name of the study's own folder; rename the file")
        _check_teacher(settings, prepared)
        return Study(path.stem, settings, prepared, _rows(settings, path, prepared, overrides))
    except UserError as error:
        raise UserError(f"study {name}: {error}") from error


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() in {".yaml", ".yml"} and path.is_file():
        return path
    if name not in study_names():
        there = ", ".join(study_names())
        raise UserError(f"no study or YAML file {shown(name)}{nearest(name, study_names())}; there are {there}")
    return FOLDER / f"{name}.yaml"


def _parse_seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) < 2**63 for word in words) or len({*map(int, words)}) < len(words):
        raise UserError(f"--seeds {shown(text)}: write different whole numbers, parted by commas: 0,1,2")
    return [int(word) for word in words]


def _check_once(what: str, values: Sequence[Any]) -> None:
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise UserError(f"{what}: {twice[0]} stands there twice; write it once")


def _prepared(settings: StudySettings, path: Path) -> dict[str, Making]:
    """What is prepared, by its name; each may build on those before it."""
    found: dict[str, Making] = {}
    for number, how in enumerate(settings.prepare):
        where, kind = f"prepare.{number}", how.kind
        recipe = None
        if how.run:
            recipe = _load(how.run, [nested(how.set)], path, where)
            _check_names(recipe, found, where)
        for key in ("teacher", "autoencoder"):
            if value := getattr(how, key):
                _check_name(f"{where}.{key}", value, found)
        name = Path(getattr(how, kind)).stem if how.run else getattr(how, kind)
        if name in found:
            raise UserError(f"{where}.{kind}: {name} is prepared already; write it once")
        found[name] = Making(how, recipe)
    return found


def _load(name: str, overrides: Sequence[Any], path: Path, where: str, strict: bool = True) -> Any:
    """A recipe, or one in a file beside the study's; how many pairs are drawn is the study's to say, under prepare."""
    beside = path.parent / name
    try:
        recipe = load_recipe(str(beside) if beside.suffix and beside.is_file() else name, overrides, strict=strict)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    pairs = getattr(recipe, "regression", None)
    return recipe.model_copy(update={"regression": pairs.model_copy(update={"num": None})}) if pairs else recipe


def _refuse_what_studies_say(settings: dict[str, Any], where: str) -> None:
    if "seed" in settings:
        raise UserError(f"{where}: seed is what runs of a row differ in; say seeds in the study, or --seeds")
    if isinstance(pairs := settings.get("regression"), dict) and "num" in pairs:
        raise UserError(f"{where}: regression.num is not the rows'; say num where prepare makes the pairs")


def _check_teacher(settings: StudySettings, prepared: dict[str, Making]) -> None:
    if settings.samplers and not settings.teacher:
        raise UserError("samplers: changes nothing, for there is no teacher to be judged; name it, or leave it out")
    if settings.teacher:
        _check_name("teacher", settings.teacher, prepared)
    _check_once("samplers", settings.samplers)


def _rows(settings: StudySettings, path: Path, prepared: dict[str, Making], overrides: Sequence[str]) -> list[Row]:
    """With the recipe of each; raises UserError for two that are the same, and for what changes nothing."""
    _check_once("rows: the name", [row.name for row in settings.rows])
    common, told = nested(settings.set), dict[str, Any]()
    for each in overrides:
        told = over(told, read_override(each))
    for given, where in ((common, "set"), (told, "--set")):
        _refuse_what_studies_say(given, where)
    rows = [_row(row, settings, path, (common, told)) for row in settings.rows]
    for given, where in ((common, "set"), (told, "--set")):
        of_all = [dict(idle_among(row.recipe, given)) for row in rows]
        for key in [key for key in of_all[0] if all(key in each for each in of_all)]:
            raise UserError(f"{where}: {key} changes nothing in any row, for {of_all[0][key]}; leave it out")
    hashes: dict[str, str] = {}
    for row in rows:
        _check_names(row.recipe, prepared, f"row {row.name!r}")
        if (other := hashes.setdefault(recipe_hash(row.seeded(0)), row.name)) != row.name:
            raise UserError(f"rows {other!r} and {row.name!r} are the same recipe; change one of them, or leave it out")
    return rows


def _row(row: RowSettings, settings: StudySettings, path: Path, given: tuple[dict[str, Any], dict[str, Any]]) -> Row:
    name, where, own = row.recipe or settings.recipe, f"row {row.name!r}", nested(row.set)
    if name is None:
        raise UserError(f"{where}: has no recipe; name one there, or under recipe for all rows")
    _refuse_what_studies_say(own, where)
    recipe = _load(name, [given[0], own, given[1]], path, where, strict=False)
    if recipe.kind == "teach-autoencoder":
        raise UserError(f"{where}: {name} trains an autoencoder, which is not judged; take a teacher's or a student's")
    if recipe.data.source is None:
        raise UserError(f"{where}: data.source is null; name the images that it is judged by")
    for key, reason in idle_among(recipe, own):
        raise UserError(f"{where}: {key} changes nothing, for {reason}; leave it out")
    return Row(row.name, Path(name).stem, recipe)


def _named(recipe: Any) -> Iterator[tuple[str, str]]:
    """(dotted key, value) of what names places in a recipe, as far as it is looked at."""
    for key in PLACES:
        value = recipe
        for part in key.split("."):
            value = getattr(value, part, None)
        unused = key == "regression.pairs" and not getattr(recipe, "regression_weight", True)
        if value is not None and not unused:
            yield key, value


def _check_names(recipe: Any, prepared: Collection[str], where: str) -> None:
    for key, value in _named(recipe):
        if key != "data.source" or value not in ("digits", "shapes"):
            _check_name(f"{where}: {key}", value, prepared)


def _check_name(where: str, value: str, prepared: Collection[str]) -> None:
    """Raises UserError for what is neither prepared, nor there, nor on the hub."""
    path = value.partition("@")[0]
    if path in prepared or Path(value).exists() or Path(path).exists():
        return
    if "/" in value and where.endswith("teacher"):
        from fewstep.models.loading.hub import is_hub_id  # which imports torch

        if is_hub_id(value):
            return
    how = nearest(path, [*prepared])
    if where.endswith("regression.pairs"):
        how = f"; put {{pairs: {path}, teacher: ..., num: ..., sampler: ...}} under prepare"
    elif path in recipe_names():
        how = f"; put {{run: {path}}} under prepare{', or set null' if where.endswith('init_from') else ''}"
    raise UserError(f"{where}: {shown(value)} is neither prepared, nor a folder that is there{how}")
