"""A run's signals in windows of its lines, as the findings read them."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Lines = Sequence[Mapping[str, float]]
"""Of a run's metrics or evaluations, each with its step."""

FEWEST_LINES = 4  # in a window, or its median is one line's
SAME = 0.05  # gap
WEAK = 0.1  # gan_to_dm


class Curves:
    """A run's signals in windows of its lines, and its settings; a window with too few numbers has none."""

    def __init__(self, lines: Lines, evaluations: Lines, recipe: Mapping[str, Any]):
        self.lines, self.evaluations, self.recipe = lines, evaluations, recipe
        self.step = int(lines[-1].get("step", 0)) if lines else 0

    def numbers(self, name: str, start: float = 0.5, end: float = 1.0) -> list[float]:
        """The finite numbers of a signal in a part of the lines that have it."""
        found = [line[name] for line in self.lines if math.isfinite(line.get(name, math.nan))]
        return found[int(start * len(found)) : math.ceil(end * len(found))]

    def level(self, name: str, start: float = 0.5, end: float = 1.0) -> float | None:
        """The median, by default of the last half: a fault that lasts is told, a spike is not."""
        found = self.numbers(name, start, end)
        return median(found) if len(found) >= FEWEST_LINES else None

    def ratio(self, name: str, other: str) -> float | None:
        """Of two signals' medians in the last half."""
        over, under = self.level(name), self.level(other)
        return over / under if over is not None and under else None

    def setting(self, key: str) -> Any:
        """A dotted key of the recipe; None where it has none."""
        at: Any = self.recipe
        for part in key.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return at

    def skipped(self) -> float | None:
        """Share of the updates that were left out."""
        counts = [line.get("skipped_updates", 0.0) for line in self.lines]
        every = self.setting("student_every")
        return sum(counts) / (self.step * (1 + 1 / every if every else 1)) if self.step else None

    def dm_lines(self) -> float | None:
        """How many lines tell of distribution matching; None where none tells of a GAN on the student."""
        return float(len(self.numbers("dm_loss", 0))) if self.numbers("gan_loss", 0) else None

    def gap_of_runaway(self) -> float | None:
        """The gap; None where the samples' mean is near enough to the real ones' that guidance alone may make it."""
        shift = self.ratio("x0_mean_shift", "real_std")
        return self.level("gap") if shift is None or shift > 0.5 else None

    def balance(self) -> float | None:
        """GAN over DM; None where critic and teacher are all but the same, so that anything is above DM's nothing."""
        return self.level("gan_to_dm") if (self.level("gap") or 0) > SAME else None

    def blind(self) -> float | None:
        """The logits' deviation where the GAN pulls less than a tenth of DM: with a blind head both fall."""
        return self.level("logit_std") if (self.level("gan_to_dm") or 1) < WEAK else None

    def spread(self, falling: bool | None = None) -> float | None:
        """The samples' deviation over real ones'; with `falling` only of runs where it falls, or does not."""
        fell = (self.level("x0_std") or 0) < (self.level("x0_std", 0, 0.25) or 0)
        return self.ratio("x0_std", "real_std") if falling in (None, fell) else None

    def began_with(self) -> float | None:
        """The deviation of the first samples over real ones', of a student that does not begin as the teacher."""
        if not self.setting("init_from"):
            return None
        fake, real = (self.numbers(name, 0)[:FEWEST_LINES] for name in ("x0_std", "real_std"))
        known = len(fake) == len(real) == FEWEST_LINES and median(real) > 0
        return median(fake) / median(real) if known else None

    def unguided_dm(self) -> float | None:
        """The loss of distribution matching, half the square of |f - r| by |x - r|; guidance makes r another's."""
        return self.level("dm_loss") if self.setting("guidance_scale") == 1 else None

    def updates(self) -> float | None:
        """Updates of the student."""
        every = self.setting("student_every")
        return -(-self.step // every) if every else None

    def warm_up(self) -> float | None:
        """Share of the student's peak rate that its warm-up has reached; None behind it."""
        settings, updates = self.setting("student.optimizer") or {}, self.updates()
        warmup = settings.get("warmup_steps", 0)
        return updates / (warmup + 1) if updates is not None and updates <= warmup else None

    def past_best(self) -> float | None:
        """FID at the last evaluation over its best, where that lies in the first two thirds of the run."""
        fids = self.of_evaluations("fid")
        best = min(fids, key=fids.__getitem__, default=0)
        early = len(fids) > 1 and best <= max(fids) * 2 / 3
        return fids[max(fids)] / fids[best] if early and fids[best] > 0 else None

    def recall_lost(self) -> float | None:
        """How far recall is below its best at the last evaluation, where precision is above what it was then."""
        recalls, precisions = (self.of_evaluations(name) for name in ("recall", "precision"))
        if len(recalls) < FEWEST_LINES or recalls.keys() != precisions.keys():
            return None
        best, last = max(recalls, key=recalls.__getitem__), max(recalls)
        return recalls[best] - recalls[last] if precisions[last] >= precisions[best] else None

    def drift(self, name: str) -> float | None:
        """How far a colour is off the real ones' in the lines; else how far evaluations saw it move."""
        level, judged = self.level(name), [*self.of_evaluations(name).values()]
        if level is not None:
            return abs(level)
        return abs(judged[-1] - judged[0]) if len(judged) > 1 else None

    def of_evaluations(self, name: str) -> dict[int, float]:
        """A metric by step, where it is a number."""
        return {int(line["step"]): line[name] for line in self.evaluations if math.isfinite(line.get(name, math.nan))}
