"""The weights of an f-divergence, by the discriminator's ratio of real to fake, as training keeps them in bounds."""

import torch
from torch import Tensor

from fewstep.diffusion.losses import divergence_weight
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.runtime.distributed import add_up
from fewstep.training.dmd2_settings import Divergence

NUM_BINS = 10  # of noise levels
DECAY = 0.9  # of the running means, per update of the student


class Ratios:
    """Divides h(r) by its running mean at the noise level, so that the weights of a level have a mean near 1.

    Without it levels would differ by how well the discriminator does there (arXiv 2502.15681). The means are those
    before the step, so the weights of a batch in parts are those of one; a level's first samples have weight 1.
    """

    def __init__(self, divergence: Divergence, schedule: NoiseSchedule, device: torch.device):
        self.divergence, self.schedule = divergence, schedule
        self.means, self.sums, self.counts = (torch.zeros(NUM_BINS, device=device) for _ in range(3))

    @torch.no_grad()
    def weights(self, logits: Tensor, t: Tensor) -> Tensor:
        """Of samples with these logits (B,) at native times t (B,); (B,). Those that are not finite have weight 1."""
        h = divergence_weight(logits.float(), self.divergence)
        usable = h.isfinite()
        alpha, sigma = self.schedule.alpha_sigma(t)
        # 0 is no noise, 1 is no signal, on every schedule
        bins = (torch.atan2(sigma, alpha) * (2 / torch.pi) * NUM_BINS).long().clamp_max(NUM_BINS - 1)  # (B,)
        self.sums.index_add_(0, bins, torch.where(usable, h, 0))
        self.counts.index_add_(0, bins, usable.float())
        means = self.means[bins]
        return torch.where(usable & (means > 0), h / means, 1)

    def end_step(self) -> None:
        """Takes the step's samples into the running means."""
        add_up([self.sums, self.counts])
        new = self.sums / self.counts.clamp_min(1)
        moved = torch.where(self.means > 0, DECAY * self.means + (1 - DECAY) * new, new)
        self.means.copy_(torch.where(self.counts > 0, moved, self.means))
        self.sums.zero_()
        self.counts.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"means": self.means}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.means.copy_(state["means"])
