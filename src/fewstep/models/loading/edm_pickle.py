"""Reads a pickle of the kind that NVIDIA's EDM checkpoints are, without unpickling it.

`pickletools` decodes the opcodes, which runs nothing; those that plain data need are acted on here, all others are
refused by name. The functions and classes that the file names are ours, and the source code in it is never looked at.
Bytes and long text stay in the file, and so do a tensor's numbers until it is read.
"""

import io
import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import brief

MOST_OPCODES = 150_000  # more than twice what the ImageNet-64 network takes; bounds time and memory of a hostile file
STORAGE_OPCODES = 200  # of each of the five small pickles in front of a tensor's numbers; there are about 40
SHORT = 4096  # characters of the text that is kept; bytes that those five pickles fit in
MAGIC = 0x1950A86A20F9469CFC6C  # of torch's older format, in which the numbers stand
STORAGES = {"torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64}
STORAGES |= {"torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16}
NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}  # dtypes of numpy's scalars, as struct has them
OTHERS = {b"PK": "a zip archive, such as torch.save writes", b"\x1f\x8b": "a gzip archive", b"": "empty"}
Sizes = tuple[int, ...]


class Refused(Exception):
    """Something that has no place in such a file; the message goes behind the file's name."""


def shown(text: str) -> str:
    """Text of a hostile file, short and in one line."""
    return ascii(text)[1:-1][:80]


def only_text(value: Any) -> str:
    """The value: keys of another type can be made to collide, or to take for ever to hash."""
    if type(value) is not str:
        raise Refused(f"has a {type(value).__name__} where only text has a place")
    return value


class Bounded(io.BufferedReader):
    """A file that is never asked for more than it has left, for lengths in a hostile file may say anything."""

    def __init__(self, raw: Any):
        super().__init__(raw)
        self.size = self.seek(0, io.SEEK_END)
        self.seek(0)

    def read(self, length: int | None = -1) -> bytes:
        return super().read(self.check(length))

    def readline(self, length: int | None = -1) -> bytes:
        return super().readline(SHORT)

    def check(self, length: int | None) -> int:
        """The length itself, if that much is left."""
        left = self.size - self.tell()
        if length is None or not 0 <= length <= left:
            raise Refused(f"is cut off or damaged: {length:,} bytes are announced where {left:,} are left")
        return length


@dataclass(eq=False)
class Blob:
    """Bytes, or where they stand in a file; in protocol 2 they stand there as text."""

    source: Path | bytes
    length: int
    start: int = 0
    is_text: bool = False
    storage: "StoredTensor | None" = None
    """What they were found to hold, so that the same bytes are looked at once."""

    def open(self) -> tuple[io.BufferedIOBase, int]:
        """A file that stands at the first of them, and their number."""
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")
        file.seek(self.start)
        if not self.is_text:
            return file, self.length
        with file:
            content = file.read(self.length).decode().encode("latin1")
        return io.BytesIO(content), len(content)


@dataclass
class Part:
    """A module, or another object of the file: the name of its class and its attributes."""

    class_name: str
    state: dict[str, Any]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of `num` numbers, which stand behind the `start`-th byte of a blob in the file."""

    blob: Blob
    dtype: torch.dtype
    num: int
    start: int
    size: Sizes = ()
    stride: Sizes = ()
    offset: int = 0

    def read(self) -> Tensor:
        """The numbers, contiguous, in float32."""
        numbers = torch.empty(self.num, dtype=self.dtype)
        file, _ = self.blob.open()
        with file:
            file.seek(self.start, io.SEEK_CUR)
            file.readinto(numbers.view(torch.uint8).numpy())  # type: ignore[arg-type]
        return numbers.as_strided(self.size, self.stride, self.offset).float().contiguous()


class Function(str):
    """The name of a function or class that is ours."""


class Machine:
    """One pickle; knows nothing but what `names` holds, and takes at most `most` opcodes.

    `path` is the file itself, where bytes and long text stay; the small pickles in front of numbers have none, may hold
    neither, and may refer to what is outside of them. Raises Refused, and on a stack that is too short or holds other
    things whatever Python raises.
    """

    def __init__(self, file: Bounded, names: Mapping[str, Any], most: int, path: Path | None = None):
        self.file, self.names, self.most, self.path = file, names, most, path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The one thing that is left on the stack."""
        for count, (opcode, argument, position) in enumerate(pickletools.genops(self.file)):
            if count == self.most:
                raise Refused(f"is too long: it has more than {self.most:,} pickle opcodes")
            if opcode.name not in ACTIONS or (opcode.name == "BINPERSID" and self.path):
                named = f" ({shown(argument)})" if type(argument) is str else ""
                raise Refused(f"uses the pickle opcode {opcode.name}{named}, which has no place there")
            if type(argument) is bytes or (type(argument) is str and len(argument) > SHORT):
                argument = self.blob(opcode, position or 0, type(argument) is str)
            ACTIONS[opcode.name](self, argument)
        (result,) = self.stack
        return result

    def blob(self, opcode: pickletools.OpcodeInfo, position: int, is_text: bool) -> Blob:
        if self.path is None or opcode.name not in BLOBS or opcode.arg is None:
            raise Refused("holds bytes or long text where none has a place")
        start = position + 1 + int(opcode.arg.name[-1])  # behind their length: bytes1, unicodestring4
        return Blob(self.path, self.file.tell() - start, start, is_text)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, num: int) -> tuple[Any, ...]:
        """The last `num`, in their order; of -1 those behind the last mark."""
        place = self.marks.pop() if num < 0 else len(self.stack) - num
        items = tuple(self.stack[place:])
        del self.stack[place:]
        return items

    def name(self, name: str) -> None:
        if name not in self.names:
            raise Refused(f"names {shown(name)}, which has no place there")
        self.push(self.names[name])

    def call(self, _: None) -> None:
        function, arguments = self.pop(2)
        if type(function) is not Function or type(arguments) is not tuple:
            raise Refused(f"calls a {type(function).__name__}, which is not done there")
        try:
            self.push(FUNCTIONS[function](*arguments))
        except (TypeError, ValueError, AttributeError, LookupError, struct.error) as error:
            raise Refused(f"calls {function} with something that has no place there") from error

    def build(self, _: None) -> None:
        """Attributes of a module; a plain dict has none; that of numpy's number says its order of bytes."""
        target, state = self.stack[-2], self.stack.pop()
        if type(target) is Part and type(state) is dict:
            target.state.update(state)
        elif type(target) is Number:
            if state[1] not in ("<", "|") or state[2:5] != (None, None, None):
                raise Refused("holds a numpy dtype that is no little-endian number")
        elif not type(target) is type(state) is dict or state:
            raise Refused(f"sets the state of a {type(target).__name__} to a {type(state).__name__}")

    def fill(self, kind: type[Any], items: tuple[Any, ...]) -> None:
        target: Any = self.stack[-1]
        if type(target) is not kind:
            raise Refused(f"fills a {type(target).__name__} as if it were a {kind.__name__}")
        if kind is list:
            target.extend(items)
        elif kind is set:
            target.update(map(only_text, items))
        else:
            target.update(zip(map(only_text, items[::2]), items[1::2], strict=True))


BLOBS = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
VALUES = ("NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", *BLOBS)
ACTIONS: dict[str, Callable[[Machine, Any], object]] = {
    **dict.fromkeys(VALUES, Machine.push),
    **dict.fromkeys(("PROTO", "STOP", "BINPERSID"), lambda machine, _: None),  # a reference is what it says
    "FRAME": lambda machine, length: machine.file.check(length),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(machine.pop(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop(3)),
    "TUPLE": lambda machine, _: machine.push(machine.pop(-1)),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "APPEND": lambda machine, _: machine.fill(list, machine.pop(1)),
    "APPENDS": lambda machine, _: machine.fill(list, machine.pop(-1)),
    "SETITEM": lambda machine, _: machine.fill(dict, machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.fill(dict, machine.pop(-1)),
    "ADDITEMS": lambda machine, _: machine.fill(set, machine.pop(-1)),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, at: machine.memo.update({at: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.push(machine.memo[at])),
    "GLOBAL": lambda machine, name: machine.name(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(".".join(map(only_text, machine.pop(2)))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), Machine.call),
    "BUILD": Machine.build,
}


def _storage(blob: Blob) -> StoredTensor:
    """What torch's `_load_from_bytes` would load with a second unpickler.

    Five pickles, the number of numbers, and the numbers, which nothing is allocated for yet.
    """
    if blob.storage:
        return blob.storage
    file, size = blob.open()
    with file, Bounded(io.BytesIO(file.read(min(size, SHORT)))) as head:
        parts = [Machine(head, STORAGES, STORAGE_OPCODES).run() for _ in range(5)]
        magic, protocol, system, (kind, dtype, key, _, num, view), keys = parts
        found = (magic, protocol, system["little_endian"], kind, view, keys, type(dtype), type(num))
        if found != (MAGIC, 1001, True, "storage", None, [only_text(key)], torch.dtype, int):
            raise Refused("holds numbers in another format than torch's older one, or not numbers at all")
        left = size - head.tell() - 8
        if struct.unpack("<q", head.read(8)) != (num,) or num * dtype.itemsize != left:
            raise Refused(f"announces {num:,} numbers of {dtype} in {left:,} bytes")
        blob.storage = StoredTensor(blob, dtype, num, head.tell())
    return blob.storage


def _tensor(stored: StoredTensor, offset: int, size: Sizes, stride: Sizes, *_: Any) -> StoredTensor:
    """Every tensor of such a file has a storage of its own and uses all of it."""
    fits = type(stored) is StoredTensor and type(size) is type(stride) is tuple and len(size) == len(stride) <= 8
    if not fits or not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise TypeError
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) != stored.num or last >= max(stored.num, 1):
        raise Refused(f"has a tensor of other than the {stored.num:,} numbers that are stored for it")
    return replace(stored, size=size, stride=stride, offset=offset)


def _object(meta: dict[str, Any]) -> Part:
    """One of EDM's persistent objects, without the source code that it carries."""
    if type(meta["state"]) is not dict:
        raise TypeError
    return Part(only_text(meta["class_name"]), meta["state"])


class Number(str):
    """A numpy dtype, as `struct` calls it."""


def _number_type(code: str, align: bool, copy: bool) -> Number:
    if only_text(code) not in NUMBERS:
        raise Refused(f"holds a numpy dtype {shown(code)}; only plain numbers have a place there")
    return Number(NUMBERS[code])


def _number(dtype: Number, blob: Blob) -> Any:
    if type(dtype) is not Number or blob.length > 16:  # as text its bytes may be longer
        raise TypeError
    file, size = blob.open()
    with file:
        return struct.unpack(dtype, file.read(size))[0]


def _encode(text: str | Blob, encoding: str) -> Blob:
    """How protocol 2 holds bytes."""
    if encoding != "latin1":
        raise ValueError
    return text if isinstance(text, Blob) else Blob(text.encode("latin1"), len(text))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "torch.nn.modules.container.ModuleDict": lambda: Part("ModuleDict", {}),
    "torch._utils._rebuild_parameter": lambda data, grad, hooks: data,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.dtype": _number_type,
    "collections.OrderedDict": lambda: {},  # noqa: PIE807, for `dict` would take arguments
    "dnnlib.util.EasyDict": lambda: {},  # noqa: PIE807
    "_codecs.encode": _encode,  # protocol 2
    "__builtin__.set": lambda items: set(map(only_text, items)),  # protocol 2
    "builtins.set": lambda items: set(map(only_text, items)),  # protocol 3
}
NAMES = {name: Function(name) for name in FUNCTIONS}


def read_pickle(path: Path) -> Any:
    """What the file holds: dicts, lists, tuples, text, numbers, `Part`s, and `StoredTensor`s still in the file.

    Raises Refused if it is no pickle of protocol 2 to 5, is damaged, or holds anything that EDM's files do not.
    """
    if not path.is_file():
        raise Refused("no such file; name an EDM checkpoint (.pkl)")
    try:
        with Bounded(io.FileIO(path)) as file:
            start = file.peek(9)[:9]  # that it can be a pickle, before anything else is said of it
            if start[:1] != b"\x80" or start[1:2] not in (b"\2", b"\3", b"\4", b"\5"):
                found = OTHERS.get(start[:2], "a safetensors file" if start[8:9] == b"{" else "something else")
                raise Refused(f"is {found}, where an EDM checkpoint is a pickle of protocol 2 to 5")
            return Machine(file, NAMES, MOST_OPCODES, path).run()
    except Refused:
        raise
    except Exception as error:  # a damaged pickle, or disk, shows itself as almost any error
        raise Refused(f"is cut off or damaged ({brief(error)}); fetch it again") from error
