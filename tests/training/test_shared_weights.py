"""Ranks that share weights take the step that one rank takes, and go on from each other's states."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from test_parts import SLOW
from test_ranks import train
from torch.distributed.fsdp._fully_shard import _fsdp_init

import real_sizes
from fewstep.errors import UserError
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pipeline import load_part
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.blocks import named_units
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.distributed import num_ranks, rank
from fewstep.runtime.sharding import is_shard
from fewstep.training.budget import Meter
from fewstep.training.dmd2 import DMD2
from fewstep.training.parallel import check_shard, check_units, offload
from fewstep.training.roles import make_roles
from fewstep.training.settings import ParallelSettings
from ranks import in_ranks
from steps import GAN, apart, gathered, in_parts, make_dmd2, same
from tiny_pipelines import TINY

NUM = 8


def pixels(folder: Path) -> PixelModel:
    torch.manual_seed(0)
    config = PixelModelConfig(
        num_classes=3,
        null_class=True,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        attention=[False, True],
        attention_head_dim=8,
    )
    return PixelModel(config, build_unet(config))


def sd(folder: Path, family: str = "sd") -> LatentModel:
    return LatentModel(TINY[family](folder / f"{family}-{rank()}"))


def sdxl(folder: Path) -> LatentModel:
    return sd(folder, "sdxl")


def halves(folder: Path) -> LatentModel:
    """Of a file in 16 bits, which ranks divide as it is."""
    pipeline = TINY["sd"](folder / "sd")
    pipeline.unet.half().save_pretrained(folder / "unet")
    pipeline.unet = load_part(UNet2DConditionModel, folder / "unet", None if num_ranks() > 1 else torch.float32)
    return LatentModel(pipeline)


MODELS: dict[str, Callable[[Path], Any]] = {"pixels": pixels, "sd": sd, "sdxl": sdxl, "halves": halves}


def method_of(name: str, folder: Path, **settings: Any) -> DMD2:
    """Guided, with a GAN, a stop embedding and three timesteps."""
    (place := folder / f"{name}-{torch.initial_seed()}-{len(list(folder.iterdir()))}-{rank()}").mkdir()
    trained = {"optimizer": SLOW}
    given = {"student": {"num_timesteps": 3, **trained}, "critic": {**trained, "condition_on_stop": True}}
    return make_dmd2(MODELS[name](place), NUM, 2.0, **given | settings)


def batch(method: DMD2, step: int) -> tuple[dict[str, Any], int]:
    draws = torch.Generator().manual_seed(step)
    label = torch.randint(0, 3, (NUM,), generator=draws)
    if method.model.kind == "label":
        size = (NUM, *method.model.shape)
        return {"image": torch.randint(0, 256, size, generator=draws, dtype=torch.uint8), "label": label}, NUM
    text = {key: x for key, x in method.model.text_condition(list("abcdefgh")).items() if key != "time_ids"}
    return text | {"latent": torch.randn(NUM, *method.model.shape, generator=draws)}, NUM


def run(
    name: str,
    folder: Path,
    kind: str,
    steps: range,
    parts: int = 1,
    state: Any = None,
    keep: bool = True,
    moved: bool = False,
    **given: Any,
) -> dict[str, Any]:
    shared = None if kind == "none" else ParallelSettings(shard=kind, keep_gathered=keep)
    method = method_of(name, folder, shared=shared, **given)
    assert {is_shard(p) for p in (*method.student.parameters(), *method.teacher.parameters())} == {kind != "none"}
    if moved:
        offload(method)
    if state is not None:
        method.load_state_dict(copy.deepcopy(state))
    lines = train(method, lambda step: batch(method, step), steps[:5], parts)
    noise = torch.randn(method.num_noises, 2, *method.model.shape, generator=torch.Generator().manual_seed(5))
    drawn = method.sample(noise)  # with averages in place of weights, for a moment
    lines += train(method, lambda step: batch(method, step), steps[5:], parts)
    return {"state": gathered(method.state_dict()), "metrics": lines, "drawn": drawn}


TRAINED = {"optimizer": SLOW}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pixels": ("pixels", {}),
    "sd": ("sd", {}),
    "sdxl": ("sdxl", {}),
    "halves": ("halves", {}),
    "gathered again": ("sdxl", {"keep": False}),
    "in parts": ("sdxl", {"parts": 2, "checkpointing": "gan"}),
    "cycle, closer to the student": (
        "pixels",
        {"critic": {**TRAINED, "condition_on_stop": True, "samples": "cycle", "student_share": 0.1}},
    ),
    "updated in main memory": ("sdxl", {"parts": 2, "moved": True, "student": TRAINED | {"ema_decay": [0.5, 0.9]}}),
    "features that are not trained": (
        "pixels",
        {"gan": GAN | {"independent_noise": True, "features": "frozen", "r1_weight": 0.5}, "student_every": 1},
    ),
    "two averages, no GAN": (
        "sd",
        {"gan": {"student_weight": 0, "critic_weight": 0}, "student": TRAINED | {"ema_decay": [0.9, 0]}},
    ),
}


def cases(names: list[str], folder: Path, kind: str, num: int) -> dict[str, Any]:
    found = {}
    for name in names:
        model, given = CASES[name]
        if kind == "none":
            given = {key: value for key, value in given.items() if key not in ("keep", "parts", "moved")}
        found[name] = run(model, folder, kind, range(num), **given)
    return found


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], drawn: bool = True) -> None:
    for part in ("student", "critic", "discriminator", "ema"):
        if part in theirs["state"]:
            assert apart(ours["state"][part], theirs["state"][part]) <= 1e-5, part
    for one, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value.item() == pytest.approx(other[key].item(), rel=1e-4, abs=1e-5, nan_ok=True), key
    assert not drawn or (ours["drawn"].int() - theirs["drawn"].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("names", "num", "ranks", "kind"),
    [
        pytest.param(["pixels"], 4, 2, "full", marks=pytest.mark.slow),
        pytest.param(list(CASES), 20, 2, "full", marks=pytest.mark.slow),
        pytest.param(["pixels", "sdxl"], 20, 4, "hybrid", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_weights_take_the_steps_of_one(
    tmp_path: Path, names: list[str], num: int, ranks: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = in_ranks(ranks, tmp_path, cases, names, tmp_path, kind, num)
    for name, alone in cases(names, tmp_path, "none", num).items():
        for each in found:
            assert_close(each[name], alone)


def go_on(state: dict[str, Any], folder: Path, kind: str) -> dict[str, Any]:
    return run("sdxl", folder, kind, range(6, 12), state=state)


@pytest.mark.slow
def test_a_state_goes_on_in_shards_and_back(tmp_path: Path) -> None:
    straight = run("sdxl", tmp_path, "none", range(12))
    straight["metrics"] = straight["metrics"][6:]
    first = {"one": run("sdxl", tmp_path, "none", range(6))["state"]}
    both = in_ranks(2, tmp_path, there_and_back, tmp_path, first["one"])
    for each in both:
        assert_close(each, straight, drawn=False)
    assert_close(go_on(both[0]["half"], tmp_path, "none"), straight, drawn=False)


def there_and_back(folder: Path, of_one: dict[str, Any]) -> dict[str, Any]:
    """What one rank began, in shards; and what shards began, from shards, bit for bit."""
    half = run("sdxl", folder, "full", range(6))["state"]
    straight = run("sdxl", folder, "full", range(12))
    for moved in (False, True):
        resumed = run("sdxl", folder, "full", range(6, 12), state=half, moved=moved)
        assert same(resumed["state"], straight["state"])
    return {**go_on(of_one, folder, "full"), "half": half}


XL = {
    "block_out_channels": (32, 64, 64),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
    "sample_size": 16,
    "norm_num_groups": 8,
    "transformer_layers_per_block": (1, 1, 1),  # of which its units don't depend
}


def narrow_xl(folder: Path) -> LatentModel:
    """SDXL's structure, block by block."""
    pipeline = TINY["sdxl"](folder / "sdxl")
    torch.manual_seed(4)
    pipeline.unet = UNet2DConditionModel(**real_sizes.XL | XL).eval()
    return LatentModel(pipeline)


MODELS["narrow xl"] = narrow_xl


def counted_both(folder: Path) -> list[dict[str, float]]:
    return [counted(folder, keep) for keep in (True, False)]


def counted(folder: Path, keep: bool) -> dict[str, float]:
    """Messages of weights and gradients of a mean step, over cycles of five that stop everywhere, and of all else."""
    shared = ParallelSettings(shard="full", keep_gathered=keep)
    method = method_of("narrow xl", folder, shared=shared, student_every=5, student={"num_timesteps": 4, **TRAINED})
    counts = dict.fromkeys(("all_gather_single", "reduce_scatter_single", "all_reduce"), 0)

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*given, **named)

        return call

    for name in counts:
        setattr(dist, name, counting(name, getattr(dist, name)))
    num = 0
    for stop in range(4):
        for step in range(5):
            given, rows = batch(method, step)
            part = in_parts(given, rows, 2)[rank()]
            method.step([part], step, method.turn(step, stop))
            num += 1
            if not stop and not step:
                counts.update(dict.fromkeys(counts, 0))  # the first gathers the teacher, for good
                num = 0
    return {name: count / num for name, count in counts.items()}


@pytest.mark.slow
def test_messages_of_a_step_of_sdxl(tmp_path: Path) -> None:
    kept, again = in_ranks(2, tmp_path, counted_both, tmp_path)[0]
    assert 60 < kept["all_gather_single"] + kept["reduce_scatter_single"] < 75
    assert kept["reduce_scatter_single"] == again["reduce_scatter_single"]
    assert again["all_gather_single"] < 120
    assert kept["all_reduce"] == again["all_reduce"] < 4


def arriving(folder: Path, dtype: str) -> dict[str, int]:
    """Bytes that come to the device: of one unit, at most at once, all together, what is left; and of all networks."""
    meter, came = Meter(granule=1), list[int]()

    def move(parameters: list[Any], buffers: list[Any], device: torch.device) -> None:
        for each in parameters + buffers:
            each.data = each.detach().clone()  # as on another device
            meter.note(each.data)
        came.append(sum(each.nbytes for each in parameters + buffers))

    _fsdp_init._move_states_to_device = move
    method = method_of("narrow xl", folder, dtype=getattr(torch, dtype), shared=ParallelSettings(shard="full"))
    roles = (method.teacher, method.student, method.critic, method.discriminator)
    num = sum(p.numel() * p.element_size() for role in roles for p in role.parameters())
    return {"unit": max(came), "most": meter.now.peak, "all": sum(came), "left": meter.total, "networks": num}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_never_holds_more_on_its_device_than_its_rows_and_a_unit(tmp_path: Path, dtype: str) -> None:
    for found in in_ranks(2, tmp_path, arriving, tmp_path, dtype):
        assert found["all"] == found["networks"]
        assert found["most"] == found["unit"] < found["all"] / 10
        assert found["left"] == 0


def test_units_of_the_released_models() -> None:
    found = {}
    for name, sizes in real_sizes.UNETS.items():
        with torch.device("meta"):
            network = UNet2DConditionModel(**sizes)
        units = named_units(network)
        names = [name for name, _ in units]
        found[name] = len(units)
        # Inner ones first, none twice, and what is left for the root is small.
        assert len({*names}) == len(names)
        assert all(
            names.index(inner) < names.index(outer)
            for inner in names
            for outer in names
            if inner.startswith(f"{outer}.")
        )
        inside = {id(p) for _, unit in units for p in unit.parameters()}
        left = sum(p.numel() for p in network.parameters() if id(p) not in inside)
        assert left < 0.01 * sum(p.numel() for p in network.parameters())
    assert found == {"v1": 9 + 16, "v2": 9 + 16, "xl_base": 7 + 11}


REFUSED = {
    "one rank has nobody": ([], 1),
    "low-rank weights": (["lora={rank: 4}"], 2),
    "adamw8bit does not know": (["critic.optimizer.kind=adamw8bit"], 2),
    "1 real images a step are too few for 2 parts": (["batch_size=8", "gan.real_share=0.125"], 2),
    "parts of 2 rows don't have all 4 stops": (["batch_size=4", "student.stops=mixed"], 2),
    "hybrid shares within each": (["parallel.shard=hybrid"], 2),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_can_not_be_shared_is_refused_at_the_door(told: str) -> None:
    changes, num = REFUSED[told]
    recipe = load_recipe("digits-4step", ["parallel.shard=full", *changes])
    with pytest.raises(UserError, match=told) as raised:
        check_shard(recipe, num, here=num)
    assert "\n" not in str(raised.value)


def test_other_recipes_are_refused() -> None:
    with pytest.raises(UserError, match="a distillation alone"):
        check_shard(load_recipe("digits-teacher", ["parallel.shard=full"]), 2, here=2)
    check_shard(load_recipe("digits-4step", ["parallel.shard=full"]), 2, here=2)


def broken(folder: Path) -> dict[str, Any]:
    """Updates that one rank's gradients, or the losses, forbid; and one that nothing does."""
    method = method_of("pixels", folder, shared=ParallelSettings(shard="full"))
    given, rows = batch(method, 0)
    method.step([in_parts(given, rows, 2)[rank()]], 0)
    found = {}
    for name, finite, number in (("a gradient", True, torch.inf), ("a loss", False, 1.0), ("none", True, 1.0)):
        before = copy.deepcopy(gathered([method.critic.state_dict(), method.critic_optimizer.state_dict()]))
        for parameter in method.critic_optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        if rank() == 1:
            method.critic_optimizer.parameters[0].grad.to_local().fill_(number)
        norm, skipped = method.critic_optimizer.step(torch.tensor(finite))
        after = gathered([method.critic.state_dict(), method.critic_optimizer.state_dict()])
        found[name] = {"skipped": skipped, "norm": norm, "same": same(before, after)}
    return found | {"numbers": sum(p.numel() for p in method.critic_optimizer.parameters)}


@pytest.mark.slow
def test_an_update_is_skipped_by_all_or_by_none(tmp_path: Path) -> None:
    for found in in_ranks(2, tmp_path, broken, tmp_path):
        assert [found[name]["skipped"] for name in ("a gradient", "a loss", "none")] == [1, 1, 0]
        assert [found[name]["same"] for name in ("a gradient", "a loss", "none")] == [True, True, False]
        assert found["none"]["norm"].item() == pytest.approx(found["numbers"] ** 0.5)


def in_bfloat16(folder: Path, kind: str) -> dict[str, Any]:
    shared = None if kind == "none" else ParallelSettings(shard=kind)
    method = method_of("sdxl", folder, dtype=torch.bfloat16, shared=shared)
    lines = train(method, lambda step: batch(method, step), range(3))
    return {"metrics": lines, "dtypes": sorted({str(p.dtype) for p in method.student.parameters()})}


@pytest.mark.slow
def test_bfloat16_is_that_of_one_rank(tmp_path: Path) -> None:
    alone = in_bfloat16(tmp_path, "none")
    for found in in_ranks(2, tmp_path, in_bfloat16, tmp_path, "full"):
        assert found["dtypes"] == ["torch.float32"]
        for key, value in found["metrics"][0].items():
            assert value.item() == pytest.approx(alone["metrics"][0][key].item(), rel=0.01, abs=1e-3, nan_ok=True), key


def test_a_head_that_reads_inside_a_unit_is_refused(tmp_path: Path) -> None:
    roles = make_roles(pixels(tmp_path))
    check_units(roles, gan=True)
    roles.feature_layer = "unet.mid_block.resnets.0"
    check_units(roles, gan=False)
    with pytest.raises(
        UserError, match=r"inside a unit .* take one of unet.down_blocks.0, unet.down_blocks.1, unet.mid"
    ):
        check_units(roles, gan=True)
    roles.critic.network = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="no down_blocks"):
        check_units(roles, gan=True)
