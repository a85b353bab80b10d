"""What is wrong in a recipe, in one line, with what was probably meant."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_LINES = re.findall(r"^- (.+): (.+)$", Path(__file__).with_name("other_words.md").read_text("utf-8"), re.MULTILINE)
WORDS = {word: key for key, words in _LINES for word in words.split()}
"""What other programs call some settings."""


def explain(error: ValidationError, kinds: Mapping[Any, type[BaseModel]], kind: object) -> str:
    """The first mistake as `key: what is wrong`, with the right key if one is misspelt."""
    first, more = error.errors()[0], error.error_count() - 1
    tagged = first["loc"][:1] == (kind,)
    location = [str(part) for part in first["loc"][tagged:]]
    key, given = shown(".".join(location), 200, quoted=False), first["input"]
    if first["type"].startswith("union_tag"):
        return f"kind: must be {', '.join(map(str, kinds))}, not {shown(kind)}"
    if first["type"] == "extra_forbidden":
        text = f"{key}: unknown key{meant(key, list(keys(kinds[kind])))}"
    elif first["type"] == "model_type":
        inside = [each[len(key) + 1 :] for each in keys(kinds[kind]) if each.startswith(f"{key}.")]
        text = f"{key}: must hold keys ({', '.join(each for each in inside if '.' not in each)}), not {shown(given)}"
    elif first["type"] == "value_error":
        text = f"{key}: {first['ctx']['error']}" if location else str(first["ctx"]["error"])
    elif isinstance(given, dict) and first["type"] != "missing":
        text = f"{key} is a single value and holds no keys, such as {shown(next(iter(given), ''))}"
    else:
        message = first["msg"][0].lower() + first["msg"][1:]
        text = f"{key}: {message}" + ("" if first["type"] == "missing" else f", not {shown(given)}")
    return text + (f" (and {more} more)" if more else "")


def shown(value: object, most: int = 60, quoted: bool = True) -> str:
    """A value as far as a line has room; text without quotes has its line ends and the like escaped, too."""
    text = repr(value) if quoted else repr(value)[1:-1]
    return text if len(text) <= most else f"{text[: most - 3]}..."


def keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every dotted key of a kind of recipe, of groups too."""
    for name, field in model.model_fields.items():
        yield above + name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from keys(inner, f"{above}{name}.")


def meant(key: str, known: list[str]) -> str:
    """`, did you mean ...?`: the key beside it, or elsewhere in the recipe, which has that name or nearly that."""
    above, _, name = key.rpartition(".")
    beside = [each for each in known if each.rpartition(".")[0] == above]

    def called(names: Sequence[str], among: list[str]) -> list[str]:
        return [each for each in among if each.rpartition(".")[2] in names]

    def near(among: list[str], cutoff: float) -> list[str]:
        return difflib.get_close_matches(name[:99], [each.rpartition(".")[2] for each in among], n=1, cutoff=cutoff)

    word = [WORDS.get(name.lower(), name)]
    choices = [
        called(word, beside),
        called([name], known),
        called(near(beside, 0.5), beside) if word == [name] else [],
        called(word, known),
        called(near(known, 0.75), known),
    ]
    return asked(next((found for found in choices if found), []))


def nearest(word: str, words: list[str]) -> str:
    """`, did you mean ...?`: those that begin so, else the one that is spelt nearly so."""
    begin = [each for each in words if word and each.startswith(word)]
    return asked(begin or difflib.get_close_matches(word[:99], words, n=1, cutoff=0.5))


def asked(choices: Sequence[str]) -> str:
    """At most four of them."""
    return f", did you mean {' or '.join(map(repr, choices[:4]))}?" if choices else ""
