"""An autoencoder by itself: the latents of a pipeline's own, its folder, and what is no folder of one."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.embedded.settings import AutoencoderConfig
from fewstep.embedded.small_models import build_autoencoder
from fewstep.errors import UserError
from fewstep.models.autoencoder import Autoencoder, load_autoencoder
from fewstep.models.latent_model import LatentModel
from fewstep.networks.codec import Codec
from tiny_pipelines import TINY

CONFIG = AutoencoderConfig(image_size=16, block_out_channels=[8, 16], norm_num_groups=4, latent_channels=3)


@pytest.fixture
def model() -> Autoencoder:
    torch.manual_seed(0)
    vae = build_autoencoder(CONFIG).eval()
    vae.register_to_config(scaling_factor=0.4)
    return Autoencoder(vae)


def pictures(num: int = 3) -> Tensor:
    return torch.randint(0, 256, (num, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def test_latents_are_scaled_samples_of_diffusers_posterior(model: Autoencoder) -> None:
    assert (model.shape, model.image_size) == ((3, 8, 8), 16)
    unit = noise(3, 3, 8, 8)
    with torch.no_grad():
        posterior = model.vae.encode(pictures() / 255 * 2 - 1).latent_dist
    wanted = 0.4 * (posterior.mean + (posterior.logvar / 2).exp() * unit)
    assert torch.allclose(model.encode_images(pictures(), unit), wanted, atol=1e-5)


def test_a_reconstruction_is_that_of_the_posteriors_mean(model: Autoencoder) -> None:
    pixels = pictures() / 127.5 - 1
    with torch.no_grad():
        restored = model.vae.decode(model.vae.encode(pixels).latent_dist.mean).sample
    wanted = ((restored.clamp(-1, 1) + 1) / 2 * 255).round()
    assert (model.reconstruct(pixels).float() - wanted).abs().max() <= 1


def test_a_saved_autoencoder_opens_here_and_in_diffusers(model: Autoencoder, tmp_path: Path) -> None:
    model.save(tmp_path)
    again, theirs = load_autoencoder(tmp_path), AutoencoderKL.from_pretrained(tmp_path / "vae")
    unit = noise(3, 3, 8, 8)
    assert not again.vae.training
    assert again.latent_space == model.latent_space
    assert torch.equal(again.encode_images(pictures(), unit), model.encode_images(pictures(), unit))
    assert torch.equal(Codec(theirs.eval()).encode(pictures(), unit), model.encode_images(pictures(), unit))


def test_the_autoencoder_of_a_pipeline_is_found_in_its_folder(tmp_path: Path) -> None:
    pipeline = TINY["sd"](tmp_path / "scratch")
    pipeline.save_pretrained(tmp_path / "teacher")
    alone, inside = load_autoencoder(tmp_path / "teacher"), LatentModel(pipeline)
    unit = noise(3, 4, 8, 8)
    assert alone.latent_space == inside.latent_space
    assert torch.equal(alone.encode_images(pictures(), unit), inside.encode_images(pictures(), unit))


DAMAGES = {
    "nothing there": "holds no autoencoder",
    "no weights": "vae: holds no weights in safetensors",
    "torn weights": r"diffusion_pytorch_model\.safetensors: is missing or damaged",
    "torn configuration": r"config\.json: is damaged",
    "other sizes": r"diffusion_pytorch_model\.safetensors: has other sizes",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_without_a_whole_autoencoder_is_refused(model: Autoencoder, damage: str, tmp_path: Path) -> None:
    weights, config = tmp_path / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae" / "config.json"
    if damage != "nothing there":
        model.save(tmp_path)
    if damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "torn configuration":
        config.write_text(config.read_text()[:40])
    elif damage == "other sizes":
        config.write_text(config.read_text().replace('"latent_channels": 3', '"latent_channels": 5'))
    with pytest.raises(UserError, match=DAMAGES[damage]):
        load_autoencoder(tmp_path)
