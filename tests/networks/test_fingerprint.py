"""Two models have one fingerprint if, and only if, they sample alike."""

import copy
from pathlib import Path

import pytest
import torch

from fewstep.diffusion.parameterizations import v
from fewstep.diffusion.schedules import EDM, VP
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.pixel_model import PixelModel
from tiny_pipelines import TINY


def test_it_outlives_saving(tiny_model: PixelModel, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "pixels")
    assert load(tmp_path / "pixels").fingerprint == tiny_model.fingerprint
    TINY["sdxl"](tmp_path / "scratch").save_pretrained(tmp_path / "sdxl")
    model = load(tmp_path / "sdxl")
    before = model.fingerprint
    model.text_condition(["a call leaves its state in the tokenizer"])
    assert model.fingerprint == before == load(tmp_path / "sdxl").fingerprint


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2", "vae"])
def test_it_changes_with_every_network_that_samples_depend_on_and_not_with_the_autoencoder(part, tmp_path) -> None:
    model = LatentModel(TINY["sdxl"](tmp_path))
    before = model.fingerprint
    with torch.no_grad():
        next(getattr(model.pipeline, part).parameters()).flatten()[0] += 1e-3
    assert (model.fingerprint == before) == (part == "vae")


def test_it_changes_with_schedule_and_parameterization(tiny_model: PixelModel, tmp_path: Path) -> None:
    other = copy.deepcopy(tiny_model)
    other.denoiser.schedule = EDM(0.002, 81.0)
    assert other.fingerprint != tiny_model.fingerprint
    model = LatentModel(TINY["sd"](tmp_path))
    before = model.fingerprint
    model.denoiser.parameterization = v
    by_v = model.fingerprint
    model.denoiser.schedule = VP.scaled_linear(beta_end=0.0121)
    assert len({before, by_v, model.fingerprint}) == 3
