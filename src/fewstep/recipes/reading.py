"""YAML as people write it: in bounded time, every key once, and values as they stand until a setting takes them."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from fewstep.errors import UserError
from fewstep.settings import Written

MAX_BYTES, MAX_DEPTH, MAX_VALUES = 2**20, 20, 10_000
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # whose texts are lent by libyaml, where that is there
_NAMED = {"": None, "~": None, "null": None, ".inf": float("inf"), ".nan": float("nan")}


def read_file(path: Path) -> dict[str, Any]:
    """The content of a YAML file, a mapping; raises UserError, which names the line."""
    try:
        with path.open("rb") as file:
            content = read_yaml(file.read(MAX_BYTES + 1))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: can't be read as YAML ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    return content


def read_yaml(text: str | bytes) -> Any:
    """Mappings and lists of `Written`; raises ValueError, with the line, if it is not YAML or too much of it."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than the {MAX_BYTES} bytes that a recipe may have")
    try:
        return _Reader(text).document()
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"byte {error.position}: {error.reason}") from error


def plain(text: str) -> Any:
    """What a text without quotes means: null, a number (010 is ten, 1e-5 is one), or itself."""
    if text.lower() in _NAMED:
        return _NAMED[text.lower()]
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


class _Reader:
    """One document's events, put together; what an alias repeats counts each time."""

    def __init__(self, text: str | bytes):
        self.events: Iterator[Any] = yaml.parse(text, _Loader)
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.count = 0

    def document(self) -> Any:
        """The one that there is; null if there is none."""
        content, found = None, False
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if found:
                    raise ValueError("a second document begins; a recipe is one")
                content, found = self.value(next(self.events), 0), True
        return content

    def value(self, event: Any, depth: int) -> Any:
        """What begins with that event, nested so deep."""
        before, line = self.count, int(event.start_mark.line) + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise ValueError(f"line {line}: *{event.anchor} stands for nothing above it")
            value, size = self.anchors[event.anchor]
            self.count += size
        elif event.tag not in (None, "!"):
            raise ValueError(f"line {line}: {event.tag} is a tag, which recipes have none of")
        elif isinstance(event, yaml.ScalarEvent):
            value = Written(event.value, partial(plain if event.implicit[0] else str, event.value))
        elif depth == MAX_DEPTH:
            raise ValueError(f"line {line}: more than {MAX_DEPTH} brackets or keys within one another")
        else:
            mapping = isinstance(event, yaml.MappingStartEvent)
            value = self.mapping(depth + 1) if mapping else [self.value(each, depth + 1) for each in self.inside()]
        self.count += 1
        if self.count > MAX_VALUES:
            raise ValueError(f"line {line}: more than {MAX_VALUES} values, counted where aliases repeat them")
        if getattr(event, "anchor", None):
            self.anchors[event.anchor] = value, self.count - before
        return value

    def inside(self) -> Iterator[Any]:
        """The events up to the end of a list or mapping; those of what is nested are taken out on the way."""
        return takewhile(lambda event: not isinstance(event, yaml.CollectionEndEvent), self.events)

    def mapping(self, depth: int) -> dict[str, Any]:
        """Keys and values; under those written out lie those of the mappings that `<<` names."""
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for event in self.inside():
            key, line = self.value(event, depth), event.start_mark.line + 1
            if not isinstance(key, str):
                raise ValueError(f"line {line}: a key is a single word")
            if key in found:
                raise ValueError(f"line {line}: {str(key)!r} stands in line {lines[key]} already; write it once")
            found[str(key)], lines[key] = self.value(next(self.events), depth), line
        merged = found.pop("<<", {})
        for below in merged if isinstance(merged, list) else [merged]:
            if not isinstance(below, dict):
                raise ValueError(f"line {lines['<<']}: << takes mappings")
            found = below | found
        return found
