"""Copies of trained weights in the dtype that multiplies, which are written when the weights have changed.

Autocast casts the float32 weights of a network anew in every pass. A layer that holds a copy multiplies with it as it
is; outputs and gradients are autocast's, bit for bit. Layers that autocast computes in float32 (norms) hold none.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

AT_ONCE = 2**64 - 1  # as of the nodes that add gradients up
GRAPHS = 4  # passes that may be open for one backward pass


class Copies:
    """A hook before the passes of a network that keeps copies as the weights are, whoever writes those.

    The copies stay where they are once they are there, so that a recorded CUDA graph may write and read them. The host
    sees without the device whether a weight has changed, and does nothing where none has.
    """

    def __init__(self, parts: Sequence[Any]):
        self.parts, self.copies = parts, list[Tensor]()
        self.made: Any = None
        self.seen = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Copies":
        return type(self)(copy.deepcopy(self.parts, memo))  # with no copies yet: the layers are others

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Writes the copies if a weight has changed since."""
        weights = self.weights()
        made = *self.place(), *map(id, weights)
        # Every write in place counts a version up, an optimizer's and an average's, too.
        seen = sum(weight._version for weight in weights)
        if made != self.made:
            self.copies = self.allocate()
        elif seen == self.seen:
            return
        torch._foreach_copy_(self.copies, weights)
        self.finish()
        self.made, self.seen = made, seen

    def weights(self) -> list[Tensor]:
        """What is copied, in the order of the copies."""
        raise NotImplementedError

    def place(self) -> tuple[torch.dtype, torch.device]:
        """Of the copies."""
        raise NotImplementedError

    def allocate(self) -> list[Tensor]:
        """The copies, still empty."""
        raise NotImplementedError

    def finish(self) -> None:
        """What is done to the copies behind each writing."""


def copies_in(module: nn.Module) -> Iterator[Copies]:
    """Those of a network, or of a denoiser's."""
    # Not of all modules inside, which to go through takes longer than to see that nothing has changed.
    hooks = chain.from_iterable(each._forward_pre_hooks.values() for each in (module, *module.children()))
    return (hook for hook in hooks if isinstance(hook, Copies))


def write_copies(module: nn.Module, anew: bool = False) -> None:
    """Brings copies of a network, or a denoiser's, up to date outside a pass: behind a recorded step, before a replay.

    The first call must come before a recording, for it is then that the copies get their memory. `anew` writes them
    also where the host has seen no change, for a recording that failed wrote nothing.
    """
    for copies in copies_in(module):
        copies.seen = -1 if anew else copies.seen
        copies.write()


class Held:
    """What a layer multiplies with: its weight and its bias, or None, in bfloat16."""

    plain: tuple[Any, ...]
    traced: tuple[Any, ...]
    """The same memory, as casts of the weights that autograd knows."""
    used = False
    """Whether passes are under autocast."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        return Held()  # PyTorch copies no tensor with a history


class Copied:
    """What a linear layer or a convolution becomes; weights keep their names and get float32 gradients."""

    held: Held

    def multiplied(self) -> tuple[Any, ...]:
        own: dict[str, Any] = self._parameters  # type: ignore[attr-defined]  # not by name, which takes a lookup each
        held, weight = self.held, own["weight"]
        if not held.used:
            return weight, own["bias"]
        return held.traced if torch.is_grad_enabled() and weight.requires_grad else held.plain


class CopiedLinear(Copied, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, *self.multiplied())


class CopiedConv2d(Copied, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(x, *self.multiplied())
        return output


class WeightCopies(Copies):
    """Of whole layers, for passes under autocast.

    For autograd a copy is the cast of its weight, made once and not in every pass: such a cast saves nothing, so that
    backward passes can go through it again and again. A few of them take turns, for gradients of several passes are
    to be added up behind the casts, in float32.
    """

    def __init__(self, parts: Sequence[Any]):
        super().__init__(parts)
        self.graphs, self.turn = list[list[tuple[Any, ...]]](), 0
        self.graphs_of: Any = None

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        super().__call__(module, arguments)
        device = self.copies[0].device
        # Plans run on the meta device, which knows no autocast, as if it were CUDA.
        used = device.type == "meta" or torch.is_autocast_enabled(device.type)
        graph = self._next_graph() if used and torch.is_grad_enabled() else [()] * len(self.parts)
        for layer, traced in zip(self.parts, graph, strict=True):
            held = layer.held
            held.used = used
            if traced:
                held.traced = traced

    def weights(self) -> list[Tensor]:
        return [p for layer in self.parts for p in layer._parameters.values() if p is not None]

    def place(self) -> tuple[torch.dtype, torch.device]:
        return torch.bfloat16, self.parts[0].weight.device

    def allocate(self) -> list[Tensor]:
        copies = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in self.weights()]
        self.graphs_of = None
        for layer, plain in zip(self.parts, self._by_layer(copies), strict=True):
            layer.held.plain = plain
        return copies

    def _next_graph(self) -> list[tuple[Any, ...]]:
        device = self.copies[0].device
        # Autograd runs a cast's backward on the stream that it was made on; a graph is recorded on one of its own.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self.graphs_of != (stream,):
            self.graphs = []
            for layer in self.parts:
                layer.held.traced = ()  # the last that knows the old ones, and with them their stream
            self.graphs = [self._by_layer(_casts(self.weights(), self.copies)) for _ in range(GRAPHS)]
            self.graphs_of = (stream,)
        self.turn = (self.turn + 1) % GRAPHS
        return self.graphs[self.turn]

    def _by_layer(self, tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
        left = iter(tensors)
        return [tuple(p if p is None else next(left) for p in layer._parameters.values()) for layer in self.parts]


def _casts(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    """The copies as what casts of the weights gave: autograd notes those, and below it nothing is computed."""
    with _Instead(each.detach() for each in copies):
        casts = [weight.to(torch.bfloat16) for weight in weights]
    for cast in casts:
        note: Any = cast.grad_fn
        if note is not None:
            # A backward pass takes what was noted last first, and would keep the gradients at old casts to its end.
            note._set_sequence_nr(AT_ONCE)
    return casts


class _Instead(TorchDispatchMode):
    def __init__(self, given: Iterable[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = iter([*given])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return next(self.given)


def drop_copies(network: nn.Module) -> None:
    """Undoes `hold_copies`: its layers multiply with their weights as they are."""
    for number, hook in list(network._forward_pre_hooks.items()):
        if isinstance(hook, WeightCopies):
            del network._forward_pre_hooks[number]
            for layer in hook.parts:
                layer.held = Held()


def hold_copies(network: nn.Module) -> None:
    """Gives its trained linear layers and convolutions copies in bfloat16, two bytes per weight, for good."""
    classes: dict[type, type] = {nn.Linear: CopiedLinear, nn.Conv2d: CopiedConv2d}  # no class that computes otherwise
    layers: list[Any] = [each for each in network.modules() if type(each) in classes and each.weight.requires_grad]
    for layer in layers:
        layer.__class__, layer.held = classes[type(layer)], Held()
    if layers:
        network.register_forward_pre_hook(WeightCopies(layers))
