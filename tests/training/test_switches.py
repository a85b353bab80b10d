"""What later work adds to DMD2, each a switch: it does in a step what its formula says; and which don't go together."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.losses import dmd_loss, gan_fake_loss, gan_real_loss
from fewstep.diffusion.sampling import first_x0, rollout
from fewstep.errors import UserError
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.features import features
from fewstep.networks.settings import LoRASettings
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.ema import trainable_state
from fewstep.seeding import Draws, Random, generator
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.pool import Samples
from fewstep.training.roles import make_roles
from steps import GAN, LR, draws, make_dmd2, whole
from tiny_pipelines import TINY

BATCH = 6
MIXED = {"num_timesteps": 3, **LR, "stops": "mixed"}


def batch(model: PixelModel) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (BATCH, *model.shape), generator=numbers, dtype=torch.uint8)
    return {"image": images, "label": torch.randint(0, 3, (BATCH,), generator=numbers)}


def make(model: PixelModel, **settings: object) -> DMD2:
    return make_dmd2(model, BATCH, **settings)


def moved_critic(method: DMD2) -> DMD2:
    """The method with a critic that is not the teacher any more."""
    state = method.critic.state_dict()
    method.critic.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in state.items()})
    return method


def samples(method: DMD2, seed: int = 0) -> Samples:
    numbers = torch.Generator().manual_seed(seed)
    condition = {"label": torch.randint(0, 3, (BATCH,), generator=numbers)}
    return Samples(draws(BATCH, seed), torch.randn(BATCH, *method.model.shape, generator=numbers), condition)


# --- at which timesteps ----------------------------------------------------------------------------------------------


def test_mixed_stops_train_each_sample_at_its_own_and_all_of_them_alike(tiny_model: PixelModel) -> None:
    method = make(tiny_model, student=MIXED)
    for step in range(4):
        random = Random(0, step, "cpu")
        fake = method.fakes.simulated({}, method.turn(step), random.draws("dmd2", range(BATCH), BATCH), random)
        assert Counter(fake.stops.tolist()) == {0: 2, 1: 2, 2: 2}
        again = Draws(generator(0, "dmd2", step), range(BATCH), BATCH)
        noise = again.randn(*tiny_model.shape, before=(3,))
        condition = tiny_model.draw_condition({}, again)
        for stop in range(3):
            x0 = rollout(method.student, noise, method.timesteps, condition, stop)
            mine = fake.stops == stop
            torch.testing.assert_close(fake.x0[mine], x0[mine])


def test_a_batch_of_one_has_each_stop_as_often_as_if_it_were_shared(tiny_model: PixelModel) -> None:
    method = make_dmd2(tiny_model, 1, student=MIXED)
    stops = []
    for step in range(120):
        random = Random(0, step, "cpu")
        drawn = method.fakes.simulated({}, method.turn(step), random.draws("dmd2", range(1), 1), random)
        stops += drawn.stops.tolist()
    assert stops == [method.turn(step).stop for step in range(120)]
    assert all(25 < count < 55 for count in Counter(stops).values())


def test_the_critic_is_told_the_stop_of_each_sample(tiny_model: PixelModel) -> None:
    method = make(tiny_model, student=MIXED, critic=LR | {"condition_on_stop": True})
    told = []
    method.critic.network.register_forward_pre_hook(lambda module, args: told.append(args[2]["stop"].tolist()))
    method.step(whole(batch(tiny_model), BATCH), 1)
    assert len(told) > 0
    assert all(sorted(stops) == [0, 0, 1, 1, 2, 2] for stops in told)


def test_random_times_are_a_fresh_grid_per_step_and_a_function_of_it(tiny_model: PixelModel) -> None:
    student = {"num_timesteps": 4, "timesteps": "random", **LR}
    method, other = make(tiny_model, student=student), make(tiny_model, student=student)
    grids = [
        each.fakes.timesteps_of(each.turn(step), Random(0, step, "cpu"))
        for step in range(200)
        for each in (method, other)
    ]
    assert all(map(torch.equal, grids[::2], grids[1::2]))
    grids = grids[::2]
    assert all(35 < count < 65 for count in Counter(map(len, grids)).values())
    assert {len(grid) for grid in grids} == {1, 2, 3, 4}
    levels = method.schedule.levels
    for step, grid in enumerate(grids):
        assert grid[0] == levels[-1]
        assert (grid.diff() <= 0).all()
        assert method.turn(step).stop < len(grid)
        assert ((grid[1:] >= levels[100]) & (grid[1:] <= levels[950])).all()
    inner = torch.cat([grid[1:] for grid in grids])
    assert len(inner.unique()) > 0.8 * len(inner)
    assert torch.equal(method.timesteps, method.schedule.grid(4).to(method.timesteps))  # what it is drawn at


# --- the student's losses --------------------------------------------------------------------------------------------


def test_the_dm_settings_reach_the_loss(tiny_model: PixelModel) -> None:
    method = moved_critic(
        make(tiny_model, dm={"floor": 5.0, "project": True}, gan={"student_weight": 0, "critic_weight": 0})
    )
    given = samples(method)
    term = method.student_losses(given.x0.requires_grad_(), given.condition, given.draws)["dm"]
    again = draws(BATCH)
    x_t, t = method.noised(given.x0, method.student_levels, again)
    teacher, critic = (each(x_t, t, given.condition).detach() for each in (method.teacher, method.critic))
    torch.testing.assert_close(term.loss, dmd_loss(given.x0, teacher, critic, 5.0, True))
    assert (term.loss < 0.5 * dmd_loss(given.x0, teacher, critic)).all()


def test_an_f_divergence_weighs_samples_by_the_discriminators_ratio_over_its_mean(tiny_model: PixelModel) -> None:
    """First samples of a level have weight 1; then js is sigmoid(logit) by the running mean of it at that level."""
    plain, method = make(tiny_model), make(tiny_model, dm={"divergence": "js"})
    plain.critic.load_state_dict(moved_critic(method).critic.state_dict())
    given, ratios = samples(method, seed=1), []
    for _ in range(2):
        terms = [each.student_losses(given.x0, given.condition, draws(BATCH, 1)) for each in (plain, method)]
        ratios.append(terms[1]["dm"].loss / terms[0]["dm"].loss)
        method.ratios.end_step()
    first, ratio = ratios
    x_t, t = method.noised(given.x0, method.student_levels, draws(BATCH, 1))
    logits = method.discriminator(features(method.critic, method.feature_layer, x_t, t, given.condition))
    h, levels = torch.sigmoid(logits), torch.atan(t) * 20 / torch.pi  # of EDM, in tenths
    for bin in levels.long().unique():
        mine = levels.long() == bin
        torch.testing.assert_close(ratio[mine], (h[mine] / h[mine].mean()).detach().to(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close(first, torch.ones(BATCH))
    assert torch.equal(terms[0]["gan"].loss, terms[1]["gan"].loss)


def test_a_broken_logit_leaves_the_weights_whole(tiny_model: PixelModel) -> None:
    ratios = make(tiny_model, dm={"divergence": "kl"}).ratios
    logits, t = torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    assert ratios.weights(logits, t).tolist() == [1, 1, 1]
    ratios.end_step()
    assert ratios.means.isfinite().all()
    assert ratios.means.max() == pytest.approx((1 + torch.e) / 2)


def test_the_first_step_follows_the_teacher_and_is_in_no_other_loss(tiny_model: PixelModel) -> None:
    settings = {"diversity": {"weight": 0.3, "steps": 2, "grid": 10}, "student": {"num_timesteps": 3, **LR}}
    method = make(tiny_model, guidance_scale=2.0, **settings)
    assert {method.turn(step).stop for step in range(40)} == {1, 2}
    given = samples(method)
    noise = torch.randn(BATCH, *tiny_model.shape, generator=torch.Generator().manual_seed(9))
    term = method.extra_terms({}, noise, given.condition)["diversity"]
    target = first_x0(method.teacher, noise, method.schedule.grid(10)[:3], given.condition)
    x0 = method.student(80 * noise, torch.full((BATCH,), 80.0), given.condition)
    torch.testing.assert_close(term.loss, (x0 - target).square().mean(dim=(1, 2, 3)))
    assert term.weight == 0.3
    lines = method.step(whole(batch(tiny_model), BATCH), 0)
    assert lines["diversity_loss"] > 0
    assert "diversity_loss" not in method.step(whole(batch(tiny_model), BATCH), 1)


# --- the critic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
def test_the_critic_takes_over_a_share_of_the_student_behind_its_update(tiny_model: PixelModel, told: bool) -> None:
    settings = LR | {"student_share": 0.25, "condition_on_stop": told}
    method = moved_critic(make(tiny_model, critic=settings))
    before = copy.deepcopy(method.critic.state_dict())
    seen: list[dict[str, Tensor]] = []
    gradients = method.critic_gradients

    def watched(*args: object) -> object:
        seen.append(copy.deepcopy(method.critic.state_dict()))
        return gradients(*args)

    method.critic_gradients = watched
    method.step(whole(batch(tiny_model), BATCH), 0)  # the student's turn
    student = method.student.state_dict()
    for name, value in seen[0].items():
        alone = name not in student
        assert alone == ("stop_embedding" in name)
        torch.testing.assert_close(value, before[name] if alone else 0.75 * before[name] + 0.25 * student[name])
    untouched = copy.deepcopy(method.critic.state_dict())
    method.step(whole(batch(tiny_model), BATCH), 1)
    assert all(torch.equal(value, untouched[name]) for name, value in seen[1].items())


def head_gradients(method: DMD2) -> list[Tensor]:
    method.critic_gradients(samples(method), samples(method, seed=1))
    return [p.grad.clone() for p in method.discriminator.parameters()]


@pytest.mark.parametrize("independent", [False, True])
def test_r1_adds_the_squared_change_of_a_reals_logit_by_noise(tiny_model: PixelModel, independent: bool) -> None:
    gan = GAN | {"independent_noise": independent}
    plain, method = (make(tiny_model, gan=gan | more) for more in ({}, {"r1_weight": 3.0, "r1_std": 0.7}))
    seen: list[tuple[Tensor, Tensor]] = []
    inner = method.discriminator.forward
    method.discriminator.forward = lambda x: seen.append((x, inner(x))) or seen[-1][1]
    found, without = head_gradients(method), head_gradients(plain)
    moved = seen[-1][0]
    assert not moved.requires_grad  # the head alone learns from it
    loss = 0.1 * 3 * (inner(seen[-2][0].detach()) - inner(moved)).square().mean()
    expected = torch.autograd.grad(loss, list(method.discriminator.parameters()))
    for ours, theirs, wanted in zip(found, without, expected, strict=True):
        assert (ours - theirs - wanted).norm() <= 1e-4 * wanted.norm() + 1e-9
    assert (seen[-2][0] - moved).norm() > 0


@pytest.mark.parametrize("independent", [False, True])
def test_the_gan_is_at_low_noise_alone(tiny_model: PixelModel, independent: bool) -> None:
    """Of fakes and of reals, in both halves of the GAN, the losses are those of samples at or below the level."""
    gan = GAN | {"independent_noise": independent, "max_index": 400}
    method = make(tiny_model, gan=gan)
    limit, times, logits = method.schedule.levels[400], [], []
    inner, noised = method.discriminator.forward, method.noised
    method.discriminator.forward = lambda x: logits.append(inner(x)) or logits[-1]
    method.noised = lambda *args: (found := noised(*args), times.append(found[1]))[0]
    metrics = method.critic_gradients(samples(method), samples(method, seed=1))
    fakes_at, reals_at = times[-2:]
    expected = [
        torch.where(t <= limit, loss, 0).mean()
        for loss, t in ((gan_fake_loss(logits[0]), fakes_at), (gan_real_loss(logits[1]), reals_at))
    ]
    assert metrics["gan_critic_loss"].item() == pytest.approx(sum(expected).item(), rel=1e-5)
    assert 0 < (fakes_at <= limit).sum() < BATCH
    given = samples(method, seed=2)
    term = method.student_losses(given.x0, given.condition, given.draws)["gan"]
    assert ((term.loss == 0) == (times[-1] > limit)).all()


# --- with what else there is -----------------------------------------------------------------------------------------

ALL = {
    "dm": {"floor": 0.1, "project": True, "divergence": "js"},
    "gan": GAN | {"r1_weight": 1.0, "max_index": 900},
    "student": MIXED,
    "critic": LR | {"condition_on_stop": True, "student_share": 0.25, "stop_rate": 30},
    "diversity": {"weight": 0.5, "steps": 2, "grid": 10},
}


def test_all_at_once_on_latents_in_bfloat16_are_as_in_float32(tmp_path: Path) -> None:
    """Of text, guided: the same draws, so losses differ by rounding; the lerp is one of float32 weights."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        model = LatentModel(TINY["sdxl"](tmp_path / str(dtype)))
        model.encode_in(dtype)
        method = make_dmd2(model, 3, 8.0, dtype, **ALL)
        images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        given = {"image": images, "caption": ["a cat", "a mat", "a hat"]}
        lines.append(method.step(whole(given, 3), 0))
        assert {value.dtype for value in trainable_state(method.critic).values()} == {torch.float32}
    for name in ("diversity_loss", "gan_loss", "gan_critic_loss", "denoising_loss"):
        assert lines[1][name].item() == pytest.approx(lines[0][name].item(), rel=0.05), name
    assert all(value.isfinite() for line in lines for name, value in line.items() if name.endswith("loss"))


def test_on_a_shared_base_the_critic_takes_over_low_rank_weights_and_the_base_stays(tiny_model: PixelModel) -> None:
    settings = DMD2Settings(student_every=2, **ALL | {"gan": GAN})
    roles = make_roles(tiny_model, 2.0, None, 3, lora=LoRASettings(rank=2, alpha=2.0))
    method = DMD2(settings, tiny_model, roles, 20, BATCH, seed=0)
    base = copy.deepcopy(tiny_model.denoiser.state_dict())
    for step in range(3):
        method.step(whole(batch(tiny_model), BATCH), step)
    assert all(torch.equal(value, base[name]) for name, value in tiny_model.denoiser.state_dict().items())
    before, student = (copy.deepcopy(trainable_state(role)) for role in (method.critic, method.student))
    method._follow_student()
    after = trainable_state(method.critic)
    assert before.keys() - student.keys() == {"network.stop_embedding.weight"}
    for name, weight in student.items():
        torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * weight)


# --- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "changes", "told"),
    [
        ("digits-4step", "student.stops=mixed critic.samples=cycle", "student.stops is mixed; set step"),
        ("digits-4step", "student.timesteps=random critic.samples=cycle critic.condition_on_stop=false", "is random"),
        ("digits-4step", "student.timesteps=random", "random timesteps have no stops to tell apart; set false"),
        ("digits-1step", "student.timesteps=random", "num_timesteps of 2 or more"),
        ("digits-1step", "student.timesteps=rondom", "student.timesteps"),
        ("digits-4step", "diversity.weight=0.05 critic.samples=cycle", "diversity.weight is not 0"),
        ("digits-1step", "diversity.weight=0.05", "diversity.weight: is for students of several timesteps"),
        ("digits-4step", "diversity.weight=0.05 diversity.steps=30", "need a grid of more than 30"),
        ("digits-4step", "diversity.weight=0.05 student.backward_simulation=false", "with student.backward_simulation"),
        ("digits-1step", "dm.divergence=js gan.independent_noise=true", "gan.independent_noise: false"),
        ("digits-1step", "dm.divergence=js gan.student_weight=0 gan.critic_weight=0", "set both weights of gan"),
        ("digits-1step", "dm.divergence=jss", "dm.divergence"),
        ("digits-1step", "student.stops=mixed", "student.stops changes nothing, for the student has one timestep"),
        ("digits-1step", "dm.weight=0 dm.floor=0.1", "dm.floor changes nothing, for dm.weight is 0"),
        ("digits-1step", "gan.r1_std=0.2", "gan.r1_std changes nothing, for r1_weight is 0"),
        ("digits-1step", "diversity.steps=4", "diversity.steps changes nothing, for diversity.weight is 0"),
        ("digits-1step", "gan.student_weight=0 gan.critic_weight=0 gan.max_index=5", "gan.max_index changes nothing"),
    ],
)
def test_what_does_not_go_together_is_refused_at_the_door(recipe: str, changes: str, told: str) -> None:
    with pytest.raises(UserError, match=told.replace("(", "\\(")):
        load_recipe(recipe, changes.split())
