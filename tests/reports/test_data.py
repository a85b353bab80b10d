"""What people reported of data in tools like this one: every kind of fault by its smallest input and two relatives."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from command_line import fewstep, refused
from fewstep.data import archives
from fewstep.data.filters import Filter, load_filtered
from fewstep.data.images import ImageSet, content_digest, load_captioned, load_images
from fewstep.data.settings import DataSettings
from fewstep.data.stored import look
from fewstep.data.texts import load_prompts
from fewstep.errors import UserError
from fewstep.evaluation import judge
from image_sets import encoded, load, write_edm_zip, write_files, write_tar

SIZE = 4


def picture(index: int = 0) -> bytes:
    """All of it as red as its number."""
    return encoded(Image.new("RGB", (SIZE, SIZE), (index, 0, 0)))


def pictures(names: list[str]) -> dict[str, bytes]:
    return {name: picture(index) for index, name in enumerate(names)}


def drawn(images: ImageSet) -> list[int]:
    """The numbers of the pictures."""
    return images.fetch(torch.arange(images.length))[:, 0, 0, 0].tolist()


def captions(source: Path, **settings: str) -> list[str]:
    return list(load_captioned(DataSettings(source=str(source), **settings), SIZE).captions or [])


def one_line(error: pytest.ExceptionInfo[UserError], *fragments: str) -> None:
    told = str(error.value)
    assert "\n" not in told
    assert len(told) < 500
    assert all(fragment in told for fragment in fragments), told


# --- 1, 2, 3: which files belong to a folder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["pika.png", "pika_2.png", "train.png"], id="row-1-a-picture-called-train"),
        pytest.param(["cat_test_1.png", "dog.png"], id="row-1-a-picture-called-test"),
        pytest.param(["dev/0.png", "other/1.png"], id="row-1-relative-a-folder-called-dev"),
        pytest.param(["val.PNG", "validation-0.jpeg", "x.eval.webp"], id="row-1-relative-capitals-and-other-ends"),
        pytest.param(["[1].png", "{a,b}.png", "what?.png", "*.png", "ä ü.png"], id="row-2-relative-names-of-signs"),
        pytest.param(["data-00000-of-00002.png", "metadata.png", "dataset.json.png"], id="row-1-relative-usual-words"),
    ],
)
def test_every_image_of_a_folder_is_used_whatever_its_name(names: list[str], tmp_path: Path) -> None:
    write_files(tmp_path / "p", pictures(sorted(names)))
    assert drawn(load(tmp_path / "p", SIZE, 3)) == list(range(len(names)))


@pytest.mark.parametrize("folder", ["photos [2024]", "set{1,2}*?", "train", "test set #2", "~", "a\nb"])
def test_paths_are_literal(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """row-2 and its relatives, of every kind of file."""
    here = write_files(tmp_path / folder, pictures(["0.png", "1.png", "test.png"]))
    assert drawn(load(here, SIZE, 3)) == [0, 1, 2]
    (tmp_path / "tars" / folder).mkdir(parents=True)
    write_tar(tmp_path / "tars" / folder / "a.tar", pictures(["0.png", "1.png"]))
    assert drawn(load(tmp_path / "tars" / folder, SIZE, 3)) == [0, 1]
    (tmp_path / "sets" / folder).mkdir(parents=True)
    parquet.write_table(pyarrow.table({"image": [picture(5)]}), tmp_path / "sets" / folder / "a[b]*.parquet")
    monkeypatch.chdir(tmp_path / "sets" / folder)
    assert drawn(load("a[b]*.parquet", SIZE, 3)) == drawn(load(".", SIZE, 3)) == [5]


def test_classes_called_as_splits_are_classes(tmp_path: Path) -> None:
    """row-1: bus, car and train; where all folders are splits, the one that is asked for is read."""
    write_files(tmp_path / "v", pictures(["bus/0.png", "car/0.png", "train/0.png"]))
    images = load(tmp_path / "v", SIZE, 3, 3)
    assert (images.class_names, drawn(images)) == (["bus", "car", "train"], [0, 1, 2])
    write_files(tmp_path / "s", pictures(["test/cat/0.png", "train/cat/0.png", "train/dog/0.png", "val/cat/0.png"]))
    assert drawn(load(tmp_path / "s", SIZE, 3, 2)) == [1, 2]
    assert [drawn(load(tmp_path / "s", SIZE, 3, split=split)) for split in ("test", "validation")] == [[0], [3]]
    with pytest.raises(UserError) as error:
        load(tmp_path / "v", SIZE, 3, split="test")
    one_line(error, "data.split", "'test'", "'train'")


def test_shards_whose_names_begin_with_a_split_belong_to_it(tmp_path: Path) -> None:
    """row-1, relative: a test in the middle of a name is none."""
    for index, name in enumerate(["cats_test_1", "test-00000", "train-00000", "train-00001"]):
        parquet.write_table(pyarrow.table({"image": [picture(index)]}), tmp_path / f"{name}.parquet")
    assert drawn(load(tmp_path, SIZE, 3)) == [0, 2, 3]
    assert drawn(load(tmp_path, SIZE, 3, split="test")) == [1]


def test_folders_of_classes_may_be_links(tmp_path: Path) -> None:
    """row-3 and relatives: a link to an image, a link to the folder above, which ends, and a link to nothing."""
    write_files(tmp_path / "store", pictures(["a/0.png", "b/0.png"]))
    (tmp_path / "l").mkdir()
    for name in "ab":
        (tmp_path / "l" / name).symlink_to(tmp_path / "store" / name)
    images = load(tmp_path / "l", SIZE, 3, 2)
    assert (images.class_names, drawn(images)) == (["a", "b"], [0, 1])
    (tmp_path / "store" / "a" / "above").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "b" / "1.png").symlink_to(tmp_path / "store" / "a" / "0.png")
    assert drawn(load(tmp_path / "l", SIZE, 3)) == [0, 1, 0, 1, 0]  # a, below a/above b alone, and b
    (tmp_path / "l" / "b" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError) as error:
        load(tmp_path / "l", SIZE, 3)
    one_line(error, "2.png", "a link to nothing")


def test_a_net_of_links_ends(tmp_path: Path) -> None:
    for one in range(12):
        (tmp_path / str(one)).mkdir()
        for other in range(12):
            (tmp_path / str(one) / f"to{other}").symlink_to(tmp_path / str(other))
    with pytest.raises(UserError) as error:
        load(tmp_path, SIZE, 3)
    one_line(error, "links to folders")


def test_what_is_no_data_is_passed_over_and_pipes_are_not_opened(tmp_path: Path) -> None:
    write_files(tmp_path, pictures(["0.png", ".hidden.png", "__MACOSX/0.png", "._0.png", ".git/0.png"]))
    os.mkfifo(tmp_path / "1.png")
    os.mkfifo(tmp_path / "metadata.csv")
    (tmp_path / "2.png").symlink_to("/dev/zero")
    assert drawn(load(tmp_path, SIZE, 3)) == [0]
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(UserError) as error:
        load_prompts(str(tmp_path / "p.txt"))
    one_line(error, "p.txt")
    with pytest.raises(UserError) as error:
        load(tmp_path / "1.png", SIZE, 3)
    one_line(error, "no images here")


def test_the_digest_is_of_the_content_not_of_its_place(tmp_path: Path) -> None:
    def digest(folder: str) -> str | None:
        return content_digest(DataSettings(source=str(tmp_path / folder)))

    write_files(tmp_path / "one", {**pictures(["a/0.png", "[b]/train.png"]), "a/0.txt": b"a cat"})
    (tmp_path / "other").symlink_to(tmp_path / "one")
    first = digest("one")
    assert digest("other") == first
    (tmp_path / "one").rename(tmp_path / "two [moved]")
    assert digest("two [moved]") == first
    write_files(tmp_path / "two [moved]", {".DS_Store": b"x", "notes.md": b"x"})
    assert digest("two [moved]") == first
    write_files(tmp_path / "two [moved]", {"a/0.txt": b"a hat!"})
    assert digest("two [moved]") != first
    assert [content_digest(DataSettings(source=each)) for each in ("digits", "shapes", None)] == [None] * 3


# --- 4, 5, 8: text is text -------------------------------------------------------------------------------------------

TEXTS = ["1", "1.0", "NA", "null", "2026-11-26", "007", "TRUE", "None", "1e3", "nan", "-", "0x10"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt", "caption", "parquet", "tar", "json"])
def test_captions_are_text_whatever_they_look_like(kind: str, tmp_path: Path) -> None:
    """row-4: digits; relatives: dates, missing values' words and truth values, wherever captions may stand."""
    names = [f"{index:02d}.png" for index in range(len(TEXTS))]
    settings = {}
    if kind == "parquet":
        rows = {"image": list(pictures(names).values()), "text": TEXTS}
        parquet.write_table(pyarrow.table(rows), tmp_path / "s.parquet")
    elif kind in ("tar", "json"):
        settings = {"caption_column": "json.caption"} if kind == "json" else {}
        tell: Callable[[str], str] = (lambda text: json.dumps({"caption": text})) if kind == "json" else str
        end = "json" if kind == "json" else "txt"
        texts = {f"{name[:2]}.{end}": tell(text).encode() for name, text in zip(names, TEXTS, strict=True)}
        write_tar(tmp_path / "s.tar", pictures(names) | texts)
    else:
        lines = {
            "csv": ["file_name,text", *(f"{name},{text}" for name, text in zip(names, TEXTS, strict=True))],
            "jsonl": [json.dumps({"file_name": n, "text": t}) for n, t in zip(names, TEXTS, strict=True)],
        }.get(kind)
        beside = {f"{name[:2]}.{kind}": f"{text}\n".encode() for name, text in zip(names, TEXTS, strict=True)}
        told = {f"metadata.{kind}": "\n".join(lines).encode()} if lines else beside
        write_files(tmp_path / "s", pictures(names) | told)
    source = next(tmp_path.iterdir())
    assert captions(source, **settings) == TEXTS
    assert load_filtered(DataSettings(source=str(source), **settings), SIZE, Filter())[0].captions == TEXTS
    assert look(str(source)).captioned == (kind != "json")


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "parquet"])
def test_prompts_are_text_whatever_they_look_like(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"prompt": pyarrow.array(TEXTS).dictionary_encode()}), path)
    else:
        path.write_text("\n".join(["prompt"] * (kind != "txt") + TEXTS))
    assert load_prompts(str(path)) == TEXTS


@pytest.mark.parametrize(
    "sign", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\x1e"], ids=lambda sign: f"row-8-{ord(sign):x}"
)
def test_a_line_ends_where_files_have_line_ends(sign: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(f"one{sign}still\nb\r\nc\rd".encode())
    (tmp_path / "p.csv").write_text(f"prompt\none{sign}still\n")
    (tmp_path / "p.tsv").write_text(f"prompt\tid\none{sign}still\t1\n")
    assert load_prompts(str(tmp_path / "p.txt")) == [f"one{sign}still", "b", "c", "d"]
    assert load_prompts(str(tmp_path / "p.csv")) == load_prompts(str(tmp_path / "p.tsv")) == [f"one{sign}still"]
    write_files(tmp_path / "s", {"0.png": picture(), "metadata.csv": f"file_name,text\n0.png,one{sign}still".encode()})
    assert captions(tmp_path / "s") == [f"one{sign}still"]


def test_captions_beside_images_are_read_and_told(tmp_path: Path) -> None:
    """row-5, and relatives: in folders and with dots in names; metadata.csv comes first; what lacks is counted."""
    write_files(tmp_path, pictures(["a/0 v1.5.png", "a/1.JPG", "b/2.png"]))
    write_files(
        tmp_path, {"a/0 v1.5.txt": "\ufeffFuß\n".encode(), "a/1.caption": b"one", "b/2.txt": b"two", "readme.txt": b""}
    )
    found = load_captioned(DataSettings(source=str(tmp_path)), SIZE, shrink=True)
    assert list(found.captions or []) == ["Fuß", "one", "two"]
    assert f"{tmp_path}: 3 RGB images with captions of .caption/.txt files, 4x4" in str(found.found)
    write_files(tmp_path, {"b/metadata.csv": b'\xef\xbb\xbffile_name,text\n2.png,"two, told"\n'})
    with pytest.raises(UserError, match=r"no caption for 2 of 3 images, such as a/0 v1\.5\.png"):
        captions(tmp_path)
    assert captions(tmp_path, caption_column="txt") == ["Fuß", "one", "two"]
    images, dropped = load_filtered(DataSettings(source=str(tmp_path)), SIZE, Filter())
    assert (images.captions, drawn(images), dropped) == (["two, told"], [2], {"without a caption": 2})
    (tmp_path / "b" / "2.txt").write_bytes("Fuß".encode("latin-1"))
    with pytest.raises(UserError, match=r"b/2\.txt: not UTF-8 text \(byte 2\)"):
        captions(tmp_path, caption_column="txt")


def test_a_folder_without_captions_says_where_they_may_stand(tmp_path: Path) -> None:
    write_files(tmp_path, pictures(["0.png"]))
    with pytest.raises(UserError) as error:
        captions(tmp_path)
    one_line(error, "no column of captions", "metadata.csv", ".txt")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("file_name,text\n0.png,a cat, asleep\n", "line 2: more cells than the first line names"),
        ('file_name,text\n0.png,"a cat\n1.png,x\n', "can't be read"),
        ("name,text\n0.png,a\n", "'file_name'; it has name, text"),
        ("file_name;text\n0.png;a\n", "it has file_name;text"),
        ("file_name,text\n../s.png,a\n", "'../s.png', which is no image of this folder"),
        ("file_name,text\n/etc/passwd,a\n", "'/etc/passwd', which is no image of this folder"),
        ("file_name,text\nb/../0.png,a\n", "which is no image of this folder"),
        ("file_name,text\ngone.png,a\n", "'gone.png', which is no image of this folder"),
        ("file_name,text\n0.png,a\n./0.png,b\n", "named twice"),
        (f"file_name,text\n0.png,{'x' * 200_000}\n", "can't be read"),
        ("file_name,text\n0.png,F\xfc\n".encode("latin-1"), "can't be read"),
        ("file_name,text\n0.png,a\0b\n", ""),
    ],
    ids=range(12),
)
def test_metadata_that_is_wrong_is_told_in_one_line(content: str | bytes, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "s.png").write_bytes(picture())
    told = content if isinstance(content, bytes) else content.encode()
    write_files(tmp_path / "s", {"0.png": picture(), "metadata.csv": told})
    if not wanted:
        assert len(captions(tmp_path / "s")) == 1
        return
    with pytest.raises(UserError) as error:
        captions(tmp_path / "s")
    one_line(error, "metadata.csv", wanted)


def test_labels_of_metadata_are_numbers_or_names(tmp_path: Path) -> None:
    write_files(tmp_path, pictures(["x/0.png", "y/1.png", "y/2.png"]))
    rows = [("x/0.png", 1, "dog", 0.5), ("y/1.png", 0, "cat", 7), ("y/2.png", 1, "dog", 6.25)]
    lines = "".join(f"{name},{label},{word},{score},a\n" for name, label, word, score in rows)
    (tmp_path / "metadata.csv").write_text(f"file_name,label,word,score,text\n{lines}")
    images = load(tmp_path, SIZE, 3, 2, shrink=True)
    assert images.labels is not None
    assert (images.labels.tolist(), images.class_names) == ([1, 0, 1], None)
    named = load(tmp_path, SIZE, 3, 2, label_column="word")
    assert named.labels is not None
    assert (named.labels.tolist(), named.class_names) == ([1, 0, 1], ["cat", "dog"])
    filter = Filter(aesthetic_column="score", min_aesthetic=6.25)
    images, dropped = load_filtered(DataSettings(source=str(tmp_path)), SIZE, filter)
    assert (drawn(images), dropped) == ([1, 2], {"aesthetic score below 6.25": 1})


# --- 6: what is transparent ------------------------------------------------------------------------------------------


def transparent(mode: str) -> bytes:
    """Left transparent, with a hidden colour under it; right opaque black."""
    rgba = Image.new("RGBA", (SIZE, SIZE), (90, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (SIZE // 2, 0, SIZE, SIZE))
    if mode in ("RGBA", "LA"):
        return encoded(rgba.convert(mode))
    buffer, small = io.BytesIO(), rgba.convert("RGB").convert({"RGB": "RGB", "L": "L", "1": "1"}.get(mode, "P"))
    hidden = small.getpixel((0, 0))
    if mode == "1":  # white, where 1 is transparent
        small.paste(255, (0, 0, SIZE // 2, SIZE))
        hidden = 1
    small.save(buffer, "GIF" if mode == "gif" else "PNG", transparency=hidden)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "gif"], ids=lambda mode: f"row-6-{mode}")
def test_what_is_transparent_shows_the_ground(mode: str, tmp_path: Path) -> None:
    """In RGB and in grey models, of a folder, an EDM zip and a tar; white, or what data.background says."""
    write_files(tmp_path / "f", {"0.png": transparent(mode)})
    write_edm_zip(tmp_path / "s.zip", {"0.png": transparent(mode)}, None)
    write_tar(tmp_path / "s.tar", {"0.png": transparent(mode), "0.txt": b"a cat"})
    for source in ("f", "s.zip", "s.tar"):
        for ground, rgb, grey in (("white", (255, 255, 255), 255), ("#0000ff", (0, 0, 255), 29)):
            image = load(tmp_path / source, SIZE, 3, background=ground).fetch(torch.tensor([0]))[0]
            assert tuple(image[:, 0, 0].tolist()) == rgb
            assert image[:, 0, -1].tolist() == [0, 0, 0]
            image = load(tmp_path / source, SIZE, 1, background=ground).fetch(torch.tensor([0]))[0]
            assert (image[0, 0, 0].item(), image[0, 0, -1].item()) == (grey, 0)
    captioned = load_captioned(DataSettings(source=str(tmp_path / "s.tar")), SIZE, shrink=True)
    assert str(captioned.found).endswith(", what is transparent made white")
    assert captioned.fetch(torch.tensor([0]))[0, :, 0, 0].tolist() == [255, 255, 255]


def test_what_is_half_transparent_is_mixed_and_what_is_opaque_stays(tmp_path: Path) -> None:
    half = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 128))
    noise = Image.frombytes("RGBA", (SIZE, SIZE), bytes(i if i % 4 != 3 else 255 for i in range(4 * SIZE * SIZE)))
    write_files(tmp_path, {"0.png": encoded(half), "1.png": encoded(noise), "2.png": encoded(noise.convert("RGB"))})
    images = load(tmp_path, SIZE, 3).fetch(torch.arange(3))
    assert images[0].unique().tolist() == [127]
    assert torch.equal(images[1], images[2])


def test_a_colour_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="wite"):
        DataSettings(background="wite")


# --- 7: archives -----------------------------------------------------------------------------------------------------

NAMES = ["photo v1.5 00", "photo v1.5 01", "A. B. C", "x.tar", ".hidden/z", "d.e/f.g", "0.png", "./1", "./a b/2.x"]


def test_names_in_a_tar_may_hold_dots_capitals_and_spaces(tmp_path: Path) -> None:
    """row-7 and relatives; what is hidden is passed over."""
    members: dict[str, bytes] = {}
    for index, name in enumerate(NAMES):
        members |= {
            f"{name}.{'PNG' if index % 2 else 'png'}": picture(index),
            f"{name}.TXT": f"caption {index}".encode(),
        }
    write_tar(tmp_path / "t.tar", members | {"readme.txt": b"x", "._d.png": b"x"})
    kept = [index for index, name in enumerate(NAMES) if not name.startswith(".hidden")]
    assert captions(tmp_path / "t.tar") == [f"caption {index}" for index in kept]
    assert drawn(load(tmp_path / "t.tar", SIZE, 3)) == kept


def test_images_of_a_tar_may_be_of_several_kinds_and_have_others_beside_them(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (200, 200, 200)).save(jpeg, "JPEG")
    members = {"0.jpg": jpeg.getvalue(), "0.txt": b"a", "0.seg.png": picture(9), "1.png": picture(1), "1.txt": b"b"}
    write_tar(tmp_path / "t.tar", members)
    assert drawn(load(tmp_path / "t.tar", SIZE, 3)) == [200, 1]
    assert drawn(load(tmp_path / "t.tar", SIZE, 3, image_column="seg.png")) == [9]
    assert captions(tmp_path / "t.tar") == ["a", "b"]


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"0.png": picture(), "0.txt": b"\xef\xbb\xbfa cat"}, ["a cat"]),
        ({"0.png": picture(), "0.txt": b"F\xfc"}, "s.tar: 0.txt: not UTF-8 text"),
        ({"0.png": picture(), "0.txt": b"x" * 2**21}, "s.tar: 0.txt: a text of 1.0 MB"),
        ({"0.png": picture(), "0.json": b"["}, "no column of captions"),
        ({"0.txt": b"x"}, "holds no image"),
        ({"a.bin": b"x"}, "holds no image"),
        ({"0.png": picture(), "1.png": picture(), "0.txt": b"x", "1.txt": b" "}, "no caption for 1 of 2 images"),
    ],
    ids=range(7),
)
def test_texts_of_a_tar(members: dict[str, bytes], wanted: list[str] | str, tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", members)
    if isinstance(wanted, list):
        assert captions(tmp_path / "s.tar") == wanted
        return
    with pytest.raises(UserError) as error:
        captions(tmp_path / "s.tar")
    one_line(error, wanted)


def test_fields_of_json_are_columns(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for index in range(3):
        told = {"caption": f"c{index}", "punsafe": index, "class": index % 2, "none": [1]}
        members |= {f"{index}.png": picture(index), f"{index}.json": json.dumps(told).encode()}
    write_tar(tmp_path / "s.tar", members)
    assert captions(tmp_path / "s.tar", caption_column="json.caption") == ["c0", "c1", "c2"]
    labels = load(tmp_path / "s.tar", SIZE, 3, 2, label_column="json.class").labels
    assert labels is not None
    assert labels.tolist() == [0, 1, 0]
    for column, wanted in {"json.gone": "json.caption, json.punsafe", "json.none": "[1], which is no text"}.items():
        with pytest.raises(UserError) as error:
            captions(tmp_path / "s.tar", caption_column=column)
        one_line(error, wanted)


def test_links_in_a_tar_are_to_members_only(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(9))
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, target, kind in [
            ("0.png", "", tarfile.REGTYPE),
            ("1.png", "0.png", tarfile.LNKTYPE),
            ("2.png", "0.png", tarfile.SYMTYPE),
            ("3.png", str(tmp_path / "secret.png"), tarfile.SYMTYPE),
            ("4.png", "", tarfile.FIFOTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 0 if target or kind != b"0" else len(picture(3))
            archive.addfile(member, io.BytesIO(picture(3)))
    with pytest.raises(UserError) as error:
        load(tmp_path / "s.tar", SIZE, 3)
    one_line(error, "row 3", "3.png", "empty")


@pytest.mark.parametrize("damage", ["cut", "header", "size", "negative", "text"])
def test_a_damaged_tar_is_told_and_ends(damage: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", pictures(["0.png", "1.png", "2.png"]))
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        del whole[1200:]
    elif damage == "header":
        whole[1024:1100] = b"x" * 76
    elif damage == "text":
        whole[:] = b"no tar at all" * 100
    else:
        size = (
            b"\x80" + (2**62).to_bytes(11, "big")
            if damage == "size"
            else b"\xff" + (-1024).to_bytes(11, "big", signed=True)
        )
        whole[1024 + 124 : 1024 + 136] = size
        whole[1024 + 148 : 1024 + 156] = b" " * 8
        whole[1024 + 148 : 1024 + 155] = b"%06o\0" % sum(whole[1024:1536])
    path.write_bytes(whole)
    with pytest.raises(UserError) as error:
        load(path, SIZE, 3)
    one_line(error, "s.tar: can't be read as a tar")


# --- 9, 10: what can't be decoded ------------------------------------------------------------------------------------


def wide(width: int, height: int) -> bytes:
    """A png that says that it is so large, and holds next to nothing."""
    small = bytearray(encoded(Image.new("1", (1, 1))))
    small[16:24] = struct.pack(">II", width, height)
    small[29:33] = struct.pack(">I", zlib.crc32(small[12:29]))
    return bytes(small)


def avif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 0, 0)).save(buffer, "AVIF")
    content = bytearray(buffer.getvalue())
    at = content.index(b"mdat") + 4
    content[at:] = b"\0" * (len(content) - at)
    return bytes(content)


DEEP = io.BytesIO()
Image.new("I;16", (SIZE, SIZE), 40_000).save(DEEP, "PNG")
FLOAT = io.BytesIO()
Image.new("F", (SIZE, SIZE), 0.5).save(FLOAT, "TIFF")
NOISE = encoded(Image.effect_noise((64, 64), 100))
DAMAGED = {
    "row-9-pixels": (wide(20_000, 10_000), "200 megapixels, over the limit of 179", "over 179 megapixels"),
    "row-9-relative-a-line": (wide(2**30, 1), "1074 megapixels, over the limit", "over 179 megapixels"),
    "row-9-relative-16-bit": (DEEP.getvalue(), "16-bit, not 8-bit", "16-bit, not 8-bit"),
    "row-9-relative-float": (FLOAT.getvalue(), "floating-point, not 8-bit", "floating-point, not 8-bit"),
    "row-9-relative-empty": (b"", "empty", "empty"),
    "row-10-avif": (avif(), "damaged (", "damaged"),
    "row-10-relative-truncated": (NOISE[:1000], "truncated", "truncated"),
    "row-10-relative-text": (b"<html>404</html>", "in no format that can be read here", None),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_each_reason_is_told_as_itself_and_counted(case: str, tmp_path: Path) -> None:
    content, told, reason = DAMAGED[case]
    write_files(tmp_path, {"0.png": picture(), "1.png": content, "metadata.csv": b"file_name,text\n0.png,a\n1.png,b"})
    with pytest.raises(UserError) as error:
        load(tmp_path, SIZE, 3)
    one_line(error, f"{tmp_path}/1.png: {told}")
    images, _ = load_filtered(DataSettings(source=str(tmp_path)), SIZE, Filter())
    with pytest.raises(UserError) as error:
        images.fetch(torch.tensor([1]))
    assert error.value.reason == (reason or told)  # type: ignore[attr-defined]


# --- what is hostile -------------------------------------------------------------------------------------------------


def test_archives_of_a_mac_are_read(tmp_path: Path) -> None:
    mac = {"__MACOSX/._0.png": b"x", "._0.png": b"x", ".DS_Store": b"x"}
    path = write_edm_zip(tmp_path / "set.zip", pictures(["0.png", "1.png"]) | mac, [["0.png", 0], ["1.png", 1]])
    assert drawn(load(path, SIZE, 3, 2)) == [0, 1]


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 2**20)
    deflated = (zipfile.ZIP_DEFLATED,)
    path = write_edm_zip(tmp_path / "a.zip", {"0.png": picture(), "1.png": bytes(2**21)}, None, deflated)
    with pytest.raises(UserError) as error:
        load(path, SIZE, 3)
    one_line(error, "row 1 (1.png): unpacks to over 1 MB")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", picture())
        archive.writestr("dataset.json", b'{"labels": null, "more": "' + b"x" * 2**22 + b'"}')
    with pytest.raises(UserError) as error:
        load(tmp_path / "b.zip", SIZE, 3)
    one_line(error, "dataset.json has over 1 MB for 1 images")


def test_sizes_that_an_index_says_are_not_believed(tmp_path: Path) -> None:
    path = write_edm_zip(tmp_path / "a.zip", pictures(["0.png", "1.png"]), None)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    path.write_bytes(content)
    assert drawn(load(path, SIZE, 3)) == [0, 1]
    at = content.index(b"PK\x05\x06")
    content[at + 16 : at + 20] = struct.pack("<I", struct.unpack("<I", content[at + 16 : at + 20])[0] + 9)
    path.write_bytes(content)  # so that the first image would begin before the file
    with pytest.raises(UserError) as error:
        load(path, SIZE, 3)
    one_line(error, "a.zip")


def test_a_table_is_read_anew_where_it_changed_and_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    for index in (1, 2):
        parquet.write_table(pyarrow.table({"image": [picture(index)], "label": ["9" * 12]}), path)
        assert drawn(load(path, SIZE, 3)) == [index]
    with pytest.raises(UserError) as error:
        given(path, None)
    one_line(error, "has 1 classes, numbered 0 to 0 (999999999999), but the model has 3")
    parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), path)
    with pytest.raises(UserError) as error:
        load(path, SIZE, 3)
    one_line(error, "s.parquet: can't be read as parquet", "no data")


def test_a_cell_of_parquet_that_names_a_file_opens_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret.png").write_bytes(picture(9))
    for name in ("secret.png", "pipe"):
        cells = [{"bytes": picture(1), "path": str(tmp_path / name)}, {"bytes": None, "path": str(tmp_path / name)}]
        for index, column in enumerate((cells, [str(tmp_path / name)] * 2)):
            path = tmp_path / f"{name}{index}.parquet"
            parquet.write_table(pyarrow.table({"image": column}), path)
            with pytest.raises(UserError) as error:
                load(path, SIZE, 3)
            one_line(error, f"row {1 - index} ({tmp_path / name}): names a file and does not hold it")


# --- part of the classes ---------------------------------------------------------------------------------------------

TEACHER = ["ant", "bee", "cat"]


def given(path: Path, names: list[str] | None, num: int = 3) -> ImageSet:
    """As the data of a given teacher."""
    return load_images(DataSettings(source=str(path)), SIZE, 3, num, True, names, whole=False)


@pytest.mark.parametrize(
    ("folders", "names", "labels", "told"),
    [
        (["bee", "cat"], TEACHER, [1, 2], "2 classes: 1 bee (1), 2 cat (1); no image of class 0 ant"),
        (["ant", "bee", "cat"], TEACHER, [0, 1, 2], "3 classes: 0 ant (1), 1 bee (1), 2 cat (1); taken"),
        (["ant", "bee", "cat"], None, [0, 1, 2], "3 classes: 0 ant (1), 1 bee (1), 2 cat (1); taken"),
        (["0", "2"], None, [0, 2], "2 classes: 0 (1), 2 (1); no image of class 1; taken"),
        (["0", "2"], TEACHER, [0, 2], "2 classes: 0 ant (1), 2 cat (1); no image of class 1 bee; taken"),
        (["bee", "cat"], None, "has 2 classes, numbered 0 to 1 (bee, cat), but the model has 3", ""),
        (["bee", "dog"], TEACHER, "(bee, dog), but those of the model are ant, bee, cat", ""),
        (["0", "1", "2"], TEACHER, [0, 1, 2], "3 classes: 0 ant (1), 1 bee (1), 2 cat (1); taken"),
        (["0", "3"], None, "has 2 classes, numbered 0 to 3, but the model has 3", ""),
    ],
)
def test_some_classes_of_a_given_teacher_will_do(
    folders: list[str], names: list[str] | None, labels: list[int] | str, told: str, tmp_path: Path
) -> None:
    write_files(tmp_path, pictures([f"{folder}/{index}.png" for index, folder in enumerate(folders)]))
    if isinstance(labels, str):
        with pytest.raises(UserError) as error:
            given(tmp_path, names)
        one_line(error, labels)
        return
    images = given(tmp_path, names)
    assert images.labels is not None
    assert images.labels.tolist() == labels
    assert f"; {told}" in str(images.found)
    if len(folders) < 3:
        with pytest.raises(UserError, match="the model has 3"):
            load(tmp_path, SIZE, 3, 3)


def test_numbered_labels_of_some_classes_will_do(tmp_path: Path) -> None:
    path = write_edm_zip(tmp_path / "s.zip", pictures(["0.png", "1.png"]), [["0.png", 0], ["1.png", 1]])
    assert "; 2 classes: 0 (1), 1 (1); no image of class 2; taken" in str(given(path, None).found)
    assert given(path, TEACHER).class_names == TEACHER
    with pytest.raises(UserError, match="numbered 0 to 1, but the model has 1"):
        given(path, None, 1)


def test_real_pictures_beside_drawn_ones_are_black_where_a_class_has_none(tmp_path: Path) -> None:
    write_files(tmp_path, pictures(["bee/0.png", "cat/1.png"]))
    grid = judge._grid_of_classes(
        replace(given(tmp_path, TEACHER), fetch=lambda rows: rows[:, None, None, None] + 7), 3
    )
    assert grid[:6].flatten().tolist() == [0, 7, 8, 0, 7, 8]


# --- by the command line ---------------------------------------------------------------------------------------------


def test_a_distillation_on_some_of_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "all", pictures([f"{name}/{index}.png" for index, name in enumerate(TEACHER)]))
    write_files(tmp_path / "some", pictures(["cat/0.png", "bee/train.png"]))
    small = "--set num_steps=1 --set batch_size=2 --set model.block_out_channels=[4,4] --set model.norm_num_groups=2"
    model = f"{small} --set model.image_size=4 --set model.num_classes=3 --set checkpoint_every=1"
    assert fewstep(f"teach digits-teacher --out t --set data.source=all {model}")[0] == 0
    student = "distill digits-1step --set num_steps=1 --set batch_size=2 --set teacher=t --set init_from=null --out"
    code, told, _ = fewstep(f"{student} s --set data.source=some")
    assert code == 0
    assert "; 2 classes: 1 bee (1), 2 cat (1); no image of class 0 ant; made grey" in told
    write_files(tmp_path / "some", pictures(["dog/0.png"]))
    refused(fewstep(f"{student} d --set data.source=some"), "bee, cat, dog", "ant, bee, cat")
    refused(fewstep(f"{student} e --set data.source=some --set data.background=wite"), "data.background", "wite")
