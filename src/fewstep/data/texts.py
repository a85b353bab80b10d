"""Text of files as it stands there, prompts among it: nothing is guessed into a number, a date or a missing value."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

MAX_BYTES = 2**20  # of a caption, or of the JSON of one image
MAX_LENGTH = 2**16  # characters of a prompt, of which models read the first hundreds
PROMPTS = ("prompt", "caption", "text")


def as_text(content: bytes, what: object) -> str:
    """UTF-8 without its byte order mark; raises UserError that names `what` it is of."""
    if len(content) > MAX_BYTES:
        raise UserError(f"{what}: a text of {len(content) / 1e6:.1f} MB is no caption; the limit is 1 MB")
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str | None]]]:
    """The names in the first line of a .csv or .tsv file, and its rows by them, None where a cell is empty.

    Raises UserError, ValueError (of which Unicode's errors are), OSError or csv.Error if that can't be read.
    """
    tsv = path.suffix.lower() == ".tsv"  # in which quotation marks are text
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tsv else {"strict": True}
    found = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, **how)
        for row in rows:
            if None in row:
                told = "more cells than the first line names; put text with commas in quotation marks"
                raise UserError(f"{path}, line {rows.line_num}: {told}")
            found.append({name: cell or None for name, cell in row.items()})
        return list(rows.fieldnames or ()), found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """An object per line; errors as those of `read_csv`."""
    with path.open(encoding="utf-8-sig") as file:
        return [as_object(line, f"{path}, line {number}") for number, line in enumerate(file, 1) if line.strip()]


def as_object(text: str, what: object) -> dict[str, Any]:
    """A JSON object; raises UserError that names `what` it is of."""
    try:
        if isinstance(found := json.loads(text), dict):
            return found
        raise ValueError("something else")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: holds no JSON object") from error


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of many."""
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def find_column(
    names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, setting: str, path: Path, more: str = ""
) -> str:
    """The column asked for, or the first usual one, in any capitals; raises UserError that names the setting."""
    if wanted and wanted in names:
        return wanted
    by_lower = {name.lower(): name for name in reversed(names)}
    found = [by_lower[name] for name in ((wanted.lower(),) if wanted else usual) if name in by_lower]
    if found:
        return found[0]
    has = some(names, 30) or "none"
    if wanted:
        raise UserError(f"{path}: has no column {wanted!r} ({setting}); it has {has}")
    known = f"{', '.join(usual[:-1])} or {usual[-1]}"
    raise UserError(f"{path}: no column of {what} ({known}) among {has}; name it by {setting}{more}")


def load_prompts(source: str, column: str | None = None, field: str = "prompts.source:") -> list[str]:
    """The prompts at `source`, without blank ones: lines of a text file, or a column of a .csv, .tsv or .parquet file,
    by default the first of prompt, caption, text. `field` names the source in errors.

    Raises UserError if the file can't be read or has no prompts.
    """
    path = Path(source)
    if path.suffix.lower() not in (".txt", ".csv", ".tsv", ".parquet"):
        raise UserError(f"{field} {source}: prompts come from a .txt, .csv, .tsv or .parquet file")
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("no file")
        prompts = [cell.strip() for cell in _prompts(path, column) if isinstance(cell, str) and cell.strip()]
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and Unicode's errors are ValueErrors
        raise UserError(f"{field} {source}: can't be read ({' '.join(str(error).split()[:20])})") from error
    if not prompts:
        raise UserError(f"{field} {source}: holds no prompts")
    return check_lengths(f"{field} {source}", prompts)


def check_lengths(where: str, prompts: list[str]) -> list[str]:
    """The prompts; raises UserError for one that is too long to be one."""
    if (longest := max(map(len, prompts), default=0)) > MAX_LENGTH:
        raise UserError(f"{where}: a text of {longest:,} characters is no prompt; the limit is {MAX_LENGTH:,}")
    return prompts


def _prompts(path: Path, column: str | None) -> list[Any]:
    if path.suffix.lower() == ".txt":
        with path.open(encoding="utf-8-sig") as file:  # splitlines knows eight more ends than files have
            return list(file)
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        name = find_column(parquet.read_schema(path).names, column, PROMPTS, "prompts", "prompts.column", path)
        return list(parquet.read_table(path, columns=[name])[name].to_pylist())
    names, rows = read_csv(path)
    name = find_column(names, column, PROMPTS, "prompts", "prompts.column", path)
    return [row[name] for row in rows]
