"""Training a small autoencoder from scratch, for a text-to-image job that needs no download."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.autoencoder import Autoencoder
from fewstep.models.image_model import Asked
from fewstep.networks.codec import to_images, to_pixels
from fewstep.runtime.distributed import gathered
from fewstep.runtime.ema import EMA
from fewstep.seeding import Random
from fewstep.training.method import Batch, Method, Metrics, Part, can_learn, count_broken, of_parts, share_of
from fewstep.training.optimization import Optimizer
from fewstep.training.settings import AutoencoderSettings


class AutoencoderTraining(Method):
    """loss = mean (x - x')^2 + w_1 mean|x - x'| + w_KL mean KL(q(z|x) || N(0, 1)) (arXiv 1312.6114, appendix B)."""

    STATE = ("vae", "optimizer")
    VARIANCE_DECAY = 0.99  # of the running variance of the latents

    def __init__(self, settings: AutoencoderSettings, model: Autoencoder, num_steps: int, batch_size: int, seed: int):
        self.settings, self.model, self.batch_size, self.seed = settings, model, batch_size, seed
        self.vae = model.vae.train()
        self.optimizer = Optimizer(self.vae.parameters(), settings.optimizer, num_steps)
        self.ema = EMA(self.vae, 0)  # not averaged
        self.variance = torch.ones((), device=model.device)

    def compute(self, parts: Sequence[Part], turn: Any, random: Random) -> Metrics:
        """One update; gives the losses and the gradient norm before clipping."""
        halves = [self._gradients(rows, batch, random, share_of(parts)) for rows, batch in parts]
        found = of_parts([metrics for _, metrics in halves])
        variance = gathered(torch.cat([latent for latent, _ in halves])).var()
        norm, skipped = self.optimizer.step(can_learn(found, parts))
        # The scaling factor is saved with the weights: what an update is skipped for must not enter it either.
        self.variance.lerp_(torch.where(skipped > 0, self.variance, variance), 1 - self.VARIANCE_DECAY)
        self.shown = gathered(torch.cat([batch["image"].to(self.model.device) for _, batch in parts]))
        return found | {"grad_norm": norm, "skipped_autoencoder": skipped}

    def advance(self, turn: Any) -> None:
        self.optimizer.advance()

    def _gradients(self, rows: range, batch: Batch, random: Random, weight: float) -> tuple[Tensor, Metrics]:
        draws = random.draws("autoencoder", rows, self.batch_size)
        pixels = to_pixels(batch["image"].to(self.model.device))  # (B, 3, H, W)
        posterior = self.vae.encode(pixels).latent_dist  # mean, std, var: (B, C, h, w)
        latent = posterior.mean + posterior.std * draws.randn(*posterior.mean.shape[1:])  # (B, C, h, w)
        error = self.vae.decode(latent).sample - pixels
        # Of N(mean, var) from N(0, 1), per number of a latent: it keeps the latents near unit variance.
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        squared, absolute = error.square().mean(), error.abs().mean()
        torch.autograd.backward(weight * (squared + self.settings.l1_weight * absolute + self.settings.kl_weight * kl))
        metrics = {"squared_error": squared.detach(), "absolute_error": absolute.detach(), "kl": kl.detach()}
        return latent.detach(), metrics | count_broken(autoencoder=error.detach())

    def sample(self, noise: Tensor, first: int = 0, asked: Asked = None) -> Tensor:
        """uint8 pictures of the last batch and what became of them in turn; `noise` only says how many."""
        pixels = to_pixels(self.shown[first // 2 : (first + noise.shape[1]) // 2].to(self.model.device))
        self.vae.eval()
        restored = self.model.reconstruct(pixels)
        self.vae.train()
        return torch.stack([to_images(pixels), restored], dim=1).flatten(0, 1)

    def label(self, index: int, asked: Asked = None) -> str:
        return ("image", "restored")[index % 2]

    def save_model(self, folder: Path, state: dict[str, Any], frozen: Path | None = None) -> None:
        """Writes the autoencoder with the scaling factor that gives its latents unit variance."""
        self.model.save(folder, state["vae"], scaling_factor=1 / state["variance"].sqrt().item())

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.variance.copy_(state["variance"])
