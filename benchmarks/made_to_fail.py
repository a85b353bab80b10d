"""Small distillations that are well, or broken on purpose, one fault each; tests/health holds what their signals were.

PYTHONPATH=src python benchmarks/made_to_fail.py FOLDER [NAME ...]     runs them, or those, and records each
PYTHONPATH=src python benchmarks/made_to_fail.py --table               what rules read off the records and find

Teachers and runs stay in FOLDER; what was run before is not run again. On the CPU, one thread. The faults that no
recipe can say are planted here, from outside: the sign of the DM term, the null condition, an adapter counted twice.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from fewstep.commands import distill as verb
from fewstep.commands.teach import teach
from fewstep.diffusion import losses
from fewstep.evaluation.findings import find
from fewstep.evaluation.windows import Curves
from fewstep.networks.lora import merged
from fewstep.networks.lora_layers import lora_of
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.checkpoint import METRICS
from fewstep.runtime.tracking import read_metrics
from fewstep.training.roles import Roles

RECORDS = Path(__file__).parent.parent / "tests" / "health"
QUIET = ["device=cpu", "log_every=20", "sample_every=100000", "checkpoint_every=100000"]
SHAPES = "shapes-autoencoder", "shapes-teacher"
TEACHERS = {  # runs in this order: (recipe, what is set otherwise)
    "digits-teacher": [("digits-teacher", ())],
    "digits-guided-teacher": [("digits-teacher", ("model.null_class=true", "class_dropout=0.1"))],
    "shapes-teacher": [(SHAPES[0], ("num_steps=500",)), (SHAPES[1], ("num_steps=500", "batch_size=48"))],
}
MOST_LINES = 40
LEFT_OUT = ("seconds_per_step", "peak_memory_gb", "learning_rate", "critic_learning_rate", "critic_grad_norm")
LEFT_OUT += ("dm_image_grad_norm", "gan_image_grad_norm", "magnitude")


@contextmanager
def sign_flipped() -> Iterator[None]:
    """Descends away from the teacher: the target of the DM term is fake + g, not fake - g."""
    real = losses.dmd_loss

    def flipped(fake: torch.Tensor, teacher_x0: torch.Tensor, critic_x0: torch.Tensor) -> torch.Tensor:
        value = real(fake, teacher_x0, critic_x0)
        return 2 * value.detach() - value  # the same value, minus the gradient

    with patch.object(losses, "dmd_loss", flipped):
        yield


@contextmanager
def changed(change: Callable[[Roles], None], name: str) -> Iterator[None]:
    """Roles that are changed once `name`, a function of the verb's that gives or takes them, is done."""
    real = getattr(verb, name)

    def after(*args: Any) -> Any:
        found = real(*args)
        change(found or args[0])
        return found

    with patch.object(verb, name, after):
        yield


@torch.no_grad()
def zero_null(roles: Roles) -> None:
    """Zeros where the teacher learned what no class is; student and critic are never asked for it."""
    table = roles.teacher.denoiser.network.unet.class_embedding.weight
    table[-1] = 0


@torch.no_grad()
def untrained_null(roles: Roles) -> None:
    """A null class as it is drawn before training."""
    table = roles.teacher.denoiser.network.unet.class_embedding.weight
    table[-1] = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def merge_student(roles: Roles) -> None:
    """The student's change in the base, which all three share, while it stays beside it."""
    for name, change in lora_of(roles.student.network).items():
        weight = roles.student.network.get_submodule(name).weight
        weight.copy_(merged(weight, change))


@dataclass(frozen=True)
class Case:
    """One run: a recipe, what is set otherwise, and a fault that is planted while it goes on."""

    recipe: str
    settings: tuple[str, ...] = ("num_steps=400",)
    fault: Callable[[], AbstractContextManager[None]] = nullcontext
    teacher: str = "digits-teacher"
    behind: str | None = None  # the run that it starts from


def case(recipe: str, *settings: str, **more: Any) -> Case:
    return Case(recipe, ("num_steps=400", *settings), **more)


ONE, FOUR, LORA, GUIDED = "digits-1step", "digits-4step", "digits-4step-lora", "digits-guided-teacher"
CONTINUED = "init_from=RUNS/digits-4step-lora-0", {"behind": "digits-4step-lora-0"}
HEALTHY = {f"{recipe}-{seed}": case(recipe, f"seed={seed}") for seed in range(3) for recipe in (ONE, FOUR, LORA)} | {
    "digits-1step-guided": case(ONE, "guidance_scale=2", teacher=GUIDED),
    "digits-1step-constant": case(ONE, "student.optimizer.decay=constant", "critic.optimizer.decay=constant"),
    "digits-1step-whole": Case(ONE, ()),
    "shapes-1step": case("shapes-1step", "batch_size=32", teacher="shapes-teacher"),
    "digits-4step-lora-continued": case(LORA, CONTINUED[0], **CONTINUED[1]),
}
FAULTS = {
    "critic-1to1-1step": case(ONE, "student_every=1"),
    "critic-1to1-4step": case(FOUR, "student_every=1"),
    "critic-slow-1step": case(ONE, f"critic.optimizer.lr={2e-3 / 30}"),
    "critic-slow-4step": case(FOUR, f"critic.optimizer.lr={2e-3 / 30}"),
    "gan-30-1step": case(ONE, "gan.student_weight=4.5"),
    "gan-10-1step": case(ONE, "gan.student_weight=1.5"),
    "rate-30-1step": case(ONE, "student.optimizer.lr=0.03", "critic.optimizer.lr=0.06"),
    "rate-10-1step": case(ONE, "student.optimizer.lr=0.01", "critic.optimizer.lr=0.02"),
    "rate-low-1step": case(ONE, f"student.optimizer.lr={1e-3 / 300}", f"critic.optimizer.lr={2e-3 / 300}"),
    "no-dm-1step": case(ONE, "dm.weight=0"),
    "sign-flipped-1step": case(ONE, fault=sign_flipped),
    "sign-flipped-4step": case(FOUR, fault=sign_flipped),
    "zero-null": case(ONE, "guidance_scale=2", fault=partial(changed, zero_null, "make_roles"), teacher=GUIDED),
    "untrained-null": case(
        ONE, "guidance_scale=2", fault=partial(changed, untrained_null, "make_roles"), teacher=GUIDED
    ),
    "adapter-twice": case(LORA, CONTINUED[0], fault=partial(changed, merge_student, "initialize"), **CONTINUED[1]),
}
CASES = HEALTHY | FAULTS


def recipe_of(case: Case, folder: Path) -> Any:
    """The resolved recipe, whose runs lie in the folder."""
    settings = [each.replace("RUNS", str(folder)) for each in case.settings]
    return load_recipe(case.recipe, [*QUIET, *settings, f"teacher={folder / case.teacher}"])


def run(name: str, folder: Path) -> Path:
    """The run of a case in the folder, with its teacher and what it starts from beside it, made if not there."""
    case, out = CASES[name], folder / name
    if case.behind:
        run(case.behind, folder)
    if not (folder / case.teacher / "checkpoints").exists():
        for recipe, settings in TEACHERS[case.teacher]:
            place = case.teacher if recipe.endswith("-teacher") else recipe
            teach(load_recipe(recipe, [*QUIET, *settings]), folder / place, report=lambda *_: None)
    if not (out / "checkpoints").exists():
        shutil.rmtree(out, ignore_errors=True)
        with case.fault():
            verb.distill(recipe_of(case, folder), out, report=lambda *_: None)
    return out


def thinned(values: dict[str, float]) -> dict[str, float]:
    """Three digits of each number that findings may read."""
    return {name: float(f"{value:.3g}") for name, value in values.items() if name not in LEFT_OUT or name == "step"}


def record(name: str, folder: Path) -> None:
    """Writes tests/health/NAME.jsonl: the recipe, then the lines of metrics.jsonl, of a long run some in between."""
    out = run(name, folder)
    recipe, metrics = recipe_of(CASES[name], Path("runs")).model_dump(mode="json"), read_metrics(out / METRICS)
    lines = [recipe, *map(thinned, metrics[:: -(-len(metrics) // MOST_LINES)])]
    (RECORDS / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


READ = {  # columns of the table: medians of the windows that the rules have
    name: partial(Curves.level, name=name)
    for name in ("gap", "gan_to_dm", "gan_critic_loss", "logit_gap", "logit_std", "brightness", "contrast")
}
READ["null_error"] = lambda curves: curves.level("null_error")
READ["critic_lag"] = lambda curves: curves.level("critic_lag", 0.25)
READ["x0_std / real_std"] = lambda curves: curves.ratio("x0_std", "real_std")
READ["at first"] = lambda curves: median(curves.numbers("x0_std", 0)[:4]) / median(curves.numbers("real_std", 0)[:4])


def table() -> None:
    """Prints what the rules read off the records, run by run, and the first finding of each."""
    print("| run | " + " | ".join(READ) + " | first finding |\n|---|" + "--:|" * len(READ) + "---|")
    for name in [name for name in CASES if (RECORDS / f"{name}.jsonl").exists()]:
        recipe, *lines = (json.loads(line) for line in (RECORDS / f"{name}.jsonl").read_text().splitlines())
        values = [read(Curves(lines, [], recipe)) for read in READ.values()]
        told, first = ["" if value is None else f"{value:.3g}" for value in values], find(lines, [], recipe)[0]
        print(f"| {' | '.join([name, *told])} | {first.level}: {first.signal}; {first.advice} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--table":
        sys.exit(table())
    for asked in sys.argv[2:] or CASES:
        record(asked, Path(sys.argv[1]).resolve())
        print(asked, flush=True)
