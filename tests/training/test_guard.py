"""What is not finite never reaches the weights: it is left out or skipped, counted, named, and ends the run in time."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.commands.distill import distill
from fewstep.commands.teach import teach
from fewstep.errors import Interrupted, UserError
from fewstep.models.pixel_model import PixelModel
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.checkpoint import checkpoints, load_state
from fewstep.runtime.tracking import read_metrics
from fewstep.training.dmd2 import DMD2
from fewstep.training.guard import Guard
from fewstep.training.optimization import Optimizer
from fewstep.training.regression import PairLoss, Regression
from fewstep.training.settings import OptimizerSettings, RegressSettings
from steps import (
    GAN,
    PAIRS,
    SHORT,
    SMALL,
    flat,
    in_parts,
    interrupt_at,
    make_dmd2,
    quiet,
    received,
    same,
    weights,
    whole,
)

BATCH, NAN = 4, float("nan")
BROKEN = pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])


# --- the optimizer ---------------------------------------------------------------------------------------------------


@BROKEN
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_an_update_that_is_not_finite_leaves_no_trace_but_in_the_rate(value: float, where: str) -> None:
    settings = OptimizerSettings(lr=1e-2, decay="linear", clip_norm=1.0)
    first, second = (nn.Parameter(torch.arange(3.0)) for _ in range(2))
    ours, theirs = Optimizer([first], settings, 10), Optimizer([second], settings, 10)

    def update(optimizer: Optimizer, parameter: nn.Parameter, gradient: Tensor, finite: bool = True) -> float:
        parameter.grad = gradient.clone()
        skipped = optimizer.step(torch.tensor(finite))[1].item()
        optimizer.advance()
        return skipped

    good, other = torch.tensor([0.1, -2.0, 3.0]), torch.tensor([1.0, 1.0, -0.5])
    assert update(ours, first, good) == update(theirs, second, good) == 0
    bad = torch.tensor([0.1, value, 1.0]) if where == "gradient" else good
    assert update(ours, first, bad, finite=where == "gradient") == 1
    assert torch.equal(first, second)
    assert first.grad is None
    theirs.advance()  # the rate is a function of the run's progress
    for _ in range(2):
        assert update(ours, first, other) == update(theirs, second, other) == 0
    assert torch.equal(first, second)
    assert same(ours.state_dict(), theirs.state_dict())
    assert ours.adamw.state[first]["step"] == 3
    assert ours.progress == 4


# --- the methods -----------------------------------------------------------------------------------------------------


def make(model: PixelModel, independent: bool = False) -> DMD2:
    optimizer = {"optimizer": {"lr": 1e-3, "clip_norm": 1e9}}
    student = {"num_timesteps": 1, "ema_decay": 0.5, **optimizer}
    gan = GAN | {"independent_noise": independent}
    return make_dmd2(copy.deepcopy(model), BATCH, student=student, critic=optimizer, gan=gan)


def batch(model: PixelModel) -> dict[str, Tensor]:
    images = torch.randint(0, 256, (BATCH, *model.shape), generator=torch.Generator().manual_seed(0))
    return {"image": images.to(torch.uint8), "label": torch.arange(BATCH) % 3}


def break_samples(module: nn.Module, rows: slice, value: float) -> None:
    """Puts the value into one place of these samples of whatever the module gives."""

    def hook(m: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[rows, ..., 0, 0] = value
        return output

    module.register_forward_hook(hook)


@BROKEN
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_one_broken_sample_of_the_teachers_is_left_out(tiny_model: PixelModel, value: float, parts: int) -> None:
    method, other = make(tiny_model), make(tiny_model)
    for moved, p in zip(method.critic.parameters(), other.critic.parameters(), strict=True):
        p.data = moved.data.add_(0.02 * torch.randn_like(p)).clone()  # a critic that has moved away from the teacher
    before = weights(method.student)
    break_samples(method.teacher, slice(1, 2) if parts < 4 else slice(0, 0), value)
    metrics = method.step(in_parts(batch(tiny_model), BATCH, parts), 0)
    assert metrics["not_finite_teacher"] == (parts if parts < 4 else 0)
    assert metrics["skipped_student"] == metrics["skipped_critic"] == 0
    assert all(value.isfinite() for value in metrics.values())
    assert all(p.isfinite().all() for p in method.student.parameters())
    assert not same(before, method.student)
    other.step(in_parts(batch(tiny_model), BATCH, parts), 0)
    assert same(other.student, method.student) == (parts == 4)


@pytest.mark.parametrize("parts", [1, 4])
def test_where_every_sample_of_the_teachers_is_broken_the_students_update_is_skipped(
    tiny_model: PixelModel, parts: int
) -> None:
    method = make(tiny_model)
    averages = [x.clone() for x in method.ema.averages_of().values()]
    before, critic = weights(method.student), weights(method.critic)
    break_samples(method.teacher, slice(None), NAN)
    metrics = method.step(in_parts(batch(tiny_model), BATCH, parts), 0)
    assert (metrics["skipped_student"], metrics["skipped_critic"]) == (1, 0)
    assert same([before, averages], [method.student, method.ema.averages_of()])
    assert not same(critic, method.critic)


@BROKEN
def test_a_broken_prediction_of_the_critics_is_left_out_by_the_student_and_skipped_by_the_critic(
    tiny_model: PixelModel, value: float
) -> None:
    method = make(tiny_model)
    student, others = weights(method.student), weights(method.critic, method.discriminator)
    break_samples(method.critic, slice(1, 2), value)
    metrics = method.step(whole(batch(tiny_model), BATCH), 0)
    assert (metrics["skipped_student"], metrics["skipped_critic"]) == (0, 1)
    assert metrics["not_finite_critic"] == 1
    assert not same(student, method.student)
    assert all(p.isfinite().all() for p in method.student.parameters())
    assert same(others, [method.critic, method.discriminator])


@BROKEN
@pytest.mark.parametrize("independent", [False, True])
def test_the_gan_learns_nothing_from_a_broken_image_and_the_same_from_the_others(
    tiny_model: PixelModel, value: float, independent: bool
) -> None:
    """Its gradients are those of the reals' loss over the other three, of four."""
    found = []
    for broken in (True, False):
        method = make(tiny_model, independent)
        encode = method.model.encode_x0

        def encoded(data, draws, encode=encode, broken=broken) -> Tensor:
            real = encode(data, draws)
            real[2, 0, 3, 3] = value if broken else 0.0
            return real

        method.model.encode_x0 = encoded
        if not broken:  # the third sample's logit is a constant
            discriminate, calls = method.discriminator.forward, []

            def forward(features: Tensor, discriminate=discriminate, calls=calls) -> Tensor:
                calls.append(logits := discriminate(features))
                kept = torch.arange(BATCH) != 2
                return torch.where(kept, logits, logits.detach()) if len(calls) == 2 else logits

            method.discriminator.forward = forward
        found.append(received(method, "critic"))
        metrics = method.step(whole(batch(tiny_model), BATCH), 1)
        assert metrics["not_finite_data"] == broken
        assert metrics["skipped_critic"] == 0
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all()
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_a_regression_skips_a_batch_with_a_broken_pair(tiny_model: PixelModel) -> None:
    settings = RegressSettings(student={"ema_decay": 0.5}, regression=PAIRS)
    student = copy.deepcopy(tiny_model.denoiser).requires_grad_(True)
    method = Regression(settings, tiny_model, student, PairLoss(tiny_model), 10)
    noise, before = torch.randn(BATCH, *tiny_model.shape), weights(student)
    pairs = {"noise": noise, "x0": noise.clone(), "label": torch.arange(BATCH) % 3}
    pairs["x0"][3, 0, 2, 2] = NAN
    metrics = method.step(in_parts(pairs, BATCH, 2), 0)
    assert (metrics["skipped_student"], metrics["not_finite_data"]) == (1, 1)
    assert same(before, student)
    assert method.step(in_parts(pairs | {"x0": noise}, BATCH, 2), 1)["skipped_student"] == 0
    assert not same(before, student)


# --- the guard -------------------------------------------------------------------------------------------------------


def fed(steps: list[dict[str, float]], max_skipped: int = 3) -> Guard:
    guard = Guard(max_skipped)
    for metrics in steps:
        guard.add({name: torch.tensor(float(value)) for name, value in metrics.items()})
    return guard


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (["teacher"], "the teacher's predictions were not finite; 3 updates in a row .* try precision=float32"),
        (["critic", "student"], "the student's samples were not finite; .* lower student.optimizer.lr"),
        (["critic"], "the critic's predictions were not finite; .* lower critic.optimizer.lr"),
        (["teacher", "data"], "the data were not finite; .* look for broken files"),
        ([], "the gradient of the student was not finite"),
    ],
)
def test_the_message_names_the_first_cause(broken: list[str], said: str) -> None:
    bad = {"skipped_student": 1, **{f"not_finite_{source}": 2 for source in broken}}
    with pytest.raises(UserError, match=f"^step 9: {said}.*the newest checkpoint is whole$"):
        fed([bad] * 3).check(9)


def test_only_updates_in_a_row_end_a_run_and_of_one_optimizer() -> None:
    bad, good = {"skipped_student": 1, "skipped_critic": 0}, {"skipped_student": 0, "skipped_critic": 1}
    fed([bad, bad, good, good, bad, bad]).check(6)
    between = {"skipped_critic": 0}  # not the student's turn
    with pytest.raises(UserError, match="the gradient of the student"):
        fed([bad, between, bad, between, bad]).check(5)
    with pytest.raises(UserError, match="the gradient of the student"):  # whenever the host looks
        fed([bad, bad, bad, good]).check(4)
    recovered = fed([{"skipped_student": 1, "not_finite_data": 1}, {"skipped_student": 0}])
    recovered.check(2)
    for _ in range(3):
        recovered.add({"skipped_student": torch.tensor(1.0)})
    with pytest.raises(UserError, match="the gradient of the student"):  # not the data, which were well again
        recovered.check(5)


# --- runs ------------------------------------------------------------------------------------------------------------

TINY = [*SHORT, "checkpoint_every=2"]


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    teach(load_recipe("digits-teacher", [*TINY, *SMALL, "num_steps=2"]), run, report=quiet)
    return run


@pytest.fixture
def start(teacher_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains what is of the kind, in a folder that it gives."""

    def run(kind: str, *overrides: str, resume: bool = False, report=quiet) -> Path:
        names = {"distill": "digits-4step", "teach": "digits-teacher", "autoencoder": "shapes-autoencoder"}
        given = {"distill": [f"teacher={teacher_run}", "student_every=2"], "teach": SMALL}.get(kind, [])
        recipe = load_recipe(names[kind], [*TINY, *given, *overrides])
        (distill if kind == "distill" else teach)(recipe, tmp_path / "run", resume=resume, report=report)
        return tmp_path / "run"

    return run


def break_gradients(monkeypatch: pytest.MonkeyPatch, first: int, last: int = 10**9) -> None:
    """Of every optimizer's updates number `first` to `last`."""
    update = Optimizer.step

    def step(self: Optimizer, finite: Tensor) -> tuple[Tensor, Tensor]:
        if first <= self.progress <= last:
            self.parameters[0].grad.view(-1)[0] = NAN
        return update(self, finite)

    monkeypatch.setattr(Optimizer, "step", step)


def assert_finite(run: Path) -> None:
    for checkpoint in checkpoints(run):
        assert all(tensor.isfinite().all() for tensor in flat(load_state(checkpoint)))


KINDS = pytest.mark.parametrize("kind", ["teach", "distill", "autoencoder"])


@KINDS
def test_a_run_that_diverges_between_log_lines_ends_with_good_checkpoints(
    kind: str, start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_gradients(patch, first=4)
        with pytest.raises(UserError, match=r"^step 8: .* 4 updates in a row were skipped \(max_skipped\)"):
            start(kind, "max_skipped=4")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["00000004", "00000006"]
    assert_finite(tmp_path / "run")
    assert_finite(start(kind, "max_skipped=4", resume=True))  # what broke it is gone


@KINDS
def test_ctrl_c_between_log_lines_saves_what_is_finite(
    kind: str, start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradients(monkeypatch, first=5)
    with pytest.raises(Interrupted, match="stopped at step 7"):
        start(kind, report=interrupt_at(6))
    assert checkpoints(tmp_path / "run")[-1].name == "00000007"
    assert_finite(tmp_path / "run")


def test_a_run_goes_on_behind_skipped_updates_and_tells_them(start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    break_gradients(monkeypatch, first=4, last=6)
    run = start("teach", "log_every=6")
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["skipped_updates"] for line in lines] == [2, 1]
    assert all(value == value for line in lines for value in line.values())  # no NaN among the means
    assert_finite(run)


@pytest.mark.parametrize(
    ("settings", "said"),
    [  # one update can be finite and what it makes of the weights not
        (["lr=1e39", "warmup_steps=0"], r"^step 2: (denoiser|ema) is not finite and was not saved; lower the learning"),
        (["lr=1e30", "clip_norm=1e30"], "the network's predictions were not finite; 3 updates in a row"),
    ],
)
def test_weights_that_overflow_are_not_saved(start: Callable, tmp_path: Path, settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        start("teach", "max_skipped=3", *(f"optimizer.{each}" for each in settings))
    assert_finite(tmp_path / "run")
    if "step 2" in said:
        assert checkpoints(tmp_path / "run") == []
