"""A LoRA of what a fine-tuned network differs by from the one it came from, and what that leaves out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from fewstep.networks.lora import LowRank

FULL = 2048  # inputs of a layer up to which their whole second moment is kept, of 17 MB
WORST = 5  # layers that are named
DAMPING = 1e-3  # of the inputs' mean square, in all directions: for those that none of the inputs had


def best_low_rank(change: Tensor, rank: int, moment: Tensor | None = None) -> LowRank:
    """The B A of a rank that is nearest to a change D of a weight (out, in[, k, k]): least E|(D - B A) x|^2.

    `moment` is C = E[x x^T] (n, n) of the inputs, n = in k k, or its diagonal (n,); without it C = 1, and the error is
    Frobenius' (Eckart and Young 1936). B A = U U^T D, where U (out, r) are the eigenvectors of D C D^T of the largest
    values, so that no root of C is needed, nor its inverse. alpha is the rank.
    """
    flat = change.flatten(1)
    rank = min(rank, *flat.shape)
    left = _leading(flat, moment, rank)
    right = left.T @ flat  # (r, n)
    size = right.norm(dim=1).sqrt().clamp_min(torch.finfo(flat.dtype).tiny)  # shared out, which suits float16
    up = (left * size).reshape(len(flat), rank, *(1,) * (change.ndim - 2))
    return LowRank((right / size[:, None]).reshape(rank, *change.shape[1:]), up, rank)


def _leading(change: Tensor, moment: Tensor | None, rank: int) -> Tensor:
    """U (out, r); of a tall D = Q R through R C R^T, so that the eigenproblem is of the smaller side."""
    q, core = torch.linalg.qr(change) if len(change) > change.shape[1] else (None, change)
    weighted = core
    if moment is not None:
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        scaled = core * moment if moment.ndim == 1 else core @ moment
        weighted = scaled + DAMPING * diagonal.mean() * core
    vectors: Tensor = torch.linalg.eigh(weighted @ core.T).eigenvectors[:, -rank:].flip(1)
    return vectors if q is None else q @ vectors


def all_layers(network: nn.Module) -> list[str]:
    """The dotted names of all that a LoRA can change."""
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@contextmanager
def observing(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Sums over the inputs of linear layers and convolutions (patches) inside: x x^T, or x^2 beyond `FULL` inputs."""
    sums: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[[Any, Any], None]:
        def add(layer: Any, arguments: Any) -> None:
            x = _rows(layer, arguments[0].detach())  # (N, n)
            found = x.T @ x if x.shape[1] <= FULL else x.square().sum(0)
            sums[name] = sums[name].add_(found) if name in sums else found

        return add

    handles = [network.get_submodule(name).register_forward_pre_hook(adding(name)) for name in names]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _rows(layer: Any, x: Tensor) -> Tensor:
    """What the layer's weight (out, n) multiplies, (N, n)."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)
    return unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type]


Call = tuple[tuple[Any, ...], Tensor]
"""Of a network: (x, t, condition), and its output."""


@contextmanager
def recording(network: nn.Module) -> Iterator[list[Call]]:
    """All calls of the network inside."""
    made = list[Call]()
    handle = network.register_forward_hook(lambda network, arguments, output: made.append((arguments, output)))
    try:
        yield made
    finally:
        handle.remove()


@torch.no_grad()
def output_errors(network: nn.Module, seen: Sequence[Call]) -> dict[float, float]:
    """|F(x, t) - F'(x, t)| / |F'(x, t)| by t, of a network against the calls of another."""
    sums: dict[float, list[float]] = {}
    for arguments, output in seen:
        pair = sums.setdefault(float(arguments[1][0]), [0.0, 0.0])
        pair[0] += (network(*arguments) - output).double().square().sum().item()
        pair[1] += output.double().square().sum().item()
    return {t: (off / whole) ** 0.5 for t, (off, whole) in sums.items()}


@dataclass(frozen=True)
class Extracted:
    """The changes of the target layers, and what they leave out."""

    lora: dict[str, LowRank]
    errors: dict[str, float]  # |D - B A| / |D| by layer
    error: float  # of all of them together
    outside: float
    """The share of |D|^2 that lies in no target: in norms, biases, the first and the last layer; no LoRA carries it."""

    def facts(self, rank: int) -> dict[str, Any]:
        """What a file says of it; some layers are smaller than the rank."""
        worst = sorted(self.errors.items(), key=lambda each: -each[1])[:WORST]
        told = {"layers": len(self.lora), "smaller_layers": sum(each.rank < rank for each in self.lora.values())}
        return told | {"error": self.error, "outside_targets": self.outside, "worst": dict(worst)}


@torch.no_grad()
def extract(
    base: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    targets: Sequence[str],
    moments: Mapping[str, Tensor],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    report: Callable[[int], None] = lambda done: None,
) -> Extracted:
    """The best low-rank changes of the target layers' weights, in `dtype`, whose rounding is in the errors.

    Layer by layer, in float32, on `device`. `base` and `student` are the state dicts of networks of one size.
    """
    lora, left, size = dict[str, LowRank](), dict[str, float](), dict[str, float]()
    whole = sum(_squares(student[name].float() - base[name].float()) for name in base)
    for done, name in enumerate(targets, 1):
        weight = f"{name}.weight"
        change = (student[weight].float() - base[weight].float()).to(device)
        if square := _squares(change):
            moment = moments.get(name)
            made = best_low_rank(change, rank, None if moment is None else moment.to(change))
            lora[name] = made = replace(made, down=made.down.to(dtype).cpu(), up=made.up.to(dtype).cpu())
            left[name], size[name] = _squares(change - made.delta().to(change)), square
        report(done)
    inside = sum(size.values())
    errors = {name: (left[name] / size[name]) ** 0.5 for name in lora}
    error = (sum(left.values()) / inside) ** 0.5 if inside else 1.0
    return Extracted(lora, errors, error, 1 - inside / whole if whole else 0.0)


def _squares(tensor: Tensor) -> float:
    """The sum of the squares."""
    return tensor.double().square().sum().item()
