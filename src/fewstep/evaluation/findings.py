"""What the curves of a distillation say of its health, in plain words.

Every rule reads one signal against a limit that runs which were broken on purpose have shown, beside runs that were
well (benchmarks/made_to_fail_cpu_2026-11-26.md); the signals themselves are told in `training/signals.py`. Causes stand
before what follows from them, so the first finding is the one to act on. The critic's loss rises while a student
sharpens: nothing is said of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

Lines = Sequence[Mapping[str, float]]
Level = Literal["ill", "watch", "well"]

FEWEST_UPDATES = 40  # of the student: behind them the runs made to fail differed from the others
FEWEST_LINES = 4  # in a window, or its median is one line's


@dataclass(frozen=True)
class Finding:
    """One thing that was found: what it is, the number that says so, and what to change."""

    level: Level
    what: str
    why: str
    advice: str
    signal: str
    value: float
    limit: float
    step: int


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


@dataclass(frozen=True)
class Rule:
    """A signal, how it is read, and the limit beyond which something is told."""

    signal: str
    limit: float
    read: Callable[[Curves], float | None]
    what: str
    advice: str | Callable[[Curves], str]
    level: Level = "ill"
    below: bool = False  # what is told lies below the limit
    window: str = "in the last half of the run"

    def apply(self, curves: Curves) -> Finding | None:
        """What is found; None where the signal is missing, or as it should be."""
        value = self.read(curves)
        if value is None or (value >= self.limit if self.below else value <= self.limit):
            return None
        why = f"{self.signal} is {value:.3g} {self.window}; the limit is {self.limit:.3g}"
        advice = self.advice if isinstance(self.advice, str) else self.advice(curves)
        return Finding(self.level, self.what, why, advice, self.signal, value, self.limit, curves.step)


def _level(name: str) -> Callable[[Curves], float | None]:
    return lambda curves: curves.level(name)


def _size(name: str) -> Callable[[Curves], float | None]:
    return lambda curves: None if (found := curves.level(name)) is None else abs(found)


# --- how a signal is read --------------------------------------------------------------------------------------------


def _skipped(curves: Curves) -> float | None:
    """Share of the updates that were left out."""
    counts = [line.get("skipped_updates", 0.0) for line in curves.lines]
    every = curves.setting("student_every")
    return sum(counts) / (curves.step * (1 + 1 / every if every else 1)) if curves.step else None


def _dm_lines(curves: Curves) -> float | None:
    """How many lines tell of distribution matching; None where none tells of a GAN on the student."""
    return float(len(curves.numbers("dm_loss", 0))) if curves.numbers("gan_loss", 0) else None


def _gap_of_runaway(curves: Curves) -> float | None:
    """The gap; None where the samples' mean is near enough to the real ones' that guidance alone may make it."""
    shift = curves.ratio("x0_mean_shift", "real_std")
    return curves.level("gap") if shift is None or shift > 0.5 else None


def _balance(curves: Curves) -> float | None:
    """GAN over DM; None where critic and teacher are still all but the same, so that anything is above DM's nothing."""
    return curves.level("gan_to_dm") if (curves.level("gap") or 0) > SAME else None


def _spread(curves: Curves, falling: bool | None = None) -> float | None:
    """The deviation of the samples over that of real ones; with `falling` of runs alone where it falls, or does not."""
    fell = (curves.level("x0_std") or 0) < (curves.level("x0_std", 0, 0.25) or 0)
    return curves.ratio("x0_std", "real_std") if falling in (None, fell) else None


def _gap_alone(curves: Curves) -> float | None:
    """The gap where nothing better tells of the critic, and no guidance makes it larger."""
    told = curves.level("critic_lag") is not None or curves.setting("guidance_scale") != 1
    return None if told else curves.level("gap")


def _updates(curves: Curves) -> float | None:
    """Updates of the student."""
    every = curves.setting("student_every")
    return -(-curves.step // every) if every else None


def _warm_up(curves: Curves) -> float | None:
    """Share of the student's peak rate that its warm-up has reached; None behind it."""
    settings, updates = curves.setting("student.optimizer") or {}, _updates(curves)
    warmup = settings.get("warmup_steps", 0)
    return updates / (warmup + 1) if updates is not None and updates <= warmup else None


def _past_best(curves: Curves) -> float | None:
    """FID at the last evaluation over its best, where that lies in the first two thirds of the run."""
    fids = _of_evaluations(curves, "fid")
    best = min(fids, key=fids.__getitem__, default=0)
    early = len(fids) >= FEWEST_LINES and best <= max(fids) * 2 / 3
    return fids[max(fids)] / fids[best] if early and fids[best] > 0 else None


def _recall_lost(curves: Curves) -> float | None:
    """How far recall is below its best at the last evaluation, where precision is above what it was then."""
    recalls, precisions = (_of_evaluations(curves, name) for name in ("recall", "precision"))
    if len(recalls) < FEWEST_LINES or recalls.keys() != precisions.keys():
        return None
    best, last = max(recalls, key=recalls.__getitem__), max(recalls)
    return recalls[best] - recalls[last] if precisions[last] >= precisions[best] else None


def _of_evaluations(curves: Curves, name: str) -> dict[int, float]:
    """A metric by step, where it is a number."""
    return {int(line["step"]): line[name] for line in curves.evaluations if math.isfinite(line.get(name, math.nan))}


# --- what to change --------------------------------------------------------------------------------------------------


def _critic_advice(curves: Curves) -> str:
    """Which setting leaves the critic behind: its error along the update tells a restless critic from a slow one.

    Of too many updates and too high rates the signals are alike: the settings tell.
    """
    every, share = curves.setting("student_every"), curves.level("critic_error_share")
    student, critic = (curves.setting(f"{role}.optimizer.lr") or 0.0 for role in ("student", "critic"))
    if every is not None and every < FEWEST_CRITIC_UPDATES:
        return f"set student_every to 5: it is {every}, and the critic needs several updates for one of the student's"
    if share is not None and share > RESTLESS:
        told = f"the critic is restless, not slow, for {share:.2f} of the update is its own error (critic_error_share)"
        return f"lower student.optimizer.lr ({student:g}) and critic.optimizer.lr ({critic:g}) tenfold: {told}"
    if critic < student:
        return f"raise critic.optimizer.lr: it is {critic:g}, below the student's {student:g}"
    either = f"either raise critic.optimizer.lr ({critic:g}), or lower student.optimizer.lr ({student:g})"
    return f"{either}, or raise student_every ({every})"


def _gan_advice(curves: Curves) -> str:
    weight, ratio = curves.setting("gan.student_weight") or 0.0, curves.level("gan_to_dm") or 1.0
    return f"lower gan.student_weight from {weight:g} to {weight / ratio:.1g} or less: there both would pull alike"


def _best_advice(curves: Curves) -> str:
    fids = _of_evaluations(curves, "fid")
    best = min(fids, key=fids.__getitem__)
    return f"take RUN@best-fid, which is step {best:,}; a next run may be as short (num_steps)"


# --- the rules: causes before what follows from them -----------------------------------------------------------------

FEWEST_CRITIC_UPDATES = 4  # per update of the student
RESTLESS = 0.17  # critic_error_share
SAME = 0.05  # gap
AT_ONCE = ("skipped_updates", "dm_loss", "null_error")  # what needs no time to show
OF_REALS = "of that of real samples, in the last half of the run"

RULES = (
    Rule(
        "skipped_updates",
        0.01,
        _skipped,
        "Updates were skipped, for their losses or gradients were not finite.",
        "lower student.optimizer.lr and critic.optimizer.lr; not_finite_* in metrics.jsonl says whose samples broke",
        window="of all updates",
    ),
    Rule(
        "dm_loss",
        1,
        _dm_lines,
        "Nothing pulls the student to the teacher's distribution: the GAN trains it alone.",
        "set dm.weight to 1",
        below=True,
        window="lines long",
    ),
    Rule(
        "null_error",
        1.14,
        _level("null_error"),
        "The guided teacher was never trained with its null condition: guidance pushes away from nonsense.",
        'where the null condition is made, encode "" (zeros only where the model was trained with them); else '
        "guidance_scale=1, or a teacher with model.null_class and class_dropout",
    ),
    Rule(
        "gap",
        0.75,
        _gap_of_runaway,
        "The student runs away from the teacher: the critic, which follows it, sees other pictures than the teacher.",
        "either a loss of your own has its sign turned, or the teacher is read wrongly: look at its own samples "
        "(`fewstep sample`), teacher_prediction_type and guidance_scale",
    ),
    Rule("gan_to_dm", 4, _balance, "The GAN pulls the student harder than distribution matching does.", _gan_advice),
    Rule(
        "critic_lag",
        1.3,
        lambda curves: curves.level("critic_lag", 0.25),
        "The critic does not know the student's pictures as well as the teacher knows real ones.",
        _critic_advice,
        window="behind the first quarter of the run",
    ),
    Rule(
        "gan_critic_loss",
        1.392,
        _level("gan_critic_loss"),
        "The discriminator does worse than chance (2 ln 2): what it knows of the student is out of date.",
        _critic_advice,
    ),
    Rule(
        "logit_gap",
        5,
        _level("logit_gap"),
        "The discriminator has won: it tells every sample from a real one.",
        "lower gan.critic_weight, or both rates",
    ),
    Rule(
        "x0_std",
        0.75,
        lambda curves: _spread(curves, falling=True),
        "The student's samples become more alike than real ones: it collapses.",
        "raise student_every or lower student.optimizer.lr; go on from a checkpoint before it fell (init_from)",
        below=True,
        window=OF_REALS,
    ),
    Rule(
        "x0_std",
        1.25,
        _spread,
        "The student's samples spread wider than real ones: they are over-baked.",
        "lower guidance_scale, or student.optimizer.lr and critic.optimizer.lr",
        window=OF_REALS,
    ),
    Rule(
        "x0_std",
        0.75,
        lambda curves: _spread(curves, falling=False),
        "The student's samples are still more alike than real ones, as one step of the teacher gives them.",
        "either wait (num_steps), or raise student.optimizer.lr and critic.optimizer.lr: it hardly moves",
        level="watch",
        below=True,
        window=OF_REALS,
    ),
    *(
        Rule(
            name,
            0.03,
            _size(name),
            f"The student's {name} is not that of the real images.",
            "watch whether it grows; if so lower student.optimizer.lr, or guidance_scale where it is above 1",
            level="watch",
        )
        for name in ("brightness", "contrast", "saturation")
    ),
    Rule("gap", 0.2, _gap_alone, "Critic and teacher are far apart.", _critic_advice, level="watch"),
    Rule(
        "fid",
        1.25,
        _past_best,
        "The best step lies well before the last one.",
        _best_advice,
        level="watch",
        window="times its best at the last evaluation",
    ),
    Rule(
        "recall",
        0.1,
        _recall_lost,
        "Recall falls while precision rises: modes are lost.",
        "raise student_every, lower student.optimizer.lr, or take RUN@best-recall",
        level="watch",
        window="below its best at the last evaluation",
    ),
    Rule(
        "student_every",
        FEWEST_CRITIC_UPDATES,
        lambda curves: curves.setting("student_every"),
        "The student is updated nearly as often as the critic.",
        "set student_every to 5; where critic.optimizer.lr is far above the student's no curve may tell",
        level="watch",
        below=True,
        window="in the recipe",
    ),
    Rule(
        "learning_rate",
        1,
        _warm_up,
        "The student's rate is still in its warm-up.",
        "wait, or lower student.optimizer.warmup_steps, which counts updates of the student",
        level="watch",
        below=True,
        window="of its peak",
    ),
)


def find(lines: Lines, evaluations: Lines, recipe: Mapping[str, Any]) -> list[Finding]:
    """What the lines of metrics.jsonl and evaluations.jsonl say of a run of this recipe (its plain dict).

    The worst level first, and within a level causes before what follows; one finding of level "well" where there is
    nothing else. Rules whose signals are missing, or have fewer than four numbers in the window, are silent.
    """
    curves = Curves(lines, evaluations, recipe)
    found = [finding for rule in RULES if (finding := rule.apply(curves))]
    updates = _updates(curves)
    if updates is not None and updates < FEWEST_UPDATES:
        told = f"{updates} updates of the student; before {FEWEST_UPDATES} no fault shows for certain"
        early = Finding(
            "watch",
            "It is too early for a verdict.",
            told,
            "wait, or raise num_steps",
            "step",
            updates,
            FEWEST_UPDATES,
            curves.step,
        )
        found = [early, *(each for each in found if each.level == "watch" or each.signal in AT_ONCE)]
    order = ("ill", "watch")
    return sorted(found, key=lambda each: order.index(each.level)) or [_well(curves)]


def _well(curves: Curves) -> Finding:
    """That nothing was found, and in what."""
    judged = {name for line in curves.evaluations for name in line} - {"step"}
    names = dict.fromkeys(rule.signal for rule in RULES)
    seen = [name for name in names if name in judged or curves.level(name) is not None]
    told = f"in order: {', '.join(seen)}" if seen else "no signal that tells of it is there yet"
    return Finding(
        "well",
        "Nothing is wrong as far as the curves tell.",
        told,
        "nothing",
        "step",
        curves.step,
        curves.step,
        curves.step,
    )
