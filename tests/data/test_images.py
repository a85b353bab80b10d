"""Image sets: every kind of file gives the same pixels, and every step its own part of a shuffled epoch."""

import json
import tarfile
import zipfile
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data import images as module
from fewstep.data.images import ImageSet, batch_indices
from fewstep.data.settings import DataSettings
from fewstep.embedded.sources import digits, open_images
from fewstep.errors import UserError
from fewstep.networks.settings import PixelModelConfig
from image_sets import encoded, load, picture, write_edm_zip, write_files, write_tar

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
NUM, CLASSES = 7, 3


def png(index: int) -> bytes:
    return encoded(picture(index, 13, 10))


def reference(index: int, size: int, mode: str) -> Tensor:
    """The picture cut by hand to its central square, which PIL then resizes."""
    source = picture(index, 13, 10).convert(mode)
    short, (left, top) = min(source.size), ((side - min(source.size)) / 2 for side in source.size)
    fitted = source.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))
    array = torch.from_numpy(np.array(fitted))
    return array[None] if mode == "L" else array.permute(2, 0, 1)


def table(image: str = "image", label: str = "label", start: int = 0, stop: int = NUM) -> datasets.Dataset:
    rows = range(start, stop)
    return datasets.Dataset.from_dict({image: [png(i) for i in rows], label: [i % CLASSES for i in rows]})


def write_parquet(path: Path) -> Path:
    table().to_parquet(path)
    return path


def write_flat(folder: Path) -> Path:
    return write_files(folder, {f"{index}.png": png(index) for index in range(NUM)} | {"README.txt": b"no image"})


def write_class_folders(folder: Path) -> Path:
    return write_files(folder, {f"class{index % CLASSES}/{index}.png": png(index) for index in range(NUM)})


def write_shards(folder: Path) -> Path:
    write_files(folder, {"README.md": b"not data"})
    table(stop=4).to_parquet(folder / "part-0.parquet")
    table(start=4).to_parquet(folder / "part-1.parquet")
    return folder


def write_webdataset(path: Path) -> Path:
    pairs = [((f"{i:03d}.png", png(i)), (f"{i:03d}.cls", b"%d" % (i % CLASSES))) for i in range(NUM)]
    return write_tar(path, dict(chain(*pairs)))


EDM_NAMES = [f"{index // 4:05d}/img{index:08d}.png" for index in range(NUM)]
BACKWARDS = [[EDM_NAMES[index], index % CLASSES] for index in reversed(range(NUM))]


def write_zip(path: Path) -> Path:
    """In another order than that of the names, as is the dataset.json."""
    images = {EDM_NAMES[index]: png(index) for index in reversed(range(NUM))} | {"readme.txt": b"no image"}
    return write_edm_zip(path, images, BACKWARDS, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))


def write_edm_folder(folder: Path) -> Path:
    described = json.dumps({"labels": BACKWARDS}).encode()
    return write_files(folder, {EDM_NAMES[index]: png(index) for index in range(NUM)} | {"dataset.json": described})


WRITERS = {
    "edm.zip": write_zip,
    "edm": write_edm_folder,
    "folder": write_class_folders,
    "flat": write_flat,
    "set.parquet": write_parquet,
    "shards": write_shards,
    "set.tar": write_webdataset,
}


def everything(images: ImageSet) -> Tensor:
    return images.fetch(torch.arange(images.length))


# --- what is in a set ------------------------------------------------------------------------------------------------


def test_the_digits_are_scikit_learns_in_eight_bits() -> None:
    images = digits()
    pixels, labels = everything(images), images.labels
    assert (images.length, tuple(pixels.shape), pixels.dtype) == (1797, (1797, 1, 8, 8), torch.uint8)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert labels is not None
    assert labels.unique().tolist() == list(range(10))
    assert labels[:10].tolist() == list(range(10))
    assert len(pixels.unique()) == 17  # 16 levels and zero, evenly spread
    assert pixels.unique().diff().min() >= 15
    assert list(open_images(DataSettings(source="digits"), PixelModelConfig()).batch(torch.tensor([0]))) == ["image"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("in_memory", [True, False])
def test_every_kind_of_file_gives_pils_pixels_and_its_labels(
    name: str, channels: int, mode: str, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 0)
    images = load(WRITERS[name](tmp_path / name), 6, channels)
    order = sorted(range(NUM), key=lambda i: (i % CLASSES, i)) if name == "folder" else list(range(NUM))
    assert images.labels is None
    assert list(images.batch(torch.tensor([0]))) == ["image"]
    assert torch.equal(everything(images), torch.stack([reference(index, 6, mode) for index in order]))
    if name == "flat":
        return
    batch = load(tmp_path / name, 6, channels, num_classes=CLASSES).batch(torch.tensor([4, 1, 1, 6]))
    assert batch.keys() == {"image", "label"}
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [order[row] % CLASSES for row in (4, 1, 1, 6)]
    assert torch.equal(batch["image"], torch.stack([reference(order[row], 6, mode) for row in (4, 1, 1, 6)]))


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_found_is_told_and_what_is_refused_is_not_decoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[name](tmp_path / name)
    found, done = f"{path}: 7 RGB images, 13x10", "; resized and cropped to 6x6"
    if name != "flat":
        classes = [f"{label} class{label}" if name == "folder" else str(label) for label in range(CLASSES)]
        told = f"; 3 classes: {classes[0]} (3), {classes[1]} (2), {classes[2]} (2)"
        assert load(path, 6, 3, CLASSES, shrink=True).found == found + told + done
    unused = "; its 3 classes are not used (model.num_classes is 0)" if name == "folder" else ""
    assert load(path, 6, 1, shrink=True).found == f"{found}{unused}{done}, made grey"
    assert load(path, 6, 3).found is None
    monkeypatch.setattr(module, "decode", None)
    with pytest.raises(UserError, match=r"images of 13x10 would be shrunk to 6x6;.* --set model\.image_size=8"):
        load(path, 6, 3, shrink=False)


def test_only_a_set_over_the_limit_is_read_at_every_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_flat(tmp_path / "flat")
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", NUM * 3 * 6**2)
    kept = load(folder, 6, 3)
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", NUM * 3 * 6**2 - 1)
    read = load(folder, 6, 3)
    for path in folder.glob("*.png"):
        path.write_bytes(b"gone")
    assert torch.equal(kept.fetch(torch.tensor([2])), reference(2, 6, "RGB")[None])
    with pytest.raises(UserError, match=r"2\.png"):
        read.fetch(torch.tensor([2]))


def test_resizing_is_by_the_shorter_side_and_keeps_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 200
    wide[:4, 8:16] = 100
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels = everything(load(tmp_path, 8, 1))
    assert pixels[0, 0].tolist() == [[100] * 8] * 4 + [[200] * 8] * 4


def test_grey_pictures_become_rgb_and_back(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "b.png")
    assert everything(load(tmp_path, 4, 3))[0].unique().tolist() == [77]
    assert everything(load(tmp_path, 4, 1))[1].unique().tolist() == [76]  # 0.299 of red


# --- the recipe's columns and splits ---------------------------------------------------------------------------------


def test_the_columns_are_those_of_the_recipe(tmp_path: Path) -> None:
    both = table("scan", "digit").add_column("label", [0] * NUM).add_column("image", ["text"] * NUM)
    both.to_parquet(tmp_path / "set.parquet")
    images = load(tmp_path / "set.parquet", 6, 3, CLASSES, image_column="scan", label_column="digit")
    assert torch.equal(images.fetch(torch.tensor([3])), reference(3, 6, "RGB")[None])
    assert images.labels is not None
    assert images.labels.tolist() == [index % CLASSES for index in range(NUM)]


def test_shards_named_by_split_are_kept_apart(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", {"train-info.json": b"not data"})
    for split, rows in {"train": range(4), "test": range(4, NUM)}.items():
        table(start=rows.start, stop=rows.stop).to_parquet(folder / f"{split}-0.parquet")
    for split, rows in {"train": range(4), "test": range(4, NUM)}.items():
        wanted = torch.stack([reference(index, 6, "RGB") for index in rows])
        assert torch.equal(everything(load(folder, 6, 3, split=split)), wanted)


@pytest.mark.parametrize(
    ("columns", "num_classes", "wanted"),
    [
        ({"label": [0, 2]}, 3, r"has 2 classes, numbered 0 to 2, but the model has 3, numbered 0 to 2"),
        ({"image": [png(0), None]}, 0, r"set\.parquet, row 1: no picture; replace"),
    ],
)
def test_a_class_without_pictures_and_an_empty_cell_are_told(
    columns: dict, num_classes: int, wanted: str, tmp_path: Path
) -> None:
    datasets.Dataset.from_dict({"image": [png(0)] * 2} | columns).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(UserError, match=wanted):
        load(tmp_path / "set.parquet", 6, 3, num_classes)


def test_reading_prints_nothing_into_a_pipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(write_parquet(tmp_path / "set.parquet"), 6, 3)
    assert capfd.readouterr() == ("", "")


# --- real data -------------------------------------------------------------------------------------------------------


@needs_shared
def test_fashion_mnist_loads_pixel_by_pixel() -> None:
    path = SHARED / "fashion_mnist_test.parquet"
    images = load(path, 28, 1, num_classes=10)
    assert images.labels is not None
    assert (images.length, images.labels.bincount().tolist()) == (10000, [1000] * 10)
    cells = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image())
    for row in (0, 5000, 9999):
        assert torch.equal(images.fetch(torch.tensor([row]))[0, 0], torch.from_numpy(np.array(cells[row]["image"])))


@needs_shared
def test_a_webdataset_of_captioned_tiles_loads_pixel_by_pixel() -> None:
    path = SHARED / "crawl_tiles32.tar"
    images = load(path, 32, 3)
    with tarfile.open(path) as tar:
        names = [name for name in tar.getnames() if name.endswith(".png")]
        assert images.length == len(names)
        for row in (0, len(names) - 1):
            stored = np.array(Image.open(tar.extractfile(names[row])).convert("RGB"))  # type: ignore[arg-type]
            assert torch.equal(images.fetch(torch.tensor([row]))[0], torch.from_numpy(stored).permute(2, 0, 1))


# --- order -----------------------------------------------------------------------------------------------------------


def stream(length: int, batch_size: int, steps: int, seed: int = 0) -> Tensor:
    return torch.cat([batch_indices(length, batch_size, step, seed) for step in range(steps)])


@pytest.mark.parametrize(("length", "batch_size"), [(12, 4), (10, 4), (7, 3), (5, 12), (3, 64)])
def test_every_epoch_sees_every_index_once(length: int, batch_size: int) -> None:
    epochs = stream(length, batch_size, steps=length).reshape(batch_size, length)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(length).expand(batch_size, length))


def test_epochs_purposes_and_seeds_shuffle_differently() -> None:
    first, second = stream(50, 50, steps=2).chunk(2)
    others = [second, batch_indices(50, 50, 0, seed=0, purpose="prompts"), batch_indices(50, 50, 0, seed=1)]
    for order in (torch.arange(50), *others):
        assert not torch.equal(first, order)
        assert sorted(order.tolist()) == sorted(first.tolist()) == list(range(50))


def test_the_batch_is_a_function_of_the_step_alone() -> None:
    wanted = batch_indices(11, 4, 9, seed=3)
    module._epoch_order.cache_clear()
    assert torch.equal(batch_indices(11, 4, 9, seed=3), wanted)
    assert torch.equal(stream(11, 4, steps=10, seed=3)[-4:], wanted)


def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    upright = np.zeros((20, 20, 3), dtype=np.uint8)
    upright[:10] = 255
    orientation = Image.Exif()
    orientation[0x0112] = 6  # stored lying on its left side
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "photo.png", exif=orientation)
    image = load(tmp_path, 20, 3).fetch(torch.tensor([0]))[0]
    assert torch.equal(image, torch.from_numpy(upright).permute(2, 0, 1))
