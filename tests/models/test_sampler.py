"""Image i of a seed is the same in every batch; samplers call the network as often as they say."""

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.sampling import ddim, heun, rollout
from fewstep.errors import UserError
from fewstep.models import sampler as generation
from fewstep.models.pixel_model import PixelModel
from fewstep.models.sampler import Sampler, default_sampler, draw_noise, generate, parse_sampler, sample

TIMESTEPS = [80.0, 2.0, 0.5]
SAMPLERS = [Sampler("ddim", 4), Sampler("heun", 3), Sampler("student", 3)]


@pytest.fixture
def student(tiny_model: PixelModel) -> PixelModel:
    """A model with timesteps; as a teacher it is the same network."""
    tiny_model.timesteps = TIMESTEPS
    return tiny_model


def level_gap(first: Tensor, second: Tensor) -> int:
    """The largest difference in grey levels: batches of different sizes round differently, by one level at most."""
    return int((first.int() - second.int()).abs().max())


# --- which image is which --------------------------------------------------------------------------------------------


def test_the_noise_of_an_image_does_not_depend_on_the_batch(tiny_model: PixelModel) -> None:
    whole = draw_noise(tiny_model, 2, 0, 6, seed=3)
    assert not torch.equal(whole, draw_noise(tiny_model, 2, 0, 6, seed=0))
    assert torch.equal(whole[:, 2:5], draw_noise(tiny_model, 2, 2, 5, seed=3))
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], draw_noise(tiny_model, 1, 0, 6, seed=3)[0])  # every sampler starts from the same


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("first", "batch_size"), [(0, 1), (0, 4), (0, 7), (3, 2)])
def test_an_image_depends_neither_on_the_batch_size_nor_on_where_the_range_starts(
    student: PixelModel, sampler: Sampler, first: int, batch_size: int
) -> None:
    whole = generate(student, sampler, range(8), seed=1)
    assert level_gap(generate(student, sampler, range(first, 8), seed=1, batch_size=batch_size), whole[first:]) <= 1
    assert level_gap(whole[:1], whole[1:2]) > 10


def test_a_label_fixes_the_class_and_keeps_the_noise(student: PixelModel) -> None:
    in_turn, twos = (generate(student, SAMPLERS[2], range(6), asked=asked) for asked in (None, [2]))
    assert level_gap(twos[2::3], in_turn[2::3]) <= 1
    assert level_gap(twos[0], in_turn[0]) > 1


def test_finished_images_are_reported(student: PixelModel) -> None:
    counts: list[int] = []
    images = generate(student, SAMPLERS[2], range(10, 17), batch_size=3, report=counts.append)
    assert counts == [3, 6, 7]
    assert (len(images), images.dtype) == (7, torch.uint8)


# --- what is run -----------------------------------------------------------------------------------------------------


def test_the_student_is_sampled_by_the_rollout_that_trains_it(student: PixelModel) -> None:
    noise, condition = draw_noise(student, 3, 0, 4, seed=0), student.conditions(range(4))
    x0 = rollout(student.denoiser, noise, torch.tensor(TIMESTEPS).double(), condition, stop=2).detach()
    assert torch.equal(sample(student, SAMPLERS[2], noise, condition).detach(), x0)
    assert torch.equal(generate(student, SAMPLERS[2], range(4)), student.decode(x0))


def test_the_teachers_samplers_are_those_of_the_mathematics(tiny_model: PixelModel) -> None:
    noise, condition = draw_noise(tiny_model, 1, 0, 4, seed=0), tiny_model.conditions(range(4))
    schedule = tiny_model.denoiser.schedule
    by_ddim = ddim(tiny_model.denoiser, noise[0], schedule.grid(4), condition)
    by_heun = heun(tiny_model.denoiser, noise[0], schedule.ode_grid(3), condition)
    assert torch.equal(sample(tiny_model, Sampler("ddim", 4), noise, condition), by_ddim)
    assert torch.equal(sample(tiny_model, Sampler("heun", 3), noise, condition), by_heun)


@pytest.mark.parametrize("sampler", [*SAMPLERS, Sampler("ddim", 1), Sampler("heun", 1), Sampler("heun", 18)])
def test_nfe_is_the_count_of_network_calls_and_no_gradient_is_left(student: PixelModel, sampler: Sampler) -> None:
    calls = []
    handle = student.denoiser.network.register_forward_hook(lambda *args: calls.append(1))
    generate(student, sampler, range(2))
    handle.remove()
    assert len(calls) == sampler.nfe
    assert all(parameter.grad is None for parameter in student.denoiser.parameters())


def test_the_speed_is_the_batch_over_the_median_time(student: PixelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1, 10, 30, 100, 103])  # batches of 1, 20 and 3 seconds
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(ticks))
    assert generation.images_per_second(student, SAMPLERS[2], batch_size=6) == 2.0


def test_the_speed_is_measured_for_as_long_as_asked(student: PixelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(ticks))
    assert generation.images_per_second(student, SAMPLERS[2], batch_size=6, min_seconds=8) == 6.0
    assert next(ticks) == 16  # eight batches of one second, two looks at the clock each


# --- which sampler ---------------------------------------------------------------------------------------------------


def test_the_default_is_the_students_own_or_heun(tiny_model: PixelModel) -> None:
    assert default_sampler(tiny_model) == Sampler("heun", 18)
    tiny_model.timesteps = TIMESTEPS
    assert default_sampler(tiny_model) == Sampler("student", 3)


def test_a_sampler_is_read_from_its_name() -> None:
    assert parse_sampler("heun:18") == Sampler("heun", 18)
    assert parse_sampler("ddim:1") == Sampler("ddim", 1)
    assert parse_sampler("ddim:50@3") == Sampler("ddim", 50, 3.0)
    assert parse_sampler("dpm++:4@1.5") == Sampler("dpm++", 4, 1.5)
    assert parse_sampler("unipc:2") == Sampler("unipc", 2)
    spelt = [str(parse_sampler(text)) for text in ("euler:3@8.0", "euler:3@1", "heun:18")]  # whatever the user's
    assert spelt == ["euler:3@8", "euler:3", "heun:18"]


NO_STEPS = ["", "heun", "heun:", "heun:0", "heun:-1", "midpoint:4", "student:1"]


@pytest.mark.parametrize("text", NO_STEPS + [f"ddim:{steps}" for steps in ("²", "4x", "4@", "4@x", "4@0.5", "4@nan")])
def test_another_text_is_no_sampler(text: str) -> None:
    with pytest.raises(UserError, match="write ddim:STEPS, heun:STEPS"):
        parse_sampler(text)
