"""All methods: a batch in parts is the same batch (draws, gradients, metrics, weights), and a state goes on."""

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import losses
from fewstep.diffusion.timesteps import karras_grid
from fewstep.embedded.settings import AutoencoderConfig
from fewstep.embedded.small_models import build_autoencoder
from fewstep.errors import UserError
from fewstep.models.autoencoder import Autoencoder
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.settings import LoRASettings
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.tracking import is_count
from fewstep.seeding import Draws, generator
from fewstep.training.autoencoder import AutoencoderTraining
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.guard import Guard
from fewstep.training.regression import PairLoss, Regression
from fewstep.training.roles import make_roles
from fewstep.training.settings import AutoencoderSettings, RegressSettings, TeacherSettings
from fewstep.training.teacher import TeacherTraining
from looks import looks
from steps import GAN, PAIRS, in_parts, make_dmd2, same
from tiny_pipelines import TINY

NUM = 6


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "draw",
    [
        lambda draws: draws.randn(),
        lambda draws: draws.randn(2, 5),
        lambda draws: draws.randn(3, before=(4,)).transpose(0, 1),
        lambda draws: draws.rand(7),
        lambda draws: draws.randint(3, 90, 2),
    ],
)
def test_the_rows_of_any_division_are_the_whole(size: int, draw: Callable[[Draws], Tensor]) -> None:
    whole = Draws(generator(0, "test"), range(NUM), NUM)
    expected = [draw(whole), draw(whole)]  # also of the numbers behind
    rows = [range(first, min(first + size, NUM)) for first in range(0, NUM, size)]
    parts = [Draws(generator(0, "test"), each, NUM) for each in rows]
    found = [torch.cat([draw(part) for part in parts]) for _ in range(2)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert [len(part) for part in parts] == [len(each) for each in rows]
    some = [row for row in range(NUM) if row % 2][: size + 1]
    few = Draws(generator(0, "test"), some, NUM)
    assert all(torch.equal(draw(few), theirs[some]) for theirs in expected)


def test_they_are_as_they_say() -> None:
    draws = Draws(generator(0, "test"), range(1000, 3000), 40_000)
    assert draws.randn(3, before=(2,)).shape == (2, 2000, 3)
    assert draws.rand(2, 1).shape == (2000, 2, 1)
    integers = draws.randint(3, 7)
    assert (integers.dtype, integers.shape) == (torch.int64, (2000,))
    assert torch.bincount(integers).tolist() == pytest.approx([0, 0, 0, 500, 500, 500, 500], rel=0.2)


SLOW = {"lr": 1e-3, "eps": 1e-3}  # AdamW divides by the gradient's size: without it, rounding of nothing becomes a step


def dmd2(**settings: object) -> Callable:
    settings = {
        "student": {"num_timesteps": 3, "optimizer": SLOW},
        "critic": {"optimizer": SLOW, "condition_on_stop": True},
        **settings,
    }
    return lambda model: make_dmd2(model, NUM, 2.0, **settings)


def regression(model: PixelModel) -> Regression:
    settings = RegressSettings(student={"optimizer": SLOW}, regression=PAIRS)
    return Regression(settings, model, model.denoiser.requires_grad_(True), PairLoss(model), 20)


def teacher(model: PixelModel) -> TeacherTraining:
    return TeacherTraining(TeacherSettings(class_dropout=0.5, optimizer=SLOW), model, 20, NUM, seed=0)


def autoencoder(model: PixelModel) -> AutoencoderTraining:
    torch.manual_seed(0)
    model = Autoencoder(build_autoencoder(AutoencoderConfig(block_out_channels=[8, 16], norm_num_groups=4)))
    return AutoencoderTraining(AutoencoderSettings(optimizer=SLOW), model, 20, NUM, seed=0)


METHODS: dict[str, Callable] = {
    "dmd2": dmd2(),
    "dmd2, independent": dmd2(gan=GAN | {"independent_noise": True}),
    "dmd2, without simulation": dmd2(student={"num_timesteps": 3, "optimizer": SLOW, "backward_simulation": False}),
    "dmd2, cycle and a third of the reals": dmd2(
        critic={"optimizer": SLOW, "condition_on_stop": True, "samples": "cycle"},
        gan=GAN | {"independent_noise": True, "real_share": 1 / 3},
        checkpointing="gan",
    ),
    "dmd2, mixed stops": dmd2(
        student={"num_timesteps": 3, "optimizer": SLOW, "stops": "mixed"}, diversity={"weight": 0.5, "steps": 2}
    ),
    "dmd2, random times": dmd2(
        student={"num_timesteps": 4, "optimizer": SLOW, "timesteps": "random", "stops": "mixed"},
        critic={"optimizer": SLOW},
    ),
    "dmd2, weights of losses": dmd2(
        critic={"optimizer": SLOW, "condition_on_stop": True, "student_share": 0.1, "stop_rate": 30},
        dm={"floor": 0.5, "project": True, "divergence": "js"},
        gan=GAN | {"r1_weight": 0.5, "max_index": 700},
    ),
    "dmd2, pairs": dmd2(regression_weight=0.5, regression=PAIRS),
    "regression": regression,
    "teacher": teacher,
    "autoencoder": autoencoder,
}


def batch(name: str, model: PixelModel, step: int) -> dict:
    draws = torch.Generator().manual_seed(step)
    shape = (3, 64, 64) if name == "autoencoder" else model.shape
    images = torch.randint(0, 256, (NUM, *shape), generator=draws, dtype=torch.uint8)
    label = torch.randint(0, 3, (NUM,), generator=draws)
    pairs = {key: torch.randn(NUM, *model.shape, generator=draws) for key in ("noise", "x0")} | {"label": label}
    if name == "regression":
        return pairs
    return {"image": images, "label": label} | ({"pair": pairs} if "pairs" in name and step % 2 == 0 else {})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("parts", [2, 6])
def test_weights_and_metrics_are_those_of_one_piece(tiny_model: PixelModel, name: str, parts: int) -> None:
    found = []
    for num in (1, parts):
        method = METHODS[name](copy.deepcopy(tiny_model))
        lines = [method.step(in_parts(batch(name, tiny_model, step), NUM, num), step) for step in range(3)]
        state = method.state_dict()
        networks = [state[part] for part in ("student", "critic", "discriminator", "denoiser", "vae") if part in state]
        found.append((lines, networks, method))
    (lines, networks, method), (other_lines, other_networks, other) = found
    for ours, theirs in zip(networks, other_networks, strict=True):
        ours, theirs = (torch.cat([value.flatten() for value in each.values()]) for each in (ours, theirs))
        assert (ours - theirs).norm() <= 1e-6 * ours.norm()
    for ours, theirs in zip(lines, other_lines, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key].item() == pytest.approx(value.item(), rel=2e-4, abs=1e-6), key
            assert not (is_count(key) and value)
    if name == "autoencoder":
        torch.testing.assert_close(method.variance, other.variance)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_holds_what_goes_on_bit_for_bit(tiny_model: PixelModel, tmp_path: Path, name: str) -> None:
    straight, first, second = (METHODS[name](copy.deepcopy(tiny_model)) for _ in range(3))
    for method, steps in ((straight, range(4)), (first, range(2))):
        for step in steps:
            method.step(in_parts(batch(name, tiny_model, step), NUM, 1), step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(2, 4):
        second.step(in_parts(batch(name, tiny_model, step), NUM, 1), step)
    assert same(second.state_dict(), straight.state_dict())
    assert not same(first.state_dict(), straight.state_dict())
    with second.averaged_model() as ours, straight.averaged_model() as theirs:
        assert same(*(each.vae if name == "autoencoder" else each.denoiser for each in (ours, theirs)))


@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_the_device(tiny_model: PixelModel, name: str) -> None:
    method = METHODS[name](copy.deepcopy(tiny_model))
    steps = [in_parts(batch(name, tiny_model, step), NUM, 1 + step % 2) for step in range(6)]
    with looks() as found:
        for step, parts in enumerate(steps):
            method.step(parts, step)
    assert not found


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("lora", [None, LoRASettings(rank=2, alpha=2.0)])
def test_no_step_of_latents_waits_with_what_is_kept(tmp_path: Path, family: str, lora: LoRASettings | None) -> None:
    """Embeddings and latents are read before the step; in bfloat16, guided; a teacher's loss, too."""
    model = LatentModel(TINY[family](tmp_path / family))
    model.encode_in(torch.bfloat16)
    kept = {name: value for name, value in model.text_condition(["a", "b", "c"]).items() if name != "time_ids"}
    given = kept | {"latent": torch.randn(3, *model.shape)}
    settings = DMD2Settings(student_every=2, student={"num_timesteps": 3}, critic={"condition_on_stop": True}, gan=GAN)
    roles = make_roles(model, 2.0, None, 3, dtype=torch.bfloat16, lora=lora)
    methods = [DMD2(settings, model, roles, 20, 3, seed=0)]
    if lora is None:
        of_teacher = LatentModel(TINY[family](tmp_path / "teacher"))
        teaching = TeacherSettings(class_dropout=0.5, optimizer=SLOW, noise={"distribution": "index"})
        methods.append(TeacherTraining(teaching, of_teacher, 20, 3, seed=0))
    with looks() as found:
        for method, step in product(methods, range(4)):
            method.step([(range(3), given)], step)
    assert not found


def test_what_waits_is_seen(tiny_model: PixelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    method, guard = dmd2()(copy.deepcopy(tiny_model)), Guard(20)
    guard.add(method.step(in_parts(batch("dmd2", tiny_model, 0), NUM, 1), 0))
    with looks() as found:
        guard.check(1)  # reads counts, where a line is due
    assert any(line.startswith("tolist") and "guard.py" in line for line in found)
    monkeypatch.setattr(losses, "finite_samples", lambda x: x[x.flatten(1).sum(1) > 0].new_ones(len(x)).bool())
    with looks() as found:
        losses.dmd_loss(*torch.randn(3, 4, 1, 8, 8))
    assert any("index" in line and "losses.py" in line for line in found)
    with looks() as found:
        karras_grid(3)  # made on the CPU: from there its way to a GPU would be waited for
    assert any(line.startswith("linspace") for line in found)


def test_parts_that_do_not_divide_the_batch_are_refused_at_the_door() -> None:
    with pytest.raises(UserError, match="accumulate: 3 parts don't divide batch_size 64"):
        load_recipe("digits-1step", ["batch_size=64", "accumulate=3"])
    with pytest.raises(UserError, match=r"accumulate=2 and parallel\.max_rows_per_part=8 both say what a part is"):
        load_recipe("digits-1step", ["batch_size=64", "accumulate=2", "parallel.max_rows_per_part=8"])
