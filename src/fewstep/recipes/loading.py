"""Finding, checking, overriding and printing recipes; every mistake in one is told in one line."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from fewstep.errors import UserError
from fewstep.recipes.schema import AnyRecipe, Recipe

FOLDER = Path(__file__).parent
_ADAPTER: TypeAdapter[AnyRecipe] = TypeAdapter(Recipe)
KINDS: dict[object, type[AnyRecipe]] = {each.model_fields["kind"].default: each for each in get_args(AnyRecipe)}


def recipe_names() -> list[str]:
    """The recipes that come with fewstep."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), verb: str | None = None) -> Any:
    """The recipe of that name, or in that YAML file, over what it extends, with `a.b=value` overrides put in.

    Raises UserError for an unknown name, key or type, naming the nearest right one, or if it is not for the `verb`.
    """
    content, given = (_extended(find(name), shipped=shipped) for shipped in (True, False))
    for override in overrides:
        _put(content, override)
        _put(given, override)
    recipe = parse(content, name)
    _keep_given(recipe, given)
    right = "teach" if recipe.kind.startswith("teach") else "distill"
    if verb not in (None, right):
        raise UserError(f"recipe {name}: is for `fewstep {right}`, not for `fewstep {verb}`")
    return recipe


def _extended(path: Path, heirs: tuple[Path, ...] = (), shipped: bool = True) -> dict[str, Any]:
    """The content of a recipe, over that of the one which it `extends`: a name, or a YAML file, from its folder.

    With `shipped` false, recipes that come with fewstep say nothing.
    """
    if path.resolve() in heirs:
        chain = " -> ".join(each.name for each in (*heirs, path))
        raise UserError(f"{path}: extends: goes round in a circle ({chain})")
    content = _read(path) if shipped or path.parent != FOLDER else {}
    if "extends" not in content:
        return content
    name = os.path.expanduser(str(content.pop("extends")))
    beside = path.parent / name
    try:
        base = find(str(beside) if beside.suffix and beside.is_file() else name)
    except UserError as error:
        raise UserError(f"{path}: extends: {error}") from error
    return _over(_extended(base, (*heirs, path.resolve()), shipped), content)


def _over(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with those of `content` in their place; a list is a single value."""
    both = [key for key, value in content.items() if isinstance(value, dict) and isinstance(base.get(key), dict)]
    return {**base, **content, **{key: _over(base[key], content[key]) for key in both}}


def find(name: str) -> Path:
    """The YAML file of a recipe; raises UserError if there is none."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        return path
    if name not in recipe_names():
        near = _nearest(name, recipe_names())
        raise UserError(f"no recipe or YAML file {name!r}{near}; `fewstep recipes` lists them")
    return FOLDER / f"{name}.yaml"


def parse(content: dict[str, Any], name: str) -> AnyRecipe:
    """Checks the content of a recipe; raises UserError with the first mistake."""
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise UserError(f"recipe {name}: {_explain(error, content)}") from error


def _keep_given(recipe: BaseModel, given: dict[str, Any]) -> None:
    """Leaves in `model_fields_set` what the user gave, not what a recipe that comes with fewstep says."""
    recipe.model_fields_set.intersection_update(given)
    for name, value in recipe:
        if isinstance(value, BaseModel):
            _keep_given(value, given.get(name) or {})


def dump(recipe: BaseModel) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def read_run_recipe(path: Path) -> AnyRecipe:
    """The resolved recipe of a run folder."""
    return parse(_read(path), str(path))


def differences(old: AnyRecipe, new: AnyRecipe) -> list[str]:
    """The dotted keys in which two recipes differ, as `key: old -> new`; of two kinds, only the kind."""
    if old.kind != new.kind:
        return [f"kind: {old.kind} -> {new.kind}"]
    before, after = ({key: value for key, value, _ in documented(recipe)} for recipe in (old, new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def documented(recipe: BaseModel) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, documentation) for every setting of a recipe."""
    for name, field in type(recipe).model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            yield from ((f"{name}.{key}", inner, text) for key, inner, text in documented(value))
        else:
            yield name, value, " ".join((field.description or "").split())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: can't be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    return content


def _put(content: dict[str, Any], override: str) -> None:
    """Puts `a.b=value` into nested dicts; the value is YAML."""
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override!r}: write key=value, for example num_steps=1000")
    *parents, last = key.strip().split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"--set {override}: {parent} is a single value and holds no keys")
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: {value!r} is not a YAML value") from error


def _explain(error: ValidationError, content: dict[str, Any]) -> str:
    """The first mistake as `key: what is wrong`, with the nearest right key if one is misspelt."""
    first, more = error.errors()[0], error.error_count() - 1
    kind = content.get("kind")
    location = [str(part) for part in first["loc"][1:]]  # behind the kind
    key = ".".join(location)
    if first["type"].startswith("union_tag"):
        return f"kind: must be {', '.join(map(str, KINDS))}, not {kind!r}"
    if first["type"] == "extra_forbidden":
        text = f"{key}: unknown key{_nearest(location[-1], _keys_beside(kind, location))}"
    elif first["type"] == "model_type":
        text = f"{key}: must hold keys ({', '.join(_keys_beside(kind, [*location, '']))}), not {first['input']!r}"
    elif first["type"] == "value_error":
        text = f"{key}: {first['ctx']['error']}" if location else str(first["ctx"]["error"])
    else:
        message = first["msg"][0].lower() + first["msg"][1:]
        text = f"{key}: {message}" + ("" if first["type"] == "missing" else f", not {first['input']!r}")
    return text + (f" (and {more} more)" if more else "")


def _keys_beside(kind: object, location: list[str]) -> list[str]:
    """The keys that a recipe takes where `location` stands."""
    model: Any = KINDS[kind]
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        model = next((t for t in (annotation, *get_args(annotation)) if isinstance(t, type)), None)
    return list(model.model_fields)


def _nearest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
