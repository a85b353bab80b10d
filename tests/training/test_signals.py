"""The signals of a step are their formulas, whatever the parts, of what has a meaning alone, and decide nothing."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Guided, unguided
from fewstep.diffusion.losses import denoising_loss
from fewstep.diffusion.sampling import rollout
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.codec import to_images
from fewstep.runtime.tracking import Metrics
from fewstep.seeding import Draws, generator
from fewstep.training import panels
from fewstep.training.dmd2 import DMD2
from fewstep.training.settings import LoopSettings
from fewstep.training.signals import Signals, sums_of_errors, sums_of_logits, sums_of_samples, sums_of_update
from fewstep.training.teacher_errors import TeacherErrors, null_error, teacher_errors
from steps import GAN, LR, in_parts, make_dmd2, recorded_calls, same, spy, weights, whole
from tiny_pipelines import TINY

BATCH = 6
make = partial(make_dmd2, batch_size=BATCH)
NO_GAN = {"student_weight": 0, "critic_weight": 0}
UPDATE = {"gap", "cosine", "magnitude", "critic_error_share"}
GUIDANCE = {"dm_norm", "cfg_norm"}
SAMPLES = {"x0_std"}
REALS = {"logit_std", "real_std", "x0_mean_shift"}
COLOURS = {"brightness", "contrast"}  # of grey pictures
ALL = {*UPDATE, *GUIDANCE, *SAMPLES, *REALS, *COLOURS, "saturation", "gan_to_dm", "critic_lag"}


def images(step: int, num: int = BATCH) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(step)
    pictures = torch.randint(0, 256, (num, 1, 8, 8), generator=drawn, dtype=torch.uint8)
    return {"image": pictures, "label": torch.randint(0, 3, (num,), generator=drawn)}


def signals_of(*sums: dict[str, Tensor]) -> dict[str, float]:
    signals = Signals()
    for each in sums:
        signals.add(each)
    return {name: value.item() for name, value in signals.read().items()}


# --- the formulas, sample by sample in float64 ------------------------------------------------------------------------


def by_hand(x: Tensor, r: Tensor, f: Tensor, c: Tensor) -> dict[str, float]:
    """As the table of them says it."""
    x, r, f, c = (each.double() for each in (x, r, f, c))

    def rms(of: Tensor) -> float:
        return of.square().mean().sqrt().item()

    cosines, shares = [], []
    for sample in range(len(x)):
        xs, rs, fs = (each[sample].flatten() for each in (x, r, f))
        d, p = rs - fs, xs - fs
        cosines.append((fs @ rs / (fs @ fs).sqrt() / (rs @ rs).sqrt()).item())
        shares.append(((d @ p) ** 2 / (d @ d) / (p @ p)).item())
    return {
        "gap": rms(r - f) / rms(r),
        "magnitude": rms(f) / rms(r),
        "cosine": sum(cosines) / len(x),
        "critic_error_share": sum(shares) / len(x),
        "dm_norm": rms(c - f),
        "cfg_norm": rms(r - c),
    }


def test_the_update_is_described_by_the_formulas_in_any_parts() -> None:
    drawn = torch.Generator().manual_seed(0)
    x, r, null = (torch.randn(6, 3, 4, 4, generator=drawn) for _ in range(3))
    f, scale = r + 0.2 * torch.randn(6, 3, 4, 4, generator=drawn), 3.0
    c = (r + (scale - 1) * null) / scale  # r = null + scale (c - null)
    expected = by_hand(x, r, f, c)
    assert expected["cfg_norm"] == pytest.approx(((scale - 1) * (c - null)).square().mean().sqrt().item(), rel=1e-5)
    for size in (6, 3, 2, 1):
        parts = zip(*(each.split(size) for each in (x, r, f, c)), strict=True)
        assert signals_of(*(sums_of_update(*part) for part in parts)) == pytest.approx(expected, rel=1e-5)
    assert signals_of(sums_of_update(x, r, f)).keys() == UPDATE


def test_samples_and_logits_are_described_by_the_formulas_in_any_parts() -> None:
    drawn = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(num, 3, 4, 4, generator=drawn) * num + 0.3 for num in (6, 4))
    fakes, reals = 40 + torch.randn(6, generator=drawn), torch.randn(4, generator=drawn)
    f, r = fake.double(), real.double()

    def std(x: Tensor) -> float:
        return sum(x[:, k].var(0).mean().sqrt().item() for k in range(3)) / 3  # var(0): over the batch, by place

    def colours(x: Tensor) -> list[float]:
        pictures = (x + 1) / 2
        grey, ranges = pictures.mean(1), pictures.max(1).values - pictures.min(1).values
        deviations = [picture.var(correction=0).sqrt() for picture in grey]
        return [grey.mean().item(), sum(deviations).item() / len(x), ranges.mean().item()]

    within = ((fakes.double() - fakes.double().mean()).square().sum() + 3 * reals.double().var()) / (6 + 4 - 2)
    differences = [a - b for a, b in zip(colours(f), colours(r), strict=True)]
    expected = {
        "x0_std": std(f),
        "real_std": std(r),
        "x0_mean_shift": sum(abs((f[:, k].mean() - r[:, k].mean()).item()) for k in range(3)) / 3,
        **dict(zip(("brightness", "contrast", "saturation"), differences, strict=True)),
        "logit_std": within.sqrt().item(),
    }
    for size in (6, 2, 1):
        of_fakes = [sums_of_samples("fake", x, True) | sums_of_logits("fake", y) for x, y in split(size, fake, fakes)]
        of_reals = [sums_of_samples("real", x, True) | sums_of_logits("real", y) for x, y in split(size, real, reals)]
        assert signals_of(*of_fakes, *of_reals) == pytest.approx(expected, rel=2e-5)


def split(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(each.split(size) for each in tensors), strict=True))


def test_broken_samples_are_in_no_signal_and_one_sample_has_no_deviation() -> None:
    drawn = torch.Generator().manual_seed(0)
    x, r, f, y = (torch.randn(4, 3, 4, 4, generator=drawn) for _ in range(4))
    logits = torch.randn(4, generator=drawn)

    def found(rows: list[int]) -> dict[str, float]:
        pairs = [sums_of_samples("fake", x[rows], True), sums_of_samples("real", y[rows], True)]
        pairs += [sums_of_logits(kind, logits[rows]) for kind in ("fake", "real")]
        return signals_of(sums_of_update(x[rows], r[rows], f[rows]), *pairs, sums_of_errors(logits[rows], logits[rows]))

    whole = found([0, 2])
    for broken in (r, y, logits):
        broken[1] = torch.nan
    for broken in (f, x):
        broken[3] = torch.inf
    x[1], y[3], logits[3] = torch.nan, -torch.inf, torch.inf
    assert found([0, 1, 2, 3]) == pytest.approx(whole, rel=1e-6)
    alone = found([0])
    told = {name for name, value in alone.items() if torch.tensor(value).isfinite()}
    assert alone.keys() - told == {"x0_std", "real_std", "logit_std"}


def test_equal_predictions_have_no_gap_and_no_share() -> None:
    x, r = torch.randn(2, 3, 8)
    assert signals_of(sums_of_update(x, r, r)) == pytest.approx(
        {"gap": 0, "cosine": 1, "magnitude": 1, "critic_error_share": 0}, abs=1e-6
    )


# --- of a step -------------------------------------------------------------------------------------------------------


def flat_errors(method: DMD2) -> TeacherErrors:
    levels = method.schedule.levels.double()
    return TeacherErrors(levels, 1 + torch.arange(len(levels), dtype=torch.float32) / len(levels))


def moved(method: DMD2) -> DMD2:
    """With a critic that is not the teacher."""
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.critic.parameters():
            p += 0.05 * torch.randn(p.shape, generator=drawn)
    return method


def test_a_step_tells_the_formulas_of_what_it_has_at_hand(tiny_model: PixelModel) -> None:
    """Guided, with a shared GAN, against values caught on the way."""
    method = moved(make(tiny_model, guidance_scale=3.0, dm={"weight": 0.7}))
    method.teacher_errors = flat_errors(method)
    batch, guided = images(0), unguided(method.teacher)
    with (
        recorded_calls(guided) as teacher,
        recorded_calls(method.critic) as critic,
        recorded_calls(method.student) as x,
        recorded_calls(method.discriminator) as logits,
    ):
        metrics = method.step(whole(batch, BATCH), 0)
    fake, real = x[-1][1].detach(), batch["image"] / 127.5 - 1
    null, conditional = teacher[0][1].chunk(2)
    guided_x0 = null + 3 * (conditional - null)
    expected = by_hand(fake, guided_x0, critic[0][1].detach(), conditional)
    assert same([teacher[0][0][0][:BATCH]], [critic[0][0][0]])  # of the same x_t
    (_, t, _), critic_x0, _ = critic[1]
    errors = denoising_loss(critic_x0.detach().double(), fake.double(), method.critic.coefficients(t)[1])
    index = torch.searchsorted(method.schedule.levels.double(), t.double())
    expected["critic_lag"] = (errors.mean() / (1 + index / 1000).mean()).item()
    expected["x0_std"] = fake.double().var(0).mean().sqrt().item()
    expected["real_std"] = real.double().var(0).mean().sqrt().item()
    expected["x0_mean_shift"] = abs(fake.double().mean() - real.double().mean()).item()
    expected["brightness"] = (fake.double().mean() - real.double().mean()).item() / 2
    deviations = [each.double().flatten(1).std(1, correction=0).mean() / 2 for each in (fake, real)]
    expected["contrast"] = (deviations[0] - deviations[1]).item()
    of_fakes, of_reals = (logits[k][1].detach().double() for k in (1, 2))  # 0 was the student's term
    expected["logit_std"] = ((of_fakes.var() + of_reals.var()) / 2).sqrt().item()
    norms = [metrics[f"{name}_image_grad_norm"].item() for name in ("gan", "dm")]
    expected["gan_to_dm"] = 0.1 * norms[0] / (0.7 * norms[1])
    found = {name: value.item() for name, value in metrics.items() if name in ALL}
    assert found == pytest.approx(expected, rel=1e-4)
    assert {metrics[name].dtype for name in found} == {torch.float32}


def latent_model(folder: Path) -> LatentModel:
    return LatentModel(TINY["sdxl"](folder))


CASES = {  # settings -> the signals of a student's turn
    "all": ({}, {*UPDATE, "gan_to_dm", *SAMPLES, *REALS, *COLOURS}),
    "independent noise": (
        {"gan": GAN | {"independent_noise": True}},
        {*UPDATE, "gan_to_dm", *SAMPLES, *REALS, *COLOURS},
    ),
    "guided": ({"guidance_scale": 2.0}, {*UPDATE, *GUIDANCE, "gan_to_dm", *SAMPLES, *REALS, *COLOURS}),
    "without DM": ({"dm": {"weight": 0}}, {*SAMPLES, *REALS, *COLOURS}),
    "without GAN": ({"gan": NO_GAN}, {*UPDATE, *SAMPLES}),
    "cycle": ({"critic": LR | {"samples": "cycle"}}, {*UPDATE, "gan_to_dm", *SAMPLES, *REALS, *COLOURS}),
    "noised reals": (
        {"student": {"num_timesteps": 3, "backward_simulation": False, **LR}, "gan": NO_GAN},
        {*UPDATE, *SAMPLES},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_students_turn_has_the_signals_that_have_a_meaning(tiny_model: PixelModel, case: str) -> None:
    settings, names = CASES[case]
    method = make(tiny_model, **settings)
    turns = [method.step(in_parts(images(step), BATCH, 1 + step % 2), step) for step in (0, 1, 2)]
    for step, metrics in enumerate(turns):
        assert metrics.keys() & ALL == (names if step % 2 == 0 else set())
    assert all(turns[2][name].isfinite() for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_have_no_colours_and_bfloat16_has_the_signals_of_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also guided, from the halves of one pass, in which the teacher's cast and autocast are."""
    model = latent_model(tmp_path)
    model.encode_in(dtype)
    method = make_dmd2(model, 3, 8.0, dtype)
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"image": images, "caption": ["a cat", "a mat", "a hat"]}
    with (
        recorded_calls(unguided(method.teacher)) as teacher,
        recorded_calls(moved(method).critic) as critic,
        recorded_calls(method.student) as student,
    ):
        metrics = method.step(whole(batch, 3), 0)
    assert len(teacher) == 1
    assert metrics.keys() & ALL == {*UPDATE, *GUIDANCE, "gan_to_dm", *SAMPLES, *REALS}
    null, conditional = teacher[0][1].chunk(2)
    fake, f = student[-1][1].detach(), critic[0][1].detach()
    expected = by_hand(fake, null + 8 * (conditional - null), f, conditional)
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_signal_that_is_not_finite_skips_nothing_and_is_in_no_line(tiny_model: PixelModel, tmp_path: Path) -> None:
    """Teacher and critic are equal, so the gradient of DM is 0, and of one sample there are no deviations."""
    method = make_dmd2(tiny_model, 1, gan=GAN)
    metrics = method.step(whole({name: value[:1] for name, value in images(0).items()}, 1), 0)
    broken = {name for name, value in metrics.items() if not value.isfinite()}
    assert broken == {"gan_to_dm", "x0_std", "real_std", "logit_std"}
    assert not metrics["skipped_student"]
    assert not metrics["skipped_critic"]
    log = Metrics(tmp_path / "metrics.jsonl")
    log.add(metrics)
    assert broken.isdisjoint(log.write(1))


# --- the teacher's own errors ----------------------------------------------------------------------------------------


def test_the_teachers_errors_are_its_losses_on_the_runs_first_images(tiny_model: PixelModel) -> None:
    """Each image at one of 16 levels, in turn; linear between them; the same at every start, and without guidance."""
    settings, batches = LoopSettings(batch_size=12, seed=5), []

    def batch_at(step: int, rows: range) -> dict[str, Tensor]:
        batches.append((step, rows))
        return images(step, 12)

    teacher = Guided(tiny_model.denoiser, 7.0, tiny_model.null_condition)
    table, again = (teacher_errors(unguided(teacher), tiny_model, batch_at, settings) for _ in range(2))
    assert batches[:8] == [(step, range(12)) for step in range(8)]
    assert torch.equal(table.errors, again.errors)
    schedule, losses = tiny_model.denoiser.schedule, [[] for _ in range(16)]
    places = [round(999 * k / 15) for k in range(16)]
    for step in range(8):
        draws, batch = Draws(generator(5, "teacher's errors", step), range(12), 12), images(step, 12)
        x0, eps = batch["image"] / 127.5 - 1, draws.randn(1, 8, 8)
        turn = [(12 * step + row) % 16 for row in range(12)]
        t = torch.stack([schedule.levels[places[level]] for level in turn])
        x0_hat = tiny_model.denoiser(x0 + t.float().view(-1, 1, 1, 1) * eps, t, {"label": batch["label"]})  # EDM
        squares = ((x0_hat - x0) / tiny_model.denoiser.coefficients(t)[1].view(-1, 1, 1, 1)).square()
        for level, each in zip(turn, squares, strict=True):
            losses[level].append(each.mean().item())
    means = [sum(each) / len(each) for each in losses]
    assert [table.errors[place].item() for place in places[::15]] == pytest.approx([means[0], means[-1]], rel=1e-5)
    position = 15 * torch.arange(1000) / 999
    low = position.long().clamp_max(14)
    mean, share = torch.tensor(means), position - low
    torch.testing.assert_close(table.errors, mean[low] * (1 - share) + mean[low + 1] * share, rtol=1e-4, atol=1e-5)
    between = (schedule.levels[500] + schedule.levels[501]) / 2
    t = torch.stack([schedule.levels[0], schedule.levels[500], between, schedule.levels[-1]])
    assert torch.equal(table.at(t), table.errors[[0, 500, 501, 999]])


def test_small_pictures_have_a_table_of_more(tiny_model: PixelModel) -> None:
    asked: list[int] = []

    def batch_at(step: int, rows: range) -> dict[str, Tensor]:
        asked.append(len(rows))
        return images(step, len(rows))

    teacher_errors(tiny_model.denoiser, tiny_model, batch_at, LoopSettings(batch_size=256, num_steps=1000))
    assert 2048 <= sum(asked) < 2048 + asked[0]  # where the largest have 128


def test_the_null_error_is_the_loss_without_a_condition_over_that_with_it_at_little_noise(
    tiny_model: PixelModel,
) -> None:
    settings, teacher = (
        LoopSettings(batch_size=8),
        Guided(tiny_model.denoiser, 7.0, {"label": torch.tensor([3])}),
    )
    found = null_error(teacher, tiny_model, lambda step, rows: images(step, 8), settings)
    schedule, sums = tiny_model.denoiser.schedule, [0.0, 0.0]
    for step in range(8):
        draws, batch = Draws(generator(0, "teacher's errors", step), range(8), 8), images(step, 8)
        x0, eps = batch["image"] / 127.5 - 1, draws.randn(1, 8, 8)
        t = torch.stack([schedule.levels[(100, 150, 200, 250)[row % 4]] for row in range(8)])
        for index, label in enumerate((torch.full((8,), 3), batch["label"])):
            x0_hat = tiny_model.denoiser(x0 + t.float().view(-1, 1, 1, 1) * eps, t, {"label": label})
            sums[index] += denoising_loss(x0_hat, x0, tiny_model.denoiser.coefficients(t)[1]).sum().item()
    assert sums[0] != sums[1]
    assert found.item() == pytest.approx(sums[0] / sums[1], rel=1e-6)


def test_small_batches_have_a_table_of_fewer_whatever_the_steps(tiny_model: PixelModel) -> None:
    asked: list[int] = []

    def batch_at(step: int, rows: range) -> dict[str, Tensor]:
        asked.append(len(rows))
        return images(step, len(rows))

    table = teacher_errors(tiny_model.denoiser, tiny_model, batch_at, LoopSettings(batch_size=3, num_steps=1))
    assert asked == [3] * 8
    assert table.errors.shape == (1000,)
    assert table.errors.isfinite().all()


def test_parts_have_the_same_table_and_the_same_lag(tiny_model: PixelModel) -> None:
    found = []
    for parts in (1, 2, 3):
        method = moved(make(copy.deepcopy(tiny_model), guidance_scale=2.0, critic=LR | {"condition_on_stop": True}))
        method.teacher_errors = flat_errors(method)
        metrics = method.step(in_parts(images(0), BATCH, parts), 0)
        found.append({name: metrics[name].item() for name in metrics.keys() & ALL})
    assert found[0].keys() == ALL - {"saturation"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-6)


# --- panels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, dict]]:
    """The pictures of all grids, as they are laid out."""
    found: list[tuple[Tensor, dict]] = []
    spy(monkeypatch, panels, "grid", lambda images, columns, **named: found.append((images, columns, named)))
    return found


@pytest.mark.parametrize("told", [False, True])
def test_a_panel_is_the_trained_student_and_what_teacher_and_critic_make_of_it(
    tiny_model: PixelModel, shown: list, told: bool
) -> None:
    """Pixel by pixel, for samples of the weights in training, noised alike at each level."""
    method = moved(make(tiny_model, guidance_scale=3.0, critic=LR | {"condition_on_stop": told}))
    for step in range(3):  # the average stays behind
        method.step(whole(images(step), BATCH), step)
    noise, before = (
        torch.randn(3, 5, *tiny_model.shape, generator=torch.Generator().manual_seed(2)),
        weights(method.critic),
    )
    method.panel(noise)
    ((pictures, columns, named),) = shown
    assert pictures.shape == (5 * 9, 1, 8, 8)
    assert (columns, named["heads"]) == (9, 3 * ("student", "teacher", "critic"))
    assert [side.split("\n")[0] for side in named["sides"]] == [f"level {n}" for n in (50, 250, 500, 750, 950)]
    condition = {"label": torch.tensor([0, 1, 2])}
    with torch.no_grad():
        x0 = rollout(method.student, noise[:, :3], method.timesteps, condition, 2)
        eps = torch.randn(x0.shape, generator=generator(0, "panel"))
        stop = {"stop": torch.tensor([2, 2, 2])} if told else {}
        rows = []
        for level in (50, 250, 500, 750, 950):
            t = method.schedule.levels[level].repeat(3)
            x_t = x0 + t.float().view(-1, 1, 1, 1) * eps  # EDM
            rows.append([x0, method.teacher(x_t, t, condition), method.critic(x_t, t, condition | stop)])
    for row, three in enumerate(rows):
        for column in range(9):
            expected = to_images(three[column % 3][column // 3])
            assert (pictures[9 * row + column].int() - expected.int()).abs().max() <= 1
    assert same(before, method.critic)
    assert all(p.grad is None or not p.grad.any() for p in method.critic.parameters())


def test_latents_in_bfloat16_have_panels_of_their_prompts(tmp_path: Path, shown: list) -> None:
    model = latent_model(tmp_path)
    model.encode_in(torch.bfloat16)
    method = make_dmd2(model, 3, 8.0, torch.bfloat16)
    noise = torch.randn(3, 2, *model.shape)
    picture = method.panel(noise, ["a cat", "a mat"])
    ((pictures, columns, _),) = shown
    assert (pictures.shape, pictures.dtype, columns) == ((5 * 6, 3, 16, 16), torch.uint8, 6)
    assert picture.mode == "RGB"
    with torch.no_grad():
        x0 = rollout(method.student, noise, method.timesteps, model.conditions(range(2), ["a cat", "a mat"]), 2)
    assert (pictures[[0, 3]].int() - model.decode(x0).int()).abs().max() <= 1
    assert all(torch.equal(pictures[6 * row], pictures[0]) for row in range(5))
