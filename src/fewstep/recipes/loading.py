"""Finding, checking, overriding and printing recipes; every mistake in one is told in one line."""

import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from fewstep.errors import UserError
from fewstep.recipes.mistakes import explain, nearest, shown
from fewstep.recipes.reading import read_file, read_yaml
from fewstep.recipes.schema import AnyRecipe, Recipe
from fewstep.settings import Settings, Written

FOLDER = Path(__file__).parent
_ADAPTER: TypeAdapter[AnyRecipe] = TypeAdapter(Recipe)
FIRST = ("kind", "description", "teacher", "data", "model", "num_steps", "batch_size")  # what a reader looks for
KINDS: dict[object, type[AnyRecipe]] = {each.model_fields["kind"].default: each for each in get_args(AnyRecipe)}


def recipe_names() -> list[str]:
    """The recipes that come with fewstep."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(
    name: str, overrides: Sequence[str | dict[str, Any]] = (), verb: str | None = None, strict: bool = True
) -> Any:
    """The recipe of that name, or in that YAML file, over what it extends, with overrides put in.

    These are `a.b=value`, or settings as they were read. Raises UserError for an unknown name, key or type, naming the
    nearest right one, where it is `strict` for a value of the user's that changes nothing, or if it is not for the
    `verb`.
    """
    path = find(name, verb)
    content, given = (_extended(path, shipped=shipped) for shipped in (True, False))
    told: dict[str, Any] = {}
    for override in overrides:
        content, given, told = (over(each, read_override(override)) for each in (content, given, told))
    recipe = parse(_without_images(content, given), name)
    _keep_given(recipe, given)
    own = read_file(path) if path.parent != FOLDER else {}
    for given in (own, told) if strict else ():
        for key, reason in idle_among(recipe, given):
            raise UserError(f"recipe {name}: {key} changes nothing, for {reason}; leave it out")
    if verb not in (None, right := _verb(recipe.kind)):
        raise UserError(f"recipe {name}: is for `fewstep {right} {name}`, not for `fewstep {verb}`")
    return recipe


def _without_images(content: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The content without its GAN where data.source is null; a GAN that the user asks for stays, and is refused."""
    source = _group(content.get("data")).get("source", "digits")
    null = source is None or (source in ("null", "") and source.meant is None)  # a folder may be called null
    weights = {"student_weight": 0, "critic_weight": 0}
    off = null and content.get("kind") == "distill" and not weights.keys() & _group(given.get("gan")).keys()
    return over(content, {"gan": weights}) if off else content


def _verb(kind: str) -> str:
    return "teach" if kind.startswith("teach") else "distill"


def _extended(path: Path, heirs: tuple[Path, ...] = (), shipped: bool = True) -> dict[str, Any]:
    """The content of a recipe, over that of the one which it `extends`: a name, or a YAML file, from its folder.

    With `shipped` false, recipes that come with fewstep say nothing.
    """
    if path.resolve() in heirs:
        chain = " -> ".join(each.name for each in (*heirs, path))
        raise UserError(f"{path}: extends: goes round in a circle ({chain})")
    content = read_file(path) if shipped or path.parent != FOLDER else {}
    if "extends" not in content:
        return content
    name = os.path.expanduser(str(content.pop("extends")))
    beside = path.parent / name
    try:
        base = find(str(beside) if beside.suffix and beside.is_file() else name)
    except UserError as error:
        raise UserError(f"{path}: extends: {error}") from error
    return over(_extended(base, (*heirs, path.resolve()), shipped), content)


def over(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with those of `content` in their place; a list is a single value."""
    both = {key: _group(base.get(key)) for key, value in content.items() if isinstance(value, dict)}
    return {**base, **content, **{key: over(below, content[key]) for key, below in both.items() if below}}


def _group(value: Any) -> dict[str, Any]:
    """The keys in a group of settings, also of one behind --set; none of anything else."""
    value = value.meant if isinstance(value, Written) and value.startswith("{") else value
    return value if isinstance(value, dict) else {}


def find(name: str, verb: str | None = None) -> Path:
    """The YAML file of a recipe; raises UserError if there is none, naming the nearest for that verb."""
    path = Path(name)
    if path.suffix.lower() in {".yaml", ".yml"} and path.is_file():
        return path
    if name not in recipe_names():
        fitting = [each for each in recipe_names() if verb in (None, _verb(load_recipe(each).kind))]
        raise UserError(f"no recipe or YAML file {shown(name)}{nearest(name, fitting)}; `fewstep recipes` lists them")
    return FOLDER / f"{name}.yaml"


def parse(content: dict[str, Any], name: str) -> AnyRecipe:
    """Checks the content of a recipe; raises UserError with the first mistake."""
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise UserError(f"recipe {name}: {explain(error, KINDS, content.get('kind'))}") from error


def _keep_given(recipe: BaseModel, given: dict[str, Any]) -> None:
    """Leaves in `model_fields_set` what the user gave, not what a recipe that comes with fewstep says."""
    recipe.model_fields_set.intersection_update(given)
    for name, value in recipe:
        if isinstance(value, BaseModel):
            _keep_given(value, _group(given.get(name)))


def idle_among(recipe: BaseModel, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, why) for every value given that changes nothing, where whoever gives one believes that it does."""
    for key, reason in idle(recipe):
        *above, last = key.split(".")
        at, settings = given, recipe
        for part in above:
            at, settings = _group(at.get(part)), getattr(settings, part)
        fields = type(settings).model_fields
        written = _is_whole(given, recipe) and _is_whole(at, settings)
        if last in at and not written and getattr(settings, last) != fields[last].get_default():
            yield key, reason


def _is_whole(given: dict[str, Any], settings: BaseModel) -> bool:
    """Whether so much is given that a run or `recipes show` wrote it, which write what changes nothing, too."""
    return len(given) > 0.75 * len(type(settings).model_fields)


def idle(settings: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, why) for every setting that nothing looks at as the others stand."""
    if isinstance(settings, Settings):
        yield from ((above + key, reason) for key, reason in settings.idle().items())
        for name, value in settings:
            yield from idle(value, f"{above}{name}.")


def dump(recipe: BaseModel) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def explained(
    recipe: BaseModel, skipped: Collection[str] = (), notes: Mapping[str, str] = MappingProxyType({}), above: str = ""
) -> Iterator[str]:
    """The lines of the resolved recipe as YAML, each setting's meaning above it, and its note; but for some keys."""
    indent = "  " * above.count(".")
    saved = recipe.model_dump(mode="json")
    for name in sorted(saved, key=lambda name: (*FIRST, name).index(name)):
        key, field, inner = above + name, type(recipe).model_fields[name], getattr(recipe, name)
        if key not in skipped:
            text = " ".join(f"{field.description or ''} {notes.get(key, '')}".split())
            yield from textwrap.wrap(text, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            yield f"{indent}{name}:" + ("" if isinstance(inner, BaseModel) else f" {_flow(saved[name])}")
            if isinstance(inner, BaseModel):
                yield from explained(inner, skipped, notes, f"{key}.")


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    line = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=float("inf"))
    return str(line).removesuffix("...\n").strip()


def read_run_recipe(path: Path) -> AnyRecipe:
    """The resolved recipe of a run folder."""
    return parse(read_file(path), str(path))


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


def defaults(recipe: BaseModel, usual: BaseModel | None = None, above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, default) for every setting of a recipe that has one, of a group that is null by default its own."""
    for name, field in type(recipe).model_fields.items():
        value, default = getattr(recipe, name), field.get_default() if usual is None else getattr(usual, name)
        if isinstance(value, BaseModel):
            yield from defaults(value, default if isinstance(default, BaseModel) else None, f"{above}{name}.")
        elif not field.is_required():
            yield f"{above}{name}", default


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose keys may be dotted, as groups in one another."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner: Any = nested(value) if isinstance(value, dict) else value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        found = over(found, inner)
    return found


def read_override(text: str | dict[str, Any]) -> dict[str, Any]:
    """`a.b=value` as nested settings, the value as typed."""
    if isinstance(text, dict):
        return text
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {shown(text)}: write key=value, for example num_steps=1000")

    def read() -> Any:
        try:
            return read_yaml(value) if value else ""
        except ValueError as error:
            told = f"{shown(value)} is not a YAML value ({error})"
            raise UserError(f"--set {shown(key, 90, quoted=False)}: {told}") from error

    nested: Any = Written(value, read)
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)
