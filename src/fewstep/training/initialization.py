"""Starting a distillation from another one's weights, as the paper's longer runs and its second stages do (spec, 2)."""

from pathlib import Path

from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.runtime.checkpoint import load_state
from fewstep.training.roles import Roles

STOP_EMBEDDING = "network.stop_embedding.weight"  # of a critic with `condition_on_stop`, zero at first


def start_from(roles: Roles, checkpoint: Path) -> None:
    """Loads student and critic from a checkpoint of `fewstep distill`; optimizers, averages and head start anew.

    A regression has no critic: it stays the teacher, as published (spec, 2). They are the weights as trained, not the
    averaged ones: the paper has no average, and the critic has tracked this student. A stop embedding that only one
    side has is left out, or stays zero. Raises UserError if the checkpoint is of something else or of another
    architecture.
    """
    state = load_state(checkpoint, lazy=True).get("method", {})  # moments and averages stay on the disk
    if "student" not in state:
        raise UserError(f"{checkpoint}: holds no student; name a run of `fewstep distill`")
    for name, module in (("student", roles.student), ("critic", roles.critic)):
        if name in state:
            _load(module, state[name], f"{checkpoint}: its {name}")


def _load(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """All of the weights, but for a stop embedding on one side only."""
    ours = module.state_dict()
    shared = {name: weights[name] for name in weights.keys() & ours.keys()}
    # A second stage may begin or cease to tell the critic the stop.
    lone = (weights.keys() ^ ours.keys()) - {STOP_EMBEDDING}
    other = sorted(lone) + sorted(name for name, weight in shared.items() if weight.shape != ours[name].shape)
    if other:
        stops = "another number of timesteps" if other == [STOP_EMBEDDING] else "another architecture"
        raise UserError(f"{what} is of {stops} than this recipe's: {other[0]} differs, one of {len(other)}")
    module.load_state_dict(shared, strict=False)
