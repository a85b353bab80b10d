"""What is not finite is counted on the device, and ends a run before it is lost or saved."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.runtime.distributed import any_of
from fewstep.training.method import Metrics

SOURCES = {  # in the order of cause and effect
    "data": ("the data", "look for broken files where `data` says"),
    "network": ("the network's predictions", "lower optimizer.lr"),
    "teacher": ("the teacher's predictions", "try precision=float32, or another teacher"),
    "student": ("the student's samples", "lower student.optimizer.lr"),
    "critic": ("the critic's predictions", "lower critic.optimizer.lr, or the GAN weights"),
    "autoencoder": ("the autoencoder's pictures", "lower optimizer.lr"),
}


class Guard:
    """Ends a run of whose updates `max_skipped` in a row were skipped; the host reads the counts in `check` alone."""

    def __init__(self, max_skipped: int):
        self.max_skipped = max_skipped
        self.in_a_row: dict[str, Tensor] = {}
        self.longest: dict[str, Tensor] = {}
        """By what is updated: skipped updates up to now, and the most that there ever were."""
        self.broken: dict[str, Tensor] = {}
        """Samples that were not finite, by their source, since the last check that found all well."""

    def add(self, metrics: Metrics) -> Metrics:
        """Takes in one step; gives its metrics with all skipped updates under one name."""
        skipped = {name: value for name, value in metrics.items() if name.startswith("skipped_")}
        for name, value in skipped.items():
            self.in_a_row[name] = (self.in_a_row.get(name, 0) + 1) * value  # back to 0 at an update that was made
            # The most that there ever were: whether a run ends must not depend on when the host looks.
            self.longest[name] = torch.maximum(self.in_a_row[name], self.longest.get(name, self.in_a_row[name]))
        for name, value in metrics.items():
            if name.startswith("not_finite_"):
                self.broken[name] = self.broken.get(name, 0) + value
        rest = {name: value for name, value in metrics.items() if name not in skipped}
        return rest | {"skipped_updates": torch.stack(list(skipped.values())).sum()} if skipped else rest

    def check(self, step: int) -> None:
        """Raises UserError, which names what was not finite, if too many updates in a row were skipped."""
        if not self.longest:
            return
        counts = (self.longest, self.in_a_row, self.broken)
        # One stack, one wait for the device.
        values = iter(torch.stack([value.float() for each in counts for value in each.values()]).tolist())
        longest, in_a_row, broken = ({name: next(values) for name in each} for each in counts)
        worst = max(longest, key=longest.__getitem__)
        if longest[worst] >= self.max_skipped:
            sources = [source for source in SOURCES if broken.get(f"not_finite_{source}")]
            source = sources[0] if sources else worst.removeprefix("skipped_")
            what, advice = SOURCES[source]
            what = f"{what} were" if sources else f"the gradient of the {source} was"
            end = f"{self.max_skipped} updates in a row were skipped (max_skipped): {advice}"
            raise UserError(f"step {step}: {what} not finite; {end}; the newest checkpoint is whole")
        # Old troubles must not be named as the cause of new ones.
        if not any(in_a_row.values()):
            self.broken = {}


def check_finite(tensors: Mapping[str, Tensor], parts: Sequence[str], step: int) -> None:
    """Raises UserError, on all ranks, if a number of a method's state is not finite on one of them, before it is saved.

    `tensors` are those of this rank, by names that begin with the part of the state that they are in.
    """
    # Weights, averages and moments: one finite update can still overflow what it is added to. Not a pool of samples,
    # which are counted, and skipped, as any others.
    kept = [part for part in parts if part != "pool"]
    found = {part: [x for name, x in tensors.items() if name.split(".")[0] == part] for part in kept}
    broken = any_of(next((len(kept) - at for at, part in enumerate(kept) if not _finite(found[part])), 0))
    if broken:
        advice = "lower the learning rate or the GAN weights, and go on from the newest checkpoint, which is whole"
        raise UserError(f"step {step}: {kept[-broken]} is not finite and was not saved; {advice}")


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are."""
    # Extremes are NaN where there is one, and are found ten times as fast as every number is looked at.
    extremes = [torch.stack(x.aminmax()).double() for x in tensors if x.is_floating_point() and x.numel()]
    return bool(torch.stack(extremes).isfinite().all()) if extremes else True  # one wait for the device
