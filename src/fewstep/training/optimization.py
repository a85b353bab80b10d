"""One optimizer with its schedule and its clipping; what is not finite never reaches the weights."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.runtime.distributed import add_up, num_ranks
from fewstep.runtime.main_memory import MainMemory
from fewstep.runtime.sharding import is_shard, placed
from fewstep.training.settings import OptimizerSettings


def learning_rate_factor(update: int, num_updates: int, settings: OptimizerSettings) -> float:
    """Share of the peak rate at `update` of `num_updates`: linear warm-up, then constant, linear or cosine decay."""
    warmup = min(1.0, (update + 1) / (settings.warmup_steps + 1))  # the first update is not one of rate 0
    progress = max(0.0, update / num_updates - settings.decay_start) / (1 - settings.decay_start)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return warmup * decay[settings.decay]


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raises UserError if the package of its kind is missing."""
    if settings.kind == "adamw8bit" and find_spec("bitsandbytes") is None:
        advice = "pip install fewstep[8bit], or set kind to adamw"
        raise UserError(f"optimizer.kind=adamw8bit: the package bitsandbytes is missing; {advice}")


def _adamw(
    parameters: list[nn.Parameter], settings: OptimizerSettings, rates: Mapping[nn.Parameter, float]
) -> torch.optim.Optimizer:
    by_rate: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in parameters:
        by_rate.setdefault(rates.get(parameter, 1.0), []).append(parameter)
    groups = [{"params": those, "lr": settings.lr * rate} for rate, those in by_rate.items()]
    given: Any = settings.model_dump(include={"lr", "betas", "weight_decay", "eps"})
    if settings.kind == "adamw":
        # Fused: one kernel, and the only one that can skip without the host.
        return torch.optim.AdamW(groups, **given, fused=not any(p.is_meta for p in parameters))  # of plans
    check_optimizer(settings)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels of multiplications, not needed here
    from bitsandbytes.optim import AdamW8bit  # its state is plain tensors; two seconds to import

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **given)
    return optimizer


class Optimizer:
    """AdamW over the parameters that are trained, for `num_updates` updates; `rates` are times the rate of the rest."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        settings: OptimizerSettings,
        num_updates: int,
        rates: Mapping[nn.Parameter, float] | None = None,
    ):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.clip_norm = settings.clip_norm
        self.adamw, self.eight_bit = _adamw(self.parameters, settings, rates or {}), settings.kind == "adamw8bit"
        self.lr: float = settings.lr
        self.peaks = [group["lr"] for group in self.adamw.param_groups]
        self.factor: Callable[[int], float] = lambda update: learning_rate_factor(update, num_updates, settings)
        self.units: Sequence[Any] = ()
        """What gathers the weights where ranks share them, and has added their gradients up."""
        self.main_memory: MainMemory | None = None
        self.finished = False
        """Where weights and moments lie if not beside the parameters, and whether the last update has been made."""
        self.progress = 0
        """Updates that were made or skipped."""
        if not self.eight_bit and any(p.is_cuda for p in self.parameters):
            self.keep_rates(self.parameters[0].device)
        self._set_rates()

    def offload(self) -> MainMemory:
        """Keeps moments and makes updates in main memory, from before its first one on; gives what is there.

        What `step` begins is then done by `finish`, or by `advance`: the device goes on with what needs no new weights.
        """
        self.main_memory = MainMemory(self.parameters)
        others = dict(zip(self.parameters, self.main_memory.weights, strict=True))
        for group in self.adamw.param_groups:
            group["params"] = [others[each] for each in group["params"]]
        if isinstance(self.adamw.param_groups[0]["lr"], Tensor):
            self.keep_rates(torch.device("cpu"))  # with the rounding that they have on the device
            self._set_rates()
        return self.main_memory

    def step(self, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Clips, updates, clears the gradients; gives the gradient norm before clipping, and 1 if it was skipped, or 0.

        An update is skipped if its losses are not `finite` () or the norm is not. Weights, moments and AdamW's count of
        updates, on which its correction of the moments depends, stay as they were then.
        """
        if num_ranks() > 1 and not self.units:  # of losses that are shares of the whole batch's
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            add_up([p.grad for p in self.parameters if p.grad is not None])
        norm: Any = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)  # (), over all parameters together
        norm = norm.full_tensor() if is_shard(norm) else norm
        skipped = (~(norm.isfinite() & finite)).float()
        if self.eight_bit and skipped.item():
            # The host waits here, once: bitsandbytes waits for the device behind every tensor anyway.
            self.clear()  # and what has no gradient stays as it is, with its moments and counts
        if self.main_memory:
            self.main_memory.take(skipped)
        else:
            self._update(skipped)
        self.clear()  # frees them, and with them what was not finite
        return norm, skipped

    def _update(self, skipped: Tensor) -> None:
        for unit in self.units:
            unit.reshard()  # a pass without gradient left weights gathered, as they were before this
        # The fused kernel looks at `found_inf` on the device, as for a gradient scaler: the host need not know.
        self.adamw.grad_scale, self.adamw.found_inf = None, skipped  # type: ignore[attr-defined]
        self.adamw.step()
        # Both kinds write unseen by autograd, and copies of low-rank weights go by their versions.
        torch.autograd.graph.increment_version(self.parameters)

    def clear(self) -> None:
        """Frees the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def finish(self) -> None:
        """Makes the update that `step` left to main memory, unless that has been done."""
        if self.main_memory and not self.finished:
            self._update(self.main_memory.arrived())
            self.main_memory.give()
            self.finished = True

    def advance(self) -> None:
        """Sets the rate of the next update, also behind one that was skipped: it is a function of the progress."""
        self.finish()
        self.finished = False
        self.progress += 1
        self._set_rates()

    def keep_rates(self, device: torch.device) -> None:
        """Has the rate in a tensor, which a graph of the step reads anew in each replay."""
        for group in self.adamw.param_groups:
            group |= {"lr": torch.zeros((), device=device), "capturable": True}
        self.adamw._warned_capturable_if_run_uncaptured = True  # as it may well be

    def _set_rates(self) -> None:
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            rate = peak * self.factor(self.progress)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate

    @property
    def learning_rate(self) -> float:
        """Of the last update; before the first, of that."""
        return self.lr * self.factor(max(0, self.progress - 1))  # not AdamW's: that is the next update's

    def state_dict(self) -> dict[str, Any]:
        state = self.adamw.state_dict()
        groups = [group | {"lr": peak} for group, peak in zip(state["param_groups"], self.peaks, strict=True)]
        return {"adamw": state | {"param_groups": groups}, "schedule": {"last_epoch": self.progress}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also takes the states of other devices and of earlier versions, whose settings are not those of here."""
        ours = [{name: value for name, value in group.items() if name != "params"} for group in self.adamw.param_groups]
        groups = [saved | own for saved, own in zip(state["adamw"]["param_groups"], ours, strict=True)]
        ordered = [parameter for group in self.adamw.param_groups for parameter in group["params"]]
        moments = {
            index: {name: placed(value, ordered[index]) for name, value in each.items()}
            for index, each in state["adamw"]["state"].items()
        }
        self.adamw.load_state_dict({"state": moments, "param_groups": groups})
        for group, own in zip(self.adamw.param_groups, ours, strict=True):
            group["lr"] = own["lr"]  # the very tensor, where it is one
        self.progress = state["schedule"]["last_epoch"]
        self._set_rates()
        if self.main_memory:
            self.main_memory.fetch()  # the weights, which are loaded before their optimizer
