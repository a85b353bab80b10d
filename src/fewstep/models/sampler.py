"""Images from an image model for evaluation: noise and class of image i depend on (seed, i) alone, not on the batch."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.data.shards import chunks
from fewstep.diffusion.denoiser import Condition, Denoiser, Guided
from fewstep.diffusion.sampling import ddim, heun, rollout, whole_rollout
from fewstep.diffusion.schedules import broadcast
from fewstep.diffusion.timesteps import trailing_grid
from fewstep.errors import UserError
from fewstep.models.image_model import Asked, ImageModel
from fewstep.networks.codec import to_images
from fewstep.runtime.graphs import graphed
from fewstep.seeding import generator

MOST_STEPS, MOST_GUIDANCE = 10_000, 1000.0
SAMPLERS = ("ddim", "heun", "euler", "dpm++", "unipc", "lcm")  # of teachers, and lcm of few-step LoRAs on them
RENOISING = ("student", "lcm")
MULTISTEP = {"dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}


class NotFinite(UserError):
    """Of images, which uint8 would hide."""


@dataclass(frozen=True)
class Sampler:
    """How images are drawn: by a student's own timesteps, or from a teacher in `num_steps` by one of `SAMPLERS`.

    A student is drawn at the first `num_steps` of its timesteps: fewer than all are an earlier stop of its rollout.
    `lcm` is what draws students, at evenly spaced timesteps: for LoRAs that do not say theirs, such as DMD2's own.
    """

    kind: Literal["student", "ddim", "heun", "euler", "dpm++", "unipc", "lcm"]
    num_steps: int
    guidance_scale: float = 1.0

    def __str__(self) -> str:
        """As `parse_sampler` reads it, in one spelling."""
        return f"{self.kind}:{self.num_steps}" + (f"@{self.guidance_scale:g}" if self.guidance_scale != 1 else "")

    @property
    def nfe(self) -> int:
        """Calls of the network per image; guidance doubles them."""
        steps = 2 * self.num_steps - 1 if self.kind == "heun" else self.num_steps
        return steps * (1 + (self.guidance_scale != 1))

    @property
    def num_noises(self) -> int:
        """Noises per image: a student renoises freshly, the teacher's samplers are deterministic."""
        return self.num_steps if self.kind in RENOISING else 1


def default_sampler(model: ImageModel) -> Sampler:
    """The student's own timesteps; for a teacher EDM's 18 Heun steps (35 calls), or 50 of DDIM on other schedules."""
    if model.timesteps:
        return Sampler("student", len(model.timesteps))
    return Sampler("heun", 18) if model.denoiser.schedule.kind == "edm" else Sampler("ddim", 50)


def parse_sampler(text: str) -> Sampler:
    """`heun:18`, `ddim:8`, or with guidance `ddim:50@3`; raises UserError for anything else."""
    what, at, scale = text.partition("@")
    kind, _, steps = what.partition(":")
    with suppress(ValueError):
        guidance = float(scale if at else 1)
        if kind in SAMPLERS and steps.isdecimal() and 0 < int(steps) <= MOST_STEPS and 1 <= guidance <= MOST_GUIDANCE:
            return Sampler(kind, int(steps), guidance)  # type: ignore[arg-type]
    kinds = ", ".join(f"{name}:STEPS" for name in SAMPLERS)
    if len(steps) > 4 and steps.isdecimal():
        raise UserError(f"sampler {text!r}: takes at most {MOST_STEPS} steps")
    raise UserError(f"sampler {text!r}: write {kinds}, for example heun:18, or ddim:50@3 for guidance of scale 3")


def spread_timesteps(model: ImageModel, own: list[float], steps: int) -> list[float]:
    """As many evenly spaced timesteps, for a student of several evenly spaced ones; raises UserError for others."""
    schedule = model.denoiser.schedule
    if steps == len(own):
        return own
    if len(own) == 1:
        raise UserError(f"--steps {steps}: this is a one-step student (timestep {own[0]:g}), which has no second step")
    if not torch.allclose(torch.tensor(own).double(), schedule.grid(len(own)).double()):
        raise UserError(f"--steps {steps}: the student's timesteps {own} are not evenly spaced; leave --steps out")
    return schedule.grid(steps).tolist()


def draw_noise(model: ImageModel, num_noises: int, start: int, stop: int, seed: int) -> Tensor:
    """Unit noise (num_noises, B, C, H, W) of images start .. stop-1; image i has the same noise in every batch.

    The first of an image's noises is alike for every sampler, so that rows of a table start from the same noise.
    """
    each = (torch.randn(num_noises, *model.shape, generator=generator(seed, "image", i)) for i in range(start, stop))
    return torch.stack(list(each), dim=1).to(model.device)


def sample(
    model: ImageModel, sampler: Sampler, noise: Tensor, condition: Condition, null_condition: Condition | None = None
) -> Tensor:
    """x0 from noise (>= 1, B, ...), without gradient; `null_condition` is the model's, where it was made before."""
    denoiser: Denoiser | Guided = model.denoiser
    null_condition = null_condition or (model.null_condition if sampler.guidance_scale != 1 else None)
    if sampler.guidance_scale != 1 and null_condition is not None:
        denoiser = Guided(model.denoiser, sampler.guidance_scale, null_condition)
    schedule = denoiser.schedule
    if sampler.kind in RENOISING:
        own = model.timesteps if sampler.kind == "student" else schedule.grid(sampler.num_steps)
        timesteps = torch.as_tensor(own, dtype=torch.float64, device=noise.device)
        return rollout(denoiser, noise, timesteps, condition, stop=sampler.num_steps - 1)
    if sampler.kind in MULTISTEP:
        return multistep(denoiser, noise[0], sampler, condition)
    if sampler.kind == "euler":
        return euler(denoiser, noise[0], sampler.num_steps, condition)
    if sampler.kind == "ddim":
        return ddim(denoiser, noise[0], schedule.grid(sampler.num_steps).to(noise.device), condition)
    return heun(denoiser, noise[0], schedule.ode_grid(sampler.num_steps).to(noise.device), condition)


def euler(denoiser: Denoiser | Guided, noise: Tensor, num_steps: int, condition: Condition) -> Tensor:
    """Euler's method on the probability flow in sigma/alpha, where it is `ddim`; noise (B, ...) -> x0.

    On VP schedules as diffusers' EulerDiscreteScheduler has it with "trailing" spacing: it starts from sigma(T-1) eps,
    not from eps. Else from pure noise along Karras' levels (arXiv 2206.00364, algorithm 1, without its lines 6 to 8).
    """
    schedule = denoiser.schedule
    if schedule.kind != "vp":
        return ddim(denoiser, noise, schedule.ode_grid(num_steps).to(noise.device), condition)
    times = trailing_grid(num_steps, len(schedule.levels)).to(noise.device)
    return ddim(denoiser, broadcast(schedule.alpha_sigma(times[:1])[1], noise) * noise, times, condition)


@torch.no_grad()
def multistep(denoiser: Denoiser | Guided, noise: Tensor, sampler: Sampler, condition: Condition) -> Tensor:
    """DPM-Solver++ (2M) or UniPC as diffusers has them, on evenly spaced times from T-1; noise (B, ...) -> x0.

    For VP schedules, else UserError. The schedulers are told that the network predicts x0, as a denoiser does.
    """
    import diffusers

    if denoiser.schedule.betas is None:  # all that the schedulers know of noise
        raise UserError(f"sampler {sampler.kind}: is for text-to-image models; take ddim or heun")
    told = {"prediction_type": "sample", "timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, MULTISTEP[sampler.kind])(trained_betas=denoiser.schedule.betas.numpy(), **told)
    scheduler.set_timesteps(sampler.num_steps)
    x_t = denoiser.schedule.pure_noise(noise)
    for t in scheduler.timesteps:
        x0 = denoiser(x_t, t.expand(len(noise)).to(noise.device), condition)
        x_t = scheduler.step(x0, t, x_t, return_dict=False)[0]
    return x_t


def by_graphs(model: ImageModel) -> ImageModel:
    """The same model, whose passes without gradient are CUDA graphs on a GPU, as long as its weights stay."""
    faster = copy.copy(model)
    faster.denoiser = graphed(model.denoiser, model.device)
    return faster


def generate_batches(
    model: ImageModel,
    sampler: Sampler,
    indices: range,
    seed: int = 0,
    asked: Asked = None,
    batch_size: int | None = None,
    report: Callable[[int], None] = lambda done: None,
    name: str = "the model",
) -> Iterator[Tensor]:
    """uint8 images (B, C, H, W) number indices[0] .. indices[-1] of a seed, one batch after the other, on the CPU.

    Image i is of `asked[i % len(asked)]`, prompts or class numbers. `report` is called with the count of finished ones.
    Raises NotFinite, with the model's `name`.
    """
    model = by_graphs(model)
    for part in chunks(indices, batch_size or model.sampling_batch):
        noise = draw_noise(model, sampler.num_noises, part.start, part.stop, seed)
        with torch.no_grad():
            x0 = sample(model, sampler, noise, model.conditions(part, asked))
        images = decoded(model, x0, part, name)
        report(part.stop - indices.start)
        yield images


def generate_stops(
    model: ImageModel, indices: range, seed: int = 0, asked: Asked = None, batch_size: int | None = None, name: str = ""
) -> Iterator[list[Tensor]]:
    """What `generate_batches` gives of a student at each of its K stops, bit for bit, of one rollout: K batches."""
    model, timesteps = by_graphs(model), torch.as_tensor(model.timesteps, dtype=torch.float64, device=model.device)
    for part in chunks(indices, batch_size or model.sampling_batch):
        noise = draw_noise(model, len(timesteps), part.start, part.stop, seed)
        with torch.no_grad():
            stops = whole_rollout(model.denoiser, noise, timesteps, model.conditions(part, asked))
        yield [decoded(model, x0, part, name) for x0 in stops]


@torch.no_grad()
def decoded(model: ImageModel, x0: Tensor, numbers: range, name: str) -> Tensor:
    """uint8 images of x0 (B, ...) on the CPU; raises NotFinite, with the model's `name` and the images' numbers."""
    pixels = model.decode_pixels(x0)
    if not pixels.isfinite().all():
        what = f"images {numbers[0]} to {numbers[-1]} are not finite"
        raise NotFinite(f"{name}: {what}; take another checkpoint or float32")
    return to_images(pixels).cpu()


def generate(model: ImageModel, sampler: Sampler, indices: range, *args: Any, **kwargs: Any) -> Tensor:
    """All that `generate_batches` gives in one: uint8 images (N, C, H, W)."""
    return torch.cat(list(generate_batches(model, sampler, indices, *args, **kwargs)))


@torch.no_grad()
def images_per_second(model: ImageModel, sampler: Sampler, batch_size: int = 0, min_seconds: float = 1.0) -> float:
    """Median throughput, pixels included, over three batches and `min_seconds` at least, after a warm-up."""
    model, batch_size = by_graphs(model), batch_size or model.sampling_batch
    noise = draw_noise(model, sampler.num_noises, 0, batch_size, seed=0)
    condition = model.conditions(range(batch_size))

    def draw() -> None:
        model.decode(sample(model, sampler, noise, condition))
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    seconds: list[float] = []
    draw()
    while len(seconds) < 3 or sum(seconds) < min_seconds:
        start = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - start)
    return batch_size / sorted(seconds)[len(seconds) // 2]
