"""The loss on pairs: its closed form, that it learns, and its share of the student's gradient in DMD2."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.diffusion.parameterizations import x0 as predicts_x0
from fewstep.diffusion.sampling import heun, rollout
from fewstep.diffusion.schedules import EDM
from fewstep.errors import UserError
from fewstep.models.autoencoder import load_tiny_decoder
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.precision import trainable
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.regression import PairLoss, Regression
from fewstep.training.settings import RegressSettings
from steps import PAIRS, make_dmd2, received, same, whole
from tiny_pipelines import TINY

NUM = 6


def noise_of(shape: tuple[int, ...], num: int = NUM) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(3))


def pairs_of(model: PixelModel) -> dict[str, Tensor]:
    """Pairs by the model's own ODE, as they lie on disk."""
    noise, label = noise_of(model.shape).half(), torch.arange(NUM) % 3
    end = heun(model.denoiser, noise.float(), model.denoiser.schedule.ode_grid(5), {"label": label})
    return {"noise": noise, "x0": end.half(), "label": label}


def regression(model: PixelModel, num_steps: int = 20, **student: object) -> Regression:
    settings = RegressSettings(student={"optimizer": {"lr": 2e-3}, "ema_decay": 0, **student}, regression=PAIRS)
    denoiser = trainable(copy.deepcopy(model.denoiser).requires_grad_(True), torch.float32)
    return Regression(settings, model, denoiser, PairLoss(model), num_steps)


def test_the_loss_is_the_squared_error_of_what_the_student_makes_of_pure_noise(tiny_model: PixelModel) -> None:
    batch = pairs_of(tiny_model)
    loss = PairLoss(tiny_model)(tiny_model.denoiser, torch.tensor([80.0, 1.0]), batch)
    x0 = tiny_model.denoiser(80 * batch["noise"].float(), torch.full((NUM,), 80.0), {"label": batch["label"]})
    torch.testing.assert_close(loss, (x0 - batch["x0"].float()).square().mean(dim=(1, 2, 3)))
    assert loss.min() > 1e-4


def test_the_student_learns_the_ends_of_the_teachers_ode(tiny_model: PixelModel) -> None:
    batch, method = pairs_of(tiny_model), regression(tiny_model, 60, optimizer={"lr": 5e-3})
    before = method.step(whole(batch, NUM), 0)["regression_loss"].item()
    [method.step(whole(batch, NUM), step) for step in range(1, 60)]
    x0 = rollout(method.student, batch["noise"].float()[None], method.timesteps, {"label": batch["label"]}, stop=0)
    assert (x0 - batch["x0"]).square().mean().item() < 0.005 * before


class Affine(nn.Module):
    """x0 = A x + b, for which least squares knows the best."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.map(x.flatten(1)).reshape(x.shape)


def test_it_falls_to_what_least_squares_allows() -> None:
    noise = noise_of((1, 2, 2), 40)
    target = 0.5 * noise.roll(1, dims=-1) + 0.3 * noise.square() - 0.2
    flat = torch.cat([noise.flatten(1), torch.ones(40, 1)], dim=1)
    best = torch.linalg.lstsq(flat, target.flatten(1)).solution
    floor = (flat @ best - target.flatten(1)).square().mean().item()
    student = Denoiser(Affine(), EDM(sigma_max=1.0), predicts_x0)
    model = SimpleNamespace(device=torch.device("cpu"), encode_condition=lambda batch: {}, decode_pixels=None)
    optimizer = {"lr": 0.03, "decay": "linear", "decay_start": 0.5, "weight_decay": 0, "clip_norm": 1e9}
    settings = RegressSettings(student={"optimizer": optimizer, "ema_decay": 0}, regression=PAIRS)
    method = Regression(settings, model, student, PairLoss(model), 400)
    losses = [
        method.step([(range(40), {"noise": noise, "x0": target})], step)["regression_loss"].item()
        for step in range(400)
    ]
    assert losses[0] > 1.5 * floor
    assert floor * 0.9999 < losses[-1] < floor * 1.001


def test_what_is_saved_is_the_averaged_student_with_its_timestep(tiny_model: PixelModel, tmp_path: Path) -> None:
    batch, method = pairs_of(tiny_model), regression(tiny_model, ema_decay=0.5)
    [method.step(whole(batch, NUM), step) for step in range(3)]
    method.save_model(tmp_path, method.state_dict())
    saved = load(tmp_path)
    assert saved.timesteps == [80.0]
    averages = method.ema.averages_of()
    assert method.state_dict().keys() == {"student", "ema", "student_optimizer"}
    assert same(averages, saved.denoiser)
    assert not same(averages, method.student)


def test_it_is_of_one_timestep() -> None:
    with pytest.raises(ValueError, match=r"student.num_timesteps: regression trains one timestep"):
        RegressSettings(student={"num_timesteps": 2}, regression=PAIRS)


@pytest.mark.parametrize("extra", [{"decoder": "tiny"}, {"lpips_size": 64}])
def test_decoding_is_for_lpips(extra: dict) -> None:
    with pytest.raises(ValueError, match="decoder and lpips_size are for lpips"):
        RegressSettings(regression=PAIRS | extra)


# --- on pictures -----------------------------------------------------------------------------------------------------


def tiny_autoencoder(folder: Path, channels: int = 4) -> AutoencoderTiny:
    torch.manual_seed(5)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    numbers = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": channels}
    tiny = AutoencoderTiny(**blocks, **numbers, scaling_factor=0.5)
    tiny.save_pretrained(folder)
    return tiny.eval()


def blurred(first: Tensor, second: Tensor) -> Tensor:
    """A distance of pictures that is not the squared error of their pixels."""
    return nn.functional.avg_pool2d(first - second, 2).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("tiny", [True, False])
def test_lpips_is_of_decoded_pictures_and_trains_the_student_alone(tiny: bool, tmp_path: Path) -> None:
    model = LatentModel(TINY["sdxl"](tmp_path / "scratch"))
    model.denoiser.requires_grad_(True)
    theirs = tiny_autoencoder(tmp_path / "tiny") if tiny else None
    decoders: list[bool] = []

    def seen(x0: Tensor) -> Tensor:
        decoders.append(torch.is_grad_enabled())
        return decode(x0)

    decode = load_tiny_decoder(tmp_path / "tiny", 4, model.device) if tiny else model.decode_pixels
    batch = {"noise": noise_of(model.shape, 2), "x0": noise_of(model.shape, 2).flip(0), "caption": ["cat", "dog"]}
    loss = PairLoss(model, blurred, seen)(model.denoiser, torch.tensor([399.0]), batch)
    loss.mean().backward()
    assert sorted(decoders) == [False, True]
    assert all(p.grad is None for p in model.autoencoder.parameters())
    with torch.no_grad():
        condition = model.text_condition(["cat", "dog"])
        x0 = model.denoiser(batch["noise"], torch.tensor([399.0, 399.0]), condition)
        both = (x0, batch["x0"])
        vae = model.autoencoder
        pictures = [
            theirs.decode(x / 0.5).sample if theirs else vae.decode(x / vae.config.scaling_factor).sample for x in both
        ]
    torch.testing.assert_close(loss.detach(), blurred(*pictures))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.network.parameters())


def test_what_is_no_tiny_autoencoder_is_refused(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"regression\.decoder: .*absent.*: is missing or damaged"):
        load_tiny_decoder(tmp_path / "absent", 4, cpu)
    tiny_autoencoder(tmp_path / "wide", channels=16)
    with pytest.raises(UserError, match="of 16 channels, not of 4"):
        load_tiny_decoder(tmp_path / "wide", 4, cpu)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "kl")
    with pytest.raises(UserError, match=r"regression\.decoder: .*kl.*AutoencoderKL; supported is AutoencoderTiny"):
        load_tiny_decoder(tmp_path / "kl", 4, cpu)


# --- in DMD2 ---------------------------------------------------------------------------------------------------------


def dmd2(model: PixelModel, weight: float) -> DMD2:
    student = {"num_timesteps": 2, "optimizer": {"lr": 1e-3, "clip_norm": 1e9}}
    pairs = {"regression_weight": weight, "regression": PAIRS} if weight else {}
    method = make_dmd2(copy.deepcopy(model), NUM, student=student, **pairs)
    with torch.no_grad():  # a critic that has moved away from the teacher
        for p in method.critic.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return method


def student_gradients(method: DMD2, batch: dict) -> tuple[list[Tensor], dict]:
    """Of step 0."""
    return received(method, "student"), method.step(whole(batch, NUM), 0)


def test_the_students_gradient_is_the_sum_of_its_parts(tiny_model: PixelModel) -> None:
    draws = torch.Generator().manual_seed(2)
    real = torch.randint(0, 256, (NUM, *tiny_model.shape), generator=draws, dtype=torch.uint8)
    batch = {"image": real, "label": torch.arange(NUM) % 3}
    pairs = pairs_of(tiny_model) | {"x0": torch.randn(NUM, *tiny_model.shape, generator=draws)}
    both, together = student_gradients(dmd2(tiny_model, 0.25), batch | {"pair": pairs})
    dm, alone = student_gradients(dmd2(tiny_model, 0), batch)
    method = dmd2(tiny_model, 0)
    loss = PairLoss(tiny_model)(method.student, method.timesteps, pairs).mean()
    pair = torch.autograd.grad(loss, list(method.student.parameters()))
    scale = max(g.abs().max() for g in both)
    for total, first, second in zip(both, dm, pair, strict=True):
        assert (total - first - 0.25 * second).abs().max() < 1e-5 * scale
    assert any((0.25 * g).abs().max() > 1e-2 * scale for g in pair)
    assert any(g.abs().max() > 1e-2 * scale for g in dm)
    assert together["regression_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in ("dm_loss", "gan_loss", "denoising_loss", "gan_critic_loss"):  # the critic never sees the pairs
        assert torch.equal(together[name], alone[name])
    assert "regression_loss" not in alone


def test_a_weight_needs_pairs() -> None:
    with pytest.raises(ValueError, match=r"regression_weight: needs regression.pairs and regression.sampler"):
        DMD2Settings(regression_weight=0.25)
