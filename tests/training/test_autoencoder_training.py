"""Training an autoencoder: its loss by hand, its scaling factor, its resuming, and that it learns."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.embedded.settings import AutoencoderConfig
from fewstep.embedded.shapes import shapes
from fewstep.embedded.small_models import build_autoencoder
from fewstep.models.autoencoder import Autoencoder, load_autoencoder
from fewstep.seeding import generator
from fewstep.training.autoencoder import AutoencoderTraining
from fewstep.training.settings import AutoencoderSettings
from steps import whole

CONFIG = AutoencoderConfig(block_out_channels=[8, 16], norm_num_groups=4)
FROZEN = {"optimizer": {"lr": 1e-12, "weight_decay": 0}}


def make(num_steps: int = 10, seed: int = 0, **settings: object) -> AutoencoderTraining:
    torch.manual_seed(0)
    model = Autoencoder(build_autoencoder(CONFIG))
    settings = AutoencoderSettings(**{"optimizer": {"lr": 2e-3}, **settings})
    return AutoencoderTraining(settings, model, num_steps, 8, seed)


def batch(step: int, num: int = 8) -> dict[str, Tensor]:
    return {"image": shapes().fetch(torch.arange(num * step, num * (step + 1)))}


def by_hand(vae: torch.nn.Module, images: Tensor, noise: Tensor, l1: float, kl_weight: float) -> dict[str, float]:
    """The three parts with diffusers' own divergence, and the norm of the whole loss's gradient."""
    pixels = images.float() / 255 * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    restored = vae.decode(posterior.mean + posterior.std * noise).sample
    squared = torch.nn.functional.mse_loss(restored, pixels)
    absolute = torch.nn.functional.l1_loss(restored, pixels)
    kl = posterior.kl().sum() / posterior.mean.numel()
    gradients = torch.autograd.grad(squared + l1 * absolute + kl_weight * kl, list(vae.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    parts = {"squared_error": squared, "absolute_error": absolute, "kl": kl, "grad_norm": norm}
    return {name: value.item() for name, value in parts.items()}


@pytest.mark.parametrize(("l1", "kl_weight"), [(1.0, 1e-4), (0.0, 0.5), (3.0, 0.0)])
def test_the_loss_is_the_direct_computation(l1: float, kl_weight: float) -> None:
    method = make(seed=3, l1_weight=l1, kl_weight=kl_weight)
    images = batch(0)["image"]
    noise = torch.randn(8, 4, 16, 16, generator=generator(3, "autoencoder", 5))
    wanted = by_hand(method.model.vae, images, noise, l1, kl_weight)
    found = {name: value.item() for name, value in method.step(whole({"image": images}, 8), 5).items()}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert {name for name in found.keys() - wanted.keys() if found[name]} == set()


@pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])
def test_the_scaling_factor_gives_latents_unit_variance(
    spread: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents of any spread, over more steps than the running variance remembers."""
    monkeypatch.setattr(AutoencoderTraining, "VARIANCE_DECAY", 0.5)
    method = make(**FROZEN)
    with torch.no_grad():
        method.model.vae.quant_conv.weight[:4] *= 3 * spread
        method.model.vae.quant_conv.weight[4:] *= 0
        method.model.vae.quant_conv.bias[4:] = torch.tensor(0.1 * spread).log() * 2  # of the posterior's variance
    for step in range(12):
        method.step(whole(batch(step), 8), step)
    method.save_model(tmp_path, method.state_dict())
    images = shapes(seed=1).fetch(torch.arange(64))
    latents = load_autoencoder(tmp_path).encode_images(images, torch.randn(64, 4, 16, 16))
    assert latents.var().item() == pytest.approx(1, rel=0.1)


def test_a_short_training_restores_the_shapes_better() -> None:
    method = make(num_steps=60, optimizer={"lr": 5e-3})
    errors = [method.step(whole(batch(step), 8), step)["squared_error"].item() for step in range(60)]
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])


def test_a_grid_shows_pictures_and_what_became_of_them_in_turn() -> None:
    method = make()
    images = batch(0)["image"]
    method.step(whole({"image": images}, 8), 0)
    shown = method.sample(torch.zeros(1, 8, 4, 16, 16))
    assert torch.equal(shown[::2], images[:4])
    method.model.vae.eval()
    assert torch.equal(shown[1::2], method.model.reconstruct(images[:4] / 127.5 - 1))
    assert torch.equal(method.sample(torch.zeros(1, 4, 4, 16, 16), first=4), shown[4:])
    assert method.model.vae.training
