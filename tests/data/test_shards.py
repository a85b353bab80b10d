"""Latents, pairs and embeddings are kept alike: file by file, by one writer, whatever stops, damages or fills it."""

import errno
import os
import re
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fewstep.data import latents, pairs
from fewstep.data.images import ImageSet
from fewstep.errors import UserError
from kept_rows import CAPTIONS, NUM, PLAN, PROMPTS, SPACE, captioned, draw, encode, files, load_latents, load_pairs
from steps import dying

NAMES = ["00000", "00001", "00002"]  # of 4, 4 and 3 rows, each made in two calls
Tick = Callable[[], object]
"""Called at every call of what makes rows."""


def ticking(tick: Tick, made: Callable[..., object]) -> Callable[..., object]:
    def make(*arguments: object) -> object:
        if arguments != ([""],):  # which asks for the size of an embedding
            tick()
        return made(*arguments)

    return make


def write_latents(out: Path, tick: Tick = int, report: Callable[[int], None] = id, **changes: object) -> None:
    images, draw_latents = changes.pop("images", captioned()), ticking(tick, encode)
    latents.write_latents(images, draw_latents, SPACE | changes, out, batch_size=2, report=report)


def write_pairs(out: Path, tick: Tick = int, report: Callable[[int], None] = id, **changes: object) -> None:
    given = changes.pop("given", PROMPTS)
    pairs.write_pairs(ticking(tick, draw), given, PLAN | changes, out, batch_size=2, report=report)


def write_embeddings(out: Path, tick: Tick = int, report: Callable[[int], None] = id) -> None:
    def embed(texts: list[str]) -> dict[str, Tensor]:
        return {"text": torch.tensor([[float(sum(map(ord, text))), len(text)] for text in texts])}

    latents.cached_embeddings(CAPTIONS, ticking(tick, embed), "f", out, 1.0, report)


class Kind(NamedTuple):
    write: Callable[..., None]
    load: Callable[..., object]
    row_bytes: int
    missing: str
    """What `load` says where some of three files lack."""


KINDS = {
    "latents": Kind(write_latents, load_latents, 32, "not all images are encoded yet"),
    "pairs": Kind(write_pairs, load_pairs, 72, "{} of 3 files are not there yet"),
    "embeddings": Kind(write_embeddings, write_embeddings, 8, ""),
}
PLANNED = ["latents", "pairs"]  # and say how they were made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("0*") if path.is_file())


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["stopped", "broken"])
def test_what_was_stopped_goes_on_to_the_same_bytes(
    kind: Kind, after: int, error: BaseException, tmp_path: Path
) -> None:
    kind.write(tmp_path / "whole")
    assert [path.stem for path in shards(tmp_path / "whole")] == NAMES
    with pytest.raises(type(error)):
        kind.write(tmp_path / "parts", dying(after, error))
    assert [path.stem for path in shards(tmp_path / "parts")] == NAMES[: after // 2]
    if kind.missing:
        missing = kind.missing.format(3 - after // 2)
        with pytest.raises(UserError, match=f"{missing}; run the same `fewstep data "):
            kind.load(tmp_path / "parts")
    if after >= 2:
        made = shards(tmp_path / "parts")[0]
        made.with_name(f".00001{made.suffix}.1234.tmp").write_bytes(b"torn")
    calls, finished = [], []
    kind.write(tmp_path / "parts", lambda: calls.append(1), finished.append)
    assert len(calls) == 6 - after // 2 * 2
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert finished == sorted(finished)
    assert finished[-1] == NUM


def test_what_is_there_is_not_made_again(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path)
    before = files(tmp_path)
    kind.write(tmp_path, dying(0, AssertionError()))
    assert files(tmp_path) == before


@pytest.mark.parametrize("keep", [0, 5, 100, -1, None])
def test_a_damaged_or_missing_file_is_named_and_made_anew(kind: Kind, keep: int | None, tmp_path: Path) -> None:
    kind.write(tmp_path)
    before, path = files(tmp_path), shards(tmp_path)[1]
    if keep is not None:
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=f"{path.name}: missing or damaged; remove it and run the "):
            kind.load(tmp_path)
    path.unlink()
    if kind.missing:
        with pytest.raises(UserError, match="missing or damaged" if path.suffix != ".parquet" else "1 of 3 files are"):
            kind.load(tmp_path)
    kind.write(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", PLANNED)
def test_a_folder_of_other_files_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        KINDS[name].write(tmp_path)
    assert list(files(tmp_path)) == ["thesis.tex"]
    assert not latents.is_latents(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("latents", {"seed": 1}, "seed: 5 -> 1"),
        ("latents", {"min_side": 512}, "min_side: 1024 -> 512"),
        ("latents", {"autoencoder": "b2"}, "autoencoder: a1 -> b2"),
        ("latents", {"images": ImageSet(int, None, NUM, CAPTIONS[::-1])}, "captions: [0-9a-f]{16} -> [0-9a-f]{16}"),
        ("latents", {"images": ImageSet(int, None, NUM - 1, CAPTIONS)}, "num_images: 11 -> 10"),
        ("pairs", {"seed": 1}, "seed: 5 -> 1"),
        ("pairs", {"sampler": "ddim:4"}, "sampler: euler:50@8 -> ddim:4"),
        ("pairs", {"teacher": "b2"}, "teacher: a1 -> b2"),
        ("pairs", {"num_pairs": 4}, "num_pairs: 11 -> 4"),
        ("pairs", {"given": {"prompt": ["prompt 1"] * NUM}}, "conditions: prompt .* -> prompt"),
    ],
)
def test_a_folder_made_otherwise_is_refused(name: str, change: dict, message: str, tmp_path: Path) -> None:
    KINDS[name].write(tmp_path)
    before = files(tmp_path)
    with pytest.raises(UserError, match=f"holds {name} made otherwise .*{message}.*another --out"):
        KINDS[name].write(tmp_path, **change)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("latents", {"autoencoder": "b2"}, "autoencoder .a1. than asked for .b2"),
        ("latents", {"shape": [4, 3, 3]}, r"size .\[4, 2, 2\]. than asked for .\[4, 3, 3\]"),
        ("pairs", {"teacher": "b2"}, "teacher .a1. than asked for .b2"),
        ("pairs", {"sampler": "euler:50@7"}, "sampler .euler:50@8. than asked for .euler:50@7"),
        ("pairs", {"shape": (2, 4, 4)}, r"shape .\[2, 3, 3\]. than asked for .\[2, 4, 4\]"),
    ],
)
def test_what_was_made_for_something_else_is_refused(name: str, asked: dict, message: str, tmp_path: Path) -> None:
    KINDS[name].write(tmp_path)
    with pytest.raises(UserError, match=f"{name} of another {message}"):
        KINDS[name].load(tmp_path, **asked)


@pytest.mark.parametrize("name", PLANNED)
def test_a_folder_without_or_with_a_damaged_description_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"holds no {name} .no {name}.json.; write them with `fewstep data {name}`"):
        KINDS[name].load(tmp_path)
    (tmp_path / f"{name}.json").write_text('{"teacher": ')
    with pytest.raises(UserError, match=rf"{name}\.json: can't be read"):
        KINDS[name].load(tmp_path)


def test_of_two_writers_the_second_is_refused_or_waits(kind: Kind, tmp_path: Path) -> None:
    """It waits for embeddings, which runs want, and is refused where two commands are the same by mistake."""
    errors, calls, begun = [], [], threading.Event()

    def second() -> None:
        begun.wait(10)
        try:
            kind.write(tmp_path, lambda: calls.append("second"))
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()

    def first() -> None:
        calls.append("first")
        begun.set()
        if kind.missing:
            thread.join(10)

    kind.write(tmp_path, first)
    thread.join()
    assert calls == ["first"] * 6
    assert len(errors) == bool(kind.missing)
    assert all(re.search(f"process {os.getpid()} writes there", error) for error in errors)
    assert {path.suffix for path in tmp_path.rglob("*.*")} <= {".json", ".parquet", ".safetensors"}


def test_a_full_disk_is_told_before_anything_is_made(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = namedtuple("free", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(NUM * kind.row_bytes - 1))
    with pytest.raises(UserError, match=r"1 bytes too few; (choose another|name another embeddings\.folder)"):
        kind.write(tmp_path / "new", dying(0, AssertionError()))
    assert shards(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(NUM * kind.row_bytes))
    kind.write(tmp_path / "new")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(0))
    kind.write(tmp_path / "new")  # what is there needs no room


def test_a_disk_that_fills_leaves_nothing_torn(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def filling(whole: Callable[..., None], place: int) -> Callable[..., None]:
        def save(*arguments: object, **options: object) -> None:
            path = Path(str(arguments[place]))
            if "00001" in path.name:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            whole(*arguments, **options)

        return save

    from pyarrow import parquet

    from fewstep.data import shards as module

    monkeypatch.setattr(parquet, "write_table", filling(parquet.write_table, 1))
    monkeypatch.setattr(module, "save_file", filling(module.save_file, 1))
    with pytest.raises(UserError, match=r"00001\.\w+: can't be written .*No space left on device"):
        kind.write(tmp_path)
    assert [path.stem for path in shards(tmp_path)] == NAMES[:1]
    assert {path.suffix for path in tmp_path.rglob("*.*")} <= {".json", ".parquet", ".safetensors"}


@pytest.mark.parametrize("name", PLANNED)
def test_files_are_mapped_and_not_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    if name == "latents":  # 8 MB a row
        shape = [4, 1024, 1024]
        images = ImageSet(lambda rows: rows.to(torch.uint8)[:, None, None, None], None, 11, CAPTIONS)
        encode = lambda images, noise: images.half().expand(-1, *shape)  # noqa: E731
        latents.write_latents(images, encode, SPACE | {"shape": shape}, tmp_path)
    else:
        shape = [8, 512, 512]
        pairs.write_pairs(lambda noise, given: noise, {}, PLAN | {"shape": shape, "num_pairs": 6}, tmp_path, 2)
    before = resident()
    if name == "latents":
        batch = load_latents(tmp_path, shape=shape).batch(torch.tensor([3]))
        assert batch["latent"].unique().tolist() == [3]
    else:
        kept = load_pairs(tmp_path, shape=tuple(shape))
        assert kept.plan["rows_per_group"] == 1
        batch = kept.batch(torch.tensor([3]))
        assert torch.equal(batch["noise"], batch["x0"])
    assert resident() - before < 40
