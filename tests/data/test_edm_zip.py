"""EDM's zips: read as EDM's own loader reads them, lazily, and told in one line where they are wrong."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data import images as module
from fewstep.data.edm_zip import is_edm_set, open_edm_set
from fewstep.errors import UserError
from image_sets import captioned, encoded, load, write_edm_zip

NUM, SIZE = 5, 6


def array(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def png(index: int) -> bytes:
    return encoded(Image.fromarray(array(index)))


def name(index: int) -> str:
    return f"{index // 2:05d}/img{index:08d}.png"


PAIRS = [[name(index), index % 2] for index in range(NUM)]


def write(path: Path, labels: object = PAIRS, extra: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    images = {name(index): png(index) for index in range(NUM)}
    return write_edm_zip(path, {**images, **(extra or {})}, labels, (compression,))


def edms_loader(path: Path) -> tuple[Tensor, list[int]]:
    """What EDM's ImageFolderDataset does, in a few lines: names sorted, labels by name."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(each for each in archive.namelist() if each.endswith(".png"))
        of_name = dict(json.loads(archive.read("dataset.json"))["labels"])
        arrays = [np.array(Image.open(archive.open(each))) for each in names]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), [of_name[each] for each in names]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("in_memory", [True, False])
def test_images_and_labels_are_those_of_edms_loader(
    tmp_path: Path, compression: int, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 0)
    shuffled = [PAIRS[index] for index in (3, 1, 4, 0, 2)]
    path = write(tmp_path / "set.zip", shuffled, {"readme.txt": b"no image"}, compression=compression)
    images, (pixels, labels) = load(path, SIZE, 3, num_classes=2), edms_loader(path)
    batch = images.batch(torch.tensor([4, 0, 0, 3]))
    assert torch.equal(batch["image"], pixels[[4, 0, 0, 3]])
    assert batch["label"].tolist() == [labels[index] for index in (4, 0, 0, 3)]
    assert (images.length, batch["label"].dtype) == (NUM, torch.int64)


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
    assert [cell["bytes"] for cell in cells] == [png(index) for index in range(NUM)]


def test_images_of_a_zip_stay_in_it_until_they_are_asked_for(tmp_path: Path) -> None:
    """Nothing but the index is read at first: an image that is damaged shows itself where it is fetched."""
    path = write(tmp_path / "set.zip")
    content = bytearray(path.read_bytes())
    start = content.index(png(3))
    content[start : start + 8] = b"\0" * 8
    path.write_bytes(content)
    stored = open_edm_set(path)
    cells = stored.cells([0, 4])
    assert [(cell["bytes"], cell["path"]) for cell in cells] == [(png(index), name(index)) for index in (0, 4)]
    with pytest.raises(UserError, match=r"set\.zip, row 3 \(00001/img00000003\.png\): not a readable 8-bit image"):
        load(path, SIZE, 3)


def test_an_entry_that_cannot_be_unpacked_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "set.zip", compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(name(1))
    content = bytearray(path.read_bytes())
    begin = entry.header_offset + 30 + len(entry.filename)
    content[begin : begin + entry.compress_size] = b"\xff" * entry.compress_size
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"row 1 \(00000/img00000001\.png\): not a readable"):
        load(path, SIZE, 3)


def test_an_empty_image_is_not_looked_for_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in a zip are no paths: one that names a file here does not open it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.png").write_bytes(png(0))
    path = write(tmp_path / "set.zip", None, {"secret.png": b""})
    with pytest.raises(UserError, match=r"row 5 \(secret\.png\): not a readable"):
        load("set.zip", SIZE, 3)
    assert [cell["bytes"] for cell in open_edm_set(path).cells([NUM])] == [b""]


def test_labels_may_be_null_for_a_model_without_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "set.zip", labels=None)
    images = load(path, SIZE, 3)
    assert list(images.batch(torch.tensor([1]))) == ["image"]
    with pytest.raises(UserError, match=r"set\.zip: its dataset\.json has no labels, but the model has 2 classes"):
        load(path, SIZE, 3, num_classes=2)


def test_a_folder_is_edms_where_it_has_a_dataset_json(tmp_path: Path) -> None:
    for index in range(NUM):
        (tmp_path / name(index)).parent.mkdir(exist_ok=True)
        (tmp_path / name(index)).write_bytes(png(index))
    assert not is_edm_set(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": PAIRS}))
    assert is_edm_set(tmp_path)
    images = load(tmp_path, SIZE, 3, num_classes=2)
    assert images.labels is not None
    assert images.labels.tolist() == [label for _, label in PAIRS]
    assert torch.equal(images.fetch(torch.tensor([2]))[0].permute(1, 2, 0), torch.from_numpy(array(2)))
    (tmp_path / name(4)).unlink()
    with pytest.raises(UserError, match=rf"{name(4)} is missing, one of 1 images that its dataset\.json names"):
        load(tmp_path, SIZE, 3, num_classes=2)


# --- what is wrong ---------------------------------------------------------------------------------------------------

FORM = 'its dataset.json must hold {"labels": [[name, class], ...]}, or null there'


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (PAIRS[:3], f"its dataset.json has labels for 3 of 5 images, and none for {name(3)}"),
        ([*PAIRS, ["00009/gone.png", 1]], "00009/gone.png is missing, one of 1 images that its dataset.json names"),
        ([*PAIRS, [3, 1], ["x", 1]], "3 is missing, one of 2 images that its dataset.json names"),
        ([*PAIRS[:4], [name(4), -1]], f"labels must be class indices 0, 1, 2, ..., but {name(4)} has -1"),
        ([*PAIRS[:4], [name(4), 1.0]], f"labels must be class indices 0, 1, 2, ..., but {name(4)} has 1.0"),
        ([*PAIRS[:4], [name(4), True]], f"labels must be class indices 0, 1, 2, ..., but {name(4)} has True"),
        ([*PAIRS[:4], [name(4), [0, 1]]], f"labels must be class indices 0, 1, 2, ..., but {name(4)} has [0, 1]"),
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


def test_a_zip_without_dataset_json_or_without_images_says_so(tmp_path: Path) -> None:
    for content, wanted in (
        ({"inner/dataset.json": b'{"labels": null}', "a.png": png(0)}, r"has no dataset\.json at its top"),
        ({"dataset.json": b'{"labels": null}'}, r"no images here beside its dataset\.json"),
    ):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for each, data in content.items():
                archive.writestr(each, data)
        with pytest.raises(UserError, match=wanted):
            load(tmp_path / "set.zip", SIZE, 3)


@pytest.mark.parametrize("damage", ["text", "empty", "half", "tail", "index", "description"])
def test_a_file_that_is_no_whole_zip_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "set.zip")
    whole = path.read_bytes()
    index = whole.index(b"PK\x01\x02")
    described = whole.index(b'{"labels"')
    path.write_bytes(
        {
            "text": b"no zip at all",
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "tail": whole[:-30],
            "index": whole[:index] + b"XX" + whole[index + 2 :],
            "description": whole[: described + 20] + b"?" + whole[described + 21 :],
        }[damage]
    )
    with pytest.raises(UserError, match=rf"^{path}: can't be read as a zip \([^\n]+\) \(data\.source\)$"):
        load(path, SIZE, 3)


def test_compressions_that_dataset_tool_has_not_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "set.zip", compression=zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match=r"00000/img00000000\.png is encrypted or compressed; zip the images as they"):
        load(path, SIZE, 3)


def test_a_zip_has_no_captions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set\.zip: a zip holds images with classes.* captions come from another"):
        captioned(write(tmp_path / "set.zip"), SIZE)
