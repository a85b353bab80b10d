"""A checkpoint is there whole or not at all, whenever the process dies; damage is noticed, and nothing executed."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from fewstep.errors import Interrupted, UserError
from fewstep.files import write_text
from fewstep.runtime import manifest, writing
from fewstep.runtime.checkpoint import STATES, checkpoints, load_state, newest_whole
from fewstep.runtime.manifest import MANIFEST, write_manifest
from fewstep.runtime.runs import Found, find
from fewstep.runtime.sharding import Share, share_of
from fewstep.runtime.writing import SaveModel, Writer
from fewstep.stopping import end_on_signals
from steps import as_before


def model(text: str) -> SaveModel:
    """A `save_model` that writes one file."""

    def save_model(folder: Path, state: dict[str, Any]) -> None:
        (folder / "weights").write_text(text)

    return save_model


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((3,), float(step)), "rate": 0.1 * step}


def share(state: dict[str, Any]) -> Share:
    return share_of(state, 0, 1)


def save(run: Path, *steps: int) -> None:
    with Writer(run) as writer:
        for step in steps:
            writer.save(step, share(state_of(step)), model(f"model {step}"), ())


def save_model_by(run: Path, step: int, save_model: Callable[[Path], object]) -> None:
    with Writer(run) as writer:
        writer.save(step, share({}), lambda folder, state: save_model(folder), ())


def assert_whole(run: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, and all of it can be read."""
    newest = checkpoints(run)[-1]
    assert newest.name == f"{step:08d}"
    assert (newest / "model" / "weights").read_text() == f"model {step}"
    state = load_state(newest)
    assert state["step"] == step
    assert torch.equal(state["weight"], torch.full((3,), float(step)))
    assert state["rate"] == 0.1 * step


def test_only_the_newest_two_are_kept_and_hold_the_state_the_step_and_the_model(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    assert newest_whole(tmp_path) is None
    save(tmp_path, 1, 2, 90, 100)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000090", "00000100"]
    assert [path.name for path in checkpoints(tmp_path)] == ["00000090", "00000100"]
    assert sorted(os.listdir(checkpoints(tmp_path)[0])) == ["manifest.json", "model", "state"]
    assert_whole(tmp_path, 100)


def test_unfinished_checkpoints_and_stray_files_are_no_checkpoints_and_the_first_are_cleared_away(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1)
    for name in (".00000001.tmp", ".00000009.0a1b.tmp", ".00000000.old"):
        (tmp_path / "checkpoints" / name / "model").mkdir(parents=True)
    (tmp_path / "checkpoints" / "00000010.txt").write_text("a file")
    assert_whole(tmp_path, 1)
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000001", "00000002", "00000010.txt"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    save_model_by(tmp_path, 3, lambda folder: model("old")(folder, {}))
    save(tmp_path, 3)
    assert_whole(tmp_path, 3)


def save_tensors(folder: Path, state: dict[str, Any]) -> None:
    save_file({"weight": torch.zeros(2**20)}, folder / "model.safetensors")


@pytest.mark.parametrize("place", ["state", "safetensors", "text"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(place: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; safetensors and Python each have their own error."""
    save(tmp_path, 1)
    state = {"weight": torch.zeros(2**20 if place == "state" else 1)}
    save_model = save_tensors if place == "safetensors" else model("x" * (2**22 if place == "text" else 1))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        writer = Writer(tmp_path)
        writer.save(2, share(state), save_model, ())
        with pytest.raises(UserError, match=r"00000002: can't be written \(.*\); make room and --resume") as refused:
            writer.save(3, share(state), save_model, ()) if place == "text" else writer.wait()
        writer.wait()  # which was told once
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]
    assert_whole(tmp_path, 1)
    save(tmp_path, 2)
    assert_whole(tmp_path, 2)


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_state(tensors: object, path: Path, about: object) -> None:
    path.write_bytes(b"half a sta")
    die()


def die_in_removal(folder: Path, ignore_errors: bool) -> None:
    if folder.is_dir():
        (folder / "manifest.json").unlink()
        die()


@pytest.mark.parametrize(
    ("place", "name", "function", "left"),
    [
        (writing, "write_manifest", die, [1, 2]),
        (safetensors.torch, "save_file", die_in_state, [1, 2]),
        (Path, "rename", die, [1, 2]),
        (shutil, "rmtree", die_in_removal, [2, 3]),
    ],
)
def test_a_kill_leaves_whole_checkpoints_alone(
    place: Any, name: str, function: Callable, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, function)
        child = os.fork()
        if not child:
            save(tmp_path, 3)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [int(path.name) for path in checkpoints(tmp_path)] == left
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[-1]
    save(tmp_path, 4)
    assert_whole(tmp_path, 4)
    assert len(os.listdir(tmp_path / "checkpoints")) == 2


def test_20_kills_at_any_moment_of_writing_leave_whole_checkpoints_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments, torn = random.Random(0), 0
    for _ in range(20):
        begin = newest_whole(tmp_path)
        first = int(begin.name) + 1 if begin else 1
        child = os.fork()
        if not child:
            save(tmp_path, *range(first, first + 10_000))
        while not list((tmp_path / "checkpoints").glob("*")):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += bool(list((tmp_path / "checkpoints").glob(".*")))
        if found := newest_whole(tmp_path):
            assert_whole(tmp_path, int(found.name))
    assert torn > 5
    assert capsys.readouterr().err == ""  # none was damaged


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int | None = None) -> None:
    """Changes one bit, in the middle or there."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    with path.open("r+b") as file:  # the same file for all of its hard links
        file.write(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edited(**values: Any) -> Callable[[Path], object]:
    """A JSON object with other values."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def from_before(path: Path) -> None:
    """The file that the checkpoint before has there."""
    shutil.copyfile(Path(str(path).replace("00000002", "00000001")), path)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), make(path))


def rewritten(change: Callable[[dict, dict], object]) -> Callable[[Path], None]:
    """The manifest with other entries; the second is that of the checkpoint before."""

    def harm(path: Path) -> None:
        ours = json.loads(path.read_text())
        change(ours, json.loads(Path(str(path).replace("00000002", "00000001")).read_text()))
        path.write_text(json.dumps(ours))

    return harm


def renumbered(path: Path) -> None:
    """A whole checkpoint of another step in its place."""
    shutil.rmtree(path)
    shutil.copytree(path.with_name("00000001"), path)


def outside(path: Path) -> None:
    """A link to a file with the same bytes elsewhere."""
    elsewhere = path.parents[3] / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


OTHER, SHARD, INDEX, WEIGHTS = (
    "has other bytes than were written",
    "state/shard-00000.safetensors",
    "state/state.json",
    "model/weights",
)
ENTRY = {"size": 1, "sha256": "0" * 64}
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a bit of a shard": (flip, SHARD, f"{SHARD} {OTHER}"),
    "a bit of its header": (partial(flip, at=20), SHARD, f"{SHARD} {OTHER}"),
    "a bit of the index": (partial(flip, at=-4), INDEX, f"{INDEX} {OTHER}"),
    "a bit of the model": (flip, WEIGHTS, f"{WEIGHTS} {OTHER}"),
    "a bit of the manifest": (partial(flip, at=0), MANIFEST, f"{MANIFEST} can't be read"),
    "a torn shard": (cut, SHARD, f"{SHARD} has 203 bytes instead of 204"),
    "half an index": (halve, INDEX, f"{INDEX} is damaged or missing"),
    "a torn model": (cut, WEIGHTS, f"{WEIGHTS} has 6 bytes instead of 7"),
    "half a manifest": (halve, MANIFEST, f"{MANIFEST} can't be read"),
    "an empty shard": (partial(os.truncate, length=0), SHARD, f"{SHARD} has 0 bytes instead of 204"),
    "an empty index": (partial(os.truncate, length=0), INDEX, f"{INDEX} is damaged or missing"),
    "an empty manifest": (partial(os.truncate, length=0), MANIFEST, f"{MANIFEST} can't be read"),
    "a longer shard": (
        lambda path: path.write_bytes(path.read_bytes() + b"0"),
        SHARD,
        f"{SHARD} has 205 bytes instead of 204",
    ),
    "no shard": (Path.unlink, SHARD, f"{SHARD} is missing"),
    "no index": (Path.unlink, INDEX, f"{INDEX} is damaged or missing"),
    "no model": (Path.unlink, WEIGHTS, f"{WEIGHTS} is missing"),
    "no model folder": (shutil.rmtree, "model", f"{WEIGHTS} is missing"),
    "no state folder": (shutil.rmtree, "state", f"{INDEX} is damaged or missing"),
    "no manifest": (Path.unlink, MANIFEST, f"{MANIFEST} is missing"),
    "a shard of another step": (from_before, SHARD, f"{SHARD} {OTHER}"),
    "an index of another step": (from_before, INDEX, f"{INDEX} is of step 1"),
    "a manifest of another step": (from_before, MANIFEST, f"{WEIGHTS} {OTHER}"),
    "a checkpoint of another step": (renumbered, ".", f"{INDEX} is of step 1"),
    "a folder for a shard": (replaced(Path.mkdir), SHARD, f"{SHARD} is missing"),
    "a FIFO for a shard": (replaced(os.mkfifo), SHARD, f"{SHARD} is missing"),
    "a loop for a shard": (replaced(lambda path: path.symlink_to(path.name)), SHARD, f"{SHARD} is missing"),
    "a link to elsewhere": (outside, SHARD, f"{SHARD} leads out of the folder"),
    "a pickle for a shard": (lambda path: torch.save({"weight": 1}, path), SHARD, "instead of 204"),
    "a shard more": (
        lambda path: shutil.copy(path, path.with_name("shard-00001.safetensors")),
        SHARD,
        f"state/shard-00001.safetensors is not in {MANIFEST}",
    ),
    "more shards in the index": (edited(shards=2), INDEX, "state/shard-00001.safetensors is missing"),
    "endless shards": (edited(shards=10**30), INDEX, "state/shard-00001.safetensors is missing"),
    "shards of words": (edited(shards="x"), INDEX, f"{INDEX} is damaged or missing"),
    "another step in the index": (edited(step=3), INDEX, f"{INDEX} is of step 3"),
    "a manifest of other sizes": (
        rewritten(lambda ours, _: ours[SHARD].update(size=1)),
        MANIFEST,
        f"{SHARD} has 204 bytes instead of 1",
    ),
    "a manifest of other digests": (
        rewritten(lambda ours, before: ours[SHARD].update(before[SHARD])),
        MANIFEST,
        f"{SHARD} {OTHER}",
    ),
    "a manifest without the shard": (
        rewritten(lambda ours, _: ours.pop(SHARD)),
        MANIFEST,
        f"{SHARD} is not in {MANIFEST}",
    ),
    "a manifest without all": (rewritten(lambda ours, _: ours.clear()), MANIFEST, f"{SHARD} is not in {MANIFEST}"),
    "a manifest of more": (rewritten(lambda ours, _: ours.update(more=ENTRY)), MANIFEST, "more is missing"),
    "a manifest of a file outside": (
        rewritten(lambda ours, _: ours.update({"../../a": ENTRY})),
        MANIFEST,
        f"{MANIFEST} can't be read",
    ),
    "a manifest of a place": (
        rewritten(lambda ours, _: ours.update({"/etc/hostname": ENTRY})),
        MANIFEST,
        f"{MANIFEST} can't be read",
    ),
    "a manifest of words": (
        lambda path: path.write_text(json.dumps({SHARD: "x"})),
        MANIFEST,
        f"{MANIFEST} can't be read",
    ),
    "a manifest that is a list": (lambda path: path.write_text("[]"), MANIFEST, f"{MANIFEST} can't be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_it_used(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2)
    before, newest = checkpoints(tmp_path)
    harm, file, what = DAMAGES[name]
    harm(newest / file)
    assert newest_whole(tmp_path) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fewstep: {newest}: ")
    assert line.endswith(f"{what}; it is set aside as 00000002.damaged")
    assert checkpoints(tmp_path) == [before]
    assert (tmp_path / "checkpoints" / "00000002.damaged").is_dir()
    assert_whole(tmp_path, 1)
    save(tmp_path, 2, 3)
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[-1]
    assert capsys.readouterr().err == ""
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000002", "00000003"]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (cut, "state.pt is torn or missing"),
        (flip, "state.pt has other bytes than were written"),
        (Path.unlink, "holds no state"),
    ],
)
def test_a_checkpoint_of_an_earlier_version_is_taken_unless_it_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], object], told: str
) -> None:
    save(tmp_path, 1, 2)
    before, newest = map(as_before, checkpoints(tmp_path))
    assert newest_whole(tmp_path) == newest
    assert_whole(tmp_path, 2)
    harm(newest / "state.pt")
    assert newest_whole(tmp_path) == before
    assert re.search(told, capsys.readouterr().err)
    save(tmp_path, 3)  # from here on as today
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[-1]
    assert_whole(tmp_path, 3)


def test_where_no_checkpoint_is_whole_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2)
    for path in checkpoints(tmp_path):
        flip(path / SHARD)
    with pytest.raises(UserError, match="no checkpoint of it is whole; choose another --out to begin anew"):
        newest_whole(tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_damage_in_an_older_checkpoint_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / "checkpoints" / "00000001" / "manifest.json").write_text("{")
    assert_whole(tmp_path, 2)
    save(tmp_path, 3)
    assert_whole(tmp_path, 3)


def test_the_earliest_checkpoints_have_no_manifest_and_are_taken_unless_torn(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for path in map(as_before, checkpoints(tmp_path)):
        (path / "manifest.json").unlink()
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[1]
    cut(checkpoints(tmp_path)[1] / "state.pt")
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[0]


@pytest.fixture
def linking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run with two checkpoints that link to what is not trained; the names of the files that were hashed."""
    hashed: list[str] = []
    digest = manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda path: (hashed.append(path.name), digest(path))[1])
    write_text(tmp_path / "recipe.yaml", "kind: distill")
    for step in (1, 2):
        save_model_by(tmp_path, step, lambda folder: link_frozen(tmp_path, folder))
    return hashed


def link_frozen(run: Path, folder: Path) -> None:
    if not (run / "frozen").is_dir():
        (run / "frozen").mkdir()
        (run / "frozen" / "vae").write_text("as it was loaded")
    (folder / "vae").hardlink_to(run / "frozen" / "vae")
    (folder / "unet").write_text("trained")


def test_what_is_linked_is_hashed_once_per_run(linking: list[str]) -> None:
    assert sorted(linking) == sorted(["shard-00000.safetensors", "state.json", "unet"] * 2 + ["vae"])


def test_damage_in_what_all_checkpoints_share_costs_none_of_them(
    linking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(tmp_path / "frozen" / "vae")
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[1]
    wanted = "frozen: model/vae has other bytes than were written; it is set aside as frozen.damaged\n"
    assert capsys.readouterr().err == f"fewstep: {tmp_path}/{wanted}"
    with pytest.raises(UserError, match=r"00000002: model/vae has other bytes than were written; take .*@1$"):
        find(tmp_path).check()
    save_model_by(tmp_path, 3, lambda folder: link_frozen(tmp_path, folder))
    find(tmp_path).check()


def lose(run: Path) -> None:
    (run / "frozen" / "vae").unlink()


def lose_in_a_copy(run: Path) -> None:
    """Of a folder that also the checkpoint has."""
    for folder in (run / "frozen", checkpoints(run)[-1] / "model"):
        (folder / "text").mkdir()
        (folder / "text" / "config").write_text("{}")
    (checkpoints(run)[-1] / "model" / "text" / "weights").write_text("as they were loaded")


def flip_in_a_copy(run: Path) -> None:
    """Where no file system keeps links."""
    (run / "frozen" / "vae").unlink()
    (run / "frozen" / "vae").write_text("as it was damaged")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lose, "vae is missing"),
        (lose_in_a_copy, "text/weights is missing"),
        (flip_in_a_copy, "vae has other bytes than were written"),
    ],
)
def test_what_the_next_checkpoint_would_lack_or_have_damaged_is_written_anew(
    linking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], told: str
) -> None:
    damage(tmp_path)
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[1]
    assert capsys.readouterr().err == f"fewstep: {tmp_path}/frozen: {told}; it is set aside as frozen.damaged\n"
    save_model_by(tmp_path, 3, lambda folder: link_frozen(tmp_path, folder))
    assert (checkpoints(tmp_path)[-1] / "model" / "vae").read_text() == "as it was loaded"
    assert not (tmp_path / "frozen.damaged").exists()


@pytest.mark.parametrize("copy", [shutil.copy2, os.link])
def test_a_copy_without_links_or_of_links_alone_is_as_whole(
    linking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], copy: Callable[[str, str], object]
) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, copied, ignore=shutil.ignore_patterns("elsewhere"), copy_function=copy)
    assert newest_whole(copied) == checkpoints(copied)[1]
    assert capsys.readouterr().err == ""


def test_damage_in_a_copy_by_links_is_as_in_the_run(
    linking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, copied, ignore=shutil.ignore_patterns("elsewhere"), copy_function=os.link)
    flip(checkpoints(copied)[1] / SHARD)
    assert newest_whole(copied) == checkpoints(copied)[0]
    assert f"00000002: {SHARD} {OTHER}; it is set aside" in capsys.readouterr().err
    flip(copied / "frozen" / "vae")
    assert newest_whole(copied) == checkpoints(copied)[0]
    assert f"frozen: model/vae {OTHER}; it is set aside" in capsys.readouterr().err


def test_a_model_is_checked_by_sizes_when_it_is_found_and_by_bytes_when_that_is_asked(
    linking: list[str], tmp_path: Path
) -> None:
    newest = checkpoints(tmp_path)[-1]
    linking.clear()
    assert find(tmp_path) == Found(tmp_path, 2)
    assert linking == []
    (newest / SHARD).unlink()  # which drawing takes nothing from
    find(tmp_path).check()
    with pytest.raises(UserError, match=r"state/shard-00000\.safetensors is missing"):
        find(tmp_path).check(*STATES)
    cut(newest / "model" / "unet")
    with pytest.raises(UserError, match=r"model/unet has 6 bytes instead of 7; take .*@1"):
        find(tmp_path)
    shutil.rmtree(checkpoints(tmp_path)[0])
    with pytest.raises(UserError, match="there is no other checkpoint"):
        find(tmp_path)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "executed"))


@pytest.mark.parametrize("plain", [False, True])
def test_a_malicious_state_of_an_earlier_version_is_refused_and_not_executed(plain: bool, tmp_path: Path) -> None:
    state, mark = {"step": 1, "weight": Trap(tmp_path / "executed")}, tmp_path / "executed"
    path = tmp_path / "state.pt"
    if plain:
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path)
    with pytest.raises(UserError, match="can't be read"):
        load_state(tmp_path)
    assert not mark.exists()
    pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)
    assert mark.exists()  # the trap works where it is not guarded against


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "state.json"])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_executed(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (newest,) = checkpoints(tmp_path)
    torch.save({"step": 1, "weight": Trap(tmp_path / "executed")}, newest / "state" / name)
    write_manifest(newest)
    with pytest.raises(
        UserError, match=r"00000001/state: the checkpoint can't be read; remove .*00000001 to fall back"
    ):
        load_state(newest)
    assert not (tmp_path / "executed").exists()


# --- the thread ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_the_state_as_it_was_saved_though_training_goes_on(tmp_path: Path) -> None:
    weight, counts, go_on = torch.zeros(1000), {"updates": [1]}, Event()

    def save_model(folder: Path, state: dict[str, Any]) -> None:
        assert go_on.wait(20)
        (folder / "weights").write_text(str(state["weight"].sum().item()))

    with Writer(tmp_path) as writer:
        writer.save(1, share({"weight": weight, "counts": counts}), save_model, ())
        weight += 1
        counts["updates"].append(2)
        assert checkpoints(tmp_path) == []
        go_on.set()
    state = load_state(checkpoints(tmp_path)[0])
    assert state["weight"].sum() == 0
    assert state["counts"] == {"updates": [1]}
    assert (checkpoints(tmp_path)[0] / "model" / "weights").read_text() == "0.0"


def test_one_is_written_at_a_time_and_the_end_waits(tmp_path: Path) -> None:
    writing = list[int]()

    def save_model(folder: Path, state: dict[str, Any]) -> None:
        writing.append(1)
        time.sleep(0.02)
        assert len(writing) == 1
        writing.pop()

    with Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.save(step, share(state_of(step)), save_model, ())
    assert [path.name for path in checkpoints(tmp_path)] == ["00000002", "00000003"]


def test_without_memory_for_a_copy_all_is_waited_for_which_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([11, 10])
    monkeypatch.setattr(writing, "free_memory", lambda: next(free))
    with Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.save(step, share(state_of(step)), model(f"model {step}"), ())
            assert_whole(tmp_path, step)
            assert writer.buffers == {}
    told = (
        "a copy of the state takes 12 bytes of main memory, and 11 bytes are free: training waits for its checkpoints"
    )
    assert capsys.readouterr().err == f"fewstep: {told}\n"


def test_what_memory_is_free_is_read_of_the_machine_and_of_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "GROUP", tmp_path)
    machine = writing.free_memory()
    assert 10**8 < machine < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name, text in (("current", "700\n"), ("max", "max\n"), ("stat", "anon 1\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert writing.free_memory() > 10**8
    (tmp_path / "memory.max").write_text("1000\n")
    assert writing.free_memory() == 350


def refuse(folder: Path, state: dict[str, Any]) -> None:
    raise ValueError("no such model")


def end(writer: Writer, error: Exception) -> None:
    """By another error than the one in the thread."""
    writer.save(2, share(state_of(2)), refuse, ())
    raise error


def test_what_fails_in_the_thread_is_raised_where_it_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="no such model"), Writer(tmp_path) as writer:
        writer.save(2, share(state_of(2)), refuse, ())
    with pytest.raises(LookupError, match="another"), Writer(tmp_path) as writer:
        end(writer, LookupError("another"))
    assert capsys.readouterr().err == "fewstep: no such model\n"
    with pytest.raises(ValueError, match="no such model"), Writer(tmp_path) as writer:  # a stop is told behind one
        end(writer, Interrupted("stopped"))
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]
    assert_whole(tmp_path, 1)


def test_a_second_signal_in_a_write_ends_at_once_and_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    child = os.fork()
    if not child:
        end_on_signals()
        os.close(2)
        with Writer(tmp_path) as writer:
            writer.save(
                2, share(state_of(2)), lambda folder, state: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(9)), ()
            )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]
    assert_whole(tmp_path, 1)
