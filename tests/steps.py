"""What the tests of training methods and of their runs share: methods, batches, recorded calls, states, interrupts."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.models.image_model import ImageModel
from fewstep.runtime.checkpoint import checkpoints, load_state
from fewstep.runtime.manifest import write_manifest
from fewstep.runtime.sharding import share_of
from fewstep.runtime.shards import Divided, all_rows, packed, shard_name, write_index, write_shard
from fewstep.runtime.tracking import read_metrics
from fewstep.seeding import Draws
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.guard import check_finite
from fewstep.training.parallel import divide
from fewstep.training.regression import PairLoss
from fewstep.training.roles import make_roles
from fewstep.training.settings import ParallelSettings

SHORT = ["batch_size=8", "log_every=50", "sample_every=100", "num_steps=12", "device=cpu"]
SMALL = ["model.block_out_channels=[8, 8]", "model.norm_num_groups=4"]
LR = {"optimizer": {"lr": 1e-3}}
GAN = {"student_weight": 0.1, "critic_weight": 0.1}
PAIRS = {"pairs": "somewhere", "sampler": "heun:5"}
OF_THE_MACHINE = ("seconds_per_step", "data_wait", "peak_memory_gb")  # which differ between two runs that are the same


def make_dmd2(
    model: ImageModel,
    batch_size: int,
    guidance_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    shared: ParallelSettings | None = None,
    **settings,
) -> DMD2:
    """Of 20 steps on the model itself; a GAN and three timesteps unless the settings say otherwise.

    The ranks may have `shared` its weights.
    """
    torch.manual_seed(1)
    settings = DMD2Settings(
        **{"student_every": 2, "student": {"num_timesteps": 3, **LR}, "critic": LR, "gan": GAN, **settings}
    )
    num_stops = settings.student.num_timesteps if settings.critic.condition_on_stop else 0
    roles = make_roles(model, guidance_scale, num_stops=num_stops, dtype=dtype, divided=shared is not None)
    units = divide(roles, shared, torch.device("cpu"), dtype, settings.gan.student_weight > 0) if shared else None
    method = DMD2(settings, model, roles, 20, batch_size, seed=0, pair_loss=PairLoss(model))
    return units.given_to(method) if units else method


def whole(batch: dict, num: int) -> list[tuple[range, dict]]:
    """What a step takes: all `num` rows in one part."""
    return [(range(num), batch)]


def in_parts(batch: dict, num: int, parts: int) -> list[tuple[range, dict]]:
    """The same batch in equal parts."""
    rows = [range(first, first + num // parts) for first in range(0, num, num // parts)]
    return [(each, _rows(batch, each)) for each in rows]


def _rows(batch, rows: range):
    if isinstance(batch, dict):
        return {name: _rows(value, rows) for name, value in batch.items()}
    return batch[rows.start : rows.stop]


def draws(num: int, seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), range(num), num)


@contextmanager
def recorded_calls(module: nn.Module) -> Iterator[list[tuple]]:
    """(arguments, output, whether a graph is recorded) of every call."""
    calls: list[tuple] = []
    handle = module.register_forward_hook(lambda m, args, out: calls.append((args, out, torch.is_grad_enabled())))
    yield calls
    handle.remove()


def received(method: object, role: str) -> list[Tensor]:
    """Fills with the gradients that the role's optimizer is given, before it clears them."""
    found: list[Tensor] = []
    optimizer = getattr(method, f"{role}_optimizer")
    step = optimizer.step

    def caught(finite: Tensor) -> tuple[Tensor, Tensor]:
        found.extend(p.grad.clone() for p in optimizer.parameters)
        return step(finite)

    optimizer.step = caught
    return found


def flat(state: object) -> list[Tensor]:
    """Every tensor of a nested state, or parameter of a module."""
    if isinstance(state, Tensor | nn.Module):
        return [state] if isinstance(state, Tensor) else list(state.parameters())
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in flat(value)]


def weights(*modules: nn.Module) -> list[Tensor]:
    """Copies, as they are now."""
    return [p.detach().clone() for p in flat(modules)]


def same(first: object, second: object) -> bool:
    """Whether two states, or modules, are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


def apart(ours: object, theirs: object) -> float:
    """The distance of two nested states over their norm."""
    a, b = (torch.cat([x.double().flatten() for x in flat(each)]) for each in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def curves(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl but for what is the machine's."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in lines]


def last_state(run: Path) -> dict:
    found: dict = gathered(load_state(checkpoints(run)[-1]))
    return found


def gathered(state: Any) -> Any:
    """A nested state with all rows of what is divided, in new memory; all ranks call it alike where they share it."""
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    if hasattr(state, "full_tensor"):
        state = state.full_tensor()
    return all_rows(state).clone() if isinstance(state, Tensor | Divided) else state


def checked(state: dict[str, Any]) -> None:
    """Looks at all numbers of a method's state, as the loop does at step 3."""
    slices = share_of({"method": state}, 0, 1).slices
    check_finite({name: tensor for name, (tensor, _) in slices.items()}, list(state), 3)


def write_state(folder: Path, step: int, state: Any) -> None:
    """As the one writer of all of it."""
    share = share_of(state, 0, 1)
    folder.mkdir()
    for number, slices in enumerate(shards := packed(share.slices)):
        write_shard(folder / shard_name(number), step, slices)
    write_index(folder, step, len(shards), share.content)


def as_before(checkpoint: Path) -> Path:
    """Makes it one of an earlier version, whose state was a pickle of tensors."""
    torch.save(gathered(load_state(checkpoint)), checkpoint / "state.pt")
    shutil.rmtree(checkpoint / "state")
    write_manifest(checkpoint)
    return checkpoint


def quiet(step: int, metrics: dict[str, float]) -> None:
    """In place of the progress bar."""


def interrupt_at(stop: int) -> Callable[[int, dict[str, float]], None]:
    """A report that presses Ctrl-C behind this step."""
    return lambda step, metrics: os.kill(os.getpid(), signal.SIGINT) if step == stop else None


def dying(after: int, error: BaseException) -> Callable[..., None]:
    """Raises the error at its call number `after`."""
    calls = iter(range(after))

    def tick(*arguments: object) -> None:
        if next(calls, None) is None:
            raise error

    return tick


def spy(patch: pytest.MonkeyPatch, owner: object, name: str, note: Callable[..., object]) -> None:
    """Has `note` called with what a function is called with, before it."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *given, **named: (note(*given, **named), original(*given, **named))[1])
