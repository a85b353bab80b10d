"""The reader of EDM's pickles: it takes what such a file holds, and of everything else it runs nothing."""

import io
import pickle
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from edm_files import SOURCE, Conv2d, edm_pickle
from fewstep.errors import UserError
from fewstep.models.loading.edm_checkpoint import read_network
from fewstep.models.loading.edm_pickle import Part, Refused, read_pickle

CODES, STOP, NEWOBJ, BUILD, MEMOIZE, POP = b"\x80\x04", b".", b"\x81", b"b", b"\x94", b"0"
HEADER = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)  # of torch's older format


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def called(name: str, *arguments: bytes) -> bytes:
    return call(named(*name.rsplit(".", 1)), *arguments)


def nested(content: bytes) -> bytes:
    return data(CODES + content + STOP)


def shell(marker: str) -> bytes:
    """A call that makes the file."""
    return called("os.system", text(f"touch {marker}"))


def older(numbers: torch.Tensor) -> bytes:
    """A storage in torch's older format, as torch writes it: ... K or J, how many, ... how many, numbers."""
    torch.save(numbers._typed_storage(), buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def storage(announced: int, held: bytes, written: bytes = older(torch.zeros(1))) -> bytes:
    """A storage as torch pickles it, with lies."""
    claim = b"J" + struct.pack("<i", announced) if announced < 2**31 else number(announced)
    content = written[:-12].replace(b"K\1Nt", claim + b"Nt") + struct.pack("<q", announced) + held
    return called("torch.storage._load_from_bytes", data(content))


def tensor(stored: bytes, offset: int, size: bytes, stride: bytes) -> bytes:
    return called("torch._utils._rebuild_tensor_v2", stored, number(offset), size, stride, b"\x89", b"}")


def popen(marker: str) -> bytes:
    return named("subprocess", "Popen") + listed(text("touch"), text(marker))


ORDERED = called("collections.OrderedDict")
MODULES = named("torch.nn.modules.container", "ModuleDict") + b")" + NEWOBJ
RUNS: dict[str, Callable[[str], bytes]] = {  # what is refused -> of a file to make: what plain unpickling would obey
    "os.system": shell,
    "posix.system": lambda m: called("posix.system", text(f"touch {m}")),
    "posix.system, by GLOBAL": lambda m: call(b"cposix\nsystem\n", text(f"touch {m}")),
    "builtins.eval": lambda m: called("builtins.eval", text(f"open({m!r}, 'w')")),
    "builtins.exec": lambda m: called("builtins.exec", text(f"open({m!r}, 'w')")),
    "io.open": lambda m: called("io.open", text(m), text("w")),
    "subprocess.check_call": lambda m: called("subprocess.check_call", listed(text("touch"), text(m))),
    "builtins.getattr, of an import": lambda m: call(
        called("builtins.getattr", called("builtins.__import__", text("os")), text("system")), text(f"touch {m}")
    ),
    "builtins.getattr": lambda m: call(
        called("builtins.getattr", named("pathlib", "Path"), text("touch")), called("pathlib.Path", text(m))
    ),
    "importlib.import_module": lambda m: called("importlib.import_module", text("os")) + POP + shell(m),
    "torch.serialization.os.system": lambda m: call(named("torch", "serialization.os.system"), text(f"touch {m}")),
    "torch._utils.sys.modules": lambda m: named("torch", "_utils.sys.modules") + POP + shell(m),
    "subprocess.Popen": lambda m: popen(m) + b"\x85R",
    "subprocess.Popen, by OBJ": lambda m: b"(" + popen(m) + b"o",
    "INST (posix system)": lambda m: b"(" + text(f"touch {m}") + b"iposix\nsystem\n",
    "os.system, memoised": lambda m: named("os", "system") + MEMOIZE + POP + call(b"h\x00", text(f"touch {m}")),
    "torch.storage._load_from_bytes": lambda m: called("torch.storage._load_from_bytes", nested(shell(m))),
    "torch.storage._load_from_bytes, behind a header": lambda m: called(
        "torch.storage._load_from_bytes", data(HEADER + CODES + shell(m) + STOP)
    ),
    "_pickle.loads": lambda m: called("_pickle.loads", nested(shell(m))),
    "functools.partial": lambda m: call(called("functools.partial", named("os", "system"), text(f"touch {m}"))),
    "operator.methodcaller": lambda m: call(
        called("operator.methodcaller", text("touch")), called("pathlib.Path", text(m))
    ),
    "operator.attrgetter": lambda m: call(
        call(called("operator.attrgetter", text("system")), called("builtins.__import__", text("os"))),
        text(f"touch {m}"),
    ),
    "numpy.ndarray": lambda m: named("numpy", "ndarray") + POP + shell(m),
    "runpy.run_path": lambda m: called("runpy.run_path", text(f"{m}.py")),
    "os.system, as a key": lambda m: b"}" + shell(m) + b"Ns",
    "does BUILD to a dict": lambda m: ORDERED + b"}" + text("__class__") + b"Ns" + BUILD + POP + shell(m),
    "does BUILD to a dict, of slots": lambda m: (
        ORDERED + b"N}" + text("a") + text("b") + b"s\x86" + BUILD + POP + shell(m)
    ),
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    (tmp_path / "marker.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    return tmp_path / "marker"


def refusal(content: bytes, folder: Path) -> str:
    """The one line with which it is refused, within a second."""
    (folder / "edm.pkl").write_bytes(content)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        read_network(folder / "edm.pkl")
    assert time.process_time() - start < 1
    line = str(error.value)
    assert line.startswith(f"{folder}/edm.pkl: ")
    assert "\n" not in line
    assert len(line) < len(str(folder)) + 250
    return line


def appears(path: Path) -> bool:
    """At once, or by a process that is not waited for."""
    deadline = time.monotonic() + 5
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    return path.exists()


@pytest.mark.parametrize("kind", RUNS)
def test_a_file_that_would_run_something_runs_nothing(kind: str, marker: Path) -> None:
    content = CODES + b"}" + text("ema") + RUNS[kind](str(marker)) + b"s" + STOP
    with suppress(Exception):  # behind what it ran
        pickle.loads(content)
    assert appears(marker), "the file is not as bad as it should be"
    marker.unlink()
    assert kind.split(",")[0] in refusal(content, marker.parent)
    assert not marker.exists()


def deep_tuples(depth: int) -> bytes:
    """A tuple that holds the next one twice: 2^depth leaves."""
    return b")" + b"".join(MEMOIZE + b"h" + bytes([at]) + b"\x86" for at in range(depth))


def torchs(content: object) -> bytes:
    """As torch.save writes it."""
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


ORDERED_CLASS = named("collections", "OrderedDict")
FLOAT = b"\x00" * 4
HOSTILE = {  # what the line says -> bytes behind the protocol: the machine must refuse it, whatever pickle would do
    "calls collections.OrderedDict": called("collections.OrderedDict", listed(listed(text("a"), text("b")))),
    "does REDUCE to a dict": call(ORDERED, text("a")),
    "does REDUCE to a str": call(text("os.system"), text("true")),
    "calls dnnlib.util.EasyDict": called("dnnlib.util.EasyDict", b"}"),
    "calls torch_utils.persistence._reconstruct_persistent_obj": called(
        "torch_utils.persistence._reconstruct_persistent_obj", b"}" + text("module_src") + text(SOURCE) + b"s"
    ),
    "names torch.load": named("torch", "load"),
    "names torch.storage._load_from_bytes.__globals__": named("torch.storage", "_load_from_bytes.__globals__"),
    "names torch.hub.load": named("torch.hub", "load"),
    "names nt.system": named("nt", "system"),
    "names numpy.load": named("numpy", "load"),
    "names os\\nnext line": named("os\nnext line", "x"),
    "a NoneType where only text": text("os") + b"N\x93",
    "opcode EXT1": b"\x82\x01",
    "opcode EXT2": b"\x83\x01\x00",
    "opcode EXT4": b"\x84\x01\x00\x00\x00",
    "opcode PERSID (1)": b"P1\n",
    "opcode BINPERSID": text("1") + b"Q",
    "opcode OBJ": b"(" + ORDERED_CLASS + b"o",
    "opcode NEWOBJ_EX": ORDERED_CLASS + b")}\x92",
    "opcode NEXT_BUFFER": b"\x97",
    "opcode BYTEARRAY8": b"\x96" + struct.pack("<Q", 1) + b"a",
    "opcode DUP": b"}2",
    "opcode FROZENSET": b"(\x91",
    "opcode STRING (a)": b"S'a'\n",
    "does BUILD to a Function": ORDERED_CLASS + b"}" + BUILD,
    "does BUILD to a Part": MODULES + b"N}\x86" + BUILD,
    "does SETITEM to a Part": MODULES + text("a") + b"Ns",
    "does APPEND to a tuple": b")Na",
    "does BUILD to a Tensor": storage(1, FLOAT) + b"}" + BUILD,
    "'O8'": called("numpy.dtype", text("O8"), b"\x89", b"\x88"),
    "does BUILD to a Struct": called("numpy.dtype", text("f8"), b"\x89", b"\x88") + b"(N" + text(">") + b"NNNt" + BUILD,
    "calls numpy.core.multiarray.scalar": called("numpy.core.multiarray.scalar", ORDERED, data(b"\x00" * 8)),
    "a int where only text": b"}" + number(2**61 - 1) + b"Ns",
    "a tuple where only text": b"}" + deep_tuples(60) + b"Ns",
    "expected 4611686018427387904 bytes": b"\x8e" + struct.pack("<Q", 2**62),
    "expected 4611686018427387905 bytes": b"\x8d" + struct.pack("<Q", 2**62 + 1),
    "expected 4294967295 bytes": b"B\xff\xff\xff\xff",
    "not enough data in stream to read long4": b"\x8b\xff\xff\xff\x7f",
    "expected 262144 bytes": b"\x95" + struct.pack("<Q", 2**62) + b"B\0\0\4\0",  # a frame of any size is not made
    "announces 1,000,000,000 numbers": storage(10**9, FLOAT),
    "(ValueError: no numbers in torch's older format)": storage(10**12, FLOAT),
    "announces 1 numbers": storage(1, FLOAT * 2),
    "no numbers in torch's older format": storage(1, FLOAT, older(torch.zeros(1, dtype=torch.uint8))),
    "calls torch.storage._load_from_bytes": called("torch.storage._load_from_bytes", data(torchs({"a": 1}))),
    "other than the 1 numbers": tensor(storage(1, FLOAT), 0, numbers(10**12), numbers(0)),
    "other than the 4 numbers": tensor(storage(4, FLOAT * 4), 0, numbers(3), numbers(1)),
    "storage offset 1, and": tensor(storage(2, FLOAT * 2), 1, numbers(2), numbers(1)),
    "strides [1099511627776]": tensor(storage(3, FLOAT * 3), 0, numbers(3), numbers(2**40)),
    "integer multiplication overflow": tensor(storage(1, FLOAT), 0, numbers(2**32, 2**32), numbers(0, 0)),
    "Negative strides": tensor(storage(2, FLOAT * 2), 1, numbers(2), numbers(-1)),
    "calls torch._utils._rebuild_tensor_v2": tensor(storage(1, FLOAT), 0, numbers(*[1] * 9), numbers(*[1] * 9)),
    "more than 150,000 pickle opcodes": b"]" * 150_001,
    "it has more than 150,000 pickle opcodes": storage(1, FLOAT)[:-1]  # the same numbers, loaded again and again
    + MEMOIZE
    + b"R"
    + (named("torch.storage", "_load_from_bytes") + b"h\x00R") * 31_000,
    "is cut off or damaged": b"h\x07",
}


@pytest.mark.parametrize("says", HOSTILE)
def test_a_hostile_file_is_refused_by_name(says: str, tmp_path: Path) -> None:
    assert says in refusal(CODES + b"}" + text("ema") + HOSTILE[says] + b"s" + STOP, tmp_path)


MODULE = named("torch.nn.modules.container", "ModuleDict")
LOAD, SETS = named("torch.storage", "_load_from_bytes"), named("builtins", "set")
BOMBS = {  # what pickle would take much memory or time for, or never end with
    "a place in the memo": b"Nr\xff\xff\xff\x7f",
    "places in the memo": b"N" + b"".join(b"r" + struct.pack("<I", place) for place in range(0, 2**32, 2**18)),
    "bytes": b"B\xff\xff\xff\xff",
    "text": b"X\xff\xff\xff\x7f",
    "more bytes than there are addresses": b"\x8e" + b"\xff" * 8,
    "a frame": b"\x95" + struct.pack("<Q", 2**40) + b"N",
    "numbers in torch's bytes": storage(10**9, FLOAT),
    "a number of 2^31 bytes": b"\x8b\xff\xff\xff\x7f",
    "2^200 leaves": deep_tuples(200),
    "2^200 leaves as a key": b"}" + deep_tuples(200) + b"Ns",
    "2^200 leaves in a set": b"\x8f(" + deep_tuples(200) + b"\x90",
    "keys that collide": b"}("
    + b"".join(b"\x8a\x0a" + (at * (2**61 - 1)).to_bytes(10, "little") + b"N" for at in range(12_000))
    + b"u",
    "lists in lists": b"]" * 12_000 + b"a" * 11_999,
    "tuples in tuples": b")" + b"\x85" * 15_000,
    "dicts in dicts": (b"}" + text("a")) * 8_000 + b"N" + b"s" * 8_000,
    "modules in modules": MODULE + MEMOIZE + (b"h\0)R}" + text("a")) * 8_000 + b"N" + b"sb" * 8_000,
    "a list in itself": b"]" + MEMOIZE + b"h\0a",
    "a dict in itself": b"}" + MEMOIZE + text("ema") + b"h\0s",
    "marks": b"(" * 15_000,
    "a long list, as many sets": listed(b"N" * 15_000) + MEMOIZE + SETS + MEMOIZE + b"h\1h\0\x85R" * 8_000,
    "a long dict, of many modules": b"}("
    + b"".join(text(str(at)) + b"N" for at in range(8_000))
    + b"u"
    + MEMOIZE
    + MODULE
    + MEMOIZE
    + b"h\1)Rh\0b" * 6_000,
    "the same numbers, many times": storage(1, FLOAT)[:-1] + MEMOIZE + b"R" + (LOAD + b"h\0R") * 5_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_takes_neither_time_nor_memory(kind: str, tmp_path: Path) -> None:
    content = CODES + b"}" + text("ema") + BOMBS[kind] + b"s" + STOP
    tracemalloc.start()
    try:
        refusal(content, tmp_path)
        assert tracemalloc.get_traced_memory()[1] <= 1e5 + 100 * len(content)
    finally:
        tracemalloc.stop()


WRONG = {
    "is empty": b"",
    "a zip archive": b"PK\x03\x04" + bytes(20),
    "a zip archive, such as torch.save writes": torchs({"a": torch.zeros(3)}),
    "a gzip archive": b"\x1f\x8b" + bytes(20),
    "a safetensors file": save({"a": torch.zeros(3)}),
    "is something else": b"<html>not found</html>",
    "of protocol 2 to 5": pickle.dumps({"ema": None}, 0),
    "is cut off or damaged": b"\x80\x04",
}


@pytest.mark.parametrize("says", WRONG)
def test_what_is_no_such_pickle_is_named(says: str, tmp_path: Path) -> None:
    assert says in refusal(WRONG[says], tmp_path)


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.pkl"):
        with pytest.raises(UserError, match=f"{path}: no such file"):
            read_network(path)


class Many(nn.Module):
    """Tensors of every kind that a file may hold."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.conv, self.parts = Conv2d(2, 3, 3, up=True), nn.ModuleDict({"8x8_a": Conv2d(3, 1, 1)})
        self.turned = nn.Parameter(torch.randn(4, 5, generator=draws).T)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            self.register_buffer(f"in_{str(dtype)[6:]}", torch.randn(2, 3, generator=draws).to(dtype))
        self.register_buffer("large", torch.randn(40, 50, generator=draws))
        self.register_buffer("one", torch.randn((), generator=draws))


def flat(part: Part, prefix: str = "") -> dict[str, torch.Tensor]:
    own = {**part.state["_parameters"], **part.state["_buffers"]}
    found = {prefix + name: tensor for name, tensor in own.items() if tensor is not None}
    for name, child in part.state["_modules"].items():
        found |= flat(child, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_tensor_and_attribute_arrives(protocol: int, tmp_path: Path) -> None:
    network = Many()
    (tmp_path / "edm.pkl").write_bytes(edm_pickle(network, protocol))
    read = read_pickle(tmp_path / "edm.pkl")
    assert read["dataset_kwargs"] == {"path": "a.zip"}
    assert read["ema"].class_name == "Many"
    conv = read["ema"].state["_modules"]["conv"].state
    assert conv["init_weight"] == network.conv.init_weight  # a numpy scalar
    assert conv["_non_persistent_buffers_set"] == []  # a set is a list: nothing is hashed but text
    tensors, wanted = flat(read["ema"]), network.state_dict()
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name])


def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    """Cut off anywhere, or with bytes changed at random."""
    whole, dice = edm_pickle(Conv2d(1, 1, 1)), random.Random(0)
    source = whole.index(SOURCE.encode())
    places = [*range(source), *range(source + len(SOURCE), len(whole))]
    lines = []
    for count in range(300):
        content = bytearray(whole)
        for place in dice.choices(places, k=3):
            content[place] = dice.randrange(256)
        (tmp_path / "edm.pkl").write_bytes(content[: dice.choice(places)] if count % 3 == 0 else content)
        try:
            read_pickle(tmp_path / "edm.pkl")
        except Refused as error:
            lines.append(str(error))
    assert 200 < len(lines) < 300
    assert not any("\n" in line for line in lines)
