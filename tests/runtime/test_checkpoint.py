"""A checkpoint is there whole or not at all, whenever the process dies; nothing in one is executed."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.files import write_text
from fewstep.runtime.checkpoint import check_run, checkpoints, load_state, save_checkpoint


def writer(text: str) -> Callable[[Path], None]:
    """A `save_model` that writes one file."""

    def save_model(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return save_model


def save(run: Path, step: int) -> None:
    save_checkpoint(run, step, {"weight": torch.full((3,), float(step))}, writer(f"model {step}"))


def assert_whole(run: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, and all of it can be read."""
    newest = checkpoints(run)[-1]
    assert newest.name == f"{step:08d}"
    assert (newest / "model" / "weights").read_text() == f"model {step}"
    state = load_state(newest)
    assert state["step"] == step
    assert torch.equal(state["weight"], torch.full((3,), float(step)))


def test_a_checkpoint_holds_the_state_the_step_and_the_model(tmp_path: Path) -> None:
    save(tmp_path, 7)
    assert_whole(tmp_path, 7)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (90, 100):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["00000090", "00000100"]


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000010", "00000011"]
    assert_whole(tmp_path, 11)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []


def test_unfinished_checkpoints_and_stray_files_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".00000009.tmp" / "model").mkdir(parents=True)
    (tmp_path / "checkpoints" / "00000010").write_text("a file")
    assert_whole(tmp_path, 1)


def test_an_unfinished_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".00000001.tmp"
    left.mkdir(parents=True)
    (left / "torn").write_text("left by a kill")
    save(tmp_path, 1)
    assert_whole(tmp_path, 1)
    assert sorted(os.listdir(tmp_path / "checkpoints" / "00000001")) == ["model", "state.pt"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {"weight": torch.zeros(1)}, writer("old"))
    save(tmp_path, 3)
    assert_whole(tmp_path, 3)


def torn_save(state: Any, path: Path) -> None:
    Path(path).write_bytes(b"half a sta")
    raise OSError("disk full")


def refuse(*args: object) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize(("module", "name", "function"), [(torch, "save", torn_save), (os, "replace", refuse)])
def test_a_failure_while_writing_leaves_the_checkpoint_before(
    module: Any, name: str, function: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, function)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, 2)
    assert_whole(tmp_path, 1)
    save(tmp_path, 2)
    assert_whole(tmp_path, 2)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from fewstep.runtime.checkpoint import save_checkpoint

run, place = Path(sys.argv[1]), sys.argv[2]
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)

def save_model(folder):
    (folder / "weights").write_text("mod")
    if place == "model":
        die()

def save(state, path):
    Path(path).write_bytes(b"half a sta")
    die()

if place == "state":
    torch.save = save
if place == "rename":
    os.replace = die
save_checkpoint(run, 2, {"weight": torch.zeros(3)}, save_model)
"""


@pytest.mark.parametrize("place", ["model", "state", "rename"])
def test_a_kill_while_writing_leaves_the_checkpoint_before(place: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), place], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert_whole(tmp_path, 1)
    save(tmp_path, 2)
    assert_whole(tmp_path, 2)


def test_a_truncated_state_is_refused_and_says_what_to_remove(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "00000001" / "state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"state\.pt: the checkpoint can't be read; remove .*00000001 to fall back"):
        load_state(path.parent)


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


def test_a_run_is_a_folder_with_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        check_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a run folder \(it has no recipe\.yaml\)"):
        check_run(tmp_path)
    write_text(tmp_path / "recipe.yaml", "kind: teach")
    check_run(tmp_path)
