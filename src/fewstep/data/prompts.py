"""Lists of prompts: text files, one prompt per line, and a column of CSV, TSV or parquet files."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

COLUMNS = ("prompt", "caption", "text")


def load_prompts(source: str, column: str | None = None, field: str = "prompts.source:") -> list[str]:
    """The prompts at `source`, without blank ones; `column` by default the first of prompt, caption, text.

    Capitals in column names don't matter. `field` names the source in errors. Raises UserError if the file can't be
    read or has no prompts.
    """
    path = Path(source)
    readers = {".txt": _lines, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"{field} {source}: prompts come from a .txt, .csv, .tsv or .parquet file")
    try:
        cells = readers[path.suffix.lower()](path, column)
        prompts = [cell.strip() for cell in cells if isinstance(cell, str) and cell.strip()]
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and Unicode's errors are ValueErrors
        reason = " ".join(str(error).split()[:20])
        raise UserError(f"{field} {source}: can't be read ({reason})") from error
    if not prompts:
        raise UserError(f"{field} {source}: holds no prompts")
    return prompts


def _lines(path: Path, column: str | None) -> list[str]:
    return path.read_text("utf-8-sig").splitlines()


def _csv(path: Path, column: str | None) -> Iterator[str | None]:
    tsv = path.suffix.lower() == ".tsv"  # in which quotation marks are text
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tsv else csv.DictReader(file)
        name = _find(list(rows.fieldnames or []), column, path)
        yield from (row[name] for row in rows)


def _parquet(path: Path, column: str | None) -> list[Any]:
    from pyarrow import parquet

    name = _find(parquet.read_schema(path).names, column, path)
    return list(parquet.read_table(path, columns=[name])[name].to_pylist())


def _find(names: list[str], column: str | None, path: Path) -> str:
    by_lower = {name.lower(): name for name in reversed(names)}
    wanted = (column.lower(),) if column else COLUMNS
    found = [by_lower[name] for name in wanted if name in by_lower]
    if not found:
        raise UserError(f"{path}: has no column {' or '.join(wanted)} (prompts.column); it has {', '.join(names)}")
    return found[0]
