"""On an SDXL-shaped model: the closed-form gradient, training inputs as at inference, ranks, and the ablation."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.sampling import rollout
from fewstep.models.image_model import ImageModel
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.models.sampler import default_sampler, sample
from fewstep.runtime.ema import EMA
from fewstep.seeding import Draws, generator
from steps import LR, draws, make_dmd2, recorded_calls, same, whole
from tiny_pipelines import TINY

BATCH = 5
CAPTIONS = [f"picture {index}" for index in range(BATCH)]


@pytest.fixture
def latent_model(tmp_path: Path) -> LatentModel:
    return LatentModel(TINY["sdxl"](tmp_path / "vocabularies"))


make = partial(make_dmd2, batch_size=BATCH)
FOUR = {"num_timesteps": 4, **LR}


def batch() -> dict:
    draws = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=draws)
    return {"image": images.to(torch.uint8), "caption": CAPTIONS}


def eps_of(unet: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return unet(x_t, t, text, added_cond_kwargs=added, return_dict=False)[0]


def test_the_parameter_gradient_of_distribution_matching_is_the_closed_form(latent_model: LatentModel) -> None:
    """J^T g / (B D) with g = (critic - teacher) / mean|x - teacher| (DMD2, equation 1), all of it from plain diffusers.

    Teacher and critic are called here as a pipeline would, with guidance in eps as the official code has it.
    """
    scale, stop = 8.0, 2
    method = make(latent_model, guidance_scale=scale, student=FOUR, gan={"student_weight": 0, "critic_weight": 0})
    for role in (method.teacher, method.student, method.critic):
        role.double()
    method.ema = EMA(method.student, decay=0)
    for parameter in method.critic.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    condition = latent_model.text_condition(CAPTIONS)
    noise = torch.randn(4, BATCH, *latent_model.shape, dtype=torch.float64)
    fake = rollout(method.student, noise, method.timesteps, condition, stop, grad=True)
    numbers = draws(BATCH, seed=1)
    again = rollout(method.student, noise, method.timesteps, condition, stop, grad=True)
    method.student_gradients(again, condition, numbers, {})
    received = [p.grad for p in method.student.parameters()]

    numbers = draws(BATCH, seed=1)
    t, eps = numbers.randint(20, 981), numbers.randn(*fake.shape[1:])
    abar = latent_model.denoiser.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    with torch.no_grad():
        x_t = abar.sqrt() * fake + (1 - abar).sqrt() * eps
        text, pooled, time_ids = (condition[name].double() for name in ("text", "pooled", "time_ids"))
        teacher = latent_model.pipeline.unet
        eps_text = eps_of(teacher, x_t, t, text, pooled, time_ids)
        eps_null = eps_of(teacher, x_t, t, torch.zeros_like(text), torch.zeros_like(pooled), time_ids)
        eps_critic = eps_of(method.critic.network.unet, x_t, t, text, pooled, time_ids)
        guided = eps_null + scale * (eps_text - eps_null)
        teacher_x0, critic_x0 = (((x_t - (1 - abar).sqrt() * e) / abar.sqrt()) for e in (guided, eps_critic))
        g = (critic_x0 - teacher_x0) / (fake - teacher_x0).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = torch.autograd.grad(fake, list(method.student.parameters()), g / fake.numel())
    assert len(expected) > 50
    for ours, theirs in zip(received, expected, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


@pytest.mark.parametrize("stop", range(4))
def test_training_feeds_the_student_what_sampling_feeds_it(latent_model: LatentModel, stop: int) -> None:
    """The same noise in a training step and in the sampler of `fewstep sample`: equal inputs bit for bit."""
    method = make(latent_model, student=FOUR)
    step = next(step for step in range(1, 99, 2) if method.turn(step).stop == stop)
    student = latent_model.student(method.student, method.timesteps)
    noise = torch.randn(4, BATCH, *latent_model.shape)
    noise[: stop + 1] = torch.randn((stop + 1, *noise.shape[1:]), generator=generator(0, "dmd2", step))
    with recorded_calls(method.student.network) as inference:
        sample(student, default_sampler(student), noise, latent_model.text_condition(CAPTIONS))
    with recorded_calls(method.student.network) as training:
        method.step(whole(batch(), BATCH), step)
    assert (len(inference), len(training)) == (4, stop + 1)
    for (ours, *_), (theirs, *_) in zip(training, inference[: stop + 1], strict=True):
        assert same(ours[:2], theirs[:2])
        assert same([ours[2][name] for name in theirs[2]], theirs[2])


def real_batch(model: ImageModel) -> dict:
    if isinstance(model, LatentModel):
        return batch()
    return {"image": torch.full((BATCH, 1, 8, 8), 255).byte(), "label": torch.arange(BATCH) % 3}


@pytest.mark.parametrize("family", ["pixel", "latent"])
@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_without_backward_simulation_the_student_sees_noised_reals(
    tiny_model: PixelModel, latent_model: LatentModel, family: str, gan: float
) -> None:
    model = tiny_model if family == "pixel" else latent_model
    method = make(
        model,
        student={"num_timesteps": 4, "optimizer": {"lr": 1e-9}, "backward_simulation": False},
        critic={"condition_on_stop": True, "optimizer": {"lr": 1e-9}},
        gan={"student_weight": gan, "critic_weight": gan},
    )
    encoded: list[Tensor] = []
    encode = model.encode_x0
    model.encode_x0 = lambda *args: encoded.append(encode(*args)) or encoded[-1]
    residues, stops_seen = [], set()
    for step in range(6):
        with recorded_calls(method.student) as student, recorded_calls(method.critic) as critic:
            method.step(whole(real_batch(model), BATCH), step)
        (((x_t, t, condition), *_),) = student
        stops = (t[:, None] == method.timesteps).long().argmax(dim=1)
        assert torch.equal(method.timesteps[stops], t)
        assert all(torch.equal(seen["stop"], stops) for (_, _, seen), *_ in critic)
        alpha, sigma = (each.float().reshape(-1, 1, 1, 1) for each in method.schedule.alpha_sigma(t))
        first = (stops == 0).reshape(-1, 1, 1, 1)
        scale = 80.0 if family == "pixel" else 1.0
        residues.append(torch.where(first, x_t / scale, (x_t - alpha * encoded[-1]) / sigma).flatten(1))
        stops_seen |= set(stops.tolist())
        expected = model.encode_condition(real_batch(model))
        assert all(torch.equal(condition[name], expected[name]) for name in expected)
    assert len(encoded) == 6  # real data are encoded once a step
    assert stops_seen == {0, 1, 2, 3}
    residue = torch.cat(residues)
    assert 0.95 < residue.std() < 1.05
    assert abs(residue.mean()) < 0.05


def test_a_one_step_student_without_backward_simulation_starts_from_pure_noise(latent_model: LatentModel) -> None:
    student = {"num_timesteps": 1, "timesteps": [399], "backward_simulation": False}
    method = make(latent_model, student=student)
    with recorded_calls(method.student) as calls:
        method.step(whole(batch(), BATCH), 0)
    (((x_t, t, _), *_),) = calls
    numbers = Draws(generator(0, "dmd2", 0), range(BATCH), BATCH)
    method.model.encode_x0(batch(), numbers)
    numbers.randint(0, 1)
    assert torch.equal(x_t, numbers.randn(*x_t.shape[1:]))
    assert t.tolist() == [399] * BATCH
