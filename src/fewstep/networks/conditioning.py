"""Conditioners: from what a data set or a user gives to a dict of batch-first tensors, opaque to the floors above."""

import torch
from torch import Generator, Tensor

from fewstep.diffusion.denoiser import Condition


class ClassLabels:
    """Class indices as a condition {"label": (B,) int64}; a null class has the index behind the last.

    With `num_classes` 0 the model is unconditional and every condition is {}.
    """

    def __init__(self, num_classes: int, null_class: bool):
        self.num_classes = num_classes
        self.null_condition: Condition | None = {"label": torch.tensor([num_classes])} if null_class else None

    def encode(self, labels: Tensor) -> Condition:
        return {"label": labels} if self.num_classes else {}

    def draw(self, num: int, generator: Generator) -> Condition:
        """`num` conditions to draw fakes for: uniform over the classes, as the official system does for ImageNet."""
        labels = torch.randint(max(self.num_classes, 1), (num,), generator=generator, device=generator.device)
        return self.encode(labels)

    def labels(self, num: int) -> Tensor:
        """`num` labels with every class equally often: 0, 1, 2, ... for evaluation and grids."""
        return torch.arange(num) % max(self.num_classes, 1)

    def dropout(self, condition: Condition, probability: float, generator: Generator) -> Condition:
        """Replaces labels by the null class with this probability: what a teacher needs to be guided later."""
        if not probability or not self.num_classes:
            return condition
        labels = condition["label"]
        dropped = torch.rand(len(labels), generator=generator, device=generator.device) < probability
        return {"label": torch.where(dropped, self.num_classes, labels)}
