"""DMD2: distribution matching with a two time-scale critic, a GAN on it, and backward simulation (arXiv 2405.14867)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from fewstep.diffusion import losses
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.losses import finite_samples, without_samples
from fewstep.diffusion.sampling import rollout
from fewstep.models.image_model import ImageModel
from fewstep.networks.features import features, x0_and_features
from fewstep.seeding import Draws, generator
from fewstep.training.method import Batch, Metrics, Part, StudentMethod, Term, can_learn, count_broken, of_parts
from fewstep.training.noise_levels import NoiseLevelSampler, level_sampler
from fewstep.training.optimization import Optimizer
from fewstep.training.regression import PairLoss
from fewstep.training.roles import Roles
from fewstep.training.settings import DMD2Settings

SQUARED = "_image_grad_norm"  # what parts give the share of the square of


@dataclass
class Fakes:
    """A part of a step's batch between the student's update and the critic's: constants, all of them (B, ...)."""

    draws: Draws
    fake: Tensor
    condition: Condition
    real: Tensor | None
    real_condition: Condition


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
        pair_loss: PairLoss | None = None,
    ):
        super().__init__(settings.student, model, roles.student, -(-num_steps // settings.student_every))
        self.settings, self.batch_size, self.seed, self.pair_loss = settings, batch_size, seed, pair_loss
        self.teacher, self.critic, self.schedule = roles.teacher, roles.critic, roles.student.schedule
        self.discriminator, self.feature_layer = roles.discriminator, roles.feature_layer
        self.gan = settings.gan.student_weight > 0
        self.shared = self.gan and not settings.gan.independent_noise
        critic_parameters = chain(self.critic.parameters(), self.discriminator.parameters() if self.gan else ())
        self.critic_optimizer = Optimizer(critic_parameters, settings.critic.optimizer, num_steps)
        self.student_levels = level_sampler(settings.dm.noise, self.schedule, model.device)
        self.critic_levels = level_sampler(settings.critic.noise, self.schedule, model.device)

    def step(self, parts: Sequence[Part], step: int) -> Metrics:
        """Makes fakes, updates the student if it is its turn, then the critic on the same fakes.

        Two loops over the parts: all fakes are of the student before its update, as they are in one piece.
        """
        students_turn, weight = step % self.settings.student_every == 0, 1 / len(parts)
        # The student changes behind the last part only, so that no part sees another student than the one before.
        halves = [self._fakes_of(part, step, students_turn, weight) for part in parts]
        metrics = of_parts([found for _, found in halves])
        if students_turn:
            norms = {name: value.sqrt() for name, value in metrics.items() if name.endswith(SQUARED)}
            metrics = self.update_student(can_learn(metrics, parts)) | metrics | norms
        found = of_parts([self.critic_gradients(fakes, weight) for fakes, _ in halves])
        norm, skipped = self.critic_optimizer.step(can_learn(found, parts))
        return metrics | found | {"critic_grad_norm": norm, "skipped_critic": skipped}

    def _fakes_of(self, part: Part, step: int, students_turn: bool, weight: float) -> tuple[Fakes, Metrics]:
        """Fakes of one part; in the student's turn adds their share of its gradients, which `weight` is of."""
        rows, batch = part
        draws = Draws(generator(self.seed, "dmd2", step, self.model.device), rows, self.batch_size)
        # The order of draws is part of what a seed means: condition, noise, student, real data, critic.
        real, real_condition = None, self.model.encode_condition(batch)
        if self.settings.student.backward_simulation:
            # prompts of their own, or the captions of the reals
            given = self.model.encode_condition(batch["prompt"]) if "prompt" in batch else real_condition
            fake, condition, stops = self.simulated_fake(given, self.draw_stop(step), draws, students_turn)
        else:
            real, condition = self.model.encode_x0(batch, draws), real_condition
            # A broken image must not reach the student: its x0 would be one, too, and with it all gradients.
            usable = without_samples(real, finite_samples(real))
            fake, stops = self.fake_of_real(usable, condition, draws, students_turn)
        if self.settings.critic.condition_on_stop:
            condition, real_condition = condition | {"stop": stops}, real_condition | {"stop": stops}
        # Here, not in a loop of its own: the graph of this part is freed before the next one is built.
        metrics = self.student_gradients(fake, condition, draws, batch, weight) if students_turn else {}
        if self.gan and real is None:
            real = self.model.encode_x0(batch, draws)
        return Fakes(draws, fake.detach(), condition, real if self.gan else None, real_condition), metrics

    def simulated_fake(self, given: Condition, stop: int, draws: Draws, grad: bool) -> tuple[Tensor, Condition, Tensor]:
        """The student's x0 behind its own rollout up to `stop`, its condition, and the stop of each sample (B,)."""
        noise = draws.randn(*self.model.shape, before=(stop + 1,))  # (stop + 1, B, C, H, W)
        condition = self.model.draw_condition(given, draws)  # fakes have conditions of their own: (B, ...)
        fake = rollout(self.student, noise, self.timesteps, condition, stop, grad=grad)
        return fake, condition, torch.full((len(draws),), stop, device=draws.device)

    def fake_of_real(self, real: Tensor, condition: Condition, draws: Draws, grad: bool) -> tuple[Tensor, Tensor]:
        """The student's x0 of noised real data, each at a random one of its timesteps, and which one (B,)."""
        stops = draws.randint(0, len(self.timesteps))  # (B,), for here the input of every sample is real data
        eps, t = draws.randn(*real.shape[1:]), self.timesteps[stops]
        # At the first timestep inference starts from pure noise, so training does.
        noised, pure = self.schedule.add_noise(real, eps, t), self.schedule.pure_noise(eps)
        x_t = torch.where(stops.reshape(-1, *(1,) * (real.ndim - 1)) == 0, pure, noised)
        with torch.set_grad_enabled(grad):
            return self.student(x_t, t, condition), stops

    def draw_stop(self, step: int) -> int:
        """The index of the timestep that this step trains: one for the whole batch (spec, 1.5)."""
        # Drawn on the CPU: it decides what is run, and the host must not wait for the device to know it.
        return int(torch.randint(len(self.timesteps), (), generator=generator(self.seed, "stop", step)))

    # --- the student -------------------------------------------------------------------------------------------------

    def student_gradients(
        self, fake: Tensor, condition: Condition, draws: Draws, batch: Batch, weight: float = 1.0
    ) -> Metrics:
        """Adds the gradients of the student's losses at `fake`, which carries its graph, and of its other terms.

        Gradients are asked for at the image and nowhere else, so critic, discriminator and teacher get none. The norms
        at the image are given as their squares' share of the whole batch's.
        """
        terms = self.student_losses(fake, condition, draws)
        gradients = {name: torch.autograd.grad(term.loss.mean(), fake)[0] for name, term in terms.items()}
        # One backward pass of the student for all terms at the image.
        pull = sum((weight * term.weight * gradients[name] for name, term in terms.items()), torch.zeros_like(fake))
        torch.autograd.backward(fake, pull)
        extra = self.extra_terms(batch)  # behind the others, whose graphs are gone
        for term in extra.values():
            torch.autograd.backward(weight * term.weight * term.loss.mean())
        metrics: Metrics = {}
        for name, term in (terms | extra).items():
            metrics |= {f"{name}_loss": term.loss.detach().mean(), **term.counts}
            if name in gradients:
                # A part's loss is the mean over its own samples, so its gradient is 1 / weight times the batch's.
                metrics[f"{name}{SQUARED}"] = weight * gradients[name].norm().square()
        return metrics

    def student_losses(self, fake: Tensor, condition: Condition, draws: Draws) -> dict[str, Term]:
        """The losses at the image that are on; without independent noise one pass of the critic serves both."""
        dm, terms = self.settings.dm.weight, dict[str, Term]()
        shared = dm > 0 and self.shared
        if dm > 0:
            x_t, t = self.noised(fake, self.student_levels, draws)
            with torch.no_grad():
                teacher_x0 = self.teacher(x_t, t, condition)  # (B, C, H, W), guided
            if shared:
                critic_x0, fake_features = x0_and_features(self.critic, self.feature_layer, x_t, t, condition, True)
            else:
                with torch.no_grad():
                    critic_x0 = self.critic(x_t, t, condition)  # without guidance, which it is never trained with
            terms["dm"] = Term(losses.dmd_loss(fake, teacher_x0, critic_x0), dm, count_broken(teacher=teacher_x0))
        if self.gan:
            if not shared:
                fake_features = self.noised_features(fake, condition, draws)
            loss = losses.gan_student_loss(self.discriminator(fake_features))  # (B,)
            terms["gan"] = Term(loss, self.settings.gan.student_weight)
        return terms

    def extra_terms(self, batch: Batch) -> dict[str, Term]:
        """Further losses of the student, which call it themselves: the distance from the teacher's images of pairs."""
        if self.pair_loss is None or "pair" not in batch:
            return {}
        loss = self.pair_loss(self.student, self.timesteps, batch["pair"])
        return {"regression": Term(loss, self.settings.regression_weight)}

    # --- the critic --------------------------------------------------------------------------------------------------

    def critic_gradients(self, fakes: Fakes, weight: float = 1.0) -> Metrics:
        """Adds the gradients of critic and discriminator on constants; the critic has neither guidance nor dropout."""
        fake, draws = fakes.fake, fakes.draws
        x_t, t = self.noised(fake, self.critic_levels, draws)  # (B, C, H, W), (B,)
        if self.shared:
            x0_hat, fake_features = x0_and_features(self.critic, self.feature_layer, x_t, t, fakes.condition)
        else:
            x0_hat = self.critic(x_t, t, fakes.condition)
        # 1 / c_out^2 makes it the loss in what the network predicts: eps for SD, EDM's weight for EDM.
        loss = losses.denoising_loss(x0_hat, fake, self.critic.coefficients(t)[1]).mean()
        metrics = {"denoising_loss": loss.detach(), **count_broken(student=fake, critic=x0_hat.detach())}
        if fakes.real is not None:
            if not self.shared:
                fake_features = self.noised_features(fake, fakes.condition, draws)
            usable = finite_samples(fakes.real)
            real = without_samples(fakes.real, usable)
            # With shared noise levels the head can't tell fakes from reals by how noisy they are.
            real_features = self.noised_features(real, fakes.real_condition, draws, t if self.shared else None)
            fake_logits, real_logits = self.discriminator(fake_features), self.discriminator(real_features)  # (B,)
            real_logits = torch.where(usable, real_logits, real_logits.detach())  # nothing is learned from the others
            gan_loss = losses.gan_critic_loss(fake_logits, real_logits).mean()
            loss = loss + self.settings.gan.critic_weight * gan_loss
            metrics |= {"gan_critic_loss": gan_loss.detach(), "logit_gap": (real_logits - fake_logits).mean().detach()}
            metrics |= count_broken(data=fakes.real)
        torch.autograd.backward(weight * loss)
        return metrics

    def noised_features(self, x0: Tensor, condition: Condition, draws: Draws, t: Tensor | None = None) -> Tensor:
        """The discriminator's features of x0, freshly noised to t (by default random levels of the critic)."""
        x_t, t = self.noised(x0, self.critic_levels, draws, t)
        return features(self.critic, self.feature_layer, x_t, t, condition)

    def noised(
        self, x0: Tensor, levels: NoiseLevelSampler, draws: Draws, t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t with fresh noise, and its t: random from `levels`, or given."""
        t = levels(draws) if t is None else t
        return self.schedule.add_noise(x0, draws.randn(*x0.shape[1:]), t), t
