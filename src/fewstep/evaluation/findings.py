"""What the curves of a distillation say of its health, in plain words.

Every rule reads one signal against a limit that runs which were broken on purpose have shown, beside runs that were
well (benchmarks/made_to_fail_cpu_2026-11-26.md); the signals themselves are told in `training/signals.py`. Causes stand
before what follows from them, so the first finding is the one to act on. The critic's loss rises while a student
sharpens: nothing is said of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fewstep.evaluation.windows import Curves, Lines

Level = Literal["ill", "watch", "well"]

FEWEST_UPDATES = 40  # of the student: behind them the runs made to fail differed from the others


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


# --- what to change --------------------------------------------------------------------------------------------------


def _critic_advice(curves: Curves) -> str:
    """Which setting leaves the critic behind: its error along the update tells a restless critic from a slow one.

    Of too many updates and too high rates the signals are alike: the settings tell.
    """
    every, share = curves.setting("student_every"), curves.level("critic_error_share")
    student, critic = (curves.setting(f"{role}.optimizer.lr") or 0.0 for role in ("student", "critic"))
    if every is not None and every < FEWEST_CRITIC_UPDATES:
        return _every_advice(every)
    if share is not None and share > RESTLESS:
        told = f"the critic is restless, not slow, for {share:.2f} of the update is its own error (critic_error_share)"
        return f"lower student.optimizer.lr ({student:g}) and critic.optimizer.lr ({critic:g}) tenfold: {told}"
    if critic < student:
        return f"raise critic.optimizer.lr: it is {critic:g}, below the student's {student:g}"
    either = f"either raise critic.optimizer.lr ({critic:g}), or lower student.optimizer.lr ({student:g})"
    return f"{either}, or raise student_every ({every})"


def _every_advice(every: int) -> str:
    return f"set student_every to 5: it is {every}, and the critic needs several updates for one of the student's"


def _head_advice(curves: Curves) -> str:
    every = curves.setting("student_every")
    return _every_advice(every) if every and every < FEWEST_CRITIC_UPDATES else "raise gan.critic_weight"


def _gan_advice(curves: Curves) -> str:
    weight, ratio = curves.setting("gan.student_weight") or 0.0, curves.level("gan_to_dm") or 1.0
    return f"lower gan.student_weight from {weight:g} to {weight / ratio:.1g} or less: there both would pull alike"


def _best_advice(curves: Curves) -> str:
    fids = curves.of_evaluations("fid")
    best = min(fids, key=fids.__getitem__)
    return f"take RUN@best-fid, which is step {best:,}; a next run may be as short (num_steps)"


# --- the rules: causes before what follows from them -----------------------------------------------------------------

FEWEST_CRITIC_UPDATES = 4  # per update of the student
RESTLESS = 0.17  # critic_error_share
AT_ONCE = ("skipped_updates", "dm_loss", "null_error")  # what needs no time to show
OF_REALS = "of that of real samples, in the last half of the run"

RULES = (
    Rule(
        "skipped_updates",
        0.01,
        Curves.skipped,
        "Updates were skipped, for their losses or gradients were not finite.",
        "lower student.optimizer.lr and critic.optimizer.lr; not_finite_* in metrics.jsonl says whose samples broke",
        window="of all updates",
    ),
    Rule(
        "dm_loss",
        1,
        Curves.dm_lines,
        "Nothing pulls the student to the teacher's distribution: the GAN trains it alone.",
        "set dm.weight to 1",
        below=True,
        window="lines long",
    ),
    Rule(
        "null_error",
        1.14,
        lambda curves: next(reversed(curves.numbers("null_error", 0)), None),
        "The guided teacher was never trained with its null condition: guidance pushes away from nonsense.",
        'where the null condition is made, encode "" (zeros only where the model was trained with them); else '
        "guidance_scale=1, or a teacher with model.null_class and class_dropout",
        window="times the loss with a condition",
    ),
    Rule(
        "gap",
        0.75,
        Curves.gap_of_runaway,
        "The student runs away from the teacher: the critic, which follows it, sees other pictures than the teacher.",
        "either a loss of your own has its sign turned, or the teacher is read wrongly: look at its own samples "
        "(`fewstep sample`), teacher_prediction_type and guidance_scale",
    ),
    Rule(
        "x0_std",
        1.1,
        Curves.began_with,
        "The student began over-baked: its samples spread wider than real ones before it had learned anything here.",
        "either the teacher's weights hold the LoRA already that init_from adds again (take one without it), or "
        "init_from was trained with a high guidance_scale",
        window="of that of real samples, in the first four lines",
    ),
    Rule(
        "gan_to_dm", 4, Curves.balance, "The GAN pulls the student harder than distribution matching does.", _gan_advice
    ),
    Rule(
        "critic_lag",
        1.45,
        lambda curves: curves.level("critic_lag", 0.25),
        "The critic does not know the student's pictures as well as the teacher knows real ones.",
        _critic_advice,
        window="behind the first quarter of the run",
    ),
    Rule(
        "gan_critic_loss",
        1.392,
        lambda curves: curves.level("gan_critic_loss"),
        "The discriminator does worse than chance (2 ln 2): what it knows of the student is out of date.",
        _critic_advice,
    ),
    Rule(
        "logit_std",
        0.085,
        Curves.blind,
        "The discriminator is blind: its logits are alike, and the GAN pulls less than a tenth as hard as the DM.",
        _head_advice,
        level="watch",
        below=True,
    ),
    Rule(
        "logit_gap",
        5,
        lambda curves: curves.level("logit_gap"),
        "The discriminator has won: it tells every sample from a real one.",
        "lower gan.critic_weight, or both rates",
    ),
    Rule(
        "x0_std",
        0.75,
        lambda curves: curves.spread(falling=True),
        "The student's samples become more alike than real ones: it collapses.",
        "raise student_every or lower student.optimizer.lr; go on from a checkpoint before it fell (init_from)",
        below=True,
        window=OF_REALS,
    ),
    Rule(
        "x0_std",
        1.25,
        Curves.spread,
        "The student's samples spread wider than real ones: they are over-baked.",
        "lower guidance_scale, or student.optimizer.lr and critic.optimizer.lr",
        window=OF_REALS,
    ),
    Rule(
        "x0_std",
        0.75,
        lambda curves: curves.spread(falling=False),
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
            partial(Curves.drift, name=name),
            f"The student's {name} drifts from that of the real images.",
            "watch whether it grows; if so lower student.optimizer.lr, or guidance_scale where it is above 1",
            level="watch",
        )
        for name in ("brightness", "contrast", "saturation")
    ),
    Rule(
        "dm_loss",
        0.31,
        Curves.unguided_dm,
        "Critic and teacher differ by much of what the student differs from the teacher.",
        _critic_advice,
        level="watch",
    ),
    Rule(
        "fid",
        1.5,
        Curves.past_best,
        "The best step lies well before the last one.",
        _best_advice,
        level="watch",
        window="times its best at the last evaluation",
    ),
    Rule(
        "recall",
        0.1,
        Curves.recall_lost,
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
        Curves.warm_up,
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
    updates = curves.updates()
    if updates is not None and updates < FEWEST_UPDATES:
        told = f"{updates} updates of the student; before {FEWEST_UPDATES} no fault shows for certain"
        of_run = ("step", updates, FEWEST_UPDATES, curves.step)
        early = Finding("watch", "It is too early for a verdict.", told, "wait, or raise num_steps", *of_run)
        found = [early, *(each for each in found if each.level == "watch" or each.signal in AT_ONCE)]
    order = ("ill", "watch")
    return sorted(found, key=lambda each: order.index(each.level)) or [_well(curves)]


def _well(curves: Curves) -> Finding:
    """That nothing was found, and in what."""
    judged = {name for line in curves.evaluations for name in line} - {"step"}
    names = dict.fromkeys(rule.signal for rule in RULES)
    seen = [name for name in names if name in judged or curves.level(name) is not None]
    told = f"in order: {', '.join(seen)}" if seen else "no signal that tells of it is there yet"
    of_run = ("step", curves.step, curves.step, curves.step)
    return Finding("well", "Nothing is wrong as far as the curves tell.", told, "nothing", *of_run)
