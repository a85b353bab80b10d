"""A checkpoint is there whole or not at all, whenever the process dies; damage is noticed, and nothing executed."""

import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep.errors import UserError
from fewstep.files import write_text
from fewstep.runtime import checkpoint, manifest
from fewstep.runtime.checkpoint import checkpoints, load_state, newest_whole, save_checkpoint
from fewstep.runtime.runs import Found, find


def writer(text: str) -> Callable[[Path], None]:
    """A `save_model` that writes one file."""

    def save_model(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return save_model


def save(run: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run, step, {"weight": torch.full((3,), float(step))}, writer(f"model {step}"))


def assert_whole(run: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, and all of it can be read."""
    newest = checkpoints(run)[-1]
    assert newest.name == f"{step:08d}"
    assert (newest / "model" / "weights").read_text() == f"model {step}"
    state = load_state(newest)
    assert state["step"] == step
    assert torch.equal(state["weight"], torch.full((3,), float(step)))


def test_only_the_newest_two_are_kept_and_hold_the_state_the_step_and_the_model(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    assert newest_whole(tmp_path) is None
    save(tmp_path, 1, 2, 90, 100)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000090", "00000100"]
    assert [path.name for path in checkpoints(tmp_path)] == ["00000090", "00000100"]
    assert sorted(os.listdir(checkpoints(tmp_path)[0])) == ["manifest.json", "model", "state.pt"]
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
    save_checkpoint(tmp_path, 3, {"weight": torch.zeros(1)}, writer("old"))
    save(tmp_path, 3)
    assert_whole(tmp_path, 3)


def save_tensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(2**20)}, folder / "model.safetensors")


@pytest.mark.parametrize("place", ["state", "safetensors", "text"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(place: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; torch, safetensors and Python each have their own error."""
    save(tmp_path, 1)
    state = {"weight": torch.zeros(2**20 if place == "state" else 1)}
    save_model = save_tensors if place == "safetensors" else writer("x" * (2**22 if place == "text" else 1))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(UserError, match=r"00000002: can't be written \(.*\); make room and --resume") as refused:
            save_checkpoint(tmp_path, 2, state, save_model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]
    assert_whole(tmp_path, 1)
    save(tmp_path, 2)
    assert_whole(tmp_path, 2)


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_state(state: object, path: Path) -> None:
    path.write_bytes(b"half a sta")
    die()


def die_in_removal(folder: Path, ignore_errors: bool) -> None:
    if folder.is_dir():
        (folder / "state.pt").unlink()
        die()


@pytest.mark.parametrize(
    ("place", "name", "function", "left"),
    [
        (checkpoint, "write_manifest", die, [1, 2]),
        (torch, "save", die_in_state, [1, 2]),
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


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:  # the same file for all of its hard links
        file.write(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "file", "what"),
    [
        (flip, "state.pt", "has other bytes than were written"),
        (flip, "model/weights", "has other bytes than were written"),
        (cut, "state.pt", "is torn or missing"),
        (cut, "model/weights", "has 6 bytes instead of 7"),
        (Path.unlink, "state.pt", "is torn or missing"),
        (Path.unlink, "model/weights", "is missing"),
        (cut, "manifest.json", "can't be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_it_used(
    harm: Callable[[Path], None], file: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2)
    before, newest = checkpoints(tmp_path)
    harm(newest / file) if file != "manifest.json" else (newest / file).write_text("{")
    assert newest_whole(tmp_path) == before
    assert capsys.readouterr().err == f"fewstep: {newest}: {file} {what}; it is set aside as 00000002.damaged\n"
    assert checkpoints(tmp_path) == [before]
    assert (tmp_path / "checkpoints" / "00000002.damaged").is_dir()
    save(tmp_path, 2, 3)
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[-1]
    assert capsys.readouterr().err == ""


def test_where_no_checkpoint_is_whole_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2)
    for path in checkpoints(tmp_path):
        flip(path / "state.pt")
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


def test_a_checkpoint_of_an_earlier_version_has_no_manifest_and_is_taken_unless_torn(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for path in checkpoints(tmp_path):
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
        save_checkpoint(tmp_path, step, {}, lambda folder: link_frozen(tmp_path, folder))
    return hashed


def link_frozen(run: Path, folder: Path) -> None:
    if not (run / "frozen").is_dir():
        (run / "frozen").mkdir()
        (run / "frozen" / "vae").write_text("as it was loaded")
    (folder / "vae").hardlink_to(run / "frozen" / "vae")
    (folder / "unet").write_text("trained")


def test_what_is_linked_is_hashed_once_per_run(linking: list[str]) -> None:
    assert sorted(linking) == ["state.pt", "state.pt", "unet", "unet", "vae"]


def test_damage_in_what_all_checkpoints_share_costs_none_of_them(
    linking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(tmp_path / "frozen" / "vae")
    assert newest_whole(tmp_path) == checkpoints(tmp_path)[1]
    wanted = "frozen: model/vae has other bytes than were written; it is set aside as frozen.damaged\n"
    assert capsys.readouterr().err == f"fewstep: {tmp_path}/{wanted}"
    with pytest.raises(UserError, match=r"00000002: model/vae has other bytes than were written; take .*@1$"):
        find(tmp_path).check()
    save_checkpoint(tmp_path, 3, {}, lambda folder: link_frozen(tmp_path, folder))
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
    save_checkpoint(tmp_path, 3, {}, lambda folder: link_frozen(tmp_path, folder))
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


def test_a_model_is_checked_by_sizes_when_it_is_found_and_by_bytes_when_that_is_asked(
    linking: list[str], tmp_path: Path
) -> None:
    newest = checkpoints(tmp_path)[-1]
    linking.clear()
    assert find(tmp_path) == Found(tmp_path, 2)
    assert linking == []
    (newest / "state.pt").unlink()  # which drawing takes nothing from
    find(tmp_path).check()
    with pytest.raises(UserError, match=r"state\.pt is missing"):
        find(tmp_path).check("state.pt")
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
def test_a_malicious_state_is_refused_and_not_executed(plain: bool, tmp_path: Path) -> None:
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
