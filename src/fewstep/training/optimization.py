"""One optimizer with its schedule and its clipping."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fewstep.training.settings import OptimizerSettings


def learning_rate_factor(update: int, num_updates: int, settings: OptimizerSettings) -> float:
    """Share of the peak rate at `update` of `num_updates`: linear warm-up, then constant, linear or cosine decay."""
    warmup = min(1.0, (update + 1) / (settings.warmup_steps + 1))
    progress = max(0.0, update / num_updates - settings.decay_start) / (1 - settings.decay_start)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return warmup * decay[settings.decay]


class Optimizer:
    """AdamW over the parameters that are trained, for `num_updates` updates."""

    def __init__(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings, num_updates: int):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.clip_norm = settings.clip_norm
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda update: learning_rate_factor(update, num_updates, settings)
        )

    def step(self) -> Tensor:
        """Clips, updates, clears the gradients; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()
        return norm

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"])
