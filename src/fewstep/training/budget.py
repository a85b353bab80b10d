"""What a computation keeps alive and how much it multiplies, counted on tensors without memory: shapes alone."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fewstep.diffusion.denoiser import Condition, Denoiser

GRANULE = 512  # bytes that PyTorch's allocator for CUDA rounds up to
LOWERED = ("linear", "conv2d")  # what autocast computes in bfloat16, of what networks here call
KEPT = ("group_norm", "layer_norm")  # and what it computes in float32 on CUDA
_MADE: dict[Any, tuple[Callable[..., Any], int]] = {}  # by signature, for all meters: plans are much alike
COUNTED = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


@dataclass
class Turn:
    """What happened in one stretch of a computation; bytes by kind at their largest sum."""

    name: str
    peak: int = 0
    where: str = ""
    kinds: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    sent: float = 0.0


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages alive, by kind, and floating-point operations of what is computed inside.

    Tensors on the CPU are computed with as they are, and with one on the meta device as if they were there, so that a
    step runs with weights without memory. A storage lives as long as PyTorch keeps it for a tensor or a backward pass;
    what a kernel takes and gives back inside is not seen.
    """

    def __init__(self, granule: int = GRANULE):
        super().__init__()  # type: ignore[no-untyped-call]
        self.granule, self.total, self.alive, self.now = granule, 0, Counter[str](), Turn("")
        self.kind, self.of, self.told = "other", "", ""  # of what is made now, and what for; and what is held
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors((*args, *kwargs.values()))]
        without = sum(each.is_meta for each in tensors)
        if not without:
            out = func(*args, **kwargs)
        else:
            if without < len(tensors):
                args, kwargs = _meta(args), {name: _meta(value) for name, value in kwargs.items()}
            out, operations = self._outputs(func, args, kwargs)
            self.now.operations[self.kind] += operations
        self.note(out)
        return out

    def _outputs(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """Tensors without memory, and the operations behind them.

        PyTorch finds shapes out in Python, which takes most of a plan's time: so for each signature it does so once.
        """
        key = (func, *map(_signature, args), *((name, _signature(value)) for name, value in kwargs.items()))
        if key not in _MADE:
            out = func(*args, **kwargs)
            count = COUNTED.get(func._overloadpacket)
            _MADE[key] = _recipe(out, args, kwargs), count(*args, **kwargs, out_val=out) if count else 0
            return out, _MADE[key][1]
        make, operations = _MADE[key]
        return make(func, args, kwargs), operations

    def note(self, found: Any, kind: str | None = None, known: str | None = None, share: float = 1.0) -> None:
        """Takes in the storages of tensors; those that are known get another `kind`, if theirs is the `known` one.

        Counted is a `share` of their bytes.
        """
        if isinstance(found, list | tuple):
            for each in found:
                self.note(each, kind, known, share)
        elif isinstance(found, Tensor):
            storage = found.untyped_storage()
            key = storage._cdata
            if key in self._known:
                if kind is None or known not in (None, self._known[key][2]):
                    return
                self._forget(key)
            self._add(key, storage, kind, share)

    def hold(self, size: float, kind: str) -> Tensor:
        """What takes so many bytes as long as it lives, and is nothing else."""
        self.told = kind
        held = torch.empty(round(size), dtype=torch.uint8, device="meta")
        self.told = ""
        return held

    def _add(self, key: int, storage: Any, kind: str | None, share: float) -> None:
        size = -(-round(share * storage.nbytes()) // self.granule) * self.granule
        backward = torch._C._current_graph_task_id() != -1
        kind = kind or self.told or ("backward passes" if backward else self.kind)
        self._known[key] = weakref.ref(storage, partial(self._forget, key)), size, kind
        self.alive[kind] += size
        self.total += size
        if self.total > self.now.peak:
            self.now.peak, self.now.kinds = self.total, self.alive.copy()
            made = "the backward pass" if backward else self.kind.replace("activations", "a pass")
            self.now.where = f"{self.now.name}, in {made}{self.of}"

    def _forget(self, key: int, _: object = None) -> None:
        _, size, kind = self._known.pop(key)
        self.alive[kind] -= size
        self.total -= size

    @contextmanager
    def turn(self, name: str) -> Iterator[Turn]:
        """A stretch of its own, which is told when it is over."""
        self.now = Turn(name, self.total, f"{name}, at its beginning", self.alive.copy())
        yield self.now

    def watch(self, role: str, network: nn.Module) -> None:
        """Makes what passes of the network keep a kind of its own."""

        def enter(*_: Any) -> None:
            self.kind = f"activations of the {role}"
            self.now.calls[role] += 1

        def leave(*_: Any) -> None:
            self.kind = "other"

        network.register_forward_pre_hook(enter)
        network.register_forward_hook(leave)

    def inside(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, of which is said what its passes are for."""

        def told(*args: Any, **kwargs: Any) -> Any:
            self.of = f" for {what}"
            out = function(*args, **kwargs)
            self.of = ""
            return out

        return told


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for each in values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _signature(value: Any) -> Any:
    """What the shapes of an operation's outputs depend on."""
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    return value.__class__, value  # 2 is not 2.0, which makes floats of integers


def _recipe(out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """How to make the like of what an operation gave."""
    made = [out] if isinstance(out, Tensor) else out
    given = {each.untyped_storage()._cdata for each in _tensors((*args, *kwargs.values()))}
    if args and out is args[0]:
        return lambda func, args, kwargs: args[0]  # written in place
    if not isinstance(made, list | tuple) or any(each.untyped_storage()._cdata in given for each in _tensors(made)):
        return lambda func, args, kwargs: func(*args, **kwargs)  # a view
    signatures, kind = [*map(_signature, made)], type(out)  # not `out` itself, which would be kept
    if issubclass(kind, Tensor):
        return lambda func, args, kwargs: _remade(signatures[0])
    return lambda func, args, kwargs: kind(map(_remade, signatures))


def _remade(signature: Any) -> Any:
    if signature[0] is not Tensor:
        return signature[1]
    _, shape, stride, dtype = signature
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _meta(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_meta, value))
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


class AsOnCUDA:
    """Attention without a matrix of L x L numbers, and autocast, neither of which knows tensors without memory.

    Inside the context functions of torch.nn.functional are others. A mode of PyTorch's would not reach what a backward
    pass computes again.
    """

    def __init__(self) -> None:
        self.cast: set[int] = set()  # the parameters under autocast
        self.own: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> "AsOnCUDA":
        others: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": _attention}
        for names, how in ((LOWERED, self._lower), (KEPT, self._keep)):
            others |= {name: partial(how, getattr(functional, name)) for name in names}
        self.own = {name: getattr(functional, name) for name in others}
        for name, function in others.items():
            setattr(functional, name, function)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, function in self.own.items():
            setattr(functional, name, function)

    def run(self, denoiser: Denoiser, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """In place of an `AutocastDenoiser`'s."""
        self.cast |= {id(parameter) for parameter in denoiser.parameters()}
        return Denoiser.run(denoiser, network, x, t, condition)

    def _lower(self, function: Callable[..., Any], x: Tensor, weight: Tensor, *more: Any, **named: Any) -> Any:
        if id(weight) not in self.cast and weight.dtype != torch.bfloat16:  # in which a copy is, or what is frozen
            return function(x, weight, *more, **named)
        return function(*map(self._lowered, (x, weight, *more)), **named)

    def _keep(self, function: Any, x: Tensor, size: Any, weight: Any = None, *more: Any, **named: Any) -> Any:
        if id(weight) not in self.cast:
            return function(x, size, weight, *more, **named)
        x, *given = (each.float() if isinstance(each, Tensor) else each for each in (x, weight, *more))
        return function(x, size, *given, **named)

    @staticmethod
    def _lowered(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        # A condition on the processor is cast there by nobody.
        return value.bfloat16() if value.is_meta else torch.empty_like(value, dtype=torch.bfloat16, device="meta")


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **more: Any) -> Tensor:
    """What the flash kernel keeps and multiplies; all attention here is without a mask."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    return out
