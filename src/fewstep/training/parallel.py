"""Weights that several ranks share: each holds some rows of every tensor, and of what it trains on them.

FSDP2 is put on from outside, behind all that copies networks and before optimizers and the first pass: networks, losses
and the order of a step know nothing of it. A unit's weights are gathered in one message and its gradients added up in
another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewstep.diffusion.denoiser import Denoiser, Guided, unguided
from fewstep.errors import UserError
from fewstep.files import size
from fewstep.networks.blocks import named_units
from fewstep.networks.copies import drop_copies
from fewstep.networks.precision import AutocastDenoiser
from fewstep.runtime.distributed import num_ranks, ranks_here
from fewstep.runtime.sharding import is_shard, mine
from fewstep.runtime.writing import free_memory
from fewstep.training.dmd2 import DMD2
from fewstep.training.method import StudentMethod
from fewstep.training.roles import Roles
from fewstep.training.settings import ParallelSettings

FIELD = "parallel.shard"


def check_shard(recipe: Any, num: int, here: int) -> None:
    """Raises UserError where `num` ranks, `here` to a machine, can't share a recipe's weights."""
    parts = num * recipe.num_parts(num)
    if recipe.kind != "distill":
        raise UserError(f"{FIELD}: ranks share the weights of a distillation alone; set none")
    if num == 1:
        raise UserError(f"{FIELD}: one rank has nobody to share weights with; start several (--ranks N), or set none")
    if recipe.lora:
        raise UserError(f"{FIELD}: low-rank weights are beside a base that all networks share; set none, or lora null")
    if "adamw8bit" in {recipe.student.optimizer.kind, recipe.critic.optimizer.kind}:
        raise UserError(f"{FIELD}: adamw8bit does not know weights in shards; set optimizer.kind to adamw, or none")
    if recipe.gan.student_weight and (reals := round(recipe.batch_size * recipe.gan.real_share)) < parts:
        raise UserError(f"{FIELD}: {reals} real images a step are too few for {parts} parts; raise gan.real_share")
    rows, stops = recipe.batch_size // parts, recipe.student.num_timesteps
    if recipe.student.stops == "mixed" and rows < stops:
        raise UserError(f"{FIELD}: parts of {rows} rows don't have all {stops} stops of student.stops=mixed; set none")
    if recipe.parallel.shard == "hybrid" and (here in (1, num) or num % here):
        raise UserError(f"{FIELD}: hybrid shares within each of several machines of several ranks; set full")


def check_units(roles: Roles, gan: bool) -> None:
    """Raises UserError where a network has no units, or where the discriminator reads inside one."""
    names = [name for name, _ in named_units(roles.critic.network)]
    if not names:
        raise UserError(f"{FIELD}: the network has no down_blocks, mid_block and up_blocks to divide; set none")
    if gan and roles.feature_layer not in names:
        ways = ", ".join(name for name in names if "up_blocks" not in name and "attentions" not in name)
        raise UserError(f"gan.feature_layer: {roles.feature_layer} is inside a unit of {FIELD}; take one of {ways}")


@dataclass(frozen=True)
class Units:
    """What gathers the weights of student and critic, the discriminator's among those of the critic."""

    student: Sequence[Any]
    critic: Sequence[Any]

    def given_to(self, method: DMD2) -> DMD2:
        """The method, which was made of the divided roles before any pass of them.

        Gradients are added up, for losses are shares of the whole batch's. Passes that ranks do not make alike wait for
        ever: what is drawn and judged is, too, drawn by all.
        """
        method.student_optimizer.units, method.critic_optimizer.units = self.student, self.critic
        method.sharded = True
        return method


def divide(roles: Roles, settings: ParallelSettings, device: torch.device, dtype: torch.dtype, gan: bool) -> Units:
    """Divides all networks among the ranks, unit by unit: what a rank does not hold is never on its device.

    They may be in any dtype: student and critic are held in float32 from here on, the teacher in `dtype`.
    """
    mesh, keep = _mesh(device, settings.shard), settings.keep_gathered
    student, critic = (_divide_network(each, mesh, keep, torch.float32) for each in (roles.student, roles.critic))
    _divide_network(unguided(roles.teacher), mesh, keep, dtype)
    if isinstance(roles.teacher, Guided):
        null = roles.teacher.null_condition
        roles.teacher.null_condition = {name: value.to(device) for name, value in null.items()}
    # Of the head its inner layers alone: `Discriminator` gives a view of what they give, which FSDP warns of.
    head = _divide([roles.discriminator.layers], mesh, keep) if gan else []
    return Units(student, [*critic, *head])


def offload(method: StudentMethod) -> int:
    """Moves a student's moments, averages and updates to main memory, before its first step; gives their bytes there.

    Of what ranks share each keeps its rows. Raises UserError if there is no room for it.
    """
    needed = offloaded_bytes(method)
    if (all_here := needed * ranks_here()) > (free := free_memory()):
        told = f"takes {size(all_here)} of main memory, and {size(free)} are free"
        raise UserError(f"parallel.offload_student_optimizer: {told}; set false, or share the weights (shard)")
    method.ema.move(method.student_optimizer.offload().weights)
    return needed


def offloaded_bytes(method: StudentMethod) -> int:
    """Of the student's weights, their gradients, two moments and the averages."""
    weights: int = sum(mine(each).nbytes for each in method.student_optimizer.parameters)
    return (4 + len(method.ema.decays)) * weights


def _mesh(device: torch.device, kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    here, num = ranks_here(), num_ranks()
    # Of two dimensions the weights are divided along the last, and the same along the first.
    sizes = (num // here, here) if kind == "hybrid" else (num,)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("machines", "ranks")[-len(sizes) :])


def _divide_network(denoiser: Denoiser, mesh: Any, keep: bool, dtype: torch.dtype) -> list[Any]:
    """Its units and, as the root, its adapter, in which a critic's stop embedding lies; held in `dtype`."""
    network = denoiser.network
    drop_copies(network)  # gathered weights are the copies in bfloat16
    units = [unit for _, unit in named_units(network)]
    return _divide([*units, network], mesh, keep, isinstance(denoiser, AutocastDenoiser), dtype)


def _divide(
    modules: Sequence[nn.Module], mesh: Any, keep: bool, autocast: bool = False, dtype: torch.dtype | None = None
) -> list[Any]:
    """Puts FSDP on the modules, inner ones first, the root last."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs stay as they are: bfloat16 would round native times and sizes in pixels.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if autocast:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    divided: list[Any] = []
    for module in modules:
        # The root's weights stay for the backward pass: where features alone have a graph nothing gathers them again.
        again = not keep and module is not modules[-1]
        for tensor in (*module.parameters(), *module.buffers()) if dtype else ():
            if tensor.is_floating_point() and not is_shard(tensor):
                tensor.data = tensor.to(dtype)
        # What is left in it comes to the mesh's device here, and goes from there but for this rank's rows.
        unit: Any = fully_shard(module, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # by a plain sum, which gloo knows, too
        divided.append(unit)
    return divided
