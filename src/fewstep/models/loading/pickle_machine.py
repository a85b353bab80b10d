"""Acts on the opcodes of a pickle without unpickling: what it names is ours, what it builds is plain.

`pickletools` decodes the opcodes, which runs nothing; those that plain data need are acted on here. Bytes and long text
stay in the file until they are wanted. Everything else is refused by name.
"""

import io
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

SHORT = 4096  # characters; longer text, such as the source code in EDM's files, is not kept


class Refused(Exception):
    """Something that has no place in such a file; the message goes behind the file's name."""


def shown(text: str) -> str:
    """Text of a hostile file, short and in one line."""
    return ascii(text)[1:-1][:80]


def text_key(value: Any) -> str:
    """Only text is hashed: other keys can be made to collide, or to take for ever."""
    if type(value) is not str:
        raise Refused(f"has a {type(value).__name__} as a key; only text has a place there")
    return value


class Bounded:
    """A file that is never asked for more than it has left, for lengths in a hostile file may say anything."""

    def __init__(self, file: BinaryIO, length: int):
        self.file, self.length, self.left = file, length, length

    def check(self, length: int) -> int:
        """The length itself, if that much is left."""
        if not 0 <= length <= self.left:
            raise Refused(f"is cut off or damaged: {length:,} bytes are announced where {self.left:,} are left")
        return length

    def read(self, length: int) -> bytes:
        self.left -= self.check(length)
        return self.file.read(length)

    def readline(self) -> bytes:
        line = self.file.readline(min(self.left, SHORT))
        self.left -= len(line)
        return line

    def tell(self) -> int:
        return self.length - self.left

    def close(self) -> None:
        self.file.close()


@dataclass(eq=False)
class Blob:
    """Bytes, or where they stand in a file; in protocol 2 they stand there as text."""

    source: Path | bytes
    length: int
    start: int = 0
    is_text: bool = False
    meaning: Any = None
    """What they were found to be, so that the same bytes are looked at once."""

    def open(self) -> Bounded:
        file: BinaryIO = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")
        file.seek(self.start)
        if not self.is_text:
            return Bounded(file, self.length)
        with file:
            content = file.read(self.length).decode().encode("latin1")
        return Bounded(io.BytesIO(content), len(content))


@dataclass
class Part:
    """A module, or another object of the file: the name of its class and its attributes."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)

    def build(self, state: Any) -> None:
        """What BUILD does: gives it attributes."""
        if type(state) is not dict:
            raise Refused(f"gives {shown(self.class_name)} a {type(state).__name__} for its attributes")
        self.state.update(state)


@dataclass(frozen=True)
class Function:
    """What stands for a function or class that the file names."""

    name: str
    call: Callable[..., Any]


def no_persistent(claim: Any) -> NoReturn:
    """Where the pickle may not refer to anything outside it."""
    raise Refused("uses the pickle opcode BINPERSID, which has no place there")


class Machine:
    """One pickle; knows nothing but what `names` holds, and takes at most `most` opcodes.

    `source` is where the bytes of `file` can be read again; without it long text and bytes are refused. Raises Refused,
    and on a stack that is too short or holds other things whatever Python raises.
    """

    def __init__(
        self,
        file: Bounded,
        names: Mapping[str, Any],
        most: int,
        source: Path | None = None,
        persistent: Callable[[Any], Any] = no_persistent,
    ):
        self.file, self.names, self.most, self.source, self.persistent = file, names, most, source, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The one thing that is left on the stack."""
        for count, (opcode, argument, position) in enumerate(pickletools.genops(self.file)):  # type: ignore[arg-type]
            if count == self.most:
                raise Refused(f"is too long: it has more than {self.most:,} pickle opcodes")
            if opcode.name not in ACTIONS:
                named = f" ({shown(argument)})" if type(argument) is str else ""
                raise Refused(f"uses the pickle opcode {opcode.name}{named}, which has no place there")
            if type(argument) is bytes or (type(argument) is str and len(argument) > SHORT):
                argument = self._blob(opcode.name, position or 0, type(argument) is str)
            ACTIONS[opcode.name](self, argument)
        (result,) = self.stack
        return result

    def _blob(self, opcode: str, position: int, is_text: bool) -> Blob:
        if self.source is None or opcode not in LENGTH_BYTES:
            raise Refused("holds bytes or long text where none has a place")
        start = position + 1 + LENGTH_BYTES[opcode]
        return Blob(self.source, self.file.tell() - start, start, is_text)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, num: int) -> tuple[Any, ...]:
        """The last ones, in their order."""
        items = tuple(self.stack[-num:])
        del self.stack[-num:]
        return items

    def pop_marked(self) -> tuple[Any, ...]:
        mark = self.marks.pop()
        items = tuple(self.stack[mark:])
        del self.stack[mark:]
        return items

    def name(self, name: str) -> None:
        if name not in self.names:
            raise Refused(f"names {shown(name)}, which has no place there")
        self.push(self.names[name])

    def name_on_stack(self, _: None) -> None:
        module, name = self.pop(2)
        self.name(f"{module}.{name}" if type(module) is type(name) is str else "something that is no text")

    def call(self, _: None) -> None:
        function, arguments = self.pop(2)
        if type(function) is not Function or type(arguments) is not tuple:
            raise Refused(f"calls a {type(function).__name__}, which is not done there")
        try:
            self.push(function.call(*arguments))
        except (TypeError, ValueError, AttributeError, LookupError, struct.error) as error:
            raise Refused(f"calls {function.name} with something that has no place there") from error

    def build(self, _: None) -> None:
        """Attributes of a module; a plain dict has none."""
        target, state = self.pop(2)
        if isinstance(target, Part):
            target.build(state)
        elif not (type(target) is dict and type(state) is dict and not state):
            raise Refused(f"sets the state of a {type(target).__name__}, which is not done there")
        self.push(target)

    def append(self, items: tuple[Any, ...]) -> None:
        self._filled(list).extend(items)

    def add(self, items: tuple[Any, ...]) -> None:
        self._filled(set).update(map(text_key, items))

    def set_items(self, items: tuple[Any, ...]) -> None:
        self._filled(dict).update(zip(map(text_key, items[::2]), items[1::2], strict=True))

    def _filled(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise Refused(f"fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]


LENGTH_BYTES = {  # of the opcodes that hold text or bytes: how long their length is
    "SHORT_BINBYTES": 1,
    "BINBYTES": 4,
    "BINBYTES8": 8,
    "SHORT_BINUNICODE": 1,
    "BINUNICODE": 4,
    "BINUNICODE8": 8,
}
ACTIONS: dict[str, Callable[[Machine, Any], object]] = {
    **dict.fromkeys((*LENGTH_BYTES, "NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), Machine.push),
    **dict.fromkeys(("PROTO", "STOP"), lambda machine, _: None),
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
    "TUPLE": lambda machine, _: machine.push(machine.pop_marked()),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_marked()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_marked()),
    "ADDITEMS": lambda machine, _: machine.add(machine.pop_marked()),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, at: machine.memo.update({at: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.push(machine.memo[at])),
    "GLOBAL": lambda machine, name: machine.name(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": Machine.name_on_stack,
    "REDUCE": Machine.call,
    "NEWOBJ": Machine.call,
    "BUILD": Machine.build,
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(*machine.pop(1))),
}
