from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DModel

from fewstep.networks.families.edm import PixelUNet, build_unet
from fewstep.networks.settings import PixelModelConfig


def test_quick_dtype_is_that_of_diffusers_and_the_class_stays_what_it_was(tmp_path: Path) -> None:
    sizes = {"image_size": 8, "channels": 1, "block_out_channels": [8], "attention": [False], "norm_num_groups": 4}
    unet = PixelUNet(build_unet(PixelModelConfig(**sizes))).unet
    for dtype in (torch.float32, torch.bfloat16):
        assert unet.to(dtype).dtype == ModelMixin.dtype.fget(unet) == dtype
    assert type(unet) is type(PixelUNet(build_unet(PixelModelConfig(**sizes))).unet)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert type(loaded) is UNet2DModel
    assert unet.config["_class_name"] == "UNet2DModel" == loaded.config["_class_name"]
