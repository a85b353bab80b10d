"""Steps of all methods with compiled blocks: the numbers of those without, whatever else is put on the networks."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from test_parts import METHODS, NUM, SLOW, batch
from torch import nn

from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks import compiling
from fewstep.networks.compiling import CACHE
from fewstep.networks.settings import LoRASettings
from fewstep.runtime.distributed import rank
from fewstep.runtime.ema import trainable_state
from fewstep.runtime.sharding import mine
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.parallel import divide
from fewstep.training.roles import compile_roles, make_roles, uncompile_roles
from fewstep.training.settings import ParallelSettings
from ranks import in_ranks
from steps import in_parts
from tiny_pipelines import TINY

pytestmark = pytest.mark.slow
TRAINED = ("student", "critic", "discriminator", "denoiser", "vae")
LORAS = {name: LoRASettings(rank=4, alpha=6.0, targets=name) for name in ("lean", "official")}


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """By tracing alone, or by a compiler."""
    monkeypatch.setenv(CACHE, str(Path.home() / ".cache" / "fewstep" / "compiled"))  # minutes, the first time
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    compiling._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield request.param
    torch._dynamo.reset()
    compiling._compiled.cache_clear()


def compare(methods: list, steps: list, rtol: float) -> None:
    """Metrics and weights of a method and of its compiled twin, step by step, and that it was compiled throughout."""
    compile_roles(methods[1])
    assert_alike(methods, steps, rtol)


def assert_alike(methods: list, steps: list, rtol: float) -> None:
    for step, parts in enumerate(steps):
        eager, compiled = (method.step(parts, step) for method in methods)
        assert eager.keys() == compiled.keys()
        for name, value in eager.items():
            assert compiled[name].item() == pytest.approx(value.item(), rel=30 * rtol, abs=rtol), (name, step)
    for role in TRAINED:
        if isinstance(getattr(methods[0], role, None), nn.Module):
            ours, theirs = (flat(getattr(method, role)) for method in methods)
            assert (ours - theirs).norm() <= rtol * ours.norm(), role
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    assert not counters["graph_break"]


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([mine(value).flatten() for value in trainable_state(module).values()])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_steps_that_it_takes_without(tiny_model: PixelModel, backend: str, name: str) -> None:
    if backend == "inductor" and name not in ("dmd2", "teacher"):
        pytest.skip("traced alone")
    methods = [METHODS[name](copy.deepcopy(tiny_model)) for _ in range(2)]
    compare(methods, [in_parts(batch(name, tiny_model, step), NUM, 1 + step % 2) for step in range(6)], 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "gan", "blocks"])
@pytest.mark.parametrize("lora", [None, "lean", "official"])
def test_latents_with_all_that_is_put_on(
    tmp_path: Path, backend: str, lora: str | None, checkpointing: str, dtype: torch.dtype
) -> None:
    """Guidance, GAN, stop embedding, early exit, recomputation, low-rank weights: four steps, two of the student."""
    compiled = {(None, "gan", torch.float32), ("official", "blocks", torch.float32), ("lean", "none", torch.bfloat16)}
    if backend == "inductor" and (lora, checkpointing, dtype) not in compiled:
        pytest.skip("traced alone")
    given = {"latent": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), "caption": ["a", "b"]}
    methods = [make(tmp_path / str(each), lora, checkpointing, dtype) for each in range(2)]
    compare(methods, [in_parts(given, 2, 1)] * 4, 3e-6 if dtype == torch.float32 else 2e-2)


def make(
    folder: Path,
    lora: str | None,
    checkpointing: str,
    dtype: torch.dtype,
    layer: str | None = None,
    shared: ParallelSettings | None = None,
) -> DMD2:
    settings = DMD2Settings(
        student_every=2,
        student={"num_timesteps": 2, "optimizer": SLOW},
        critic={"condition_on_stop": True, "optimizer": SLOW},
        gan={"student_weight": 0.1, "critic_weight": 0.1},
        checkpointing=checkpointing,
    )
    torch.manual_seed(0)
    model = LatentModel(TINY["sdxl"](folder))
    model.encode_in(dtype)
    roles = make_roles(model, 8.0, layer, 2, dtype, checkpointing, LORAS.get(lora or ""), divided=shared is not None)
    units = divide(roles, shared, torch.device("cpu"), dtype, gan=True) if shared else None
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for role in (roles.student, roles.critic):
            for name, weight in trainable_state(role).items():
                if name.endswith("lora_B"):  # away from zero, so that A has gradients
                    weight += 0.05 * torch.randn(weight.shape, generator=drawn)
    method = DMD2(settings, model, roles, 10, 2, seed=0)
    return units.given_to(method) if units else method


@pytest.mark.parametrize("layer", ["unet.mid_block.resnets.0", "unet.mid_block.resnets.0.conv1", "unet.down_blocks.1"])
def test_features_of_a_block_or_of_what_is_inside_one(tmp_path: Path, backend: str, layer: str) -> None:
    if backend == "inductor":
        pytest.skip("traced alone")
    given = {"latent": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), "caption": ["a", "b"]}
    methods = [make(tmp_path / str(each), None, "gan", torch.float32, layer) for each in range(2)]
    compare(methods, [in_parts(given, 2, 1)] * 3, 3e-6)
    uncompile_roles(methods[1])
    assert not any("forward" in vars(module) for module in methods[1].critic.modules())


@pytest.mark.parametrize(
    ("keep", "checkpointing", "dtype"),
    [(False, "blocks", torch.float32), (True, "gan", torch.float32), (True, "blocks", torch.bfloat16)],
)
def test_blocks_of_shared_weights(
    tmp_path: Path, backend: str, keep: bool, checkpointing: str, dtype: torch.dtype
) -> None:
    """Two ranks, with weights that are gathered anew for every pass and with those that stay."""
    if backend == "inductor" and keep:
        pytest.skip("traced alone")
    assert in_ranks(2, tmp_path, in_shards, tmp_path, backend, keep, checkpointing, dtype) == [36, 36]


def in_shards(folder: Path, backend: str, keep: bool, checkpointing: str, dtype: torch.dtype) -> int:
    torch.compile = partial(torch.compile, backend=backend)  # in a process of its own
    shared = ParallelSettings(shard="full", keep_gathered=keep)
    methods = [make(folder / f"{rank()}-{each}", None, checkpointing, dtype, shared=shared) for each in range(2)]
    num = compile_roles(methods[1])
    given = {"latent": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), "caption": ["a", "b"]}
    assert_alike(methods, [[in_parts(given, 2, 2)[rank()]]] * 4, 3e-6 if dtype == torch.float32 else 2e-2)
    return num
