"""Steps that are replayed are the steps themselves, bit for bit: on a CPU that records its operations."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parts import METHODS, NUM, SLOW, batch
from torch import Tensor

from fewstep.commands.teachers import of_recipe
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.copies import copies_in
from fewstep.networks.settings import LoRASettings
from fewstep.recipes.loading import load_recipe, recipe_names
from fewstep.runtime.ema import load_trainable, trainable_state
from fewstep.runtime.graphs import Graphs
from fewstep.training import loop
from fewstep.training.benchmarking import make_method, parts_of
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.fakes import Turn
from fewstep.training.method import Method
from fewstep.training.optimization import Optimizer
from fewstep.training.roles import make_roles
from fewstep.training.settings import LoopSettings
from looks import looks
from replays import CPU
from steps import GAN, in_parts, interrupt_at, last_state, quiet, same
from tiny_pipelines import TINY

Batches = Callable[[int], list]


def on_a_gpu(method: Method) -> Method:
    """With rates in tensors, as there."""
    for name in method.STATE:
        if isinstance(part := getattr(method, name), Optimizer):
            part.keep_rates(torch.device("cpu"))
            part._set_rates()
    return method


def graphs_of(method: Method, cpu: CPU | None = None, trial: int = 2, told: list[str] | None = None) -> Graphs:
    return Graphs(method.compute, cpu or CPU(), method.settle, trial, [].append if told is None else told.append)


def run(method: Method, parts: Batches, steps: Iterable[int], graphs: Graphs | None = None) -> list[dict[str, Tensor]]:
    """All at one stop, so that there are two kinds of steps."""
    found = []
    for step in steps:
        turn = method.turn(step)
        if isinstance(turn, Turn):
            turn = replace(method.turn(step, min(1, method.num_noises - 1)), num_timesteps=method.num_noises)
        found.append({key: value.clone() for key, value in method.step(parts(step), step, turn, graphs).items()})
    return found


def assert_equal(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert list(mine) == list(other)
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True, msg=partial("step {}: {}".format, step))


def pixels(name: str, model: PixelModel, num: int = 2) -> Batches:
    return lambda step: in_parts(batch(name, model, step), NUM, num)


QUICK = ("dmd2, cycle and a third of the reals", "dmd2, random times", "dmd2, weights of losses", "teacher")


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", slow_but(QUICK, METHODS))
def test_replayed_steps_are_the_eager_ones(tiny_model: PixelModel, name: str) -> None:
    """The batch in two parts."""
    eager, replayed = (on_a_gpu(METHODS[name](copy.deepcopy(tiny_model))) for _ in range(2))
    cpu, parts = CPU(), pixels(name, tiny_model)
    assert_equal(run(replayed, parts, range(8), graphs_of(replayed, cpu)), run(eager, parts, range(8)))
    assert cpu.replays >= 4
    assert same(replayed.state_dict(), eager.state_dict())


def test_a_run_that_goes_on_with_graphs_ends_as_one_without(tiny_model: PixelModel) -> None:
    eager, first, second = (on_a_gpu(METHODS["dmd2"](copy.deepcopy(tiny_model))) for _ in range(3))
    parts = pixels("dmd2", tiny_model)
    run(eager, parts, range(14))
    run(first, parts, range(7), graphs_of(first))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, parts, range(7, 14), graphs_of(second))
    assert same(second.state_dict(), eager.state_dict())


def latents(
    tmp_path: Path, family: str, lora: LoRASettings | None, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> tuple[DMD2, list]:
    """A guided method of two kept rows."""
    torch.manual_seed(0)
    model = LatentModel(TINY[family](tmp_path / family))
    model.encode_in(dtype)
    kept = {name: value for name, value in model.text_condition(["a", "b"]).items() if name != "time_ids"}
    given = kept | {"latent": torch.randn(2, *model.shape)}
    student = {"num_timesteps": 3, "optimizer": SLOW, "ema_decay": [0.5, 0.9]}
    critic = {"condition_on_stop": True, "student_share": 0 if lora is None else 0.1, "optimizer": SLOW}
    told = DMD2Settings(student_every=2, student=student, critic=critic, gan=GAN, **settings)
    torch.manual_seed(1)
    checkpointing = settings.get("checkpointing", "none")
    roles = make_roles(model, 2.0, None, 3, dtype, checkpointing, lora)
    return on_a_gpu(DMD2(told, model, roles, 20, 2, seed=0)), [(range(2), given)]


@pytest.mark.parametrize(
    "lora", [pytest.param(None, marks=pytest.mark.slow), LoRASettings(rank=2, alpha=2.0)], ids=["whole", "lora"]
)
@pytest.mark.parametrize("checkpointing", slow_but(["none"], ["none", "gan", "blocks"]))
@pytest.mark.parametrize("family", slow_but(["sdxl"], ["sd", "sdxl"]))
def test_what_follows_from_weights_is_as_new_as_they_are(
    tmp_path: Path, family: str, lora: LoRASettings | None, checkpointing: str
) -> None:
    """Between steps averages change places with weights, as for a picture, and other weights are loaded."""
    methods = []
    for name in ("eager", "replayed"):
        method, parts = latents(tmp_path / name, family, lora, checkpointing=checkpointing)
        graphs = None if name == "eager" else graphs_of(method)
        lines = []
        for first in (0, 4, 6):
            lines += run(method, lambda step, parts=parts: parts, range(first, first + 4 - 2 * (first > 0)), graphs)
            with method.averaged_model("0.9") as model, torch.no_grad():
                condition = model.encode_condition(parts[0][1])
                lines.append({"seen": model.denoiser(torch.ones(2, *model.shape), torch.full((2,), 500), condition)})
            load_trainable(method.critic, {name: 0.9 * w for name, w in trainable_state(method.critic).items()})
        methods.append((method, lines))
    (eager, theirs), (replayed, ours) = methods
    assert_equal(ours, theirs)
    assert same(replayed.state_dict(), eager.state_dict())


# --- whether ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "end"), [(0.25, "graphs: on, 4.00 times as fast"), (0.98, "graphs: off, they do not pay here")]
)
def test_a_trial_decides_and_says_so_once(tiny_model: PixelModel, seconds: float, end: str) -> None:
    eager, method = (on_a_gpu(METHODS["regression"](copy.deepcopy(tiny_model))) for _ in range(2))
    cpu, told, parts = CPU(), [], pixels("regression", tiny_model)
    cpu.of_replay = seconds
    graphs = graphs_of(method, cpu, 3, told)
    run(method, parts, range(7), graphs)  # three that are timed, one recorded, three replayed
    assert len(told) == 1
    assert told[0].startswith(end)
    assert "s without" in told[0]
    replays = cpu.replays
    run(method, parts, range(7, 10), graphs)
    assert (cpu.replays == replays) == (seconds > 0.9)
    run(eager, parts, range(10))
    assert same(method.state_dict(), eager.state_dict())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        pytest.param(
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.5 GiB. More"),
            "out of memory (asked for 2.5 GiB)",
            marks=pytest.mark.slow,
        ),
        (
            RuntimeError("operation not permitted when stream is capturing"),
            "a step can't be recorded (RuntimeError: oper",
        ),
    ],
)
@pytest.mark.parametrize(
    "lora", [pytest.param(None, marks=pytest.mark.slow), LoRASettings(rank=2, alpha=2.0)], ids=["whole", "lora"]
)
def test_where_none_can_be_recorded_the_steps_go_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str, lora: LoRASettings | None
) -> None:
    """Also where it ends half-way, as an operation that waits does, with gradients that are already there."""
    (eager, given), (method, _) = (latents(tmp_path / name, "sd", lora) for name in ("eager", "method"))
    told, cpu = [], CPU()

    def fail(function: Callable[[], Any]) -> Any:
        roles = (method.student, method.critic, method.discriminator)
        copied = [tensor for role in roles for each in copies_in(role) for tensor in each.copies]
        written = [*copied, *(p.data for role in roles for p in role.parameters())]  # which counts no version
        kept, moments = [tensor.clone() for tensor in written], copy.deepcopy(method.student_optimizer.state_dict())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(method.critic_optimizer, "step", lambda finite: (_ for _ in ()).throw(error))
            try:
                function()
            finally:  # on a GPU nothing of it would have run
                torch._foreach_copy_(written, kept)
                method.student_optimizer.load_state_dict(moments)

    monkeypatch.setattr(cpu, "record", fail)
    lines = run(method, lambda step: given, range(6), graphs_of(method, cpu, 2, told))
    assert_equal(lines, run(eager, lambda step: given, range(6)))
    assert [each.startswith(f"graphs: off, {line}") for each in told] == [True]
    assert same(method.state_dict(), eager.state_dict())


def test_texts_and_parts_that_come_and_go_are_named(tmp_path: Path) -> None:
    method, ((rows, given),) = latents(tmp_path, "sd", None)
    for changed, line in (
        ({"caption": ["a", "b"], "latent": given["latent"]}, "texts are embedded in every step"),
        (
            given | {"image": torch.zeros(2, 3, method.model.image_size, method.model.image_size).byte()},
            "autoencoder and text encoders come and go",
        ),
    ):
        if "image" in changed:
            del changed["latent"]
        told: list[str] = []
        run(method, lambda step, changed=changed: [(rows, changed)], range(4), graphs_of(method, None, 0, told))
        assert len(told) == 1
        assert line in told[0]


def test_batches_of_another_shape_are_steps_of_another_kind(tiny_model: PixelModel) -> None:
    eager, method = (on_a_gpu(METHODS["regression"](copy.deepcopy(tiny_model))) for _ in range(2))
    cpu = CPU()

    def parts(step: int) -> list:
        return in_parts(batch("regression", tiny_model, step), NUM, 1 + step % 2)

    run(method, parts, range(9), graphs_of(method, cpu))
    run(eager, parts, range(9))
    assert cpu.recorded == 2
    assert same(method.state_dict(), eager.state_dict())


def test_graphs_make_room_and_come_back(tiny_model: PixelModel) -> None:
    eager, method = (on_a_gpu(METHODS["regression"](copy.deepcopy(tiny_model))) for _ in range(2))
    cpu, parts = CPU(free=5), pixels("regression", tiny_model)
    graphs = graphs_of(method, cpu, 1)
    run(method, parts, range(4), graphs)
    graphs.make_room()
    assert (cpu.recorded, cpu.dropped) == (1, 1)
    run(method, parts, range(4, 8), graphs)
    assert cpu.recorded == 2
    cpu.free = 100
    graphs.make_room()  # there is enough
    assert cpu.dropped == 1
    run(eager, parts, range(8))
    assert same(method.state_dict(), eager.state_dict())


def test_a_kind_that_comes_late_has_the_memory_of_the_graphs(tiny_model: PixelModel) -> None:
    """Its first step keeps alive what theirs keep in a pool of their own."""
    eager, method = (on_a_gpu(METHODS["regression"](copy.deepcopy(tiny_model))) for _ in range(2))
    cpu = CPU(free=5)

    def parts(step: int) -> list:
        return in_parts(batch("regression", tiny_model, step), NUM, 2 if step == 4 else 1)

    run(method, parts, range(8), graphs_of(method, cpu, 1))
    assert (cpu.dropped, cpu.recorded) == (1, 2)
    run(eager, parts, range(8))
    assert same(method.state_dict(), eager.state_dict())


def test_the_loop_runs_its_steps_by_graphs(
    tiny_model: PixelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pictures, judging and checkpoints in between, stopped and resumed."""
    settings = LoopSettings(
        num_steps=12,
        batch_size=NUM,
        sample_every=4,
        checkpoint_every=5,
        grid_images=2,
        log_every=3,
        evaluation={"every": 6, "time_share": 1},
    )
    cpus: list[CPU] = []

    def made(method: Method, settings: LoopSettings) -> Graphs:
        cpus.append(CPU())
        return graphs_of(method, cpus[-1])

    def train(folder: str, stop: int = 0) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        method = on_a_gpu(METHODS["dmd2"](copy.deepcopy(tiny_model)))
        monkeypatch.setattr(method.fakes, "draw_stop", lambda step: 1)
        report = interrupt_at(stop) if stop else quiet
        loop.train(
            method,
            lambda step, rows: batch("dmd2", tiny_model, step),
            tmp_path / folder,
            settings,
            report,
            lambda method, step: {"fid": 1.0},
        )

    train("eager")
    monkeypatch.setattr(loop, "_graphs", made)
    with pytest.raises(loop.Interrupted):
        train("run", 7)
    train("run")
    assert sum(cpu.replays for cpu in cpus) >= 4
    assert same(last_state(tmp_path / "run"), last_state(tmp_path / "eager"))


# --- every recipe ----------------------------------------------------------------------------------------------------

DISTILLED = [name for name in recipe_names() if load_recipe(name).kind == "distill"]
OF_PIXELS = ["model.block_out_channels=[8, 8]", "model.norm_num_groups=4"]
FEW = {"sdxl-4step-lora", "digits-4step"}


def small(name: str) -> tuple[DMD2, list]:
    """The recipe on a narrow network of its family."""
    narrow = ["model.block_out_channels=[16, 32]", f"model.architecture={'sd' if 'sd15' in name else 'sdxl'}"]
    given = ["device=cpu", "batch_size=2", "accumulate=1", "gan.real_share=1"]
    recipe = load_recipe(name, given)
    if recipe.lora:
        recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 2})})
    on_pixels = name.startswith(("digits", "imagenet"))
    outline = of_recipe(load_recipe(*(("digits-teacher", OF_PIXELS) if on_pixels else ("shapes-teacher", narrow))))
    method = make_method(recipe, outline, torch.device("cpu"))
    return on_a_gpu(method), parts_of(recipe, outline, torch.device("cpu"))


@pytest.mark.parametrize("name", slow_but(FEW, DISTILLED))
def test_steps_of_every_recipe_look_at_nothing_and_are_replayed(name: str) -> None:
    (eager, parts), (replayed, _) = small(name), small(name)
    steps = [0, 1, 2 * eager.settings.student_every, 11, 4 * eager.settings.student_every, 21]
    with looks() as found:
        theirs = run(eager, lambda step: parts, steps)
    assert not found
    assert_equal(run(replayed, lambda step: parts, steps, graphs_of(replayed)), theirs)
    assert same(replayed.state_dict(), eager.state_dict())
