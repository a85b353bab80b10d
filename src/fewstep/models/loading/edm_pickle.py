"""Reads a pickle of the kind that NVIDIA's EDM checkpoints are, without unpickling it.

`pickletools` decodes the opcodes, which runs nothing; those that plain data need are acted on here, all others are
refused by name. The functions and classes that the file names are ours, and the source code in it is never looked at.
Time and memory are bounded by the length of the file, whatever it says.
"""

import io
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import brief

MOST_OPCODES = 150_000  # more than twice what the ImageNet-64 network takes; bounds the time of a hostile file
SHORT = 200  # characters of the text that is kept as such
NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}  # dtypes of numpy's scalars, as struct has them
OTHERS = {b"PK": "a zip archive, such as torch.save writes", b"\x1f\x8b": "a gzip archive", b"": "empty"}
DTYPES = {b"Float": torch.float32, b"Double": torch.float64, b"Half": torch.float16, b"BFloat16": torch.bfloat16}
_SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
STORAGE = re.compile(  # torch's older format: five pickles that are compared and not read, and the number of numbers
    re.escape(b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, _SYSTEM)))
    + rb"\x80\x02\(X\x07\0\0\0storageq\0ctorch\n(Float|Double|Half|BFloat16)Storage\nq\x01X....\d{1,20}q\x02"
    rb"X....[a-z]{3,4}(?::\d)?q\x03[KMJ](.{1,4})Ntq\x04Q\.\x80\x02]q\0X....\d{1,20}q\x01a\.(.{8})",
    re.DOTALL,
)


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
    """A file of which no more is asked than there is, for lengths in a hostile file may say anything."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.size = path.stat().st_size

    def read(self, length: int | None = -1) -> bytes:
        return super().read(min(length or 0, self.size))

    def readline(self, length: int | None = -1) -> bytes:
        return super().readline(SHORT)


@dataclass
class Part:
    """A module, or another object of the file: the name of its class and its attributes."""

    class_name: str
    state: dict[str, Any]


class Function(str):
    """The name of a function or class that is ours."""


def _function(name: str) -> Function:
    if name not in FUNCTIONS:
        raise Refused(f"names {shown(name)}, which has no place there")
    return Function(name)


MAKES: dict[str, Callable[[Any], Any]] = {  # opcodes -> what they make of their arguments
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), lambda number: number),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), bytearray),
    **dict.fromkeys(  # protocol 2 holds numbers as text: what is long is kept once
        ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        lambda text: text if len(text) <= SHORT else bytearray(text, "latin1", "replace"),
    ),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "GLOBAL": lambda name: _function(name.replace(" ", ".", 1)),
}
TAKES = {"TUPLE": -1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "APPENDS": -1, "SETITEM": 2, "SETITEMS": -1}
TAKES |= {"ADDITEMS": -1, "REDUCE": 1, "NEWOBJ": 1, "BUILD": 1, "STACK_GLOBAL": 2}  # how many; -1: behind the last mark


def _run(file: Bounded) -> Any:
    """What the pickle leaves on its stack; on a stack that is too short it raises whatever Python raises."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count == MOST_OPCODES:
            raise Refused(f"is too long: it has more than {MOST_OPCODES:,} pickle opcodes")
        if name in MAKES:
            stack.append(MAKES[name](argument))
        elif name in TAKES:
            place = marks.pop() if TAKES[name] < 0 else len(stack) - TAKES[name]
            items = tuple(stack[place:])
            del stack[place:]
            if name.startswith("TUPLE"):
                stack.append(items)
            elif name == "STACK_GLOBAL":
                stack.append(_function(".".join(map(only_text, items))))
            else:
                stack[-1] = _act(name, stack[-1], items)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            named = f" ({shown(argument)})" if type(argument) is str else ""
            raise Refused(f"uses the pickle opcode {name}{named}, which has no place there")
    (result,) = stack
    return result


def _act(name: str, target: Any, items: tuple[Any, ...]) -> Any:
    """What an opcode makes of the target by what stood behind it on the stack; in as few steps as these are."""
    match name, target, items:
        case "REDUCE" | "NEWOBJ", Function(), [tuple() as arguments]:
            try:
                return FUNCTIONS[target](*arguments)
            except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, struct.error) as error:
                why = shown(brief(error))
                raise Refused(f"calls {target} with something that has no place there ({why})") from error
        case "APPEND" | "APPENDS" | "ADDITEMS", list(), _:
            target.extend(items)
        case "SETITEM" | "SETITEMS", dict(), _:
            target.update(zip(map(only_text, items[::2]), items[1::2], strict=True))
        case "BUILD", Part(state=old), [dict() as state] if not old:
            target.state = state
        case "BUILD", struct.Struct(), [(_, "<" | "|", None, None, None, *_)]:
            pass  # the order of its bytes
        case "BUILD", dict(), [dict() as state] if not state:
            pass  # a plain dict has no attributes
        case _:
            raise Refused(f"does {name} to a {type(target).__name__}, which has no place there")
    return target


def _storage(content: bytearray) -> Tensor:
    """What torch's `_load_from_bytes` would load with a second unpickler: the numbers, where they stand."""
    head = STORAGE.match(content)
    if not head:
        raise ValueError("no numbers in torch's older format")
    dtype, left = DTYPES[head[1]], len(content) - head.end()
    num = int.from_bytes(head[3], "little")
    if num != int.from_bytes(head[2], "little") or num * dtype.itemsize != left:
        raise Refused(f"announces {num:,} numbers of {dtype} in {left:,} bytes")
    return torch.frombuffer(content, dtype=dtype, offset=head.end())


def _tensor(numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Every tensor of such a file uses all of its storage."""
    if len(size) > 8:
        raise ValueError
    tensor = numbers.as_strided(size, stride, offset)  # which checks the types, and that it ends in the storage
    if tensor.numel() != numbers.numel():
        raise Refused(f"has a tensor of other than the {numbers.numel():,} numbers that are stored for it")
    return tensor


def _object(meta: dict[str, Any]) -> Part:
    """One of EDM's persistent objects, without the source code that it carries."""
    if type(meta["state"]) is not dict:
        raise TypeError
    return Part(only_text(meta["class_name"]), meta["state"])


def _encode(text: str | bytearray, encoding: str) -> bytearray:
    """How protocol 2 holds bytes."""
    if encoding != "latin1":
        raise ValueError
    return text if type(text) is bytearray else bytearray(text, encoding)  # type: ignore[arg-type]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "torch.nn.modules.container.ModuleDict": lambda: Part("ModuleDict", {}),
    "torch._utils._rebuild_parameter": lambda data, grad, hooks: data,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    **dict.fromkeys(  # numpy before 2, and since
        ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        lambda dtype, content: dtype.unpack(content)[0],
    ),
    "numpy.dtype": lambda code, align, copy: struct.Struct(NUMBERS[only_text(code)]),
    **dict.fromkeys(("collections.OrderedDict", "dnnlib.util.EasyDict"), lambda: {}),  # noqa: PIE807
    "_codecs.encode": _encode,  # protocol 2
    **dict.fromkeys(("__builtin__.set", "builtins.set"), lambda items: items),  # protocols 2 and 3
}


def read_pickle(path: Path) -> Any:
    """Plain data, `Part`s, and tensors in the file's bytes; Refused if damaged, or with anything EDM's do not hold."""
    if not path.is_file():
        raise Refused("no such file; name an EDM checkpoint (.pkl)")
    try:
        with Bounded(path) as file:
            start = file.peek(9)[:9]  # that it can be a pickle, before anything else is said of it
            if start[:1] != b"\x80" or start[1:2] not in (b"\2", b"\3", b"\4", b"\5"):
                found = OTHERS.get(start[:2], "a safetensors file" if start[8:9] == b"{" else "something else")
                raise Refused(f"is {found}, where an EDM checkpoint is a pickle of protocol 2 to 5")
            return _run(file)
    except Refused:
        raise
    except Exception as error:  # a damaged pickle, or disk, shows itself as almost any error
        raise Refused(f"is cut off or damaged ({brief(error)}); fetch it again") from error
