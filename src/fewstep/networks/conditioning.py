"""Conditioners: from what a data set or a user gives to a dict of batch-first tensors, opaque to the floors above."""

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Condition
from fewstep.seeding import Draws


class ClassLabels:
    """Class indices as a condition {"label": (B,) int64}; a null class has the index behind the last.

    With `num_classes` 0 the model is unconditional and every condition is {}.
    """

    def __init__(self, num_classes: int, null_class: bool):
        self.num_classes = num_classes
        self.null_condition: Condition | None = {"label": torch.tensor([num_classes])} if null_class else None

    def encode(self, labels: Tensor) -> Condition:
        return {"label": labels} if self.num_classes else {}

    def draw(self, draws: Draws) -> Condition:
        """Conditions to draw fakes for: uniform over the classes, as the official system does for ImageNet."""
        return self.encode(draws.randint(0, max(self.num_classes, 1)))

    def labels(self, num: int) -> Tensor:
        """`num` labels with every class equally often: 0, 1, 2, ... for evaluation and grids."""
        return torch.arange(num) % max(self.num_classes, 1)

    def dropout(self, condition: Condition, probability: float, draws: Draws) -> Condition:
        """Replaces labels by the null class with this probability: what a teacher needs to be guided later."""
        if not probability or not self.num_classes:
            return condition
        return {"label": torch.where(draws.rand() < probability, self.num_classes, condition["label"])}
