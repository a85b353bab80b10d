"""Samplers against diffusers' schedulers, and against the exact solution for Gaussian data."""

import diffusers
import pytest
import torch
from stub_networks import KINDS, SD_BETAS, GaussianPosterior, SmoothNetwork, draw, kinds, relative_error, vp_scheduler

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.parameterizations import edm, eps, flow, v
from fewstep.diffusion.parameterizations import x0 as x0_prediction
from fewstep.diffusion.sampling import ddim, first_x0, heun, implied_noise, mixed_rollout, rollout, whole_rollout
from fewstep.diffusion.schedules import EDM, VP, Flow, broadcast
from fewstep.diffusion.timesteps import index_grid, karras_grid

SHAPE = (3, 2, 4, 4)
CONDITION = {"label": torch.tensor([0.3, -0.2, 0.1])}


def follow(scheduler, predict, x, native_times, **options):
    """diffusers' own sampling loop; `predict(x, t)` is called with native times."""
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for step, t in zip(scheduler.timesteps, native_times, strict=True):
        x = scheduler.step(predict(scale(x, step), t.expand(len(x))), step, x, **options).prev_sample
    return x


def make_denoiser(schedule, parameterization):
    """A denoiser on a fresh network, and that network as a function of (x, t) without gradient."""
    denoiser = Denoiser(SmoothNetwork(), schedule, parameterization)
    return denoiser, torch.no_grad()(lambda x, t: denoiser.network(x, t, CONDITION))


def ddim_error(schedule, parameterization, grid, scheduler, start=1.0):
    """How far `ddim` is from diffusers' loop on the same times, which starts from `start` times the noise."""
    denoiser, network = make_denoiser(schedule, parameterization)
    reference = follow(scheduler, network, start * draw(*SHAPE), grid)
    return relative_error(ddim(denoiser, draw(*SHAPE), grid, CONDITION), reference)


@pytest.mark.parametrize(
    ("parameterization", "prediction_type", "num", "zero_snr"),
    [
        *((*kind, num, False) for kind in KINDS for num in (1, 4, 50)),
        *((v, "v_prediction", num, True) for num in (1, 4)),
    ],
)
def test_ddim_equals_diffusers_also_at_zero_terminal_snr(parameterization, prediction_type, num, zero_snr):
    options = {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": prediction_type}
    scheduler = vp_scheduler(diffusers.DDIMScheduler, **options)
    if zero_snr:
        scheduler = diffusers.DDIMScheduler(**SD_BETAS, **options, rescale_betas_zero_snr=True)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(num)
    assert ddim_error(VP(scheduler.alphas_cumprod), parameterization, index_grid(num), scheduler) < 1e-10


@pytest.mark.parametrize("num", [1, 4, 20])
def test_ddim_equals_diffusers_euler_on_vp(num):
    """Euler works on x_t / alpha and computes in float32."""
    scheduler = vp_scheduler(diffusers.EulerDiscreteScheduler)
    scheduler.set_timesteps(timesteps=index_grid(num).tolist())
    start = VP.scaled_linear().alphas_cumprod[999] ** -0.5
    assert ddim_error(VP.scaled_linear(), eps, index_grid(num), scheduler, start) < 1e-6


@pytest.mark.parametrize("num", [1, 4, 18])
def test_ddim_equals_diffusers_euler_on_edm(num):
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(num)
    assert ddim_error(EDM(), edm(0.5), karras_grid(num), scheduler, start=80) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num", [1, 4, 28])
def test_ddim_equals_diffusers_euler_on_flow(num, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=Flow().grid(num).tolist())
    assert ddim_error(Flow(), flow, Flow(shift).grid(num), scheduler) < 1e-6


@pytest.mark.parametrize("num", [1, 2, 18])
def test_heun_equals_diffusers_on_edm(num):
    denoiser, _ = make_denoiser(EDM(), edm(0.5))
    scheduler, noise, grid = diffusers.HeunDiscreteScheduler(prediction_type="sample"), draw(*SHAPE), karras_grid(num)
    scheduler.set_timesteps(num)
    scheduler.scale_model_input = lambda x, t: x
    inner = grid[1:].repeat_interleave(2)
    scheduler.sigmas = torch.cat([grid[:1], inner, torch.zeros(1)])  # float64 instead of float32
    predict = torch.no_grad()(lambda x, t: denoiser(x, t, CONDITION))
    reference = follow(scheduler, predict, 80 * noise, torch.cat([grid[:1], inner]))
    assert relative_error(heun(denoiser, noise, grid, CONDITION), reference) < 1e-10


@pytest.mark.parametrize("num", [2, 10])
def test_heun_equals_diffusers_on_flow(num):
    denoiser, network = make_denoiser(Flow(), flow)
    scheduler, noise = diffusers.FlowMatchHeunDiscreteScheduler(), draw(*SHAPE)
    scheduler.set_timesteps(num)
    grid = torch.linspace(1, 0.001, num, dtype=torch.float64)
    reference = follow(scheduler, network, noise, torch.cat([grid[:1], grid[1:].repeat_interleave(2)]))
    assert relative_error(heun(denoiser, noise, grid, CONDITION), reference) < 1e-6


@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [999, 499], [999], [399]], ids=str)
@kinds
@pytest.mark.parametrize(("scaling", "tolerance"), [(10.0, 1e-6), (1e6, 1e-10)], ids=["default", "no boundary"])
def test_rollout_equals_lcm(parameterization, prediction_type, timesteps, scaling, tolerance):
    """LCM's boundary scalings are 1 up to 1e-7 at these times; a larger timestep scaling takes them away."""
    scheduler = vp_scheduler(diffusers.LCMScheduler, prediction_type=prediction_type, timestep_scaling=scaling)
    scheduler.set_timesteps(timesteps=timesteps, original_inference_steps=1000)
    student, network = make_denoiser(VP.scaled_linear(), parameterization)
    theirs, ours = (torch.Generator().manual_seed(7) for _ in range(2))
    reference = follow(scheduler, network, draw(*SHAPE), scheduler.timesteps, generator=theirs)
    fresh = [torch.randn(SHAPE, generator=ours, dtype=torch.float64) for _ in timesteps[1:]]
    noise = torch.stack([draw(*SHAPE), *fresh])
    fake = rollout(student, noise, torch.tensor(timesteps), CONDITION, stop=len(timesteps) - 1)
    assert relative_error(fake, reference) < tolerance


@pytest.mark.skipif(diffusers.__version__ < "0.40", reason="whose scheduler steps otherwise; no flow model is here yet")
def test_rollout_equals_diffusers_stochastic_flow():
    student, network = make_denoiser(Flow(), flow)
    scheduler, grid = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), Flow().grid(4)
    scheduler.set_timesteps(sigmas=grid.tolist())
    start = draw(*SHAPE)
    reference = follow(scheduler, network, start, grid, generator=torch.Generator().manual_seed(7))
    fresh = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(7))
    noise = torch.cat([start[None], fresh.double()])
    assert relative_error(rollout(student, noise, grid, CONDITION, stop=3), reference) < 1e-6


STUDENTS = [
    (EDM(), edm(0.5), torch.tensor([80.0, 2.5, 0.8, 0.3])),
    (VP.scaled_linear(), eps, torch.tensor([999, 749, 499, 249])),
    (Flow(), flow, torch.tensor([1.0, 0.75, 0.5, 0.25])),
]
students = pytest.mark.parametrize(("schedule", "parameterization", "timesteps"), STUDENTS, ids=["edm", "vp", "flow"])


@pytest.mark.parametrize(
    ("schedule", "parameterization", "t", "scale"),
    [
        (EDM(), edm(0.5), 80.0, 80 / (80**2 + 0.5**2) ** 0.5),
        (VP.scaled_linear(), eps, 999, 1.0),
        (VP.scaled_linear(), eps, 399, 1.0),
        (Flow(), flow, 1.0, 1.0),
    ],
    ids=["edm", "vp", "one-step vp at 399", "flow"],
)
def test_the_first_step_sees_pure_noise(schedule, parameterization, t, scale):
    """For EDM that is 80 eps, which the network sees times c_in."""
    student, _ = make_denoiser(schedule, parameterization)
    noise = draw(1, *SHAPE)
    rollout(student, noise, torch.tensor([t]), CONDITION, stop=0)
    x, seen_t, _ = student.network.calls[0]
    assert relative_error(x, scale * noise[0]) < 1e-10
    assert seen_t.tolist() == [t] * 3


@students
def test_step_k_is_renoised_with_noise_k(schedule, parameterization, timesteps):
    """What the network of step k saw, undone, is the student's previous x0 with noise[k]."""
    student, _ = make_denoiser(schedule, parameterization)
    noise = draw(4, *SHAPE)
    rollout(student, noise, timesteps, CONDITION, stop=3)
    for k in range(1, 4):
        x0 = rollout(student, noise[:k], timesteps[:k], CONDITION, stop=k - 1)
        t = timesteps[k].expand(3)
        alpha, sigma = schedule.alpha_sigma(t)
        c_in = student.coefficients(t)[2]
        expected = broadcast(c_in * alpha, x0) * x0 + broadcast(c_in * sigma, x0) * noise[k]
        assert relative_error(student.network.calls[k][0], expected) < 1e-10


@students
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_rollout_stops_at_the_asked_step_and_without_grad_carries_none(schedule, parameterization, timesteps, stop):
    student, _ = make_denoiser(schedule, parameterization)
    noise = draw(4, *SHAPE)
    fake = rollout(student, noise, timesteps, CONDITION, stop)
    assert (student.network.grad_modes, fake.requires_grad) == ([False] * (stop + 1), False)
    assert torch.is_grad_enabled()
    assert [t[0].item() for _, t, _ in student.network.calls] == timesteps[: stop + 1].tolist()
    assert relative_error(fake, rollout(student, noise[: stop + 1], timesteps[: stop + 1], CONDITION, stop)) == 0
    assert all(condition is CONDITION for _, _, condition in student.network.calls)


@students
@pytest.mark.parametrize("stop", [0, 2, 3])
def test_only_the_last_call_carries_gradient(schedule, parameterization, timesteps, stop):
    student, _ = make_denoiser(schedule, parameterization)
    fake = rollout(student, draw(4, *SHAPE), timesteps, CONDITION, stop, grad=True)
    assert student.network.grad_modes == [False] * stop + [True]
    gradient = torch.autograd.grad(fake.sum(), student.network.weight)[0]
    x, t, condition = student.network.calls[-1]
    assert not x.requires_grad
    c_out = broadcast(student.coefficients(t)[1], x)
    expected = torch.autograd.grad((c_out * student.network(x, t, condition)).sum(), student.network.weight)[0]
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-10)


@students
@pytest.mark.parametrize("stops", [[0, 1, 3], [3, 3, 3], [2, 0, 0], [0, 0, 0]])
def test_a_mixed_rollout_gives_each_sample_what_a_rollout_to_its_stop_gives(
    schedule, parameterization, timesteps, stops
):
    """With its own condition; no sample is in a pass behind its stop, and the last pass alone has a graph."""
    student, _ = make_denoiser(schedule, parameterization)
    noise, condition = draw(4, *SHAPE), {"label": draw(3)}
    fake = mixed_rollout(student, noise, timesteps, condition, stops, grad=True)
    calls, grads = [*student.network.calls], [*student.network.grad_modes]
    for row, stop in enumerate(stops):
        one = {name: value[row : row + 1] for name, value in condition.items()}
        alone = rollout(student, noise[:, row : row + 1], timesteps, one, stop)
        assert relative_error(fake[row : row + 1], alone) < 1e-10
    assert [len(x) for x, _, _ in calls] == [sum(stop > k for stop in stops) for k in range(max(stops))] + [3]
    assert grads == [False] * max(stops) + [True]
    gradient = torch.autograd.grad(fake.sum(), student.network.weight)[0]
    x, t, given = calls[-1]
    assert t.tolist() == [timesteps[stop].item() for stop in stops]
    c_out = broadcast(student.coefficients(t)[1], x)
    expected = torch.autograd.grad((c_out * student.network(x, t, given)).sum(), student.network.weight)[0]
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-10)


@students
def test_the_first_x0_leads_in_one_deterministic_step_to_where_the_teachers_steps_lead(
    schedule, parameterization, timesteps
):
    """By `ddim`, whose sixth call is there; on flow schedules it is eps - (eps - z) / (1 - s)."""
    teacher, _ = make_denoiser(schedule, parameterization)
    noise, grid = draw(*SHAPE), schedule.grid(30)[:6]
    target = first_x0(teacher, noise, grid, CONDITION)
    t, last = (grid[k].expand(len(noise)) for k in (0, -1))
    ddim(teacher, noise, grid, CONDITION)
    given = teacher.network.calls[-1][0]
    there = given / broadcast(teacher.coefficients(last)[2], given)  # x_t, of which the network is given c_in x_t
    x = schedule.pure_noise(noise)
    landed = schedule.add_noise(target, implied_noise(schedule, x, target, t), last)
    assert relative_error(landed, there) < 1e-9
    if schedule.kind == "flow":
        assert relative_error(target, noise - (noise - there) / (1 - grid[-1])) < 1e-9
    assert not target.requires_grad
    assert len(teacher.network.calls) == 5 + 6


@pytest.mark.parametrize(("sampler", "num_calls"), [(ddim, 4), (heun, 7)], ids=["ddim", "heun"])
def test_samplers_make_the_promised_number_of_calls_without_gradient(sampler, num_calls):
    denoiser, _ = make_denoiser(EDM(), edm(0.5))
    sampler(denoiser, draw(*SHAPE), karras_grid(4), CONDITION)
    assert denoiser.network.grad_modes == [False] * num_calls


@students
def test_implied_noise_undoes_add_noise(schedule, parameterization, timesteps):
    x0, eps, t = draw(4, 3), draw(4, 3, seed=1), timesteps
    x_t = schedule.add_noise(x0, eps, t)
    assert relative_error(implied_noise(schedule, x_t, x0, t), eps) < 1e-10


# Gaussian data: the optimal denoiser is known, and so is where the probability flow carries every noise.

GAUSSIANS = [
    (EDM(), karras_grid),
    (VP.scaled_linear(), lambda num: torch.linspace(999, 39, num, dtype=torch.float64).round().long()),
    (Flow(), lambda num: torch.linspace(1, 0.02, num, dtype=torch.float64)),
]
gaussians = pytest.mark.parametrize(("schedule", "grid"), GAUSSIANS, ids=["edm", "vp", "flow"])


def probability_flow(posterior, x_start, start, end):
    """The exact map: (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) never changes; then the denoiser's x0 at `end`."""

    def moments(t):
        alpha, sigma = posterior.schedule.alpha_sigma(t[None])
        return alpha * posterior.mean, (alpha**2 * posterior.std**2 + sigma**2).sqrt()

    (mean_start, std_start), (mean_end, std_end) = moments(start), moments(end)
    x_end = mean_end + std_end * (x_start - mean_start) / std_start
    return posterior(x_end, end.expand(len(x_end)), {})


def gaussian_error(sampler, schedule, timesteps):
    posterior, noise = GaussianPosterior(schedule), draw(50, 4)
    x0 = sampler(Denoiser(posterior, schedule, x0_prediction), noise, timesteps, {})
    start, end = timesteps[0], timesteps[-1]
    return relative_error(x0, probability_flow(posterior, schedule.pure_noise(noise), start, end))


@gaussians
@pytest.mark.parametrize(("sampler", "tolerance", "ratio"), [(ddim, 2e-2, 2), (heun, 2e-4, 4)], ids=["ddim", "heun"])
def test_many_steps_carry_noise_to_the_exact_sample_and_halving_them_tells_the_order(
    schedule, grid, sampler, tolerance, ratio
):
    coarse, fine = (gaussian_error(sampler, schedule, grid(num)) for num in (121, 241))
    assert fine < tolerance
    assert coarse / fine == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("kind", ["edm", "vp"])
def test_a_whole_rollout_is_a_rollout_to_every_stop(kind):
    schedule, parameterization = {"edm": (EDM(), edm(0.5)), "vp": (VP.scaled_linear(), eps)}[kind]
    student = Denoiser(SmoothNetwork(), schedule, parameterization)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    times, noise = schedule.grid(4), torch.stack([draw(*SHAPE, seed=seed) for seed in range(4)])
    for grad_at in (None, 0, 2, 3):
        found = whole_rollout(student, noise, times, CONDITION, grad_at)
        assert [x0.requires_grad for x0 in found] == [k == grad_at for k in range(4)]
        for stop, x0 in enumerate(found):
            assert torch.equal(x0, rollout(student, noise, times, CONDITION, stop))
