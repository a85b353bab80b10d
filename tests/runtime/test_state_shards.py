"""A state comes back as it was, bit for bit, from our reader and from torch's; nothing in its files is executed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from fewstep.runtime import shards
from fewstep.runtime.sharding import share_of
from fewstep.runtime.shards import flatten, shard_name, stage, unflatten, write_index, write_shard
from steps import flat, gathered, write_state

NAN = torch.tensor([0x7FC00001, 0x7F800000, -(2**31), 1], dtype=torch.int32).view(torch.float32)  # payload, inf, -0
STATES: dict[str, Any] = {
    "types": {f"{dtype}": torch.arange(3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
    | {f"{dtype}": torch.arange(3).to(dtype) for dtype in (torch.uint8, torch.int8, torch.int64, torch.bool)},
    "numbers": {"a": 1, "b": 2**70, "c": 0.1, "d": -0.0, "e": float("inf"), "f": True, "g": None, "h": "é\udc80\n"},
    "bits": {"nan": NAN, "scalar": torch.tensor(3.5), "count": torch.tensor(7), "empty": torch.zeros(0, 3)},
    "nested": {"list": [1, [torch.ones(2)], []], "tuple": (1, (2.5, None), ()), "empty": {}},
    "keys": {0: {"exp_avg": torch.ones(2)}, 1: {}, (1, "a"): 2, None: 3, 4.5: 4, "$tensor": 5},
    "dollars": {"$tuple": [1], "$float": "nan"},
    "orders": {
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "turned": torch.randn(3, 4).T,
        "part": torch.randn(6)[::2],
        "spread": torch.zeros(1).expand(3),
    },
    "names": {"method": {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "state": {"a.b": torch.ones(1) * 2}}},
    "eight bit": {"adamw": {"state": {0: {"state1": torch.arange(256, dtype=torch.uint8), "absmax1": torch.ones(1)}}}},
}


def read_state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = gathered(shards.read_state(folder))
    return found


def alike(first: Any, second: Any) -> bool:
    """Of the same types all the way down, and the same bits."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (first, second)))
    if isinstance(first, dict):
        return list(first) == list(second) and all(alike(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(alike, first, second))
    return repr(first) == repr(second)


@pytest.mark.parametrize("name", STATES)
def test_a_nested_state_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    write_state(tmp_path / "state", 3, STATES[name])
    assert alike(read_state(tmp_path / "state"), {"step": 3, **STATES[name]})
    json.loads((tmp_path / "state" / "state.json").read_text(), parse_constant=pytest.fail)  # JSON to the letter
    share = share_of(STATES[name], 0, 1)
    copy = stage(share.slices, {})
    assert alike(unflatten(share.content, lambda name, shape: copy[name][0]), STATES[name])
    assert not {t.data_ptr() for t, _ in copy.values() if t.numel()} & {t.data_ptr() for t in flat(STATES[name])}


def test_numbers_keep_their_order_in_memory(tmp_path: Path) -> None:
    """An optimizer's moments go through its weights as these lie there."""
    write_state(tmp_path / "state", 3, STATES["orders"])
    found = read_state(tmp_path / "state")
    assert {name: found[name].stride() for name in STATES["orders"]} == {
        "last": (60, 1, 15, 3),
        "turned": (1, 4),
        "part": (1,),
        "spread": (1,),
    }


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"method\.thing: PosixPath has no place in a checkpoint"):
        write_state(tmp_path / "state", 3, {"method": {"thing": tmp_path}})


def test_names_are_plain() -> None:
    found: dict[str, Tensor] = {}
    moments = {"adamw": {"state": {0: {"exp_avg": torch.ones(1)}}}}
    method = {"student": {"conv.weight": torch.ones(1)}, "ema": {"averages": [torch.ones(1)]}, "optimizer": moments}
    flatten({"method": method, "metrics": {"sums": {"loss": torch.ones(1)}}}, found)
    assert list(found) == ["student.conv.weight", "ema.0", "optimizer.0.exp_avg", "metrics.sums.loss"]


def test_a_copy_is_written_where_the_one_before_lay_unless_sizes_differ() -> None:
    buffers: dict[str, Tensor] = {}
    first = stage({"a": (torch.ones(3), [0]), "b": (torch.ones(2), [0]), "c": (torch.ones(1), [0])}, buffers)
    second = stage({"a": (torch.zeros(3), [0]), "b": (torch.zeros(4), [2])}, buffers)
    assert first["a"][0] is second["a"][0]
    assert first["b"][0] is not second["b"][0]
    assert {name: (tensor.tolist(), at) for name, (tensor, at) in second.items()} == {
        "a": ([0] * 3, [0]),
        "b": ([0] * 4, [2]),
    }
    assert buffers.keys() == second.keys()


def test_much_is_written_in_shards_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.runtime.shards.SHARD_BYTES", 40)
    state = {"a": [torch.full((number,), float(number)) for number in (2, 3, 30, 5, 1, 10, 0)]}
    write_state(tmp_path / "state", 3, state)
    assert alike(read_state(tmp_path / "state"), {"step": 3, **state})
    held = []
    for path in sorted((tmp_path / "state").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held.append(sorted(len(file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
    assert held == [[2, 3], [30], [1, 5], [0, 10]]
    dcp.load(
        found := {"a.2": torch.zeros(30)},
        storage_reader=HuggingFaceStorageReader(str(tmp_path / "state")),
        no_dist=True,
    )
    assert torch.equal(found["a.2"], state["a"][2])


# --- as torch has it -------------------------------------------------------------------------------------------------


def empty(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["types", "bits", "eight bit"])
def test_torch_reads_what_we_write(name: str, tmp_path: Path) -> None:
    flatten(STATES[name], wanted := {})
    write_state(tmp_path / "state", 3, STATES[name])
    dcp.load(found := empty(wanted), storage_reader=HuggingFaceStorageReader(str(tmp_path / "state")), no_dist=True)
    assert alike(found, wanted)


def divided(folder: Path, count: int = 3) -> dict[str, Tensor]:
    """A state of which each of several writers had some rows, the last one fewer, or a whole tensor, or nothing."""
    whole = {"student.rows": torch.randn(7, 3), "ema.0": torch.randn(7, 2, 2), "step": torch.tensor(4)}
    folder.mkdir()
    for rank in range(count):
        mine = slice(rank * 3, rank * 3 + 3)
        slices = {
            "student.rows": (whole["student.rows"][mine], [rank * 3, 0]),
            "ema.0": (whole["ema.0"][mine], [rank * 3, 0, 0]),
        }
        write_shard(folder / shard_name(rank), 3, slices | ({} if rank else {"step": (whole["step"], [])}))
    write_shard(folder / shard_name(count), 3, {})
    tensor = {name: {"$tensor": name, "shape": list(t.shape)} for name, t in whole.items()}
    write_index(folder, 3, count + 1, tensor)
    return whole


def test_slices_of_several_writers_are_one_state_for_us_and_for_torch(tmp_path: Path) -> None:
    whole = divided(tmp_path / "state")
    assert alike(read_state(tmp_path / "state"), {"step": whole["step"], **whole})
    dcp.load(found := empty(whole), storage_reader=HuggingFaceStorageReader(str(tmp_path / "state")), no_dist=True)
    assert alike(found, whole)


def test_any_rows_are_read_of_any_writers(tmp_path: Path) -> None:
    whole = divided(tmp_path / "state")["student.rows"]
    lazy = shards.read_state(tmp_path / "state")["student.rows"]
    assert lazy.shape == whole.shape
    for first in range(8):
        for num in range(8 - first):
            assert alike(lazy.rows(first, num), whole[first : first + num])
    assert lazy.rows(3, 2).data_ptr() == lazy.parts[1].data_ptr()  # no new memory for what one shard has


def test_the_offsets_stand_as_torch_writes_them(tmp_path: Path) -> None:
    ours = {"a": torch.randn(3, 2), "b": torch.tensor(1.0)}
    writer = HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
    dcp.save(ours, storage_writer=writer, no_dist=True)
    write_state(tmp_path / "state", 3, ours)
    (theirs,) = (tmp_path / "theirs").glob("*.safetensors")
    with safe_open(theirs, "pt") as written, safe_open(tmp_path / "state" / shard_name(0), "pt") as file:
        about, wanted = file.metadata(), written.metadata()
    assert json.loads(about["DCP_SHARDING_INFO"]) == json.loads(wanted["DCP_SHARDING_INFO"])
    assert {name: about[name] for name in ("DCP_VERSION", "format")} == {
        name: wanted[name] for name in ("DCP_VERSION", "format")
    }


# --- what does not fit -----------------------------------------------------------------------------------------------


def put(folder: Path, rank: int, **changes: Any) -> None:
    """A shard with another step, or with other tensors and offsets."""
    path = folder / shard_name(rank)
    with safe_open(path, "pt") as file:
        about = dict(file.metadata())
        found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    offsets = json.loads(about["DCP_SHARDING_INFO"]) | changes.get("offsets", {})
    about |= {"DCP_SHARDING_INFO": json.dumps(offsets)} | changes.get("about", {})
    save_file(found | changes.get("tensors", {}), path, about)


BROKEN = {
    "a shard is missing": (lambda folder: (folder / shard_name(1)).unlink(), "shard-00001.safetensors is missing"),
    "of another step": (lambda folder: put(folder, 2, about={"step": "4"}), "is of step 4, not of 3"),
    "of no step": (lambda folder: put(folder, 2, about={"step": ""}), "is of step , not of 3"),
    "a slice is lost": (lambda folder: put(folder, 2, tensors={"ema.0": torch.ones(0, 2, 2)}), "slices are missing"),
    "a slice is short": (lambda folder: put(folder, 1, tensors={"ema.0": torch.ones(1, 2, 2)}), "those before it lack"),
    "a narrow slice": (lambda folder: put(folder, 1, tensors={"ema.0": torch.ones(3, 2, 1)}), "is none of"),
    "a slice out of it": (lambda folder: put(folder, 2, offsets={"ema.0": {"saved_offsets": [9, 0, 0]}}), "is none of"),
    "a slice of columns": (lambda folder: put(folder, 1, offsets={"ema.0": {"saved_offsets": [3, 1, 0]}}), "is none"),
    "a slice of one axis": (lambda folder: put(folder, 2, offsets={"ema.0": {"saved_offsets": [6]}}), "is none of"),
    "two slices on one": (lambda folder: put(folder, 1, offsets={"ema.0": {"saved_offsets": [0, 0, 0]}}), "is none of"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_slices_that_make_no_tensor_are_refused(name: str, tmp_path: Path) -> None:
    divided(tmp_path / "state")
    harm, told = BROKEN[name]
    harm(tmp_path / "state")
    with pytest.raises(ValueError, match=told):
        read_state(tmp_path / "state")
