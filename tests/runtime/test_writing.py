"""Each rank writes its share; a checkpoint is there when all have, and what keeps one from it is told by all alike."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import Lost, UserError
from fewstep.runtime import writing
from fewstep.runtime.checkpoint import checkpoints, load_state, newest_whole
from fewstep.runtime.distributed import rank
from fewstep.runtime.sharding import share_of
from fewstep.runtime.writing import Post, Writer
from ranks import in_ranks
from steps import same

STATE = {"method": {"student": [torch.full((100 + number,), float(number)) for number in range(20)]}, "count": 3}


def both(run: Path) -> list[Writer]:
    """The writers of two ranks, in one process."""
    store = dist.HashStore()
    return [Writer(run, Post(number, 2, "x", store)) for number in range(2)]


def begin(writer: Writer, step: int, save_model: Callable[[Path, Any], None] | None = None) -> None:
    share = share_of(STATE, writer.post.number, 2)
    writer.save(step, share, save_model or (lambda folder, state: None), ())


def ends(writers: list[Writer]) -> list[str]:
    told = []
    for writer in writers:
        with pytest.raises(UserError) as refused:
            writer.wait()
        told.append(str(refused.value))
    return told


@pytest.fixture(autouse=True)
def _by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made by the first rank alone."""
    monkeypatch.setattr(writing, "make_room", lambda *given: None)
    monkeypatch.setattr(writing, "LOOK", 0.001)


def test_each_rank_copies_and_writes_its_share_of_what_all_have(tmp_path: Path) -> None:
    first, second = writers = both(tmp_path)
    begin(second, 1)
    assert checkpoints(tmp_path) == []
    begin(first, 1)
    first.wait()
    second.wait()
    found = load_state(checkpoints(tmp_path)[0])
    assert same(found["method"], STATE["method"])
    assert (found["count"], newest_whole(tmp_path)) == (3, checkpoints(tmp_path)[0])
    copied = [sum(buffer.nbytes for buffer in writer.buffers.values()) for writer in writers]
    whole = sum(tensor.nbytes for tensor in STATE["method"]["student"])
    assert sum(copied) == whole
    assert max(copied) < 0.52 * whole
    assert sorted(path.name for path in (checkpoints(tmp_path)[0] / "state").iterdir()) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "state.json",
    ]


def test_ranks_whose_shares_take_several_shards_number_them_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.runtime.shards.SHARD_BYTES", 2000)
    writers = both(tmp_path)
    for writer in reversed(writers):
        begin(writer, 1)
    for writer in writers:
        writer.wait()
    assert same(load_state(checkpoints(tmp_path)[0])["method"], STATE["method"])
    assert len(list((checkpoints(tmp_path)[0] / "state").glob("*.safetensors"))) == 6


@pytest.mark.parametrize("number", [0, 1])
def test_where_one_rank_can_not_write_all_tell_it_alike(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers, write = both(tmp_path), writing.write_shard
    for writer in reversed(writers):
        begin(writer, 1)
    for writer in writers:
        writer.wait()

    def full(path: Path, step: int, slices: Any) -> None:
        if path.name == f"shard-0000{number}.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, step, slices)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_shard", full)
        for writer in writers:
            begin(writer, 2)
        one, other = ends(writers)
    assert one == other
    assert "00000002: can't be written ([Errno 28] No space left on device); " in one
    assert "make room and --resume, which goes on from the checkpoint before it" in one
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]
    for writer in writers:
        begin(writer, 2)
    for writer in writers:
        writer.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["00000001", "00000002"]


def test_where_the_model_can_not_be_written_all_tell_it_alike(tmp_path: Path) -> None:
    def refuse(folder: Path, state: dict[str, Any]) -> None:
        raise UserError("no such model")

    writers = both(tmp_path)
    for writer in writers:
        begin(writer, 1, refuse)
    one, other = ends(writers)
    assert one == other
    assert one.startswith("no such model; make room and --resume, which begins anew")
    assert os.listdir(tmp_path / "checkpoints") == []


def lose(writer: Writer) -> None:
    """As training does that finds another rank gone."""
    with writer:
        begin(writer, 1)
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("there", [0, 1])
def test_a_rank_that_is_gone_is_not_waited_for(there: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PATIENCE", 0.1)
    writer = both(tmp_path)[there]
    with pytest.raises(RuntimeError, match="Connection closed"):
        lose(writer)
    writer.post.ending.set()
    begin(writer, 2)
    with pytest.raises(Lost):
        writer.wait()
    assert checkpoints(tmp_path) == []
    assert there or os.listdir(tmp_path / "checkpoints") == []
    assert writer.thread is None


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (Path.unlink, "is missing"),
        (lambda path: os.truncate(path, 100), "has 100 bytes instead of"),
        (
            lambda path: shutil.copy(str(path).replace("00000002", "00000001"), path),
            "has other bytes than were written",
        ),
        (lambda path: shutil.copy(path.with_name("shard-00000.safetensors"), path), "has "),
    ],
    ids=["missing", "torn", "of another step", "of another rank"],
)
def test_damage_in_what_another_rank_wrote_is_damage(
    harm: Callable[[Path], object], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writers = both(tmp_path)
    for step in (1, 2):
        for writer in writers:
            begin(writer, step)
    for writer in writers:
        writer.wait()
    before, newest = checkpoints(tmp_path)
    harm(newest / "state" / "shard-00001.safetensors")
    assert newest_whole(tmp_path) == before
    assert f"00000002: state/shard-00001.safetensors {told}" in capsys.readouterr().err
    assert same(load_state(before)["method"], STATE["method"])


# --- of real ranks ---------------------------------------------------------------------------------------------------


def told_by(act: Callable[[], object]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def in_turn(run: Path) -> list[str]:
    """What two ranks are told of checkpoints: without memory in one of them, on a full disk, on one that fills up."""
    patch = pytest.MonkeyPatch()
    writer, told = Writer(run), []
    if rank():
        patch.setattr(writing, "free_memory", lambda: 10)
    begin(writer, 1)
    told.append(checkpoints(run)[0].name)  # all of them have waited
    patch.undo()

    def full(path: Path, step: int, slices: dict[str, tuple[Tensor, Any]]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank():
        patch.setattr(writing, "write_shard", full)
    begin(writer, 2)
    told.append(told_by(writer.wait))
    patch.undo()
    patch.setattr("shutil.disk_usage", lambda path: [0, 0, 0] if rank() else type("usage", (), {"free": 10}))
    told.append(told_by(lambda: begin(writer, 2)))
    patch.undo()
    with writer:
        begin(writer, 2)
        begin(writer, 3)
    return told


@pytest.mark.slow
def test_two_ranks_agree_on_each_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    one, other = in_ranks(2, tmp_path, in_turn, tmp_path / "run")
    assert one == other
    waited, full, little = one
    assert waited == "00000001"
    assert "00000002: can't be written ([Errno 28] No space left on device)" in full
    assert "of a checkpoint, but only 10 bytes of disk are free" in little
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["00000002", "00000003"]
    assert same(load_state(checkpoints(tmp_path / "run")[1])["method"], STATE["method"])
