"""Reads a pickle of the kind that NVIDIA's EDM checkpoints are; the functions and classes that it names are ours.

None of the source code in it is run, and its tensors stay in the file until they are read.
"""

import io
import math
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError, brief
from fewstep.models.loading.pickle_machine import Blob, Bounded, Function, Machine, Part, Refused, shown, text_key

MOST_OPCODES = 150_000  # more than twice what the ImageNet-64 network takes; bounds time and memory of a hostile file
STORAGE_OPCODES = 200  # of each of the five small pickles in front of a tensor's numbers; there are about 40
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's older format, in which the numbers stand
STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
}
NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}  # dtypes of numpy's scalars, as struct has them
OTHERS = {b"PK": "a zip archive, such as torch.save writes", b"\x1f\x8b": "a gzip archive", b"": "empty"}


@dataclass(frozen=True)
class Storage:
    """`num` numbers that begin at a place in a blob."""

    blob: Blob
    dtype: torch.dtype
    num: int
    start: int


@dataclass(frozen=True)
class ClaimedStorage:
    """What the pickle of a storage says of it, in front of its numbers."""

    dtype: torch.dtype
    key: str
    num: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose numbers still stand in the file."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The numbers, contiguous, in float32."""
        numbers = torch.empty(self.storage.num, dtype=self.storage.dtype)
        with closing(self.storage.blob.open()) as file:
            file.file.seek(self.storage.start, io.SEEK_CUR)
            file.file.readinto(numbers.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return numbers.as_strided(self.size, self.stride, self.offset).float().contiguous()


def _storage(blob: Blob) -> Storage:
    """What torch's `_load_from_bytes` would load with a second unpickler."""
    blob.meaning = blob.meaning or _read_storage(blob)
    return blob.meaning


def _read_storage(blob: Blob) -> Storage:
    """Five pickles, the number of numbers, and the numbers, which nothing is allocated for yet."""
    with closing(blob.open()) as file:
        parts = [Machine(file, STORAGES, STORAGE_OPCODES, persistent=_claimed_storage).run() for _ in range(5)]
        magic, protocol, system, claimed, keys = parts
        known = magic == MAGIC and protocol == PROTOCOL and system["little_endian"] is True
        if not known or type(claimed) is not ClaimedStorage or keys != [claimed.key]:
            raise Refused("holds numbers in another format than torch's older one, or not numbers at all")
        (num,) = struct.unpack("<q", file.read(8))
        if num != claimed.num or num * claimed.dtype.itemsize != file.left:
            raise Refused(f"announces {claimed.num:,} numbers of {claimed.dtype} in {file.left:,} bytes")
        return Storage(blob, claimed.dtype, num, file.tell())


def _claimed_storage(claim: Any) -> ClaimedStorage:
    kind, dtype, key, _, num, view = claim
    if kind != "storage" or type(dtype) is not torch.dtype or type(key) is not str or not _is_size(num) or view:
        raise TypeError
    return ClaimedStorage(dtype, key, num)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(storage: Storage, offset: int, size: tuple, stride: tuple, grad: bool, hooks: dict) -> StoredTensor:
    """Every tensor of such a file has a storage of its own and uses all of it."""
    fits = type(storage) is Storage and type(size) is type(stride) is tuple and len(size) == len(stride) <= 8
    if not fits or not all(map(_is_size, (offset, *size, *stride))):
        raise TypeError
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) != storage.num or last >= max(storage.num, 1):
        raise Refused(f"has a tensor of other than the {storage.num:,} numbers that are stored for it")
    return StoredTensor(storage, offset, size, stride)


def _parameter(data: StoredTensor, grad: bool, hooks: dict) -> StoredTensor:
    return data


def _object(meta: dict[str, Any]) -> Part:
    """One of EDM's persistent objects, without the source code that it carries."""
    if type(meta["class_name"]) is not str or type(meta["state"]) is not dict:
        raise TypeError
    return Part(meta["class_name"], meta["state"])


class NumberType(Part):
    """A numpy dtype; its class name is what `struct` calls it."""

    def build(self, state: Any) -> None:
        """Its state says that it is little-endian, and has no fields."""
        if state[1] not in ("<", "|") or state[2:5] != (None, None, None):
            raise Refused("holds a numpy dtype that is no little-endian number")


def _number_type(code: str, align: bool, copy: bool) -> NumberType:
    if type(code) is not str:  # hashing it may take for ever
        raise TypeError
    if code not in NUMBERS:
        raise Refused(f"holds a numpy dtype {shown(code)}; only plain numbers have a place there")
    return NumberType(NUMBERS[code])


def _number(dtype: NumberType, blob: Blob) -> float | int | bool:
    if type(dtype) is not NumberType or blob.length > 16:  # as text its bytes may be longer
        raise TypeError
    with closing(blob.open()) as file:
        (value,) = struct.unpack(dtype.class_name, file.read(file.left))
    return value


def _encode(text: str | Blob, encoding: str) -> Blob:
    """How protocol 2 holds bytes."""
    if encoding != "latin1":
        raise ValueError
    if isinstance(text, Blob):
        return text
    content = text.encode("latin1")
    return Blob(content, len(content))


def _empty() -> dict[str, Any]:
    return {}


def _modules() -> Part:
    return Part("ModuleDict")


def _set(items: list[str]) -> set[str]:
    return set(map(text_key, items))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "torch.nn.modules.container.ModuleDict": _modules,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.dtype": _number_type,
    "collections.OrderedDict": _empty,
    "dnnlib.util.EasyDict": _empty,
    "_codecs.encode": _encode,  # protocol 2
    "__builtin__.set": _set,  # protocol 2
    "builtins.set": _set,  # protocol 3
}
NAMES = {name: Function(name, call) for name, call in FUNCTIONS.items()}


def read_pickle(path: Path) -> Any:
    """What the file holds: dicts, lists, tuples, text, numbers, `Part`s, and `StoredTensor`s still in the file.

    Raises UserError if it is no pickle of protocol 2 to 5, is damaged, or holds anything that EDM's files do not.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name an EDM checkpoint (.pkl)")
    try:
        with closing(Bounded(path.open("rb"), path.stat().st_size)) as file:
            _check_start(file)
            return Machine(file, NAMES, MOST_OPCODES, path).run()
    except Refused as error:
        raise UserError(f"{path}: {error}; nothing of it was run") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle shows itself as almost any error
        raise UserError(f"{path}: is cut off or damaged ({brief(error)}); fetch it again") from error


def _check_start(file: Bounded) -> None:
    """That it can be a pickle, before anything else is said of it."""
    start = file.file.read(9)
    file.file.seek(0)
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return
    found = OTHERS.get(start[:2], "a safetensors file" if start[8:9] == b"{" else "something else")
    raise Refused(f"is {found}, where an EDM checkpoint is a pickle of protocol 2 to 5")
