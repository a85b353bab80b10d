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
from fewstep.errors import UserError
from fewstep.models.loading.edm_checkpoint import convert, find_network, read_network, to_diffusers
from fewstep.models.loading.edm_pickle import Part, Refused, read_pickle
from fewstep.networks.settings import PixelModelConfig

Change = Callable[[dict[str, Any]], object]
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
    model = convert(*read_network(write_checkpoint(tmp_path / "edm.pkl", network)), lambda done, _: None)
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
    """A module as the reader gives it; filters of one number are left out."""
    tensors = {name: tensor.data for name, tensor in module.named_parameters(recurse=False)}
    children = {name: described(child) for name, child in module.named_children()}
    return Part(type(module).__name__, {**vars(module), "_parameters": tensors, "_buffers": {}, "_modules": children})


def test_the_published_shape_is_used_to_the_last_key() -> None:
    """Everything about it stands in the defaults: 296 M parameters, none of them in memory."""
    with torch.device("meta"):
        network = EDMPrecond(64, 3, 1000)
    config, tensors = find_network({"ema": described(network)})
    assert tensors.keys() == dict(network.model.named_parameters()).keys()
    assert sum(tensor.numel() for tensor in to_diffusers(config, tensors).values()) == 295_899_267
    assert config == PixelModelConfig(
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


def at(content: dict[str, Any], name: str = "") -> Part:
    """The network in it, or the module of that name in the network."""
    part = content["ema"].state["_modules"]["model"]
    for each in name.split(".") if name else ():
        part = part.state["_modules"][each]
    return part


def tensors(content: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    return at(content, name).state["_parameters"]


def claims(**changes: object) -> Change:
    return lambda content: content["ema"].state.update(changes)


def made_with(**changes: object) -> Change:
    return lambda content: at(content).state["_init_kwargs"].update(changes)


def another_filter(content: dict[str, Any]) -> None:
    """[1, 3, 3, 1] on both axes, as NCSN++ has it: 4x4."""
    weight = tensors(content, "out_conv")["weight"]
    at(content, "enc.4x4_down.conv0").state["_buffers"]["resample_filter"] = weight


def another_shape(content: dict[str, Any]) -> None:
    bias = tensors(content, "out_norm")["bias"]
    tensors(content, "dec.4x4_in0.qkv").update(weight=bias, bias=bias)


def another_block(content: dict[str, Any]) -> None:
    blocks = at(content, "enc").state["_modules"]
    blocks["8x8_block1"] = copy.deepcopy(blocks["8x8_block0"])


def a_tensor_more(content: dict[str, Any]) -> None:
    norm = at(content, "out_norm").state
    more = Part("A", {**norm, "_parameters": {"more": norm["_parameters"]["bias"]}})
    at(content).state["_modules"]["out_norm.weight"] = more


def doubled(depth: int) -> tuple[Any, ...]:
    """2^depth leaves in a few bytes."""
    return (doubled(depth - 1),) * 2 if depth else ()


WRONG: dict[str, Change] = {
    "holds no network": lambda c: c.clear(),
    "preconditioned by VPPrecond": lambda c: setattr(c["ema"], "class_name", "VPPrecond"),
    "SongUNet .* UNet2DModel can't hold": lambda c: setattr(at(c), "class_name", "SongUNet"),
    "holds a Mystery": lambda c: setattr(at(c), "class_name", "Mystery"),
    "holds a EDMPrecond without _modules": lambda c: c["ema"].state.pop("_modules"),
    "img_resolution: Field required": lambda c: c["ema"].state.pop("img_resolution"),
    "channels: Input should be 1 or 3": claims(img_channels=2),
    "sigma_data": claims(sigma_data=-1.0),
    "num_blocks: Input should be less": made_with(num_blocks=10**9),
    "channel_mult.1: Input should be less": made_with(channel_mult=[1, 10**9]),
    "model_channels: Input should be greater than or equal to 128": made_with(model_channels=64),
    "of UNet2DModel's class_embedding.weight it has \\[5, 512\\], not \\[5, 1024\\]": made_with(channel_mult=[2, 2]),
    "channel_mult.0: Input should be a valid integer": made_with(channel_mult=doubled(200)),
    "img_resolution: Unable to parse|img_resolution: Input should be": claims(img_resolution=2**2000),
    "channel_mult_emb": made_with(channel_mult_emb=2),
    "attention_head_dim 64 does not divide": made_with(model_channels=160, channel_mult=[1, 1]),
    "of UNet2DModel's class_embedding.weight it has \\[5, 512\\], not \\[6, 512\\]": claims(label_dim=6),
    "conv_in.bias it has none": lambda c: tensors(c, "enc.8x8_conv").pop("bias"),
    "has a tensor out_norm.weight.more": a_tensor_more,
    "has a tensor enc.8x8_block1": another_block,
    "of another shape": another_shape,
    "no tensor": lambda c: at(c).state["_parameters"].update(a="text"),
    "resamples with another filter": another_filter,
    "no module of its own": lambda c: at(c, "enc").state["_modules"].update(again=at(c)),
}


@pytest.mark.parametrize("says", WRONG)
def test_a_network_of_another_kind_is_refused_with_the_reason(says: str, content: dict[str, Any]) -> None:
    damaged = copy.deepcopy(content)
    to_diffusers(*find_network(damaged))
    WRONG[says](damaged)
    with pytest.raises(Refused, match=says) as error:
        to_diffusers(*find_network(damaged))
    assert "\n" not in str(error.value)


def test_numbers_that_are_used_again_are_refused(tmp_path: Path) -> None:
    """A small file would be a large model."""
    network = small_network(channel_mult=[1, 1])
    first, second = network.model.dec["8x8_block0"], network.model.dec["8x8_block1"]
    second.conv1.weight = first.conv1.weight
    with pytest.raises(UserError, match="the same numbers for more than one tensor"):
        read_network(write_checkpoint(tmp_path / "edm.pkl", network))


def test_a_range_of_noise_that_the_file_names_is_kept(content: dict[str, Any]) -> None:
    network = copy.deepcopy(content)
    network["ema"].state.update(sigma_min=0.01, sigma_max=40.0, sigma_data=0.7)
    config, _ = find_network(network)
    assert (config.sigma_min, config.sigma_max, config.sigma_data) == (0.01, 40.0, 0.7)


@pytest.mark.parametrize("block", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"])
def test_unet2dmodel_has_no_convolution_on_the_shortcut_of_a_resampler(block: str) -> None:
    """Why SongUNet is refused: its resampling blocks have one between equal widths."""
    up = block.replace("Downsample", "Upsample").replace("Down", "Up")
    unet = UNet2DModel(
        block_out_channels=[32, 32], down_block_types=[block] * 2, up_block_types=[up] * 2, downsample_type="resnet"
    )
    assert unet.down_blocks[0].downsamplers[0].conv_shortcut is None
