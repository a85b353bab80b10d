"""Prompt lists from every kind of file, and a line for every kind of mistake."""

from pathlib import Path

import datasets
import pytest

from fewstep.data.prompts import load_prompts
from fewstep.errors import UserError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "prompts"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")


def written(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding)
    return str(path)


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path / "p.txt", 'a "red" cat\n\n  \nein Fuß, nass \n')) == [
        'a "red" cat',
        "ein Fuß, nass",
    ]


def test_the_byte_order_mark_of_windows_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path / "p.txt", "cat\n", "utf-8-sig")) == ["cat"]
    assert load_prompts(written(tmp_path / "p.csv", "prompt\ncat\n", "utf-8-sig")) == ["cat"]


def test_quotation_marks_group_in_csv_and_are_text_in_tsv(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path / "p.csv", 'id,prompt\n1,"a cat, a ""mat"""\n2,None\n')) == [
        'a cat, a "mat"',
        "None",
    ]
    assert load_prompts(written(tmp_path / "p.tsv", 'prompt\tid\n"A" and\t1\na mat\t2\n')) == ['"A" and', "a mat"]


def test_a_parquet_file(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"id": [1, 2, 3], "TEXT": ["cat", None, "mat"]}).to_parquet(tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet")) == ["cat", "mat"]


@pytest.mark.parametrize(
    ("column", "expected"), [(None, "p"), ("caption", "c"), ("CAPTION", "c"), ("note", "n"), ("text", "t")]
)
def test_the_column_is_named_or_the_first_usual_one(column: str | None, expected: str, tmp_path: Path) -> None:
    source = written(tmp_path / "p.csv", "note,text,Caption,Prompt\nn,t,c,p\n")
    assert load_prompts(source, column) == [expected]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("p.txt", "\n \n", None, r"p\.txt: holds no prompts"),
        ("p.csv", "prompt\n", None, r"p\.csv: holds no prompts"),
        ("p.csv", "", None, "has no column prompt or caption or text"),
        ("p.csv", "id,words\n1,cat\n", None, "has no column prompt or caption or text .*it has id, words"),
        ("p.tsv", "id\tprompt\n1\tcat\n", "words", "has no column words .prompts.column.; it has id, prompt"),
        ("p.parquet", "not parquet", None, r"p\.parquet: can't be read"),
        ("p.pkl", "cos\nsystem\n", None, r"a \.txt, \.csv, \.tsv or \.parquet file"),
    ],
)
def test_mistakes_are_told(name: str, text: str, column: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(written(tmp_path / name, text), column)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_not_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.txt: can't be read"):
        load_prompts(str(tmp_path / "nothing.txt"))
    (tmp_path / "latin.txt").write_bytes("Fuß".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: can't be read"):
        load_prompts(str(tmp_path / "latin.txt"))


@needs_shared
def test_the_lists_of_the_papers() -> None:
    parti = load_prompts(str(SHARED / "PartiPrompts.tsv"))
    lines = (SHARED / "PartiPrompts.tsv").read_text().splitlines()[1:]
    assert parti == [line.split("\t")[0].strip() for line in lines]
    assert (len(parti), parti[0]) == (1632, "bond")
    coco = load_prompts(str(SHARED / "coco14_val_captions_30k.txt"))
    lines = (SHARED / "coco14_val_captions_30k.txt").read_text().splitlines()
    assert coco == [line.strip() for line in lines]
    assert (len(coco), len(set(lines))) == (30000, 29436)
