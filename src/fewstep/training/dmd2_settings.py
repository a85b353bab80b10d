"""How a student is distilled: its critic, its losses, and what later work adds to them, each of it off by default."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fewstep.settings import Count, Few, Settings
from fewstep.training.settings import NoiseLevels, OptimizerSettings, RegressionSettings, StudentSettings

Divergence = Literal["rkl", "kl", "js", "sf", "sh", "neyman", "jf"]  # as `divergence_weight` has them


class CriticSettings(Settings):
    """The denoiser that tracks the student's distribution."""

    optimizer: OptimizerSettings = OptimizerSettings()
    """Of critic and discriminator together."""
    noise: NoiseLevels = NoiseLevels()
    """Noise levels of its denoising loss and of its GAN term."""
    condition_on_stop: bool = False
    """Tell it at which of the student's timesteps a sample was taken. As published it is not told, and only the mixture
    over the timesteps is matched: with K > 1 the samples of one may drift as long as the others make up for it."""
    stop_rate: float = Field(1.0, gt=0, le=1000)
    """How many times as fast as the rest the vectors of `condition_on_stop` learn. The numbers of a time embedding are
    some 30 times as large as weights; at 1 a critic of a short run hardly knows its stops, and they drift apart."""
    samples: Literal["step", "cycle"] = "step"
    """`step`, as published: a new rollout of the student for every critic update. `cycle`: one in the student's turn,
    through all timesteps, serves all updates up to the next: update k takes the x0 of stop s + k mod K, with new noise.
    A cycle of SDXL takes 31.0 forward passes for 39.5, and sees a fifth of the noises: FID on the digits is 0.177 for
    0.140, and 0.145 with `gan.real_share: 0.5`, 27.7 passes (benchmarks/cycle_quality_cpu_2026-11-26.md)."""

    student_share: float = Field(0.0, ge=0, lt=1)
    """Share s of the student's weights that the critic takes over behind each update of the student, critic <- (1 - s)
    critic + s student (IDA of SenseFlow, arXiv 2506.00523; 0.03 there): for critics that lag."""

    def idle(self) -> dict[str, str]:
        """The rate of what is not there."""
        return {} if self.condition_on_stop else {"stop_rate": "condition_on_stop is false"}


class DistributionMatchingSettings(Settings):
    """The student's main loss."""

    weight: float = Field(1.0, ge=0)
    """0 leaves it out (the paper's ablation "w/o distribution matching")."""
    noise: NoiseLevels = NoiseLevels(min_index=20, max_index=980)
    """Noise levels at which teacher and critic are compared."""
    floor: float = Field(0.0, ge=0, le=10)
    """Least divisor of the direction, mean|x - teacher's x0|, which goes to 0 with the noise and lets low noise levels
    weigh ever more; others have 0.05 to 0.1, published is none."""
    project: bool = False
    """Take out the direction's component along x - critic's x0, the critic's own error (PDMD, arXiv 2609.35768)."""
    divergence: Divergence = "rkl"
    """What is minimised: the reverse KL divergence, as published, or another f-divergence, whose weight h(r) of the
    ratio r of real to fake, by the discriminator, is divided by its running mean at the noise level (arXiv 2502.15681;
    js there); kl, js, sf (softened reverse KL), sh (squared Hellinger), neyman, jf (Jeffreys)."""

    def idle(self) -> dict[str, str]:
        """All else, where the weight leaves it out."""
        return {} if self.weight else dict.fromkeys(("noise", "floor", "project", "divergence"), "dm.weight is 0")


class GANSettings(Settings):
    """The discriminator on the critic's features; both weights 0 leave it out."""

    student_weight: float = Field(3e-3, ge=0)
    """Of the student's GAN loss: ImageNet-64 3e-3, SD 1.5 1e-3, SDXL 5e-3; it scales with 1/(C H W), see losses.py."""
    critic_weight: float = Field(1e-2, ge=0)
    """Of the critic's GAN loss, beside its denoising loss of weight 1."""
    feature_layer: str | None = None
    """Dotted name of the critic's layer that is read; by default the network's bottleneck."""
    independent_noise: bool = False
    """As published: own noise and levels for the GAN terms. Otherwise they share noised samples, and so passes."""
    real_share: float = Field(1.0, gt=0, le=1)
    """Share of a batch's rows that bring a real image, spread evenly over them; published: 1. The gradient stays
    unbiased, with more variance. 0.5 saves 3.3 forward passes in a cycle of SDXL, and cost no quality on the digits."""
    features: Literal["trained", "frozen"] = "trained"
    """`trained`, as published: reals train the critic's encoder, too. `frozen`: the head alone learns from them, which
    saves 4.3 forward passes in a cycle of SDXL, and costs: FID on the digits 0.213 for 0.177, both under `cycle`."""
    max_index: int = Field(999, ge=0, le=999)
    """Highest of the schedule's levels at which samples have a GAN term, of fakes and of reals; published: all."""
    r1_weight: float = Field(0.0, ge=0)
    """In the critic's GAN loss, of (logit of a real - logit of it with noise)^2: an approximate gradient penalty (APT,
    arXiv 2501.08316), for one more pass of the critic's encoder; 0.1 to 200 elsewhere, published: none."""
    r1_std: float = Field(0.1, gt=0)
    """Deviation of that noise, on x0."""

    def idle(self) -> dict[str, str]:
        """All else, where the weights leave it out."""
        if not self.student_weight:
            others = type(self).model_fields.keys() - {"student_weight", "critic_weight"}
            return dict.fromkeys(sorted(others), "both weights are 0")
        return {} if self.r1_weight else {"r1_std": "r1_weight is 0"}

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if bool(self.student_weight) != bool(self.critic_weight):
            raise ValueError("student_weight and critic_weight: set both, or both to 0")
        return self


class DiversitySettings(Settings):
    """The first step's own loss (DP-DMD, arXiv 2602.03139): it follows the teacher, and the others match distributions.

    mean (x0 - x0*)^2 at the first timestep, x0* what leads in one deterministic step from the noise to where the
    teacher gets in `steps` of a grid of `grid`.
    """

    weight: float = Field(0.0, ge=0)
    """0 leaves it out, and trains all timesteps alike; there 0.05. The samples keep the variety of the teacher's."""
    steps: Few = 5
    """Calls of the teacher, two each if it is guided, in the student's turn."""
    grid: int = Field(30, ge=2, le=1000)
    """Evenly spaced times of the teacher's way from pure noise."""

    def idle(self) -> dict[str, str]:
        """The way, where nothing follows it."""
        return {} if self.weight else dict.fromkeys(("steps", "grid"), "diversity.weight is 0")

    @model_validator(mode="after")
    def _steps_are_of_the_grid(self) -> Self:
        if self.steps >= self.grid:
            raise ValueError(f"steps: {self.steps} steps need a grid of more than {self.grid}")
        return self


class DMD2Settings(Settings):
    """How a student is distilled."""

    checkpointing: Literal["none", "gan", "blocks"] = "none"
    """What is not kept for the backward pass but computed again, with the same gradients. `blocks`: all inside the
    blocks of student and critic, for about a third more arithmetic; `gan`: only the critic's blocks in the student's
    turn, where the peak is, for the GAN's gradient: 3 GB less of SDXL at batch 1, for 1 % more."""
    student_every: Count = 5
    """Critic updates per student update, the two time-scale rule: 5, or 10 for SD 1.5."""
    student: StudentSettings = StudentSettings()
    critic: CriticSettings = CriticSettings()
    dm: DistributionMatchingSettings = DistributionMatchingSettings()
    gan: GANSettings = GANSettings()
    diversity: DiversitySettings = DiversitySettings()
    """Of the first of several timesteps (keys weight, steps, grid)."""
    regression_weight: float = Field(0.0, ge=0)
    """Of a loss on pairs of the teacher's noise and image in the student's turn, at its first timestep; DMD2 has none,
    the original DMD 0.25, with LPIPS."""
    regression: RegressionSettings | None = None
    """For `regression_weight` (keys pairs, num, sampler, lpips, lpips_size, decoder)."""

    def idle(self) -> dict[str, str]:
        """What belongs to several timesteps, to the main loss or to pairs, where there are none."""
        several = ("critic.condition_on_stop", "critic.stop_rate", "student.stops")
        found = dict.fromkeys(several, "the student has one timestep") if self.student.num_timesteps == 1 else {}
        if not self.student.backward_simulation:
            found |= {"student.stops": "student.backward_simulation is off, where each sample has its own"}
        found |= {} if self.dm.weight else {"guidance_scale": "dm.weight is 0"}
        found |= {"critic.samples": "student_every is 1"} if self.student_every == 1 else {}
        if self.checkpointing == "gan" and not self.gan.student_weight:
            found["checkpointing"] = "both weights of the GAN are 0"
        return found | ({} if self.regression_weight else {"regression": "regression_weight is 0"})

    @model_validator(mode="after")
    def _something_trains_the_student(self) -> Self:
        if self.regression_weight and self.regression is None:
            raise ValueError("regression_weight: needs regression.pairs and regression.sampler")
        if not self.dm.weight and not self.gan.student_weight:
            raise ValueError("dm.weight and gan.student_weight are both 0: nothing would train the student")
        return self

    @model_validator(mode="after")
    def _a_cycle_has_one_rollout(self) -> Self:
        student = self.student
        others = {
            "student.backward_simulation is off": not student.backward_simulation,
            "student.stops is mixed": student.stops == "mixed",
            "student.timesteps is random": student.timesteps == "random",
            "diversity.weight is not 0": self.diversity.weight > 0,
        }
        if self.critic.samples == "cycle" and any(others.values()):
            why = next(why for why, on in others.items() if on)
            raise ValueError(f"critic.samples: cycle shares a rollout to one stop, but {why}; set step")
        return self

    @model_validator(mode="after")
    def _switches_go_together(self) -> Self:
        student, gan = self.student, self.gan
        if student.timesteps == "random" and self.critic.condition_on_stop:
            raise ValueError("critic.condition_on_stop: random timesteps have no stops to tell apart; set false")
        if self.dm.divergence != "rkl" and (not gan.student_weight or gan.independent_noise):
            told = "takes its ratio from the discriminator, at the same noise"
            raise ValueError(f"dm.divergence: {told}; set both weights of gan, and gan.independent_noise: false")
        if self.diversity.weight and (student.num_timesteps == 1 or not student.backward_simulation):
            raise ValueError("diversity.weight: is for students of several timesteps, with student.backward_simulation")
        return self
