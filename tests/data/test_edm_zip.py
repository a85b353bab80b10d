"""EDM's zips: read as EDM's own loader reads them, lazily, and told in one line where they are wrong."""

import json
import zipfile
from pathlib import Path

import pytest
import torch

from fewstep.data.archives import is_edm_set, open_edm_set
from fewstep.errors import UserError
from image_sets import captioned, encoded, load, picture, write_edm_zip, write_files

NUM, SIZE = 5, 6


def png(index: int) -> bytes:
    return encoded(picture(index, SIZE, SIZE))


def name(index: int) -> str:
    return f"{index // 2:05d}/img{index:08d}.png"


PAIRS = [[name(index), index % 2] for index in range(NUM)]


def write(path: Path, labels: object = PAIRS, extra: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    images = {name(index): png(index) for index in range(NUM)}
    return write_edm_zip(path, {**images, **(extra or {})}, labels, (compression,))


def test_local_headers_longer_than_the_index_says_are_skipped(tmp_path: Path) -> None:
    """Sizes of 64 bits stand in the local header alone, dates of other tools in both: the index is not enough."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for index in range(NUM):
            entry = zipfile.ZipInfo(name(index))
            entry.extra = b"\x99\x99\x04\x00date" * (index % 2)
            with archive.open(entry, "w", force_zip64=index > 2) as file:
                file.write(png(index))
        archive.writestr("dataset.json", json.dumps({"labels": PAIRS}))
    cells = open_edm_set(tmp_path / "set.zip").cells(list(range(NUM)))
    assert [cell.content for cell in cells] == [png(index) for index in range(NUM)]


@pytest.mark.parametrize(
    ("compression", "damage", "told"),
    [
        (zipfile.ZIP_STORED, b"\0" * 8, "in no format that"),
        (zipfile.ZIP_DEFLATED, b"\xff" * 80, r"damaged \(error: Err"),
    ],
    ids=["stored", "deflated"],
)
def test_images_of_a_zip_stay_in_it_until_they_are_asked_for(
    tmp_path: Path, compression: int, damage: bytes, told: str
) -> None:
    """Only the index is read at first: an image that is damaged or can't be unpacked shows itself when fetched."""
    path = write(tmp_path / "set.zip", compression=compression)
    content, entry = bytearray(path.read_bytes()), zipfile.ZipFile(path).getinfo(name(3))
    begin = entry.header_offset + 30 + len(entry.filename)
    content[begin : begin + len(damage)] = damage
    path.write_bytes(content)
    cells = open_edm_set(path).cells([0, 4])
    assert [(cell.content, cell.name) for cell in cells] == [(png(index), name(index)) for index in (0, 4)]
    with pytest.raises(UserError, match=rf"set\.zip, row 3 \(00001/img00000003\.png\): {told}"):
        load(path, SIZE, 3)


def test_an_empty_image_is_not_looked_for_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in a zip are no paths: one that names a file here does not open it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.png").write_bytes(png(0))
    path = write(tmp_path / "set.zip", None, {"secret.png": b""})
    with pytest.raises(UserError, match=r"row 5 \(secret\.png\): empty"):
        load("set.zip", SIZE, 3)
    assert [cell.content for cell in open_edm_set(path).cells([NUM])] == [b""]


def test_labels_may_be_null_for_a_model_without_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "set.zip", labels=None)
    images = load(path, SIZE, 3)
    assert list(images.batch(torch.tensor([1]))) == ["image"]
    with pytest.raises(UserError, match=r"set\.zip: no column of labels .* among none"):
        load(path, SIZE, 3, num_classes=2)


def test_a_folder_is_edms_where_it_has_a_dataset_json(tmp_path: Path) -> None:
    write_files(tmp_path, {name(index): png(index) for index in range(NUM)})
    assert not is_edm_set(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": PAIRS}))
    assert is_edm_set(tmp_path)
    (tmp_path / name(4)).unlink()
    with pytest.raises(UserError, match=rf"{name(4)} is missing, one of 1 images that its dataset\.json names"):
        load(tmp_path, SIZE, 3, num_classes=2)


# --- what is wrong ---------------------------------------------------------------------------------------------------

ROWS = "column 'label' must hold class indices 0, 1, 2, ... or names, but "
FORM = 'its dataset.json must hold {"labels": [[name, class], ...]}, or null there'


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (PAIRS[:3], f"{ROWS}{name(3)} has None (data.label_column)"),
        ([*PAIRS, ["00009/gone.png", 1]], "00009/gone.png is missing, one of 1 images that its dataset.json names"),
        ([*PAIRS, [3, 1], ["x", 1]], "3 is missing, one of 2 images that its dataset.json names"),
        ([*PAIRS[:4], [name(4), -1]], f"{ROWS}{name(4)} has -1 (data.label_column)"),
        ([*PAIRS[:4], [name(4), 1.0]], f"{ROWS}{name(4)} has 1.0 (data.label_column)"),
        ([*PAIRS[:4], [name(4), True]], f"{ROWS}{name(4)} has True (data.label_column)"),
        ([*PAIRS[:4], [name(4), [0, 1]]], f"{ROWS}{name(4)} has [0, 1] (data.label_column)"),
        ([*PAIRS[:4], [name(4), 2]], "has 3 classes, numbered 0 to 2, but the model has 2"),
        ([[pair[0], 0] for pair in PAIRS], "has 1 classes, numbered 0 to 0, but the model has 2"),
        ([1, 2], FORM),
        (7, FORM),
        ([[["a"], 1]], FORM),
        (b"", FORM),
        (b"\xff\xfe\x00", FORM),
        (b"[]", FORM),
        (b"{}", FORM),
        (b'{"labels": ' + b"[" * 100_000, FORM),
    ],
)
def test_labels_that_do_not_fit_are_told_in_one_line(tmp_path: Path, labels: object, wanted: str) -> None:
    with pytest.raises(UserError) as refused:
        load(write(tmp_path / "set.zip", labels), SIZE, 3, num_classes=2)
    assert str(refused.value).startswith(f"{tmp_path}/set.zip: {wanted}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["inner/dataset.json", "a.png"], r"has no dataset\.json at its top"),
        (["dataset.json"], r"no images here beside its dataset\.json"),
    ],
)
def test_a_zip_without_dataset_json_or_without_images_says_so(tmp_path: Path, names: list[str], wanted: str) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        [archive.writestr(name, '{"labels": null}') for name in names]
    with pytest.raises(UserError, match=wanted):
        load(tmp_path / "set.zip", SIZE, 3)


@pytest.mark.parametrize("damage", ["text", "empty", "half", "tail", "index", "description"])
def test_a_file_that_is_no_whole_zip_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "set.zip")
    whole = path.read_bytes()
    index = whole.index(b"PK\x01\x02")
    described = whole.index(b'{"labels"')
    damaged = {"text": b"no zip at all", "empty": b"", "half": whole[: len(whole) // 2], "tail": whole[:-30]}
    damaged["index"] = whole[:index] + b"XX" + whole[index + 2 :]
    damaged["description"] = whole[: described + 20] + b"?" + whole[described + 21 :]
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=rf"^{path}: can't be read as a zip \([^\n]+\) \(data\.source\)$"):
        load(path, SIZE, 3)


def test_compressions_that_dataset_tool_has_not_and_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"00000/img00000000\.png is encrypted or compressed; zip the images as they"):
        load(write(tmp_path / "set.zip", compression=zipfile.ZIP_BZIP2), SIZE, 3)
    with pytest.raises(UserError, match=r"set\.zip: no column of captions .* among label; .* metadata\.csv"):
        captioned(write(tmp_path / "set.zip"), SIZE)
