"""Plans of one of several ranks against closed forms, and against what is alive, and sent, in two real ones."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.distributed.fsdp._fully_shard import _fsdp_param

import real_sizes
from fewstep.models.loading.outlines import SCHEDULER, of_parts, of_settings
from fewstep.models.outline import Outline
from fewstep.networks.blocks import named_units
from fewstep.networks.families import FAMILIES
from fewstep.networks.precision import DTYPES
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.distributed import rank
from fewstep.runtime.sharding import mine
from fewstep.training import budget
from fewstep.training.budget import Meter, Turn
from fewstep.training.dmd2 import DMD2
from fewstep.training.parallel import divide
from fewstep.training.planning import Plan, plan
from fewstep.training.roles import roles_of
from ranks import in_ranks

XL = {"block_out_channels": (32, 64, 128), "attention_head_dim": (2, 4, 4), "cross_attention_dim": 64}
XL |= {"transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8, "sample_size": 16}
XL |= {"projection_class_embeddings_input_dim": 12 + 6 * 8}
SD = {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": 4, "cross_attention_dim": 64, "sample_size": 16}
NETWORKS = {
    "sdxl-4step": ("StableDiffusionXLPipeline", real_sizes.XL | XL),
    "sd15-1step-gan": ("StableDiffusionPipeline", SD),
}
FEW = ["batch_size=4", "student_every=3", "student.ema_decay=0.999", "init_from=null"]


# --- closed forms ----------------------------------------------------------------------------------------------------


def digits(*settings: str) -> tuple[Any, Outline]:
    config = load_recipe("digits-teacher").model.model_copy(
        update={"block_out_channels": [32], "attention": [False], "layers_per_block": 1}
    )
    few = ["batch_size=4", "student_every=2", "student.num_timesteps=1", "student.timesteps=null", "init_from=null"]
    return load_recipe("digits-4step", [*few, *settings]), of_settings(FAMILIES["pixel"], config)


def test_a_rank_keeps_its_rows_and_what_it_has_gathered() -> None:
    ways = ([], ["parallel.shard=full"], ["parallel.shard=full", "parallel.keep_gathered=false"])
    whole, kept, again = (plan(*digits(*way), granule=1, num_ranks=2) for way in ways)
    _, outline = digits()
    network, trained = outline.denoiser.network, whole.trained
    inside = {id(p): p.numel() for _, unit in named_units(network) for p in unit.parameters()}
    rows = 4 * (whole.base + sum(trained.values())) + 4 * trained["student"] + 8 * sum(trained.values())
    assert whole.resting - kept.resting == pytest.approx(rows / 2 - 4 * (whole.base + trained["student"]), abs=2000)
    assert kept.resting - again.resting == pytest.approx(2 * 4 * sum(inside.values()), abs=100)  # all but the roots
    assert again.peak < kept.peak < whole.peak
    assert again.sent > kept.sent


def test_replicated_ranks_take_their_rows_and_send_all_gradients() -> None:
    (all_rows, outline), (half, _) = digits(), digits("batch_size=2")
    found, alone = plan(all_rows, outline, num_ranks=2), plan(half, outline)
    assert (found.rows, found.resting, found.operations) == (2, alone.resting, alone.operations)
    assert (alone.messages, alone.sent) == ({}, 0)
    student, *others = found.trained.values()
    assert found.sent == pytest.approx(4 * (student / 2 + sum(others)))  # a ring of two; the student's every other step
    assert found.messages == {"sums": 1.5}


# --- two real ones ---------------------------------------------------------------------------------------------------


class Real(Outline):
    """With weights, which are on the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def outline_of(name: str) -> Outline:
    family, sizes = NETWORKS[name]
    small = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.device("meta"):
        parts = {"vae": AutoencoderKL(**small, **kinds), "unet": UNet2DConditionModel(**sizes)}
    return of_parts(FAMILIES[family], parts, SCHEDULER, size=32, tokens=20)


def recipe_of(name: str, precision: str, settings: list[str]) -> Any:
    return load_recipe(name, [*FEW, f"precision={precision}", *settings])


def method_of(name: str, recipe: Any) -> tuple[DMD2, Outline]:
    """As `distill` makes it, of zeros."""
    model = outline_of(name)
    model.__class__ = Real
    model.denoiser = model.denoiser.to_empty(device="cpu")
    for tensor in model.denoiser.parameters():
        tensor.data.zero_()
    shared, gan = recipe.parallel.shard != "none", recipe.gan.student_weight > 0
    roles = roles_of(recipe, model, shared)
    units = divide(roles, recipe.parallel, model.device, DTYPES[recipe.precision], gan) if shared else None
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed)
    return (units.given_to(method) if units else method), model


class Storages(Meter):
    """Those of real tensors, of shards this rank's; and those that FSDP2 empties and fills, while they are full."""

    def note(self, found: Any, kind: str | None = None, known: str | None = None, share: float = 1.0) -> None:
        super().note(mine(found) if isinstance(found, torch.Tensor) else found, kind, known, share)

    def resized(self, function: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        def call(tensor: torch.Tensor) -> None:
            function(tensor)
            if (key := tensor.untyped_storage()._cdata) in self._known:
                self._forget(key)
            self.note(tensor)

        return call


def measured(name: str, precision: str, settings: list[str]) -> dict[str, float]:
    """Bytes alive at the peak of a cycle that is in full swing, without gloo's own, and messages of its mean step."""
    recipe, counts, meter = recipe_of(name, precision, settings), Counter[str](), Storages(granule=1)
    every, num = recipe.student_every, recipe.accumulate
    for kind in ("all_gather_single", "reduce_scatter_single"):
        setattr(dist, kind, _counting(counts, kind, getattr(dist, kind)))
    for kind in ("alloc_storage", "free_storage"):
        setattr(_fsdp_param, kind, meter.resized(getattr(_fsdp_param, kind)))
    size = recipe.batch_size // 2 // num
    rows = [range(first, first + size) for first in range(rank() * num * size, (rank() + 1) * num * size, size)]
    method, model = method_of(name, recipe)
    for role in (method.teacher, method.student, method.critic, method.discriminator):
        meter.note([*role.parameters()])
    meter.note([*method.ema.copies.values()])
    with meter:
        for step in range(2 * every):
            if step == every:  # at its end the moments are there, and the teacher is gathered
                meter.now = Turn("")
                counts.clear()
            method.step([(each, model.batch(size)) for each in rows], step, method.turn(step, stop=0))
    return {"peak": meter.now.peak, "messages": counts.total() / every}


def _counting(counts: Counter[str], kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        counts[kind] += 1
        return function(*given, **named)

    return call


def planned(name: str, precision: str, settings: list[str]) -> Plan:
    """At the first stop alone, as it is measured, and as autocast has norms on the CPU."""
    kept, budget.KEPT = budget.KEPT, ()
    try:
        one = ["student.num_timesteps=1", "student.timesteps=null"]
        return plan(recipe_of(name, precision, [*settings, *one]), outline_of(name), granule=1, num_ranks=2)
    finally:
        budget.KEPT = kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "settings"),
    [
        ("sdxl-4step", "bfloat16", []),
        ("sd15-1step-gan", "float32", ["parallel.keep_gathered=false", "accumulate=2", "checkpointing=gan"]),
    ],
)
def test_plans_are_what_two_ranks_hold_and_send(name: str, precision: str, settings: list[str], tmp_path: Path) -> None:
    given = name, precision, ["parallel.shard=full", *settings]
    found = planned(*given)
    for truth in in_ranks(2, tmp_path, measured, *given):
        assert found.peak == pytest.approx(truth["peak"], rel=0.05)
        assert sum(found.messages.values()) == pytest.approx(truth["messages"], rel=0.02)
