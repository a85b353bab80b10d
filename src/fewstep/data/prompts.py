"""Lists of prompts: text files, one prompt per line, and a column of CSV, TSV or parquet files."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fewstep.data.texts import find_column, read_csv
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
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("no file")
        cells = readers[path.suffix.lower()](path, column)
        prompts = [cell.strip() for cell in cells if isinstance(cell, str) and cell.strip()]
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and Unicode's errors are ValueErrors
        reason = " ".join(str(error).split()[:20])
        raise UserError(f"{field} {source}: can't be read ({reason})") from error
    if not prompts:
        raise UserError(f"{field} {source}: holds no prompts")
    return prompts


def _lines(path: Path, column: str | None) -> Iterable[str]:
    with path.open(encoding="utf-8-sig") as file:  # whose lines end as files' do; str.splitlines knows eight more ends
        return list(file)


def _csv(path: Path, column: str | None) -> Iterable[str | None]:
    names, rows = read_csv(path)
    name = find_column(names, column, COLUMNS, "prompts", "prompts.column", path)
    return [row[name] for row in rows]


def _parquet(path: Path, column: str | None) -> list[Any]:
    from pyarrow import parquet

    name = find_column(parquet.read_schema(path).names, column, COLUMNS, "prompts", "prompts.column", path)
    return list(parquet.read_table(path, columns=[name])[name].to_pylist())
