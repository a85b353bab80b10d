"""EDM checkpoints become pixel models that give the same output."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from edm_files import EDMPrecond, small_network, write_checkpoint
from fewstep.models.loading.edm_checkpoint import convert, find_network, read_network
from fewstep.models.loading.edm_pickle import Storage, StoredTensor, read_pickle
from fewstep.models.loading.pickle_machine import Blob, Part, Refused
from fewstep.models.settings import PixelModelConfig

SIGMAS = (0.01, 0.5, 5.0, 80.0)


def difference(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((given - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    "settings",
    [{"augment_dim": 9}, {"label_dim": 0, "attn_resolutions": [], "img_channels": 1, "channel_mult": [1, 1]}],
    ids=str,
)
def test_the_output_is_the_original_networks(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of the network itself, and of x0 around it: ours in float32, the original in float64."""
    network = small_network(**settings)
    model = convert(read_network(write_checkpoint(tmp_path / "edm.pkl", network)), lambda done, _: None)
    label = torch.tensor([0, 4]) if network.label_dim else None
    condition = {} if label is None else {"label": label}
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
    network.double()
    for sigma in SIGMAS:
        t = torch.full((2,), sigma)
        with torch.no_grad():
            inner = model.denoiser.network(noise, t, condition)
            assert difference(inner, network.model(noise.double(), t.double().log() / 4, label)) <= 1e-5
            x0 = model.denoiser(sigma * noise, t, condition)
            assert difference(x0, network((sigma * noise).double(), t.double(), label)) <= 1e-5


def described(module: nn.Module) -> Part:
    """A module as the reader gives it, with tensors that have a size alone; filters of one number are left out."""
    sizes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
    storage = Storage(Blob(b"", 0), torch.float32, 0, 0)
    tensors = {name: StoredTensor(storage, 0, size, ()) for name, size in sizes.items()}
    children = {name: described(child) for name, child in module.named_children()}
    return Part(type(module).__name__, {**vars(module), "_parameters": tensors, "_buffers": {}, "_modules": children})


def test_the_published_shape_is_used_to_the_last_key() -> None:
    """Everything about it stands in the defaults: 296 M parameters, none of them in memory."""
    with torch.device("meta"):
        network = EDMPrecond(64, 3, 1000)
    read = find_network({"ema": described(network)})
    assert read.tensors.keys() == dict(network.model.named_parameters()).keys()
    assert sum(parameter.numel() for parameter in network.parameters()) == 295_899_267
    assert read.config == PixelModelConfig(
        image_size=64,
        channels=3,
        num_classes=1000,
        block_out_channels=[192, 384, 576, 768],
        attention=[False, True, True, True],
        middle_attention=True,
        layers_per_block=3,
        attention_head_dim=64,
        norm_num_groups=32,
        sigma_data=0.5,
        sigma_min=0.002,
        sigma_max=80.0,
        dropout=0.0,
    )


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a good file holds."""
    return read_pickle(write_checkpoint(tmp_path_factory.mktemp("edm") / "edm.pkl", small_network()))


def model_of(content: dict[str, Any]) -> Part:
    return content["ema"].state["_modules"]["model"]


def modules_of(content: dict[str, Any]) -> dict[str, Part]:
    return model_of(content).state["_modules"]


def settings_of(content: dict[str, Any]) -> dict[str, Any]:
    return model_of(content).state["_init_kwargs"]


def song(content: dict[str, Any]) -> None:
    model_of(content).class_name = "SongUNet"


def another_filter(content: dict[str, Any]) -> None:
    """[1, 3, 3, 1] on both axes, as NCSN++ has it: 4x4."""
    conv = modules_of(content)["enc"].state["_modules"]["4x4_down"].state["_modules"]["conv0"]
    conv.state["_buffers"]["resample_filter"] = modules_of(content)["out_conv"].state["_parameters"]["weight"]


def in_itself(content: dict[str, Any]) -> None:
    modules_of(content)["enc"].state["_modules"]["again"] = model_of(content)


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "holds no network": lambda c: c.clear(),
    "preconditioned by VPPrecond": lambda c: setattr(c["ema"], "class_name", "VPPrecond"),
    "SongUNet .* UNet2DModel can't hold": song,
    "holds a Mystery": lambda c: setattr(model_of(c), "class_name", "Mystery"),
    "holds a EDMPrecond without _modules": lambda c: c["ema"].state.pop("_modules"),
    "img_resolution: Field required": lambda c: c["ema"].state.pop("img_resolution"),
    "channels: Input should be 1 or 3": lambda c: c["ema"].state.update(img_channels=2),
    "sigma_data": lambda c: c["ema"].state.update(sigma_data=-1.0),
    "num_blocks: Input should be less": lambda c: settings_of(c).update(num_blocks=10**9),
    "a width of 1.28e\\+11": lambda c: settings_of(c).update(channel_mult=[1, 10**9]),
    "fewer than 32 groups": lambda c: settings_of(c).update(model_channels=64),
    "channel_mult begins with 1": lambda c: settings_of(c).update(channel_mult=[2, 2]),
    "channel_mult_emb": lambda c: settings_of(c).update(channel_mult_emb=2),
    "attention_head_dim 64 does not divide": lambda c: settings_of(c).update(model_channels=160, channel_mult=[1, 1]),
    "of UNet2DModel's class_embedding.weight it has \\[5, 512\\], not \\[6, 512\\]": lambda c: c["ema"].state.update(
        label_dim=6
    ),
    "conv_in.bias it has none": lambda c: (
        modules_of(c)["enc"].state["_modules"]["8x8_conv"].state["_parameters"].pop("bias")
    ),
    "has a tensor out_norm.weight.more": lambda c: modules_of(c).update(
        {"out_norm.weight": Part("A", {**modules_of(c)["out_norm"].state, "_parameters": {"more": a_tensor(c)}})}
    ),
    "has a tensor enc.8x8_block1": lambda c: (
        modules_of(c)["enc"]
        .state["_modules"]
        .update({"8x8_block1": copy.deepcopy(modules_of(c)["enc"].state["_modules"]["8x8_block0"])})
    ),
    "of another shape": lambda c: (
        modules_of(c)["dec"]
        .state["_modules"]["4x4_in0"]
        .state["_modules"]["qkv"]
        .state["_parameters"]
        .update(weight=a_tensor(c), bias=a_tensor(c))
    ),
    "no tensor": lambda c: model_of(c).state["_parameters"].update(a="text"),
    "resamples with another filter": another_filter,
    "no module of its own": in_itself,
}


def a_tensor(content: dict[str, Any]) -> StoredTensor:
    return modules_of(content)["out_norm"].state["_parameters"]["bias"]


@pytest.mark.parametrize("says", WRONG)
def test_a_network_of_another_kind_is_refused_with_the_reason(says: str, content: dict[str, Any]) -> None:
    damaged = copy.deepcopy(content)
    find_network(damaged)
    WRONG[says](damaged)
    with pytest.raises(Refused, match=says) as error:
        find_network(damaged)
    assert "\n" not in str(error.value)


def test_a_range_of_noise_that_the_file_names_is_kept(content: dict[str, Any]) -> None:
    network = copy.deepcopy(content)
    network["ema"].state.update(sigma_min=0.01, sigma_max=40.0, sigma_data=0.7)
    config = find_network(network).config
    assert (config.sigma_min, config.sigma_max, config.sigma_data) == (0.01, 40.0, 0.7)


@pytest.mark.parametrize("block", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"])
def test_unet2dmodel_has_no_convolution_on_the_shortcut_of_a_resampler(block: str) -> None:
    """Why SongUNet is refused: its resampling blocks have one between equal widths."""
    up = block.replace("Downsample", "Upsample").replace("Down", "Up")
    unet = UNet2DModel(
        block_out_channels=[32, 32], down_block_types=[block] * 2, up_block_types=[up] * 2, downsample_type="resnet"
    )
    assert unet.down_blocks[0].downsamplers[0].conv_shortcut is None
