"""Prompt lists from every kind of file, and a line for every kind of mistake."""

from pathlib import Path

import datasets
import pytest

from fewstep.data.texts import load_prompts
from fewstep.errors import UserError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "prompts"


def written(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "encoding", "wanted"),
    [
        ("p.txt", 'a "red" cat\n\n  \nein Fuß, nass \n', "utf-8", ['a "red" cat', "ein Fuß, nass"]),
        ("p.txt", "cat\n", "utf-8-sig", ["cat"]),  # Windows' byte order mark is no part of a prompt
        ("p.csv", "prompt\ncat\n", "utf-8-sig", ["cat"]),
        ("p.csv", 'id,prompt\n1,"a cat, a ""mat"""\n2,None\n', "utf-8", ['a cat, a "mat"', "None"]),
        ("p.tsv", 'prompt\tid\n"A" and\t1\na mat\t2\n', "utf-8", ['"A" and', "a mat"]),
    ],
)
def test_a_prompt_per_line_or_row_where_csv_alone_has_quotation_marks(
    name: str, text: str, encoding: str, wanted: list[str], tmp_path: Path
) -> None:
    assert load_prompts(written(tmp_path / name, text, encoding)) == wanted


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
        ("p.csv", "", None, r"no column of prompts \(.*\) among none"),
        (
            "p.csv",
            "id,words\n1,cat\n",
            None,
            r"no column of prompts \(prompt, caption or text\) among id, words; name it by prompts\.column",
        ),
        ("p.tsv", "id\tprompt\n1\tcat\n", "words", "has no column 'words' .prompts.column.; it has id, prompt"),
        ("p.parquet", "not parquet", None, r"p\.parquet: can't be read"),
        ("p.pkl", "cos\nsystem\n", None, r"a \.txt, \.csv, \.tsv or \.parquet file"),
    ],
)
def test_mistakes_are_told(name: str, text: str, column: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(written(tmp_path / name, text), column)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_not_text_is_told(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nothing.txt"), written(tmp_path / "latin.txt", "Fuß", "latin-1")):
        with pytest.raises(UserError, match=f"{path}: can't be read"):
            load_prompts(path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
def test_the_lists_of_the_papers() -> None:
    parti, coco = (SHARED / name for name in ("PartiPrompts.tsv", "coco14_val_captions_30k.txt"))
    prompts = load_prompts(str(parti))
    assert prompts == [line.split("\t")[0].strip() for line in parti.read_text().splitlines()[1:]]
    assert (len(prompts), prompts[0]) == (1632, "bond")
    lines = coco.read_text().splitlines()
    assert load_prompts(str(coco)) == [line.strip() for line in lines]
    assert (len(lines), len(set(lines))) == (30000, 29436)
