"""What a distillation takes: its own step, run once per kind of turn on weights without memory, and measured."""

import copy
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import unguided
from fewstep.models.latent_model import at_once
from fewstep.models.outline import Outline
from fewstep.networks.copies import copies_in, drop_copies, write_copies
from fewstep.networks.precision import DTYPES, AutocastDenoiser
from fewstep.training.budget import GRANULE, AsOnCUDA, Meter, Turn
from fewstep.training.dmd2 import DMD2
from fewstep.training.optimization import Optimizer
from fewstep.training.parallel import offloaded_bytes
from fewstep.training.planned_ranks import Ranks, plan_units, tell_sums
from fewstep.training.roles import roles_of

ROLES = ("student", "critic", "discriminator")  # those that are trained, the last by a GAN alone
TURNS = ("student's turn", "critic's turn")
WEIGHT = 4  # bytes of one that is trained, of its gradient and of its average
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.03}  # bytes per weight; of 8 bits with a float32 scale for 256 of them


@dataclass(frozen=True)
class Plan:
    """What one rank takes, in numbers of parameters, bytes and floating-point operations."""

    trained: dict[str, int]
    """Parameters by role."""
    base: int
    """Parameters of the teacher."""
    peaks: dict[str, int]
    """By turn: the largest sum of what is alive, autoencoder and text encoders left out."""
    where: str
    """The turn and the pass of the largest of them."""
    kinds: dict[str, int]
    """What is alive there."""
    resting: int
    """What is alive between two steps."""
    operations: dict[str, float]
    """By turn, the mean over the stops of a rollout."""
    forward: float
    """Operations of one pass of the teacher's network, of one sample."""
    main_memory: int
    """Bytes there, of what is offloaded."""
    checkpoint: int
    """Bytes on disk of one checkpoint, beside what lies once in the run's `frozen/`."""
    student_every: int
    rows: int
    """Samples of a batch that one rank has."""
    messages: dict[str, float]
    """That a rank sends in a mean step, by kind, but for small ones."""
    sent: float
    """Bytes in them, if each goes round in a ring."""

    @property
    def peak(self) -> int:
        """The largest of all turns."""
        return max(self.peaks.values())

    @property
    def cycle(self) -> float:
        """Operations of one update of the student and the critic's up to the next."""
        first, other = (self.operations[turn] for turn in TURNS)
        return first + (self.student_every - 1) * other


def plan(recipe: Any, outline: Outline, granule: int = GRANULE, num_ranks: int = 1, machines: int = 1) -> Plan:
    """What the `distill` recipe takes with a teacher of that outline: seconds, for a network of billions.

    The stop of a rollout adds passes without gradient, which take time and no memory: one stop is run.
    """
    ranks = Ranks(num_ranks, machines, recipe.parallel.shard, recipe.parallel.keep_gathered)
    num_parts, mine = recipe.num_parts(num_ranks), recipe.batch_size // num_ranks
    size, parts = mine // num_parts, min(num_parts, 2)  # further parts are as the second
    meter, on_cuda, model = Meter(granule), AsOnCUDA(), outline.fresh()  # not inside: the outline itself counts nothing
    with meter, on_cuda:
        method = _method(recipe, model, parts * size, on_cuda, ranks)
        _name(meter, method, recipe, ranks)
        found = _turns(meter, method, recipe.student_every, size, parts)
        resting = meter.total
        call, forward = (_pass(meter, each, outline, size) for each in (method.student, unguided(method.teacher)))
    at = max(chain.from_iterable(found.values()), key=lambda turn: turn.peak)
    first, most = method.fakes.first, method.num_noises
    grids = range(first + 1, most + 1) if method.fakes.random else [most]
    operations, messages, sent = dict.fromkeys(TURNS, 0.0), Counter[str](), 0.0
    for name, (turn, *others) in found.items():
        calls = mean(mean(_calls(recipe, name, stop, num) for stop in range(first, num)) for num in grids)
        more = calls - turn.calls["student"] / parts
        operations[name] = (turn.operations.total() / parts + more * call.operations.total()) * num_parts
        num = 1 if name == TURNS[0] else recipe.student_every - 1
        again = [turn, *(others or [turn]) * (num - 1)] + [call] * round(num * more * (not ranks.keep_gathered))
        for each in again:
            messages.update(each.messages)
        sent += sum(each.sent for each in again)
    away = recipe.parallel.offload_student_optimizer
    each_part = (num_parts / parts if ranks.sharing > 1 else 1) / recipe.student_every
    return Plan(
        trained=trained(method),
        base=sum(p.numel() for p in method.teacher.parameters()),
        peaks={name: max(turn.peak for turn in turns) for name, turns in found.items()},
        where=at.where,
        kinds={kind: num for kind, num in at.kinds.most_common() if num},
        resting=resting,
        operations=operations,
        forward=forward.operations.total() / size,
        main_memory=round(offloaded_bytes(method) * _share(method.student, ranks)) if away else 0,
        checkpoint=checkpoint_bytes(method, recipe),
        student_every=recipe.student_every,
        rows=mine,
        messages={kind: num * each_part for kind, num in messages.items()},
        sent=sent * each_part,
    )


def _method(recipe: Any, model: Outline, batch_size: int, on_cuda: AsOnCUDA, ranks: Ranks) -> DMD2:
    """The method on weights without memory, whose optimizers keep moments and step in no time."""
    model.device = torch.device("meta")  # which knows no random numbers, so a step's are drawn on the CPU
    with model.device:
        roles = roles_of(recipe, model)
    model.device = torch.device("cpu")
    for role in (roles.student, roles.critic):
        if isinstance(role, AutocastDenoiser):
            role.run = partial(on_cuda.run, role)  # type: ignore[method-assign]
            if ranks.sharing > 1:  # gathered weights are what multiplies; what is kept of them is counted as it is
                drop_copies(role.network)
                role.network.to(torch.bfloat16)
    method = DMD2(_plain(recipe), model, roles, recipe.num_steps, batch_size, recipe.seed)
    if not method.gan:
        del method.discriminator  # which stays off the device
    return method


def _plain(recipe: Any) -> Any:
    """The recipe without an optimizer whose package may not be here, and with one stop for all samples of a step.

    Mixed stops take the passes of a mean stop, and no more memory.
    """
    changes = {}
    for role in ("student", "critic"):
        settings = getattr(recipe, role)
        plain = settings.optimizer.model_copy(update={"kind": "adamw"})
        changes[role] = settings.model_copy(update={"optimizer": plain})
    changes["student"] = changes["student"].model_copy(update={"stops": "shared"})
    return recipe.model_copy(update=changes)


def trained(method: DMD2) -> dict[str, int]:
    """Numbers of parameters by role."""
    return {role: sum(p.numel() for p in _trained(getattr(method, role))) for role in ROLES if role in method.STATE}


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _pass(meter: Meter, denoiser: Any, outline: Outline, num: int) -> Turn:
    """One of so many samples, without gradient."""
    condition = outline.conditions(range(num)) | {"stop": torch.zeros(num, dtype=torch.int64)}
    with meter.turn("a pass") as turn, torch.no_grad():
        denoiser(torch.zeros(num, *outline.shape), torch.ones(num), condition)
    return turn


def _name(meter: Meter, method: DMD2, recipe: Any, ranks: Ranks) -> None:
    """Tells the meter what is what, and makes the moments, which are there from the first update on."""
    teacher = unguided(method.teacher)
    meter.note([*teacher.parameters()], "weights of the teacher", share=1 / ranks.sharing)
    for role in trained(method):
        module = getattr(method, role)
        # Of a shared base what is left is what is trained.
        meter.note([*module.parameters()], f"weights of the {role}", "other", _share(module, ranks))
        write_copies(module)
        meter.note([each.copies for each in copies_in(module)], f"copies of the {role}")
        for parameter in _trained(module):
            parameter.register_post_accumulate_grad_hook(partial(_name_gradient, meter, f"gradients of the {role}"))
    away = recipe.parallel.offload_student_optimizer
    if away:  # and with them what updates them
        method.ema.copies, method.ema.update = {}, lambda: None  # type: ignore[method-assign]
    meter.note([*method.ema.copies.values()], "averages of the student", share=_share(method.student, ranks))
    for role, optimizer in (("student", method.student_optimizer), ("critic", method.critic_optimizer)):
        moment = 0 if away and role == "student" else _moment(recipe, role) / ranks.sharing
        sizes = [round(moment * p.numel()) for p in optimizer.parameters]
        moments = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
        meter.note(moments, f"moments of the {role}")
        optimizer.step = partial(_step, meter, optimizer, moments, ranks)  # type: ignore[method-assign]
    watched: dict[str, Any] = {"teacher": teacher, "student": method.student, "critic": method.critic}
    for role, denoiser in watched.items():
        meter.watch(role, denoiser.network)
    for name, of in (("student_gradients", "the student's losses"), ("critic_gradients", "the critic's losses")):
        setattr(method, name, meter.inside(of, getattr(method, name)))
    if ranks.sharing > 1:
        roots = {role: denoiser.network for role, denoiser in watched.items()}
        roots |= {"discriminator": method.discriminator.layers} if method.gan else {}
        plan_units(meter, method, roots, ranks)


def _share(module: nn.Module, ranks: Ranks) -> float:
    """What a rank holds of trained weights, which are in float32, over the bytes of those that passes compute with."""
    return WEIGHT / next(module.parameters()).element_size() / ranks.sharing if ranks.sharing > 1 else 1.0


def _name_gradient(meter: Meter, kind: str, parameter: Tensor) -> None:
    meter.note([parameter.grad], kind)


def _step(
    meter: Meter, optimizer: Optimizer, moments: list[Tensor], ranks: Ranks, finite: Tensor
) -> tuple[Tensor, Tensor]:
    """In place of an update, which takes no more memory than the moments it keeps."""
    if ranks.sharing == 1:
        meter.kind = "an update"
        tell_sums(meter, sum(p.numel() for p in optimizer.parameters), ranks)
        meter.kind = "other"
    for unit in optimizer.units:
        unit.reshard()
        unit.gradients = None
    optimizer.adamw.zero_grad()
    return torch.zeros(()), torch.zeros(())


def _turns(meter: Meter, method: DMD2, every: int, size: int, parts: int) -> dict[str, list[Turn]]:
    """What each kind of turn took; of shared weights two of the critic's, for in the second the student is gathered."""
    rows = [range(first, first + size) for first in range(0, parts * size, size)]
    found: dict[str, list[Turn]] = {}
    for step in range(min(every, 3 if method.student_optimizer.units else 2)):
        batches = [(each, method.model.batch(size)) for each in rows]  # type: ignore[attr-defined]
        with meter.turn(name := TURNS[step > 0]) as turn:
            method.step(batches, step, method.turn(step, stop=0))
        found.setdefault(name, []).append(turn)
    return found


def _calls(recipe: Any, turn: str, stop: int, num_stops: int) -> int:
    """Passes of the student that a part of a batch takes."""
    if not recipe.student.backward_simulation:
        return 1
    if recipe.critic.samples == "cycle":  # the student's turn makes what the others take
        return min(stop + recipe.student_every, num_stops) if turn == TURNS[0] else 0
    return stop + 1 + (recipe.diversity.weight > 0 and turn == TURNS[0])


def checkpoint_bytes(method: DMD2, recipe: Any) -> int:
    """Of one on disk: `model/`, further averages beside it, and the state; without what lies in `frozen/`."""
    weights = {role: WEIGHT * num for role, num in trained(method).items()}
    model = weights["student"] if recipe.lora else WEIGHT * sum(p.numel() for p in method.student.parameters())
    optimizers = (("student", method.student_optimizer), ("critic", method.critic_optimizer))
    moments = sum(_moment(recipe, role) * p.numel() for role, each in optimizers for p in each.parameters)
    averages = weights["student"] * len(method.ema.decays)
    return round(model * (1 + len(method.ema.others)) + sum(weights.values()) + averages + moments)


def _moment(recipe: Any, role: str) -> float:
    """Bytes per weight."""
    return MOMENTS[getattr(recipe, role).optimizer.kind]


def picture_bytes(recipe: Any, outline: Outline) -> int:
    """What a grid takes beside what is alive between steps: text encoders, or the autoencoder behind them."""
    if outline.autoencoder is None:
        return 0
    meter, dtype = Meter(), DTYPES[recipe.precision]
    vae: Any = copy.deepcopy(outline.autoencoder).to(dtype)
    num = min(recipe.grid_images, at_once(outline.shape))
    with meter, AsOnCUDA(), torch.no_grad(), meter.turn("a grid") as turn:
        meter.note([*vae.parameters()], "weights")
        vae.decode(torch.empty(num, *outline.shape, dtype=dtype, device="meta"))
    return max(turn.peak, outline.encoders * dtype.itemsize)
