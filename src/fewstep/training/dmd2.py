"""DMD2: distribution matching with a two time-scale critic, a GAN on it, and backward simulation (arXiv 2405.14867)."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor

from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.losses import denoising_loss, dmd_loss, gan_critic_loss, gan_student_loss
from fewstep.diffusion.sampling import rollout
from fewstep.models.image_model import ImageModel
from fewstep.networks.features import features, x0_and_features
from fewstep.runtime.ema import EMA
from fewstep.seeding import generator
from fewstep.training.method import Batch, Metrics
from fewstep.training.noise_levels import NoiseLevelSampler, level_sampler
from fewstep.training.optimization import Optimizer
from fewstep.training.pair_loss import PairLoss
from fewstep.training.roles import Roles
from fewstep.training.settings import DMD2Settings
from fewstep.training.student import StudentMethod, student_timesteps


class DMD2(StudentMethod):
    """Every step updates critic and discriminator; every `student_every`-th step updates the student first."""

    STATE = ("student", "critic", "discriminator", "ema", "student_optimizer", "critic_optimizer")

    def __init__(
        self,
        settings: DMD2Settings,
        model: ImageModel,
        roles: Roles,
        num_steps: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        pair_loss: PairLoss | None = None,
    ):
        self.pair_loss = pair_loss
        self.settings, self.model, self.batch_size, self.seed, self.rank = settings, model, batch_size, seed, rank
        self.teacher, self.student, self.critic = roles.teacher, roles.student, roles.critic
        self.discriminator, self.feature_layer = roles.discriminator, roles.feature_layer
        self.schedule = roles.student.schedule
        self.timesteps = student_timesteps(settings.student, self.schedule).to(model.device)
        num_student_updates = -(-num_steps // settings.student_every)
        self.student_optimizer = Optimizer(self.student.parameters(), settings.student.optimizer, num_student_updates)
        critic_parameters = chain(self.critic.parameters(), self.discriminator.parameters() if self.gan else ())
        self.critic_optimizer = Optimizer(critic_parameters, settings.critic.optimizer, num_steps)
        self.ema = EMA(self.student, settings.student.ema_decay)
        self.student_levels = level_sampler(settings.dm.noise, self.schedule, model.device)
        self.critic_levels = level_sampler(settings.critic.noise, self.schedule, model.device)

    @property
    def gan(self) -> bool:
        return self.settings.gan.student_weight > 0

    def step(self, batch: Batch, step: int) -> Metrics:
        """Makes fakes, updates the student if it is its turn, then the critic on the same fakes."""
        student_turn = step % self.settings.student_every == 0
        draws = generator(self.seed, "dmd2", step, self.rank, self.model.device)
        real, real_condition = None, self.model.encode_condition(batch)
        if self.settings.student.backward_simulation:
            given = self.model.encode_condition(batch["prompt"]) if "prompt" in batch else real_condition
            fake, condition, stops = self.simulated_fake(given, self.draw_stop(step), draws, student_turn)
        else:
            real, condition = self.model.encode_x0(batch, draws), real_condition
            fake, stops = self.fake_of_real(real, condition, draws, student_turn)
        if self.settings.critic.condition_on_stop:
            condition, real_condition = condition | {"stop": stops}, real_condition | {"stop": stops}
        metrics = self.update_student(fake, condition, draws, batch.get("pair")) if student_turn else {}
        if not self.gan:
            real = None
        elif real is None:
            real = self.model.encode_x0(batch, draws)
        return metrics | self.update_critic(fake.detach(), condition, real, real_condition, draws)

    def simulated_fake(
        self, real_condition: Condition, stop: int, draws: Generator, grad: bool
    ) -> tuple[Tensor, Condition, Tensor]:
        """The student's x0 behind its own rollout up to `stop`, its condition, and the stop of each sample (B,)."""
        noise = self.randn((stop + 1, self.batch_size, *self.model.shape), draws)
        condition = self.model.draw_condition(real_condition, self.batch_size, draws)
        fake = rollout(self.student, noise, self.timesteps, condition, stop, grad=grad)
        return fake, condition, torch.full((self.batch_size,), stop, device=draws.device)

    def fake_of_real(self, real: Tensor, condition: Condition, draws: Generator, grad: bool) -> tuple[Tensor, Tensor]:
        """The student's x0 of noised real data, each at a random one of its timesteps, and which one (B,)."""
        stops = torch.randint(len(self.timesteps), (len(real),), generator=draws, device=draws.device)
        eps, t = self.randn(real.shape, draws), self.timesteps[stops]
        noised, pure = self.schedule.add_noise(real, eps, t), self.schedule.pure_noise(eps)
        x_t = torch.where(stops.reshape(-1, *(1,) * (real.ndim - 1)) == 0, pure, noised)
        with torch.set_grad_enabled(grad):
            return self.student(x_t, t, condition), stops

    def draw_stop(self, step: int) -> int:
        """The index of the timestep that this step trains: one for the whole batch, alike on all ranks (spec, 1.5)."""
        return int(torch.randint(len(self.timesteps), (), generator=generator(self.seed, "stop", step)))

    def update_student(
        self, fake: Tensor, condition: Condition, draws: Generator, pairs: Batch | None = None
    ) -> Metrics:
        """Moves the student along the gradients of its losses at `fake`, which carries its graph, and on `pairs`.

        Gradients are asked for at the image and nowhere else, so critic, discriminator and teacher get none.
        """
        losses = self.student_losses(fake, condition, draws)
        weights = {"dm": self.settings.dm.weight, "gan": self.settings.gan.student_weight}
        gradients = {name: torch.autograd.grad(loss, fake)[0] for name, loss in losses.items()}
        fake.backward(sum(weights[name] * gradient for name, gradient in gradients.items()))
        metrics = self.regress(pairs) if pairs else {}
        metrics |= {"student_grad_norm": self.student_optimizer.step()}
        self.ema.update()
        for name, loss in losses.items():
            metrics |= {f"{name}_loss": loss.detach(), f"{name}_image_grad_norm": gradients[name].norm()}
        return metrics

    def regress(self, pairs: Batch) -> Metrics:
        """Adds the gradient of the loss on a batch of pairs to the student's."""
        assert self.pair_loss is not None
        loss = self.pair_loss(self.student, self.timesteps, pairs)
        (self.settings.regression_weight * loss).backward()
        return {"regression_loss": loss.detach()}

    def student_losses(self, fake: Tensor, condition: Condition, draws: Generator) -> dict[str, Tensor]:
        """The losses that are on, unweighted; without independent noise one pass of the critic serves both."""
        dm = self.settings.dm.weight > 0
        shared = dm and self.gan and not self.settings.gan.independent_noise
        losses = {}
        if dm:
            x_t, t = self.noised(fake, self.student_levels, draws)
            with torch.no_grad():
                teacher_x0 = self.teacher(x_t, t, condition)
            if shared:
                critic_x0, fake_features = self.x0_and_features(x_t, t, condition, features_only_grad=True)
            else:
                with torch.no_grad():
                    critic_x0 = self.critic(x_t, t, condition)
            losses["dm"] = dmd_loss(fake, teacher_x0, critic_x0)
        if self.gan:
            if not shared:
                fake_features = self.noised_features(fake, condition, draws)
            losses["gan"] = gan_student_loss(self.discriminator(fake_features))
        return losses

    def update_critic(
        self, fake: Tensor, condition: Condition, real: Tensor | None, real_condition: Condition, draws: Generator
    ) -> Metrics:
        """One update of critic and discriminator on constants; the critic has neither guidance nor dropout.

        `real` is None without the GAN.
        """
        x_t, t = self.noised(fake, self.critic_levels, draws)
        shared = self.gan and not self.settings.gan.independent_noise
        if shared:
            x0_hat, fake_features = self.x0_and_features(x_t, t, condition)
        else:
            x0_hat = self.critic(x_t, t, condition)
        loss = denoising_loss(x0_hat, fake, self.critic.coefficients(t)[1])
        metrics = {"denoising_loss": loss.detach()}
        if real is not None:
            if not shared:
                fake_features = self.noised_features(fake, condition, draws)
            real_features = self.noised_features(real, real_condition, draws, t if shared else None)
            fake_logits, real_logits = self.discriminator(fake_features), self.discriminator(real_features)
            gan_loss = gan_critic_loss(fake_logits, real_logits)
            loss = loss + self.settings.gan.critic_weight * gan_loss
            metrics |= {"gan_critic_loss": gan_loss.detach(), "logit_gap": (real_logits - fake_logits).mean().detach()}
        loss.backward()
        return metrics | {"critic_grad_norm": self.critic_optimizer.step()}

    def x0_and_features(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The critic's x0 prediction and the discriminator's features, from one pass."""
        return x0_and_features(self.critic, self.feature_layer, *args, **kwargs)

    def noised_features(self, x0: Tensor, condition: Condition, draws: Generator, t: Tensor | None = None) -> Tensor:
        """The discriminator's features of x0, freshly noised to t (by default random levels of the critic)."""
        x_t, t = self.noised(x0, self.critic_levels, draws, t)
        return features(self.critic, self.feature_layer, x_t, t, condition)

    def noised(
        self, x0: Tensor, levels: NoiseLevelSampler, draws: Generator, t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t with fresh noise, and its t: random from `levels`, or given."""
        t = levels(len(x0), draws) if t is None else t
        return self.schedule.add_noise(x0, self.randn(x0.shape, draws), t), t

    @staticmethod
    def randn(shape: Sequence[int], draws: Generator) -> Tensor:
        return torch.randn(shape, generator=draws, device=draws.device)
