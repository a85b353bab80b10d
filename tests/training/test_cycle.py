"""One rollout for a cycle, a share of the reals, frozen features, and the critic's two backward passes."""

import copy
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.diffusion.sampling import rollout
from fewstep.errors import UserError
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.features import features, x0_and_features
from fewstep.recipes.loading import load_recipe
from fewstep.seeding import Draws, generator
from fewstep.training.dmd2 import DMD2
from fewstep.training.pool import Samples
from steps import GAN, LR, checked, in_parts, make_dmd2, received, recorded_calls, same, spy

BATCH, STOPS = 6, 3
TOLD = {"condition_on_stop": True, **LR}
CYCLE = TOLD | {"samples": "cycle"}
NO_GAN = ["gan.student_weight=0", "gan.critic_weight=0"]
make = partial(make_dmd2, batch_size=BATCH)


def parts_of(step: int, parts: int = 1) -> list[tuple[range, dict[str, Tensor]]]:
    drawn = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (BATCH, 1, 8, 8), generator=drawn, dtype=torch.uint8)
    return in_parts({"image": image, "label": torch.randint(0, 3, (BATCH,), generator=drawn)}, BATCH, parts)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Samples]:
    """The fakes of all critic updates."""
    found: list[Samples] = []
    spy(monkeypatch, DMD2, "critic_gradients", lambda self, fake, real, weight: found.append(fake))
    return found


# --- one rollout for a cycle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student_every", "calls"), [(1, None), (2, None), (5, STOPS)])
def test_a_cycle_is_shown_every_stop_of_one_rollout(
    tiny_model: PixelModel, shown: list[Samples], student_every: int, calls: int | None
) -> None:
    method, student = make(tiny_model, student_every=student_every, critic=CYCLE), None
    first = 2 * student_every  # a cycle within a run
    stop, student = method.turn(first).stop, copy.deepcopy(method.student)
    with recorded_calls(method.student) as recorded:
        for step in range(first, first + student_every):
            method.step(parts_of(step), step)
    needed = calls or min(stop + student_every, STOPS)
    assert [grad for *_, grad in recorded] == [k == stop for k in range(needed)]  # and no other in the whole cycle
    assert not same(student, method.student)
    numbers = Draws(generator(0, "dmd2", first), range(BATCH), BATCH)
    noise = numbers.randn(*tiny_model.shape, before=(needed,))
    condition = tiny_model.draw_condition({}, numbers)
    assert len(shown) == student_every
    for update, fake in enumerate(shown):
        its_stop = (stop + update) % STOPS
        assert torch.equal(fake.x0, rollout(student, noise, method.timesteps, condition, its_stop))
        assert torch.equal(fake.condition["label"], condition["label"])
        assert fake.condition["stop"].tolist() == [its_stop] * BATCH


def test_every_update_has_noise_levels_and_reals_of_its_own(tiny_model: PixelModel) -> None:
    method = make(tiny_model, student_every=5, critic=CYCLE)
    method.step(parts_of(0), 0)
    with recorded_calls(method.critic.network) as calls:
        for step in range(1, 5):
            method.step(parts_of(step), step)
    inputs = [args[0] for args, *_ in calls]  # of fakes and reals in turn
    assert len(inputs) == 8
    assert not any(torch.allclose(ours, theirs) for ours, theirs in pairwise(inputs[::2] + inputs[1::2]))


def test_with_a_student_update_in_every_step_it_is_a_rollout_per_step(tiny_model: PixelModel) -> None:
    found = []
    for critic in (TOLD, CYCLE):
        method = make(copy.deepcopy(tiny_model), student_every=1, critic=critic)
        metrics = [method.step(parts_of(step), step) for step in range(3)]
        found.append([metrics, method.state_dict()])
    assert same(found[0][0], found[1][0])
    assert same(found[0][1]["critic"], found[1][1]["critic"])
    assert same(found[0][1]["student"], found[1][1]["student"])


@pytest.mark.parametrize(
    ("stop", "before", "after"), [(1, 1, 1), (2, 1, 3), pytest.param(3, 2, 1, marks=pytest.mark.slow), (4, 3, 2)]
)
def test_a_state_goes_on_at_any_step_of_a_cycle(
    tiny_model: PixelModel, tmp_path: Path, stop: int, before: int, after: int
) -> None:
    """Bit for bit, also where the batch is divided otherwise from then on."""
    straight, first, second = (make(copy.deepcopy(tiny_model), student_every=3, critic=CYCLE) for _ in range(3))
    for step in range(6):
        straight.step(parts_of(step, before if step < stop else after), step)
    for step in range(stop):
        first.step(parts_of(step, before), step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(stop, 6):
        second.step(parts_of(step, after), step)
    assert same(second.state_dict(), straight.state_dict())
    assert second.state_dict()["pool"]["x0"].shape == (STOPS, BATCH, *tiny_model.shape)


def test_where_nothing_uses_a_condition_none_is_encoded(
    tiny_model: PixelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[dict] = []
    spy(monkeypatch, PixelModel, "encode_condition", lambda self, batch: encoded.append(batch))
    for gan, num in ((GAN, 3), ({"student_weight": 0, "critic_weight": 0}, 1)):
        method = make(tiny_model, student_every=3, critic=CYCLE, gan=gan)
        for step in range(3):
            method.step(parts_of(step), step)
        assert len(encoded) == num
        encoded.clear()


def test_a_broken_sample_in_the_pool_costs_updates_and_nothing_else(tiny_model: PixelModel) -> None:
    method = make(tiny_model, student_every=3, critic=CYCLE)
    method.step(parts_of(0), 0)
    stop = (method.turn(0).stop + 1) % STOPS
    method.pool.x0[stop, 2, 0, 0, 0] = float("nan")
    skipped = [method.step(parts_of(step), step)["skipped_critic"].item() for step in (1, 2)]
    assert skipped == [1, 0]
    checked(method.state_dict())


@pytest.mark.parametrize("independent", [False, True])
def test_the_graph_of_the_fakes_is_gone_before_that_of_the_reals_is_built(
    tiny_model: PixelModel, independent: bool
) -> None:
    method, has_gradients = make(tiny_model, gan=GAN | {"independent_noise": independent}), []
    critic = list(method.critic.parameters())
    method.critic.network.register_forward_pre_hook(
        lambda network, args: has_gradients.append(any(p.grad is not None for p in critic))
    )
    method.step(parts_of(1), 1)
    assert has_gradients == [False, False, True][not independent :]


# --- a share of the reals --------------------------------------------------------------------------------------------


def critic_gradients(method: DMD2, parts: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of a step that is not the student's, and its metrics."""
    gradients = received(method, "critic")
    return gradients, method.step(parts_of(1, parts), 1)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("share", "rows"), [(1.0, [0, 1, 2, 3, 4, 5]), (0.5, [1, 3, 5]), (1 / 3, [2, 5])])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_critics_gradient_is_that_of_one_sum(
    tiny_model: PixelModel, independent: bool, share: float, rows: list[int], frozen: bool
) -> None:
    """All terms in one graph, with the same random numbers, on plain copies: mean over fakes + mean over used reals."""
    gan = GAN | {"independent_noise": independent, "real_share": share, "features": "frozen" if frozen else "trained"}
    method, plain = (make(copy.deepcopy(tiny_model), gan=gan, critic=TOLD) for _ in range(2))
    critic, head, layer = plain.critic, plain.discriminator, plain.feature_layer
    ((_, batch),) = parts_of(1)
    numbers, stop = Draws(generator(0, "dmd2", 1), range(BATCH), BATCH), method.turn(1).stop
    noise = numbers.randn(1, 8, 8, before=(stop + 1,))
    told = {"stop": torch.full((BATCH,), stop)}
    condition = tiny_model.draw_condition({}, numbers) | told
    fake = rollout(method.student, noise, method.timesteps, condition, stop).detach()
    noised = partial(method.noised, levels=method.critic_levels)
    x_t, t = noised(fake, draws=numbers)
    x0_hat, of_fakes = x0_and_features(critic, layer, x_t, t, condition)
    if independent:
        x_other, t_other = noised(fake, draws=numbers)
        of_fakes = features(critic, layer, x_other, t_other, condition)
    of_all = numbers if share == 1 else Draws(generator(0, "reals", 1), range(BATCH), BATCH)
    real = batch["image"] / 127.5 - 1
    x_real, t_real = noised(real, draws=of_all, t=None if independent else t)
    label = {"label": batch["label"], **told}
    of_reals = features(critic, layer, x_real[rows], t_real[rows], {name: value[rows] for name, value in label.items()})
    fakes, reals = head(of_fakes), head(of_reals.detach() if frozen else of_reals)
    gan_loss = softplus(fakes).mean() + softplus(-reals).mean()
    denoising = ((x0_hat - fake) / critic.coefficients(t)[1].view(-1, 1, 1, 1)).square().mean()
    (denoising + 0.1 * gan_loss).backward()

    gradients, metrics = critic_gradients(method)
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*critic.parameters(), *head.parameters())]
    for ours, wanted in zip(gradients, expected, strict=True):
        assert (ours - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9
    assert metrics["gan_critic_loss"].item() == pytest.approx(gan_loss.item(), rel=1e-5)
    assert metrics["logit_gap"].item() == pytest.approx((reals.mean() - fakes.mean()).item(), rel=1e-4)


@pytest.mark.parametrize("share", [0.5, 1 / 3, 1 / 6])
def test_no_division_changes_the_gradient_also_with_parts_that_have_no_reals(
    tiny_model: PixelModel, share: float
) -> None:
    whole, metrics = critic_gradients(make(tiny_model, gan=GAN | {"real_share": share}))
    for parts in (2, 3, 6):
        method = make(tiny_model, gan=GAN | {"real_share": share})
        with recorded_calls(method.critic.network) as calls:
            gradients, others = critic_gradients(method, parts)
        passed = sum(len(args[0]) for args, *_ in calls)
        assert passed == BATCH + round(BATCH * share)  # no pass is thrown away
        for ours, theirs in zip(gradients, whole, strict=True):
            assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-8
        for name in ("gan_critic_loss", "logit_gap", "denoising_loss"):
            assert others[name].item() == pytest.approx(metrics[name].item(), rel=1e-4), name


def test_without_simulation_the_student_has_all_images_and_the_critic_its_share(tiny_model: PixelModel) -> None:
    student = {"num_timesteps": STOPS, "backward_simulation": False, **LR}
    method = make(tiny_model, student=student, gan=GAN | {"real_share": 0.5}, critic=TOLD)
    with recorded_calls(method.student) as student_calls, recorded_calls(method.critic.network) as calls:
        method.step(parts_of(1), 1)
    assert [len(args[0]) for args, *_ in student_calls] == [BATCH]
    assert [len(args[0]) for args, *_ in calls] == [BATCH, BATCH // 2]
    stops = [args[2]["stop"] for args, *_ in calls]  # those of the same rows
    assert torch.equal(stops[0][[1, 3, 5]], stops[1])


@pytest.mark.parametrize("parts", [1, 2])
def test_reals_that_are_all_broken_are_told_apart_from_a_few(tiny_model: PixelModel, parts: int) -> None:
    for rows, skipped in (([1, 3], 0), ([1, 3, 5], 1), ([0, 2, 4], 0)):  # of 1, 3 and 5, which are used
        method = make(copy.deepcopy(tiny_model), gan=GAN | {"real_share": 0.5})
        encode = method.model.encode_x0

        def broken(batch: dict, draws: Draws, rows: list[int] = rows, encode=encode) -> Tensor:
            x0 = encode(batch, draws)
            x0[[row in rows for row in draws.rows]] = float("nan")
            return x0

        method.model.encode_x0 = broken
        metrics = method.step(parts_of(1, parts), 1)
        assert metrics["skipped_critic"] == skipped
        assert metrics["not_finite_data"] == (0 if 0 in rows else len(rows))


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        (["critic.samples=cycle", "student.backward_simulation=false"], "cycle shares a rollout"),
        (["gan.real_share=0.3"], "gan.real_share: 0.3 of batch_size 64 is 19.2 images"),
        (["gan.real_share=0.001"], "0.001 of batch_size 64 is 0.064 images"),
        (["gan.real_share=0"], "gan.real_share"),
        (["critic.samples=cycle", "student_every=1"], "critic.samples changes nothing, for student_every is 1"),
        (["checkpointing=gan", *NO_GAN], "checkpointing changes nothing, for both weights of the GAN are 0"),
        (["gan.real_share=0.3", *NO_GAN], "gan.real_share changes nothing"),
        (["gan.features=frozen", *NO_GAN], "gan.features changes nothing"),
    ],
)
def test_what_does_not_go_together_is_refused_at_the_door(settings: list[str], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        load_recipe("digits-4step", settings)


def test_a_share_may_be_written_as_a_fraction_that_has_no_end() -> None:
    assert load_recipe("digits-4step", ["gan.real_share=0.333333", "batch_size=6"]).gan.real_share == 0.333333
