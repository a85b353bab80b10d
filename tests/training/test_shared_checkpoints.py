"""What ranks wrote, each its share, any number of ranks reads, each what it trains, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_ranks import train
from test_shared_weights import TRAINED, batch, method_of
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.errors import UserError
from fewstep.runtime.checkpoint import checkpoints
from fewstep.runtime.distributed import num_ranks, rank
from fewstep.runtime.sharding import mine
from fewstep.runtime.shards import flatten
from fewstep.runtime.tracking import Metrics
from fewstep.runtime.writing import Writer
from fewstep.training import loop
from fewstep.training.dmd2 import DMD2
from fewstep.training.settings import EvaluationSettings, ParallelSettings
from ranks import in_ranks
from steps import as_before, gathered, same

STEP = 3  # within a cycle, so that there is a pool
GIVEN: dict[str, Any] = {
    "student": {**TRAINED, "num_timesteps": 3, "ema_decay": [0.9, 0.5, 0]},
    "critic": {**TRAINED, "condition_on_stop": True, "samples": "cycle"},
}


def made(folder: Path, kind: str) -> DMD2:
    return method_of("pixels", folder, shared=None if kind == "none" else ParallelSettings(shard=kind), **GIVEN)


def save(method: DMD2, run: Path) -> Writer:
    with Writer(run) as writer:
        loop._save(method, Metrics(None), writer, STEP, EvaluationSettings())
    return writer


def resumed(folder: Path, kind: str, source: str) -> DMD2:
    method = made(folder, kind)
    assert loop._resume(method, Metrics(None), folder / source) == STEP
    return method


def copied(folder: Path, kind: str, sources: list[str], name: str) -> dict[str, Any]:
    """What these ranks read of each run, of which they write the last one anew."""
    found = {}
    for source in sources:
        method = resumed(folder, kind, source)
        found[source] = gathered(method.state_dict())
    save(method, folder / name)
    return found


def several(folder: Path, kinds: list[str], sources: list[str]) -> list[dict[str, Any]]:
    return [copied(folder, kind, sources, f"{kind}-{num_ranks()}") for kind in kinds]


def bytes_of(run: Path) -> list[int]:
    (checkpoint,) = checkpoints(run)
    return [path.stat().st_size for path in sorted((checkpoint / "state").glob("*.safetensors"))]


def models_of(run: Path) -> dict[str, bytes]:
    """All files of the students with each of the averages."""
    (checkpoint,) = checkpoints(run)
    files = [path for path in checkpoint.glob("model*/**/*") if path.is_file()]
    assert len(files) == 9
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_any_ranks_read_what_any_ranks_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(tmp_path, "none")
    train(method, lambda step: batch(method, step), range(STEP))
    wanted = gathered(method.state_dict())
    save(method, tmp_path / "one")
    as_before(shutil.copytree(checkpoints(tmp_path / "one")[0], tmp_path / "old" / "checkpoints" / "00000003"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    sources = ["old", "one"]
    for num, kinds in ((2, ["none", "full"]), (4, ["hybrid"]), (3, ["full"])):
        for each in in_ranks(num, tmp_path, several, tmp_path, kinds, sources):
            for found in each:
                assert found.keys() == set(sources)
                assert all(same(state, wanted) for state in found.values())
        sources += [f"{kind}-{num}" for kind in kinds]
    for name in sources:
        assert same(resumed(tmp_path, "none", name).state_dict(), wanted)
    for name in sources[1:]:
        flatten({"method": wanted}, plain := {})
        found = {key: torch.full_like(tensor, 7) for key, tensor in plain.items()}
        (checkpoint,) = checkpoints(tmp_path / name)
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(checkpoint / "state")), no_dist=True)
        assert same(found, plain)
        assert sum(bytes_of(tmp_path / name)) < 1.4 * sum(bytes_of(tmp_path / "one"))  # headers; nothing is there twice
        assert models_of(tmp_path / name) == models_of(tmp_path / "one")
    for name, num in (("none-2", 2), ("full-2", 2), ("hybrid-4", 4), ("full-3", 3)):
        held = bytes_of(tmp_path / name)
        assert len(held) == num
        assert max(held) < 1.35 * sum(held) / num
    assert json.loads((checkpoint / "state" / "state.json").read_text())["shards"] == 3


class Made(TorchDispatchMode):
    """Counts the bytes of new tensors; what is mapped from files is none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.cat, torch.ops.aten.empty_like):
            self.num_bytes += mine(found).nbytes
        return found


def read_anew(folder: Path, kind: str) -> list[int]:
    """Bytes of the copy that one rank makes, of its moments, and of the new tensors of a resume."""
    method = made(folder, kind)
    train(method, lambda step: batch(method, step), range(STEP))
    writer = save(method, folder / kind)
    method = made(folder, kind)
    with Made() as new:
        loop._resume(method, Metrics(None), folder / kind)
    states = [x for each in (method.student_optimizer, method.critic_optimizer) for x in each.adamw.state.values()]
    moments = sum(mine(x).nbytes for state in states for x in state.values())
    return [sum(buffer.nbytes for buffer in writer.buffers.values()), moments, new.num_bytes]


def refused(folder: Path) -> str:
    """What a rank is told where the second one's rows of the critic are not finite."""
    method = made(folder, "full")
    train(method, lambda step: batch(method, step), range(1))
    with torch.no_grad():
        mine(next(method.critic.parameters()))[:] = float("nan") if rank() else 0
    try:
        save(method, folder / "refused")
    except UserError as error:
        return str(error)
    return "it was saved"


def both(folder: Path) -> list[Any]:
    return [read_anew(folder, "none"), read_anew(folder, "full"), refused(folder)]


@pytest.mark.slow
def test_each_of_two_ranks_copies_half_reads_no_more_than_it_trains_and_finds_what_the_other_broke(
    tmp_path: Path,
) -> None:
    """Moments come into new memory, all else into what is there."""
    (tmp_path / "alone").mkdir()
    num_bytes, all_moments, _ = read_anew(tmp_path / "alone", "none")
    for replicated, shared, told in in_ranks(2, tmp_path, both, tmp_path):
        assert told.startswith("step 3: critic is not finite and was not saved; ")
        assert 0.49 < replicated[0] / num_bytes < 0.51
        assert 0.45 < shared[0] / num_bytes < 0.55  # rows of small tensors are not halves
        assert replicated[1] == all_moments
        assert 0.45 < shared[1] / all_moments < 0.55
        for _, moments, new in (replicated, shared):
            assert moments <= new < 1.05 * moments
