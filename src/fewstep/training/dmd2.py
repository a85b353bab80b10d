"""DMD2: distribution matching with a two time-scale critic, a GAN on it, and backward simulation (arXiv 2405.14867)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from fewstep.diffusion import losses
from fewstep.diffusion.denoiser import Condition, Guided
from fewstep.diffusion.losses import finite_samples, without_samples
from fewstep.diffusion.sampling import first_x0, rollout
from fewstep.diffusion.schedules import broadcast
from fewstep.models.image_model import Asked, ImageModel
from fewstep.networks.blocks import checkpointed
from fewstep.networks.features import features, x0_and_features
from fewstep.runtime.ema import trainable_state
from fewstep.seeding import Draws, Random
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.fakes import Fakes, Turn
from fewstep.training.method import (
    Batch,
    Metrics,
    Part,
    StudentMethod,
    Term,
    can_learn,
    count_broken,
    of_parts,
    share_of,
)
from fewstep.training.noise_levels import NoiseLevelSampler, level_sampler
from fewstep.training.optimization import Optimizer
from fewstep.training.panels import num_samples, panel
from fewstep.training.pool import Samples, rows_of
from fewstep.training.ratios import Ratios
from fewstep.training.regression import PairLoss
from fewstep.training.roles import STOP_EMBEDDING, Roles
from fewstep.training.signals import (
    Signals,
    Sums,
    sums_of_errors,
    sums_of_logits,
    sums_of_samples,
    sums_of_update,
)
from fewstep.training.teacher_errors import TeacherErrors

SQUARED = "_image_grad_norm"  # what parts give the share of the square of


class DMD2(StudentMethod):
    """Every step updates critic and discriminator; every `student_every`-th step updates the student first."""

    STATE: tuple[str, ...] = ("student", "critic", "discriminator", "ema", "student_optimizer", "critic_optimizer")

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
        self.num_reals = round(batch_size * settings.gan.real_share)  # a step, spread over its rows
        self.fakes = Fakes(settings, model, self.student, self.timesteps, seed)
        self.pool = self.fakes.pool
        if not self.gan:  # of earlier versions states have a head that nothing trained or read
            self.STATE = tuple(name for name in self.STATE if name != "discriminator")
        if self.pool:
            self.STATE = (*self.STATE, "pool")
        reweighted = settings.dm.weight > 0 and settings.dm.divergence != "rkl"
        self.ratios = Ratios(settings.dm.divergence, self.schedule, model.device) if reweighted else None
        if self.ratios:
            self.STATE = (*self.STATE, "ratios")
        critic_parameters = chain(self.critic.parameters(), self.discriminator.parameters() if self.gan else ())
        told = settings.critic.condition_on_stop
        rates = {self.critic.get_parameter(STOP_EMBEDDING): settings.critic.stop_rate} if told else {}
        self.critic_optimizer = Optimizer(critic_parameters, settings.critic.optimizer, num_steps, rates)
        self.student_levels = level_sampler(settings.dm.noise, self.schedule, model.device)
        self.critic_levels = level_sampler(settings.critic.noise, self.schedule, model.device)
        self.teachers_way = self.schedule.grid(settings.diversity.grid)[: settings.diversity.steps + 1].to(model.device)
        self.signals: Signals | None = None
        self.teacher_errors: TeacherErrors | None = None
        self.null_error: Tensor | None = None
        """What a step tells of its health; what the critic's loss is measured by, where real images are; and how much
        worse the guided teacher's loss is without a condition."""

    def compute(self, parts: Sequence[Part], turn: Turn, random: Random) -> Metrics:
        """Makes fakes, updates the student if it is its turn, then the critic on the same fakes.

        Two loops over the parts: all fakes are of the student before its update, as they are in one piece.
        """
        weight = share_of(parts)
        # When the critic has had its updates on this student; of every step they would cost five times as much.
        self.signals = Signals() if turn.student else None
        # The student changes behind the last part only, so that no part sees another student than the one before.
        found = [self._samples_of(part, turn, random, weight) for part in parts]
        metrics = of_parts([of_part for *_, of_part in found])
        if turn.student:
            norms = {name: value.sqrt() for name, value in metrics.items() if name.endswith(SQUARED)}
            metrics = self.update_student(can_learn(metrics, parts)) | metrics | norms | self._balance(norms)
            self._follow_student()
            if self.ratios:
                self.ratios.end_step()
        critics = of_parts([self.critic_gradients(fake, real, weight) for fake, real, _ in found])
        norm, skipped = self.critic_optimizer.step(can_learn(critics, parts, not_finite_data=self.num_reals))
        # Behind what decides on an update: a signal that is not finite is in no line, and no reason to skip one.
        signals = self.signals.read() if self.signals else {}
        signals |= {} if self.null_error is None else {"null_error": self.null_error}  # of the teacher, told in each
        return metrics | critics | {"critic_grad_norm": norm, "skipped_critic": skipped} | signals

    def turn(self, step: int, stop: int | None = None) -> Turn:
        """Whose turn it is, and where its samples are taken: at its own random stop, or the one given."""
        return self.fakes.turn(step, stop)

    def advance(self, turn: Turn) -> None:
        if turn.student:
            super().advance(turn)
        self.critic_optimizer.advance()

    def _watch(self, sums_of: Callable[..., Sums], *given: Any) -> None:
        """Takes in a part's sums in the turns that have signals."""
        if self.signals:
            self.signals.add(sums_of(*given))

    def _balance(self, norms: Metrics) -> Metrics:
        """`gan_to_dm`, the weighted norm of the GAN's gradient at the image over that of distribution matching."""
        gan, dm = (norms.get(f"{name}{SQUARED}") for name in ("gan", "dm"))
        if gan is None or dm is None:
            return {}
        return {"gan_to_dm": self.settings.gan.student_weight / self.settings.dm.weight * gan / dm}

    def _samples_of(
        self, part: Part, turn: Turn, random: Random, weight: float
    ) -> tuple[Samples, Samples | None, Metrics]:
        """Fakes and reals of one part; in the student's turn adds its share of its gradients, which `weight` is of.

        The critic is shown them behind the student's update. No reals are there without a GAN, and where no row of the
        part brings one.
        """
        rows, batch = part
        draws = random.draws("dmd2", rows, self.batch_size)
        # The order of draws is part of what a seed means: condition, noise, student, real data, critic.
        real, given, metrics = None, None, Metrics()
        if self.pool and not turn.student:
            fake = self.fakes.again(turn, draws)
        elif self.settings.student.backward_simulation:
            # prompts of their own, or the captions of the reals
            given = self.model.encode_condition(batch.get("prompt", batch))
            fake = self.fakes.simulated(given, turn, draws, random)
        else:
            real, condition = self.model.encode_x0(batch, draws), self.model.encode_condition(batch)
            # A broken image must not reach the student: its x0 would be one, too, and with it all gradients.
            usable = without_samples(real, finite_samples(real))
            given, fake = condition, self.fakes.of_real(usable, condition, draws, turn.student)
        told = {"stop": fake.stops} if self.settings.critic.condition_on_stop else {}
        # Here, not in a loop of its own: the graph of this part is freed before the next one is built.
        if turn.student:
            metrics = self.student_gradients(fake.x0, fake.condition | told, draws, batch, weight, fake.noise)
        reals = self._reals(draws, batch, real, None if "prompt" in batch else given, told, random)
        return Samples(draws, fake.x0.detach(), fake.condition | told), reals, metrics

    def _reals(
        self,
        draws: Draws,
        batch: Batch,
        x0: Tensor | None,
        condition: Condition | None,
        told: Condition,
        random: Random,
    ) -> Samples | None:
        """Those of a part's rows that bring reals; their x0 and condition, if not known yet, are encoded here."""
        total, num = self.batch_size, self.num_reals
        rows = [row for row in draws.rows if (row + 1) * num // total > row * num // total]  # spread over the batch
        if not self.gan or not rows:
            return None
        if num < total:
            mine = [row - draws.rows[0] for row in rows]
            batch, x0, condition, told = (rows_of(each, mine) for each in (batch, x0, condition, told))
            # Draws of their own: a part's fakes must not depend on whether it has reals.
            draws = random.draws("reals", rows, total)
        x0 = self.model.encode_x0(batch, draws) if x0 is None else x0
        condition = self.model.encode_condition(batch) if condition is None else condition
        return Samples(draws, x0, condition | told)

    def panel(self, noise: Tensor, asked: Asked = None) -> Image:
        """Samples of the student as it is trained, not averaged: those that the critic tracks, at the last timestep."""
        num, last = min(num_samples(self.model), noise.shape[1]), len(self.timesteps) - 1
        condition = self.model.conditions(range(num), asked)
        x0 = rollout(self.student, noise[:, :num], self.timesteps, condition, last)
        stops = torch.full((num,), last, device=x0.device)
        told = {"stop": stops} if self.settings.critic.condition_on_stop else {}
        return panel(self.model, self.teacher, self.critic, x0, condition | told, self.seed)

    # --- the student -------------------------------------------------------------------------------------------------

    def student_gradients(
        self,
        fake: Tensor,
        condition: Condition,
        draws: Draws,
        batch: Batch,
        weight: float = 1.0,
        noise: Tensor | None = None,
    ) -> Metrics:
        """Adds the gradients of the student's losses at `fake`, which carries its graph, and of its other terms.

        Gradients are asked for at the image and nowhere else, so critic, discriminator and teacher get none. The norms
        at the image are given as their squares' share of the whole batch's. `noise` is what the rollout began with.
        """
        recomputed = self.settings.checkpointing == "gan"  # of the teacher nothing is kept, and the student is not run
        with checkpointed(self.critic.network) if recomputed else nullcontext():
            terms = self.student_losses(fake, condition, draws)
        gradients = {name: torch.autograd.grad(term.loss.mean(), fake)[0] for name, term in terms.items()}
        # One backward pass of the student for all terms at the image.
        pull = sum((weight * term.weight * gradients[name] for name, term in terms.items()), torch.zeros_like(fake))
        torch.autograd.backward(fake, pull)
        extra = self.extra_terms(batch, noise, condition)  # behind the others, whose graphs are gone
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
                teacher_x0, conditional = self._teacher_x0(x_t, t, condition)  # (B, C, H, W), guided and not
            if shared:
                critic_x0, fake_features = x0_and_features(self.critic, self.feature_layer, x_t, t, condition, True)
            else:
                with torch.no_grad():
                    critic_x0 = self.critic(x_t, t, condition)  # without guidance, which it is never trained with
            self._watch(sums_of_update, fake, teacher_x0, critic_x0, conditional)
            switches = self.settings.dm.floor, self.settings.dm.project
            loss = losses.dmd_loss(fake, teacher_x0, critic_x0, *switches)  # (B,)
            terms["dm"] = Term(loss, dm, count_broken(teacher=teacher_x0))
        if self.gan:
            if not shared:
                fake_features, t = self.noised_features(fake, condition, draws)
            logits = self.discriminator(fake_features)  # (B,)
            terms["gan"] = Term(
                self._at_low_noise(losses.gan_student_loss(logits), t), self.settings.gan.student_weight
            )
            if self.ratios:
                weighted = terms["dm"].loss * self.ratios.weights(logits.detach(), t)
                terms["dm"] = replace(terms["dm"], loss=weighted)
        return terms

    def _at_low_noise(self, loss: Tensor, t: Tensor) -> Tensor:
        """A GAN's loss (B,), without that of samples above the noisiest level that has one; t (B,)."""
        index, levels = self.settings.gan.max_index, self.fakes.levels
        return loss if index == len(levels) - 1 else torch.where(t <= levels[index], loss, 0)

    @torch.no_grad()
    def _follow_student(self) -> None:
        """critic <- (1 - s) critic + s student (IDA, arXiv 2506.00523)."""
        if share := self.settings.critic.student_share:
            self.student_optimizer.finish()  # which is else done when the critic's passes are on their way
            ours, theirs = trainable_state(self.critic), trainable_state(self.student)  # of one architecture,
            names = [name for name in ours if name in theirs]  # but for what tells the critic the stop
            torch._foreach_lerp_([ours[name] for name in names], [theirs[name] for name in names], share)
            # Copies of weights go by their versions, which an operation on a list may leave as they are.
            torch.autograd.graph.increment_version([ours[name] for name in names])

    def _teacher_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """The teacher's x0, and that before guidance, if it is guided, of the same pass."""
        if not isinstance(self.teacher, Guided):
            return self.teacher(x_t, t, condition), None
        null, conditional = self.teacher.halves(x_t, t, condition)
        return self.teacher.guide(null, conditional), conditional

    def extra_terms(self, batch: Batch, noise: Tensor | None, condition: Condition) -> dict[str, Term]:
        """Further losses of the student, which call it themselves.

        The distance from the teacher's images of pairs, and that of the first x0 of `noise` from the teacher's way.
        """
        terms: dict[str, Term] = {}
        if self.pair_loss and "pair" in batch:
            loss = self.pair_loss(self.student, self.timesteps, batch["pair"])
            terms["regression"] = Term(loss, self.settings.regression_weight)
        if self.settings.diversity.weight and noise is not None:
            target = first_x0(self.teacher, noise, self.teachers_way, condition)  # (B, ...)
            x0 = rollout(self.student, noise[None], self.timesteps, condition, stop=0, grad=True)
            squares: Tensor = (x0 - target).square()
            terms["diversity"] = Term(squares.flatten(1).mean(1), self.settings.diversity.weight)
        return terms

    # --- the critic --------------------------------------------------------------------------------------------------

    def critic_gradients(self, fake: Samples, real: Samples | None, weight: float = 1.0) -> Metrics:
        """Adds the gradients of critic and discriminator on constants; the critic has neither guidance nor dropout."""
        x_t, t = self.noised(fake.x0, self.critic_levels, fake.draws)  # (B, C, H, W), (B,)
        if self.shared:
            x0_hat, features = x0_and_features(self.critic, self.feature_layer, x_t, t, fake.condition)
        else:
            x0_hat = self.critic(x_t, t, fake.condition)
        # 1 / c_out^2 makes it the loss in what the network predicts: eps for SD, EDM's weight for EDM.
        errors = losses.denoising_loss(x0_hat, fake.x0, self.critic.coefficients(t)[1])  # (B,)
        self._watch(sums_of_samples, "fake", fake.x0, self.model.on_pixels)
        if self.teacher_errors:
            self._watch(sums_of_errors, errors, self.teacher_errors.at(t))
        loss = errors.mean()
        metrics = {"denoising_loss": loss.detach(), **count_broken(student=fake.x0, critic=x0_hat.detach())}
        if self.gan:
            if not self.shared:
                features, t = self.noised_features(fake.x0, fake.condition, fake.draws)
            logits = self.discriminator(features)  # (B,)
            gan_loss = self._at_low_noise(losses.gan_fake_loss(logits), t).mean()
            loss = loss + self.settings.gan.critic_weight * gan_loss
            metrics |= {"gan_critic_loss": gan_loss.detach(), "logit_gap": -logits.detach().mean()}
            self._watch(sums_of_logits, "fake", logits)
        torch.autograd.backward(weight * loss)
        if self.gan:  # behind the backward pass of the fakes, whose graph is gone
            of_reals = self._real_gradients(real, fake, t, weight)
            metrics |= {name: metrics.get(name, 0) + value for name, value in of_reals.items()}
        return metrics

    def _real_gradients(self, real: Samples | None, fake: Samples, t: Tensor, weight: float) -> Metrics:
        """Adds the gradients of the GAN's term on a part's reals; as one of `1 / weight` parts of their mean."""
        zero = t.new_zeros((), dtype=torch.float32)
        if real is None:
            return {"gan_critic_loss": zero, "logit_gap": zero, "not_finite_data": zero.long()}
        usable, share = finite_samples(real.x0), 1 / (self.num_reals * weight)
        # With shared noise levels the head can't tell fakes from reals by how noisy they are.
        t_real = rows_of(t, [row - fake.draws.rows[0] for row in real.draws.rows]) if self.shared else None
        with torch.set_grad_enabled(self.settings.gan.features == "trained"):
            x0 = without_samples(real.x0, usable)
            x_t, t_real = self.noised(x0, self.critic_levels, real.draws, t_real)
            found = features(self.critic, self.feature_layer, x_t, t_real, real.condition)
        logits = self.discriminator(found)  # (reals,)
        logits = torch.where(usable, logits, logits.detach())  # nothing is learned from the others
        self._watch(sums_of_logits, "real", logits)
        self._watch(sums_of_samples, "real", real.x0, self.model.on_pixels)
        each = losses.gan_real_loss(logits)
        if r1 := self.settings.gan.r1_weight:
            each = each + r1 * self._r1_loss(logits, x_t, t_real, real)
        loss = share * self._at_low_noise(each, t_real).sum()
        torch.autograd.backward(weight * self.settings.gan.critic_weight * loss)
        counts = count_broken(data=real.x0)
        return {"gan_critic_loss": loss.detach(), "logit_gap": share * logits.detach().sum(), **counts}

    def _r1_loss(self, logits: Tensor, x_t: Tensor, t: Tensor, real: Samples) -> Tensor:
        """How far the logits of reals move with noise on x0, at the same x_t else; (reals,). The head alone learns."""
        std = self.settings.gan.r1_std * broadcast(self.schedule.alpha_sigma(t)[0], x_t)
        with torch.no_grad():
            moved = x_t + std * real.draws.randn(*x_t.shape[1:])
            found = features(self.critic, self.feature_layer, moved, t, real.condition)
        return losses.approximate_r1_loss(logits, self.discriminator(found))

    def noised_features(self, x0: Tensor, condition: Condition, draws: Draws) -> tuple[Tensor, Tensor]:
        """The discriminator's features of x0, freshly noised to random levels of the critic, and those levels."""
        x_t, t = self.noised(x0, self.critic_levels, draws)
        return features(self.critic, self.feature_layer, x_t, t, condition), t

    def noised(
        self, x0: Tensor, levels: NoiseLevelSampler, draws: Draws, t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t with fresh noise, and its t: random from `levels`, or given."""
        t = levels(draws) if t is None else t
        return self.schedule.add_noise(x0, draws.randn(*x0.shape[1:]), t), t
