"""Several ranks as a plan sees them, without any: what FSDP2 keeps alive of shared weights, and what a step sends."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fewstep.networks.blocks import named_units
from fewstep.runtime.distributed import BUCKET
from fewstep.training.budget import Meter

REDUCED = 4  # bytes of a gradient that is added up


@dataclass(frozen=True)
class Ranks:
    """So many, on so many machines, and which of them share the weights of a network."""

    num: int = 1
    machines: int = 1
    shard: Literal["none", "full", "hybrid"] = "none"
    keep_gathered: bool = True

    @property
    def sharing(self) -> int:
        """How many have the rows of a tensor between them."""
        return {"none": 1, "full": self.num, "hybrid": self.num // self.machines}[self.shard]


def tell_sums(meter: Meter, num: int, ranks: Ranks) -> None:
    """Has the meter count what one rank sends, and takes for it, to sum so many numbers over replicated ones."""
    if ranks.num > 1:
        meter.hold(REDUCED * min(num, BUCKET), "a message")
        meter.now.messages["sums"] += -(-num // BUCKET)
        meter.now.sent += 2 * (1 - 1 / ranks.num) * REDUCED * num


def plan_units(meter: Meter, method: Any, roots: Mapping[str, nn.Module], ranks: Ranks) -> None:
    """Divides the networks of a method among ranks, as a step finds them: what no update changes is gathered."""
    networks = {role: PlannedNetwork(meter, role, root, ranks) for role, root in roots.items()}
    method.student_optimizer.units = networks["student"].units
    critic = [networks[role].units for role in ("critic", "discriminator") if role in networks]
    method.critic_optimizer.units = [*chain.from_iterable(critic)]
    kept = ["teacher", *(["student"] if method.settings.student_every > 1 and not method.pool else [])]
    for unit in chain.from_iterable(networks[role].units for role in kept) if ranks.keep_gathered else ():
        unit.gather(backward=True)


class PlannedUnit:
    """What a unit of FSDP2 does in a pass, of which it is told by hooks where FSDP2 has its own."""

    def __init__(self, network: "PlannedNetwork", module: nn.Module, parameters: Sequence[nn.Parameter], keep: bool):
        self.network, self.parameters, self.keep = network, parameters, keep
        self.size = sum(p.nbytes for p in parameters)  # in the dtype that is computed in
        self.message: Tensor | None = None
        self.gathered: Tensor | None = None
        self.gradients: Tensor | None = None
        self.passes, self.in_backward = list[int](), False
        module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(self._leave)

    def reshard(self) -> None:
        """Puts gathered weights away."""
        self.gathered = None

    def ask(self) -> None:
        """The message alone, in which the weights come."""
        if self.gathered is None and self.message is None:
            self.network.tell("gathers", self.size)
            self.message = self.network.hold(self.size, "gathered")

    def gather(self, backward: bool = False) -> None:
        """Out of the message into tensors, which FSDP2 has beside it; in a forward pass it stays up to the next one."""
        self.ask()
        if self.gathered is None:
            self.network.message = None
            self.gathered = self.network.hold(self.size, "gathered")
            self.network.message, self.message = None if backward else self.message, None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.gather()
        values, shape = tree_flatten((args, kwargs))
        at = [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.requires_grad]
        if at and torch.is_grad_enabled():
            told: Any = _Behind.apply
            for i, x in zip(at, told(self.finish, *[values[i] for i in at]), strict=True):
                values[i] = x
        return tree_unflatten(values, shape)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        network = self.network
        if not self.keep:
            self.reshard()
        self.passes.append(len(network.order))
        network.order.append(self)
        if self is network.units[-1]:
            network.message = None
        for x in tree_leaves(output) if torch.is_grad_enabled() else ():
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(self._before_backward)

    def _before_backward(self, gradient: Tensor) -> None:
        if self.in_backward:  # of another of its outputs
            return
        self.in_backward = True
        self.network.begin_backward()
        self.gather(backward=True)
        if self.passes and (place := self.passes.pop()):
            self.network.order[place - 1].ask()  # the one whose turn is next

    def finish(self) -> None:
        """Behind its backward pass its gradients are added up, and each rank has its rows of them."""
        self.reshard()
        self.in_backward = False
        self.network.reduced = None  # that of the unit before
        if found := [p for p in self.parameters if p.grad is not None]:
            size = REDUCED * sum(p.numel() for p in found)
            self.network.reduced = self.network.hold(size, "gradients")
            for parameter in found:
                parameter.grad = None
            self.network.tell("reductions", size)
            rows = self.network.hold(size / self.network.ranks.sharing, "gradients")
            self.gradients = rows if self.gradients is None else self.gradients


class PlannedNetwork:
    """A network whose weights ranks share; its parameters are in the dtype that passes compute in."""

    def __init__(self, meter: Meter, role: str, root: nn.Module, ranks: Ranks):
        self.meter, self.role, self.ranks = meter, role, ranks
        self.message: Tensor | None = None
        self.reduced: Tensor | None = None
        self.order, self.in_backward, taken = list[PlannedUnit](), False, set[int]()
        self.units = list[PlannedUnit]()
        for module in (*(unit for _, unit in named_units(root)), root):
            own = [p for p in module.parameters() if id(p) not in taken]
            taken |= {id(p) for p in own}
            self.units.append(PlannedUnit(self, module, own, ranks.keep_gathered or module is root))

    def hold(self, size: float, what: str) -> Tensor:
        return self.meter.hold(size, f"{what} of the {self.role}")

    def tell(self, what: str, size: float) -> None:
        """Of a message whose whole has so many bytes what one rank sends, in a ring."""
        self.meter.now.messages[what] += 1
        self.meter.now.sent += size * (1 - 1 / self.ranks.sharing)
        if what == "reductions" and self.ranks.shard == "hybrid":
            self.meter.now.messages["sums"] += 1
            self.meter.now.sent += 2 * size / self.ranks.sharing * (1 - 1 / self.ranks.machines)

    def begin_backward(self) -> None:
        if not self.in_backward:
            self.in_backward = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        """Also units that no gradient went through put their weights away."""
        for unit in self.units:
            unit.finish()
            unit.message = None
            unit.passes.clear()
        self.reduced, self.in_backward = None, False
        self.order.clear()


class _Behind(torch.autograd.Function):
    """Its inputs, and a call when all of their gradients are there."""

    @staticmethod
    def forward(ctx: Any, finish: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.finish = finish
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.finish()
        return None, *gradients
