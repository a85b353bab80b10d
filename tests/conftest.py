"""One thread, no network, and small models that the tests share."""

import gc
import os

from fewstep.networks.settings import PixelModelConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _libraries_stay() -> None:
    """Keeps the garbage collector from walking through all that is imported again and again: a tenth of the time."""
    gc.freeze()


@pytest.fixture
def tiny_config() -> PixelModelConfig:
    """8x8 grey images of three classes and a null class, 9 k parameters."""
    return PixelModelConfig(num_classes=3, null_class=True, block_out_channels=[8, 8], norm_num_groups=4)


@pytest.fixture
def tiny_model(tiny_config: PixelModelConfig) -> PixelModel:
    """A randomly initialised model whose output layers are not zero."""
    torch.manual_seed(0)
    model = PixelModel(tiny_config, build_unet(tiny_config))
    model.denoiser.eval()
    return model
