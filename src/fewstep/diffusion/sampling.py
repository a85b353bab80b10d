"""Samplers: one renoising step, and the loops made of it. Every loop ends on an x0 prediction.

`noise` is unit noise, which the schedule turns into what a sampler starts from; `timesteps` (K,) are decreasing native
times.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Condition, Denoiser, Guided
from fewstep.diffusion.schedules import NoiseSchedule, broadcast

AnyDenoiser = Denoiser | Guided


def implied_noise(schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The eps for which x_t = alpha(t) x0 + sigma(t) eps; all (B, ...), t (B,)."""
    alpha, sigma = schedule.alpha_sigma(t)
    return (x_t - broadcast(alpha, x_t) * x0) / broadcast(sigma, x_t)


def rollout(
    student: AnyDenoiser, noise: Tensor, timesteps: Tensor, condition: Condition, stop: int, grad: bool = False
) -> Tensor:
    """The student's x0 at timesteps[stop], reached from pure noise through its own samples (DMD2, section 4.5).

    With stop = K-1 this is sampling; with a random `stop` it is backward simulation. noise (>= stop+1, B, ...).
    Only the last call carries gradient, and only if `grad`.
    """
    return whole_rollout(student, noise[: stop + 1], timesteps, condition, stop if grad else None)[stop]


def whole_rollout(
    student: AnyDenoiser, noise: Tensor, timesteps: Tensor, condition: Condition, grad_at: int | None = None
) -> list[Tensor]:
    """The student's x0 at each of its first N timesteps, on one path from noise (N, B, ...): N tensors (B, ...).

    x0_k = student(x_k, t_k);  x_{k+1} = alpha(t_{k+1}) x0_k + sigma(t_{k+1}) eps_{k+1} with fresh eps = noise[k+1]

    Only the call number `grad_at` carries gradient; the ones behind it start from its value.
    """
    times, schedule = timesteps[:, None].expand(-1, noise.shape[1]), student.schedule  # (K, B)
    found: list[Tensor] = []
    for k, eps in enumerate(noise):
        # fresh noise, not the implied
        x_t = schedule.add_noise(found[-1].detach(), eps, times[k]) if k else schedule.pure_noise(eps)
        with torch.set_grad_enabled(k == grad_at):
            found.append(student(x_t, times[k], condition))
    return found


def mixed_rollout(
    student: AnyDenoiser,
    noise: Tensor,
    timesteps: Tensor,
    condition: Condition,
    stops: Sequence[int],
    grad: bool = False,
) -> Tensor:
    """The student's x0 of each sample at its own stop, as `rollout` has it for one of all; (B, ...).

    noise (K, B, ...); no sample is run beyond its stop, so the passes of a batch are those of a mean stop. Only the
    last pass, in which all samples are, each at its own time, carries gradient, and only if `grad`.
    """
    schedule = student.schedule
    states = [*schedule.pure_noise(noise[0]).unbind()]  # of each sample what its next pass is given
    for k in range(max(stops)):
        going = [row for row, stop in enumerate(stops) if stop > k]
        t, next_t = (timesteps[i].expand(len(going)) for i in (k, k + 1))
        given = {name: torch.stack([value[row] for row in going]) for name, value in condition.items()}
        with torch.no_grad():
            x0 = student(torch.stack([states[row] for row in going]), t, given)
        x_t = schedule.add_noise(x0, torch.stack([noise[k + 1, row] for row in going]), next_t)
        for row, state in zip(going, x_t, strict=True):
            states[row] = state
    times = torch.stack([timesteps[stop] for stop in stops])  # (B,); no index tensor, whose way to a GPU takes a wait
    with torch.set_grad_enabled(grad):
        x0_at_stops: Tensor = student(torch.stack(states), times, condition)
    return x0_at_stops


@torch.no_grad()
def first_x0(teacher: AnyDenoiser, noise: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """The x0* from which one deterministic step leads from pure noise to where the teacher's N lead; (B, ...).

    With (x, s) at the first and (x', s') at the last of timesteps (N+1,), and s, a their sigma and alpha:
    x' = a' x0* + s' (x - a x0*) / s, so x0* = (x' - x s'/s) / (a' - a s'/s); on flow schedules the noise less the mean
    velocity (DP-DMD, arXiv 2602.03139, section 3).
    """
    schedule, x = teacher.schedule, teacher.schedule.pure_noise(noise)
    times = timesteps[:, None].expand(-1, len(noise))
    x_t = x
    for t, next_t in pairwise(times):
        x0 = teacher(x_t, t, condition)
        x_t = schedule.add_noise(x0, implied_noise(schedule, x_t, x0, t), next_t)
    (alpha, sigma), (alpha_last, sigma_last) = schedule.alpha_sigma(times[0]), schedule.alpha_sigma(times[-1])
    ratio = sigma_last / sigma  # (B,)
    found: Tensor = (x_t - broadcast(ratio, x) * x) / broadcast(alpha_last - alpha * ratio, x)
    return found


@torch.no_grad()
def ddim(
    denoiser: AnyDenoiser, noise: Tensor, timesteps: Tensor, condition: Condition, second_order: bool = False
) -> Tensor:
    """The deterministic sampler: renoise with the implied noise; K calls, or 2K-1 of `heun`.

    On EDM and flow schedules this is Euler's method on the probability flow. noise (B, ...) -> x0 (B, ...).
    """
    schedule, x_t = denoiser.schedule, denoiser.schedule.pure_noise(noise)
    times = timesteps[:, None].expand(-1, len(noise))
    for t, next_t in pairwise(times):
        x0 = denoiser(x_t, t, condition)
        eps = implied_noise(schedule, x_t, x0, t)
        x_next = schedule.add_noise(x0, eps, next_t)  # (B, C, H, W)
        if second_order:  # where Euler's step leads, the slope is taken a second time
            x0_next = denoiser(x_next, next_t, condition)
            eps_next = implied_noise(schedule, x_next, x0_next, next_t)
            (alpha, sigma), (alpha_next, sigma_next) = schedule.alpha_sigma(t), schedule.alpha_sigma(next_t)
            d_alpha, d_sigma = broadcast(alpha_next - alpha, x_t), broadcast(sigma_next - sigma, x_t)
            x_next = x_t + d_alpha * (x0 + x0_next) / 2 + d_sigma * (eps + eps_next) / 2
        x_t = x_next
    last: Tensor = denoiser(x_t, times[-1], condition)
    return last


def heun(denoiser: AnyDenoiser, noise: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """Heun's second-order sampler, 2K-1 calls (arXiv 2206.00364, algorithm 1, without churn).

    The probability flow is dx = x0 dalpha + eps dsigma, so one line serves EDM, VP and flow:
    x' = x + (alpha' - alpha) (x0 + x0')/2 + (sigma' - sigma) (eps + eps')/2
    """
    return ddim(denoiser, noise, timesteps, condition, second_order=True)
