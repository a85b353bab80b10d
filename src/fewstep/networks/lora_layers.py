"""Low-rank weights beside the frozen ones of a network (LoRA, arXiv 2106.09685), in few kernels.

y = W x + b + alpha / rank B (A x). A and B are trained in float32; what multiplies are copies of them in the dtype of
W, with the scale in B's, which are written when A or B have changed. Trees of modules over one base can be trained side
by side, also under activation checkpointing, where switching one tree's weights would recompute with the wrong ones.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.networks.copies import Copies
from fewstep.networks.lora import LowRank, lora_in
from fewstep.networks.settings import LoRASettings

LEAN = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
PRESETS = {"official": (*LEAN, "proj_in", "proj_out", *CONVOLUTIONS, "time_emb_proj"), "lean": LEAN}
"""By DMD2's script (spec, 1.8), and attention and feed-forward alone."""


def find_targets(network: nn.Module, targets: str | Sequence[str], rank: int = 1) -> list[str]:
    """Dotted names of the layers that end in one of the targets; of a preset some may match nothing.

    Raises UserError for a name of one's own that matches nothing, or what is no such layer, and for a rank above what
    a layer's weight (out, in k k) can have.
    """
    modules = dict(network.named_modules())
    fused = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # these take the weights of layers they do not call
    called = {name: m for name, m in modules.items() if not isinstance(modules[name.rpartition(".")[0]], fused)}
    fitting = {name for name, module in called.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    found = set[str]()
    for end in PRESETS.get(targets, ()) if isinstance(targets, str) else targets:
        matching = [name for name in modules if name == end or name.endswith(f".{end}")]
        if not isinstance(targets, str) and (not matching or not fitting.issuperset(matching)):
            what = "is no linear layer or convolution that is called" if matching else "matches no layer"
            ends = {".".join(name.split(".")[-size:]) for name in fitting for size in (1, 2, 3)}
            near = get_close_matches(end, sorted(ends), cutoff=0.5) or sorted(ends)[:3]
            raise UserError(f"lora.targets: {end!r} {what}; write {', '.join(near)}, or a preset")
        found |= fitting.intersection(matching)
    if not found:
        raise UserError(
            f"lora.targets: {targets} matches no layer of this network; write a list of ends of their names"
        )
    ordered = [name for name in modules if name in found]
    largest = {name: min(modules[name].weight.flatten(1).shape) for name in ordered}
    if rank > (most := min(largest.values())):
        layer = min(ordered, key=largest.__getitem__)
        raise UserError(f"lora.rank: {rank} is above the {most} that {layer} can have; take at most that")
    return ordered


class Trained:
    """What a linear layer or a convolution becomes: the same weight and bias, with A and B beside them."""

    lora_A: nn.Parameter  # noqa: N815 - as in peft; float32, (r, in) or (r, in, k, k)
    lora_B: nn.Parameter  # noqa: N815 - float32, (out, r) or (out, r, 1, 1)
    alpha: float
    down: Tensor
    """A in the dtype of the weight."""
    up: Tensor
    """alpha / rank B in the dtype of the weight."""
    group: "Group"

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def copies(self) -> tuple[Tensor, Tensor]:
        """`down` and `up`, from which gradients get to A and B."""
        if not torch.is_grad_enabled():
            return self.down, self.up
        copies: tuple[Tensor, Tensor] = _Copied.apply(self.lora_A, self.lora_B, self)  # type: ignore[no-untyped-call]
        return copies


class LoRALinear(Trained, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.group(self, x)
        down, up = self.copies()  # a compiler fuses by itself, and can't follow what a group keeps
        inner = functional.linear(x, down)  # (..., r)
        return functional.linear(x, self.weight, self.bias) + functional.linear(inner, up)


class LoRAConv2d(Trained, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        down, up = self.copies()
        inner = self._conv_forward(x, down, None)  # (B, r, H, W)
        output: Tensor = self._conv_forward(x, self.weight, self.bias)
        return output.add_(functional.conv2d(inner, up))  # (B, out, H, W)


class _Copied(torch.autograd.Function):
    """The copies of one layer, whose gradients are those of the weights."""

    @staticmethod
    def forward(ctx: Any, lora_A: Tensor, lora_B: Tensor, layer: Trained) -> tuple[Tensor, Tensor]:  # noqa: N803
        ctx.scale, ctx.dtype = layer.scale, lora_A.dtype
        return layer.down.view_as(layer.down), layer.up.view_as(layer.up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, None]:
        return down.to(ctx.dtype), up.to(ctx.dtype) * ctx.scale, None


class Group:
    """Linear layers that are called with one input, one after the other, and share the first product.

    The first computes for all; the others are handed what it kept if they are given the very same tensor.
    """

    def __init__(self, layers: list[Any]):
        self.layers, self.kept = layers, dict[Trained, Tensor]()
        self.given: Tensor | None = None
        self.down: Tensor  # of all layers, stacked (n r, in)
        for layer in layers:
            layer.group = self

    def __call__(self, layer: Trained, x: Tensor) -> Tensor:
        if x is self.given and layer in self.kept:
            return self._hand_out(layer)
        if layer is not self.layers[0] or len(self.layers) == 1:
            return _linear(x, [layer], layer.down)[0]
        outputs = _linear(x, self.layers, self.down)
        self.given, self.kept = x, dict(zip(self.layers, outputs, strict=True))
        return self._hand_out(layer)

    def _hand_out(self, layer: Trained) -> Tensor:
        output = self.kept.pop(layer)
        if not self.kept:
            self.given = None  # so that nothing stays behind the last
        return output


def _linear(x: Tensor, layers: list[Any], down: Tensor) -> Sequence[Tensor]:
    """The outputs (..., out) of all layers for x (..., in); `down` is theirs, stacked."""
    if not torch.is_grad_enabled():
        return _products(x, layers, down)[0]
    trained = chain(*((layer.lora_A, layer.lora_B) for layer in layers))
    outputs: Sequence[Tensor] = _Linear.apply(x, layers, down, *trained)  # type: ignore[no-untyped-call]
    return outputs


def _products(x: Tensor, layers: list[Any], down: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The outputs, x (N, in) and what lies between A and B, (N, n r)."""
    flat = x.flatten(0, -2)
    inner = flat @ down.T
    outputs = []
    for layer, own in zip(layers, inner.split(layers[0].rank, dim=1), strict=True):
        outputs.append(y := functional.linear(x, layer.weight, layer.bias))
        y.flatten(0, -2).addmm_(own, layer.up.T)
    return tuple(outputs), flat, inner


class _Linear(torch.autograd.Function):
    """Whole layers, the frozen weights included, which get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[Any], down: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        outputs, flat, inner = _products(x, layers, down)
        # The copies, too: autograd then tells if they were written between forward and backward.
        ctx.save_for_backward(flat, inner, down, *(layer.weight for layer in layers), *(layer.up for layer in layers))
        ctx.shape, ctx.scale, ctx.dtype = x.shape, layers[0].scale, trained[0].dtype
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, inner, down, *others = ctx.saved_tensors
        num = len(gradients)
        weights, ups = others[:num], others[num:]
        rank, given = ups[0].shape[1], [gradient.flatten(0, -2) for gradient in gradients]  # each (N, out)
        between = [gradient @ up for gradient, up in zip(given, ups, strict=True)]  # each (N, r)
        dh = between[0] if num == 1 else torch.cat(between, dim=1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = given[0] @ weights[0]
            for gradient, weight in zip(given[1:], weights[1:], strict=True):
                dx.addmm_(gradient, weight)
            dx = dx.addmm_(dh, down).view(ctx.shape)
        down_gradients = (dh.T @ flat).to(ctx.dtype).split(rank)
        pairs = zip(down_gradients, given, inner.split(rank, dim=1), ups, strict=True)
        scaled = ((d, torch.addmm(up, g.T, h, beta=0, alpha=ctx.scale).to(ctx.dtype)) for d, g, h, up in pairs)
        return dx, None, None, *chain(*scaled)


class LowRankCopies(Copies):
    """Of groups: A as it is, and B with the scale in it."""

    def weights(self) -> list[Tensor]:
        return [layer.lora_A for layer in self._layers()] + [layer.lora_B for layer in self._layers()]

    def place(self) -> tuple[torch.dtype, torch.device]:
        weight = self.parts[0].layers[0].weight
        return weight.dtype, weight.device

    def allocate(self) -> list[Tensor]:
        for group in self.parts:
            first = group.layers[0]
            group.down = first.weight.new_empty(len(group.layers) * first.rank, *first.lora_A.shape[1:])
            for layer, part in zip(group.layers, group.down.split(first.rank), strict=True):
                layer.down, layer.up = part, first.weight.new_empty(layer.lora_B.shape)
        return [layer.down for layer in self._layers()] + [layer.up for layer in self._layers()]

    def finish(self) -> None:
        layers = self._layers()
        torch._foreach_mul_([layer.up for layer in layers], layers[0].scale)

    def _layers(self) -> list[Any]:
        return [layer for group in self.parts for layer in group.layers]


def with_lora(denoiser: Denoiser, settings: LoRASettings) -> Denoiser:
    """Another tree of modules over the same tensors, with low-rank weights in the layers of `settings`.

    As in peft A is drawn (kaiming uniform) and B zero, so that it starts as the denoiser is. They alone are trained;
    the denoiser is to be frozen.
    """
    shared = chain(denoiser.parameters(), denoiser.buffers())
    tree = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in shared})
    network: Any = tree.network
    names = find_targets(network, settings.targets, settings.rank)
    layers = {name: _trained(network.get_submodule(name), settings) for name in names}
    network.lora_settings = settings
    network.register_forward_pre_hook(LowRankCopies([Group(each) for each in _siblings(network, layers)]))
    return tree


def _trained(layer: Any, settings: LoRASettings) -> Any:
    """The layer, which becomes another class in its place: names, hooks and shared tensors stay."""
    weight, rank = layer.weight, settings.rank
    point = (1,) * (weight.ndim - 2)  # of a convolution: the second product has no neighbours
    layer.__class__ = LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear
    down = nn.init.kaiming_uniform_(torch.empty(rank, *weight.shape[1:]), a=math.sqrt(5))  # on the CPU, like the head
    layer.lora_A = nn.Parameter(down.to(weight.device))
    layer.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, *point, device=weight.device))
    layer.alpha = settings.alpha
    return layer


def _siblings(network: nn.Module, layers: dict[str, Any]) -> Iterator[list[Any]]:
    """The layers in groups: q, k and v of a self-attention, k and v of a cross-attention, and all others alone."""
    groups: dict[str, list[Any]] = {}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        across = getattr(network.get_submodule(parent), "is_cross_attention", None)  # None of no attention
        shared = across is not None and own in (("to_k", "to_v") if across else ("to_q", "to_k", "to_v"))
        groups.setdefault(parent if shared else name, []).append(layer)
    return iter(groups.values())


def settings_of(denoiser: Denoiser) -> LoRASettings | None:
    """What its low-rank weights were made by; None where there are none."""
    settings: LoRASettings | None = getattr(denoiser.network, "lora_settings", None)
    return settings


def lora_of(network: nn.Module) -> dict[str, LowRank]:
    """What is trained, by the dotted names of the layers; {} of a network without low-rank weights."""
    alpha = next((module.alpha for module in network.modules() if isinstance(module, Trained)), 1.0)
    return lora_in(network.state_dict(), alpha)
