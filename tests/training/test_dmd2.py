"""The turns of DMD2: who is updated, on what, by how much, and with how many network passes."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.sampling import rollout
from fewstep.models.pixel_model import PixelModel
from fewstep.runtime.ema import trainable_state
from fewstep.seeding import Draws, Random, generator
from fewstep.training.dmd2 import DMD2
from fewstep.training.method import Term, of_parts
from fewstep.training.pool import Samples
from steps import GAN, LR, draws, make_dmd2, recorded_calls, same, weights, whole

BATCH = 6
make = partial(make_dmd2, batch_size=BATCH, student_every=3)


def real_batch(step: int = 0) -> list[tuple[range, dict[str, Tensor]]]:
    drawn = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (BATCH, 1, 8, 8), generator=drawn, dtype=torch.uint8)
    return whole({"image": image, "label": torch.randint(0, 3, (BATCH,), generator=drawn)}, BATCH)


def update_student(method: DMD2, fake: Tensor, condition: dict[str, Tensor], numbers: Draws) -> None:
    method.student_gradients(fake, condition, numbers, {})
    method.update_student(torch.tensor(True))


def update_critic(method: DMD2, fake: Tensor, condition: dict[str, Tensor], numbers: Draws) -> None:
    ((_, batch),) = real_batch()
    model, real = method.model, None
    if method.gan:
        real = Samples(numbers, model.encode_x0(batch, numbers), model.encode_condition(batch))
    method.critic_gradients(Samples(numbers, fake, condition), real)
    method.critic_optimizer.step(torch.tensor(True))


def student_fake(method: DMD2, grad: bool) -> tuple[Tensor, dict[str, Tensor], Draws]:
    numbers = draws(BATCH)
    condition = method.model.draw_condition({}, numbers)
    noise = numbers.randn(1, 8, 8, before=(1,))
    return rollout(method.student, noise, method.timesteps, condition, 0, grad=grad), condition, numbers


@pytest.mark.parametrize(
    ("update", "moved"), [(update_student, ("student",)), (update_critic, ("critic", "discriminator"))]
)
def test_an_update_leaves_the_others_bit_for_bit(tiny_model: PixelModel, update, moved: tuple[str, ...]) -> None:
    method = make(tiny_model)
    before = {name: weights(getattr(method, name)) for name in ("teacher", "student", "critic", "discriminator")}
    update(method, *student_fake(method, grad=update is update_student))
    for name, old in before.items():
        assert same(old, getattr(method, name)) == (name not in moved), name
        assert name in moved or all(p.grad is None for p in getattr(method, name).parameters())


@pytest.mark.parametrize(("student_every", "simulation"), [(1, True), (3, True), (5, True), (2, False)])
def test_a_cycle_is_one_student_and_n_critic_updates(
    tiny_model: PixelModel, student_every: int, simulation: bool
) -> None:
    student = {"num_timesteps": 3, "backward_simulation": simulation, **LR}
    method, turns = make(tiny_model, student_every=student_every, student=student), []
    for step in range(2 * student_every):
        before = weights(method.student), weights(method.critic)
        metrics = method.step(real_batch(step), step)
        turns.append((not same(before[0], method.student), not same(before[1], method.critic), "dm_loss" in metrics))
    assert turns == 2 * ([(True, True, True)] + [(False, True, False)] * (student_every - 1))
    assert method.ema.num_updates == 2


def test_backward_simulation_feeds_the_students_own_rollout(tiny_model: PixelModel) -> None:
    method = make(tiny_model)
    schedule, times = method.schedule, method.timesteps
    for step in range(12):
        with recorded_calls(method.student) as calls:
            method.step(real_batch(step), step)
        assert len(calls) == method.turn(step).stop + 1
        assert [grad for *_, grad in calls] == [False] * (len(calls) - 1) + [step % 3 == 0]  # of the last call alone
        assert torch.allclose(calls[0][0][0].std(), torch.tensor(80.0), rtol=0.15)
        for k, ((x_t, t, _), _, _) in enumerate(calls):
            assert torch.equal(t, times[k].expand(BATCH))
            if k:  # the input is the student's own x0, renoised with unit noise that is its own for every sample
                eps = (x_t - calls[k - 1][1]) / schedule.alpha_sigma(t)[1].float().view(-1, 1, 1, 1)
                assert 0.8 < eps.std() < 1.2
                assert abs(torch.corrcoef(torch.stack([eps.flatten(), calls[k - 1][0][0].flatten()]))[0, 1]) < 0.2


def test_stops_are_a_function_of_the_step_and_equally_likely(tiny_model: PixelModel) -> None:
    first, second = make(tiny_model), make(tiny_model)
    stops = [first.turn(step).stop for step in range(300)]
    assert stops == [second.turn(step).stop for step in reversed(range(300))][::-1]
    assert all(70 < count < 130 for count in Counter(stops).values())
    assert set(stops) == {0, 1, 2}


# settings -> passes of (teacher, critic whole, critic left early) in a student's turn, then in the critic's
PASSES = {
    "shared": ({}, (1, 1, 0), (0, 1, 1)),
    "independent": ({"gan": GAN | {"independent_noise": True}}, (1, 1, 1), (0, 1, 2)),
    "without GAN": ({"gan": {"student_weight": 0, "critic_weight": 0}}, (1, 1, 0), (0, 1, 0)),
    "without DM": ({"dm": {"weight": 0}}, (0, 0, 1), (0, 1, 1)),
}


@pytest.mark.parametrize("case", PASSES)
def test_no_pass_is_thrown_away(tiny_model: PixelModel, case: str) -> None:
    settings, in_student_turn, in_critic_turn = PASSES[case]
    method = make(tiny_model, **settings)

    def passes(turn: str) -> tuple[int, int, int]:
        critic = method.critic  # its network, or a view of that, runs in every pass; the whole of it in some
        with (
            recorded_calls(method.teacher) as teacher,
            recorded_calls(critic) as whole,
            recorded_calls(critic.network) as all_,
        ):
            update = update_student if turn == "student" else update_critic
            update(method, *student_fake(method, grad=turn == "student"))
        return len(teacher), len(whole), len(all_) - len(whole)

    assert passes("student") == in_student_turn
    assert passes("critic") == in_critic_turn


def test_shared_terms_see_one_noised_sample_and_independent_ones_do_not(tiny_model: PixelModel) -> None:
    for independent in (False, True):
        method = make(tiny_model, gan=GAN | {"independent_noise": independent})
        with recorded_calls(method.critic.network) as calls:
            update_critic(method, *student_fake(method, grad=False))
        times = [args[1] for args, *_ in calls]
        assert all(torch.equal(times[0], t) for t in times) != independent


def test_the_students_gradients_are_the_closed_forms(tiny_model: PixelModel) -> None:
    """DM: (critic - teacher) / mean|fake - teacher| / (B D). GAN: autograd's, through a hook of the test's own."""
    method = make(tiny_model)
    method.critic.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in method.critic.state_dict().items()})
    fake, condition, numbers = student_fake(method, grad=False)
    fake.requires_grad_()
    state = numbers.generator.get_state()
    terms = method.student_losses(fake, condition, numbers)
    dm, gan = (torch.autograd.grad(terms[name].loss.mean(), fake)[0] for name in ("dm", "gan"))
    numbers.generator.set_state(state)
    x_t, t = method.noised(fake, method.student_levels, numbers)
    layer = method.critic.network.get_submodule(method.feature_layer)
    with recorded_calls(layer) as captured:
        critic_x0, teacher_x0 = method.critic(x_t, t, condition).detach(), method.teacher(x_t, t, condition).detach()
    feature = captured[0][1][0]
    expected_dm = (critic_x0 - teacher_x0) / (fake - teacher_x0).abs().mean(dim=(1, 2, 3), keepdim=True) / fake.numel()
    expected_gan = torch.autograd.grad(torch.log1p(torch.exp(-method.discriminator(feature))).mean(), fake)[0]
    for gradient, expected in ((dm, expected_dm), (gan, expected_gan)):
        assert expected.norm() > 0
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_the_student_moves_along_the_weighted_sum(tiny_model: PixelModel) -> None:
    """With plain gradient descent in place of AdamW the parameters move by -J^T (w_dm g_dm + w_gan g_gan)."""
    method = make(tiny_model, dm={"weight": 0.7}, gan={"student_weight": 50.0, "critic_weight": 0.1})
    parameters = list(method.student.parameters())
    fake, condition, numbers = student_fake(method, grad=True)
    state = numbers.generator.get_state()
    terms = method.student_losses(fake, condition, numbers)
    assert {name: term.weight for name, term in terms.items()} == {"dm": 0.7, "gan": 50}
    weighted = 0.7 * terms["dm"].loss.mean() + 50 * terms["gan"].loss.mean()
    expected = torch.autograd.grad(weighted, parameters, retain_graph=True)
    numbers.generator.set_state(state)
    method.student_gradients(fake, condition, numbers, {})
    for parameter, wanted in zip(parameters, expected, strict=True):
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_new_loss_is_a_function_and_a_term(tiny_model: PixelModel) -> None:
    """And a setting for its weight: three files; summed, routed and logged like the others."""

    class Bright(DMD2):
        def student_losses(self, fake: Tensor, *args: object) -> dict[str, Term]:
            brightness = fake.mean(dim=(1, 2, 3))  # (B,)
            return super().student_losses(fake, *args) | {"bright": Term((brightness - 0.5).square(), 2.0)}

    plain, method = make(tiny_model), make(tiny_model)
    method.__class__ = Bright
    gradients = []
    for each in (plain, method):
        metrics = of_parts([each.student_gradients(*student_fake(each, grad=True), {})])
        gradients.append([p.grad.clone() for p in each.student.parameters()])
    fake, *_ = student_fake(plain, grad=True)
    loss = (fake.mean(dim=(1, 2, 3)) - 0.5).square().mean()
    extra = torch.autograd.grad(2 * loss, list(plain.student.parameters()))
    for ours, without, own in zip(gradients[1], gradients[0], extra, strict=True):
        assert (ours - without - own).norm() <= 1e-4 * own.norm()
    assert metrics["bright_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {"bright_image_grad_norm", "dm_loss", "gan_loss"} <= metrics.keys()


def test_logged_gradient_norms_are_those_at_the_image(tiny_model: PixelModel) -> None:
    method = make(tiny_model, gan={"student_weight": 0.3, "critic_weight": 0.1})
    numbers, ((_, batch),) = Draws(generator(0, "dmd2", 0), range(BATCH), BATCH), real_batch()
    given = method.model.encode_condition(batch)
    made = method.fakes.simulated(given, method.turn(0), numbers, Random(0, 0, "cpu"))
    fake, condition = made.x0, made.condition
    expected = {
        f"{name}_image_grad_norm": torch.autograd.grad(term.loss.mean(), fake, retain_graph=True)[0].norm()
        for name, term in method.student_losses(fake, condition, numbers).items()
    }
    metrics = method.step(real_batch(), 0)
    torch.testing.assert_close({name: value for name, value in metrics.items() if "image" in name}, expected)


def test_guidance_reaches_the_teacher_alone(tiny_model: PixelModel) -> None:
    method = make(tiny_model, guidance_scale=3.0)
    with recorded_calls(method.teacher.denoiser) as teacher, recorded_calls(method.critic) as critic:
        update_student(method, *student_fake(method, grad=True))
    assert [len(args[0]) for args, *_ in teacher] == [2 * BATCH]
    assert [len(args[0]) for args, *_ in critic] == [BATCH]


def test_a_critic_conditioned_on_the_stop_learns_the_stops_that_were_drawn(tiny_model: PixelModel) -> None:
    method = make(tiny_model, critic={"optimizer": {"lr": 1e-3, "weight_decay": 0}, "condition_on_stop": True})
    embedding, seen = method.critic.network.stop_embedding.weight, set()
    for step in range(8):
        before = embedding.detach().clone()
        method.step(real_batch(step), step)
        seen.add(method.turn(step).stop)
        moved = {stop for stop in range(3) if not torch.equal(before[stop], embedding[stop])}
        assert method.turn(step).stop in moved
        assert moved <= seen  # AdamW goes on moving what it has seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vectors_of_stops_learn_so_many_times_as_fast(tiny_model: PixelModel, dtype: torch.dtype) -> None:
    """AdamW's first update moves every number by the rate, whatever its gradient."""
    adamw = {"lr": 1e-4, "weight_decay": 0, "eps": 1e-20}
    critic = {"optimizer": adamw, "condition_on_stop": True, "stop_rate": 30}
    method = make(copy.deepcopy(tiny_model), dtype=dtype, critic=critic)
    before = {name: p.detach().clone() for name, p in method.critic.named_parameters()}
    method.step(real_batch(), 0)
    for name, parameter in method.critic.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        assert moved == pytest.approx(3e-3 if "stop_embedding" in name else 1e-4, rel=0.02), name
    assert method.learning_rates["critic_learning_rate"] == 1e-4


def test_a_step_is_a_function_of_seed_and_step(tiny_model: PixelModel) -> None:
    first, second = make(tiny_model), make(tiny_model)
    torch.manual_seed(123)  # the global generator plays no part
    assert first.step(real_batch(), 4) == second.step(real_batch(), 4)
    assert first.step(real_batch(), 5)["denoising_loss"] != make(tiny_model).step(real_batch(), 6)["denoising_loss"]


def test_sampling_is_the_rollout_of_the_averaged_weights(tiny_model: PixelModel) -> None:
    method = make(tiny_model)
    for step in range(6):
        method.step(real_batch(step), step)
    noise = torch.randn(3, BATCH, 1, 8, 8)
    raw = weights(method.student)
    averaged = copy.deepcopy(method.student)
    averaged.load_state_dict(averaged.state_dict() | method.ema.averages_of())
    condition = {"label": torch.arange(BATCH) % 3}
    expected = method.model.decode(rollout(averaged, noise, method.timesteps, condition, stop=2))
    assert torch.equal(method.sample(noise), expected)
    assert same(raw, method.student)


def test_without_a_gan_no_state_has_the_head_and_one_that_has_it_is_read(tiny_model: PixelModel) -> None:
    method, other = (make_dmd2(tiny_model, 4, gan={"student_weight": 0, "critic_weight": 0}) for _ in range(2))
    method.step(whole({}, 4), 0)
    state = method.state_dict()
    assert "discriminator" not in state
    assert "discriminator" in make_dmd2(tiny_model, 4).state_dict()
    other.load_state_dict(state | {"discriminator": trainable_state(method.discriminator)})  # of an earlier version
    assert same(other.state_dict(), state)
