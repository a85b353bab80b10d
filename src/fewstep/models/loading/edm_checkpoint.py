"""NVIDIA's EDM checkpoints as pixel models: ADM's networks in `UNet2DModel`, exactly (arXiv 2206.00364).

The layouts are set side by side in `module_names`; only qkv and the labels are stored in another order.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import UNet2DModel
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from fewstep.errors import UserError, brief
from fewstep.models.loading.edm_pickle import Part, Refused, read_pickle, shown
from fewstep.models.loading.weights import check_finite
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig
from fewstep.settings import Settings

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # EDM, table 1; the files say 0 and inf, where the network may be called at all
HEAD_DIM, GROUPS = 64, 32  # ADM's; it has fewer groups below 128 channels
DEEPEST = 4  # modules in modules
ENDS = {"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2"}
ENDS |= {"map_label": "class_embedding", "out_norm": "conv_norm_out", "out_conv": "conv_out"}
RESNET = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
RESNET |= {"skip": "conv_shortcut"}
SONG = (
    "holds a SongUNet (DDPM++ or NCSN++), which diffusers' UNet2DModel can't hold: where its resolution changes it has "
    "a learned convolution on the shortcut, which no option gives; only ADM networks (DhariwalUNet) are imported"
)


class _Claims(Settings):
    """What the file says of the network; what is missing has ADM's defaults."""

    model_config = ConfigDict(extra="ignore")
    img_resolution: int = Field(ge=4, le=2**14)
    img_channels: int
    label_dim: int = 0
    sigma_min: float = 0.0
    sigma_max: float = Field(math.inf, allow_inf_nan=True)
    sigma_data: float = 0.5
    model_channels: int = Field(192, ge=4 * GROUPS, le=2**14)
    channel_mult: list[Annotated[int, Field(ge=1, le=64)]] = Field([1, 2, 3, 4], min_length=1, max_length=12)
    channel_mult_emb: Literal[4] = 4
    num_blocks: int = Field(3, ge=1, le=16)
    attn_resolutions: list[int] = [32, 16, 8]


def read_network(path: Path) -> tuple[PixelModelConfig, dict[str, Tensor]]:
    """The averaged network's settings and, by `UNet2DModel`'s names, its tensors; UserError if it can't be imported."""
    try:
        config, tensors = find_network(read_pickle(path))
        if sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
            raise Refused("uses the same numbers for more than one tensor")
        check_finite(path, ((shown(name), tensor) for name, tensor in tensors.items()))
        return config, to_diffusers(config, tensors)
    except Refused as error:
        raise UserError(f"{path}: {error}; nothing of it was run") from error


def find_network(content: Any) -> tuple[PixelModelConfig, dict[str, Tensor]]:
    """Settings, and tensors by ADM's names, in what `read_pickle` gives; raises Refused where it is no such network."""
    network = content.get("ema") if type(content) is dict else None
    if type(network) is not Part:
        raise Refused("holds no network (under 'ema'), so it is not an EDM checkpoint")
    if network.class_name != "EDMPrecond":
        raise Refused(f"is preconditioned by {shown(network.class_name)}; only EDM's own, EDMPrecond, is imported")
    model = _attributes(network, "_modules").get("model")
    if type(model) is not Part or model.class_name != "DhariwalUNet":
        found = model.class_name if type(model) is Part else "something else"
        raise Refused(SONG if found == "SongUNet" else f"holds a {shown(found)}; only DhariwalUNet (ADM) is imported")
    return _config(_attributes(model, "_init_kwargs") | network.state), dict(_tensors(model))


def _attributes(part: Part, kind: str) -> dict[str, Any]:
    """One of the dicts that every module has."""
    found = part.state.get(kind)
    if type(found) is not dict:
        raise Refused(f"holds a {shown(part.class_name)} without {kind}")
    return {name: value for name, value in found.items() if value is not None}


def _tensors(network: Part) -> Iterator[tuple[str, Tensor]]:
    """Dotted names and tensors; averaging over 2x2 pixels, which `UNet2DModel` has without a tensor, is left out."""
    pending: list[tuple[str, Any]] = [("", network)]
    seen = set()
    while pending:
        prefix, part = pending.pop()
        if type(part) is not Part or id(part) in seen or prefix.count(".") > DEEPEST:
            raise Refused(f"holds {shown(prefix)[:-1]}, which is no module of its own in a network like ADM's")
        seen.add(id(part))
        pending += [(f"{prefix}{name}.", child) for name, child in _attributes(part, "_modules").items()]
        for name, tensor in (_attributes(part, "_parameters") | _attributes(part, "_buffers")).items():
            if type(tensor) is not Tensor:
                raise Refused(f"holds {shown(prefix + name)}, which is no tensor")
            if name != "resample_filter":
                yield prefix + name, tensor
            elif tensor.shape != (1, 1, 2, 2) or not tensor.eq(0.25).all():
                raise Refused("resamples with another filter than the average over 2x2 pixels, UNet2DModel's")


def _config(claims: dict[str, Any]) -> PixelModelConfig:
    """The settings of the same network here; raises Refused where there is none."""
    try:
        edm = _Claims.model_validate(claims)
        return PixelModelConfig(
            image_size=edm.img_resolution,
            channels=edm.img_channels,
            num_classes=edm.label_dim,
            block_out_channels=[edm.model_channels * multiple for multiple in edm.channel_mult],
            attention=[edm.img_resolution >> level in edm.attn_resolutions for level in range(len(edm.channel_mult))],
            middle_attention=True,
            layers_per_block=edm.num_blocks,
            attention_head_dim=HEAD_DIM,
            norm_num_groups=GROUPS,
            sigma_data=edm.sigma_data,
            sigma_min=edm.sigma_min or SIGMA_MIN,
            sigma_max=SIGMA_MAX if math.isinf(edm.sigma_max) else edm.sigma_max,
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise Refused(f"describes a network that can't be imported: {where}: {wrong['msg']}") from None


def module_names(config: PixelModelConfig) -> dict[str, str]:
    """ADM's name of every module -> `UNet2DModel`'s; qkv stands for all three in one."""
    last, num = len(config.attention) - 1, config.layers_per_block
    sizes = [f"{size}x{size}" for size in (config.image_size >> level for level in range(last + 1))]
    blocks = {f"dec.{sizes[last]}_in{index}": f"mid_block.resnets.{index}" for index in (0, 1)}
    for level, size in enumerate(sizes):
        up = f"up_blocks.{last - level}"
        blocks |= {f"enc.{size}_block{index}": f"down_blocks.{level}.resnets.{index}" for index in range(num)}
        blocks |= {f"dec.{size}_block{index}": f"{up}.resnets.{index}" for index in range(num + 1)}
        if level:
            blocks[f"enc.{size}_down"] = f"down_blocks.{level - 1}.downsamplers.0"
            blocks[f"dec.{sizes[level - 1]}_up"] = f"{up}.upsamplers.0"
    names = {f"enc.{sizes[0]}_conv": "conv_in", **ENDS}
    for theirs, ours in blocks.items():
        names |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in RESNET.items()}
        at = ours.replace("resnets", "attentions")  # in ADM a part of the block
        names |= {f"{theirs}.norm2": f"{at}.group_norm", f"{theirs}.qkv": at, f"{theirs}.proj": f"{at}.to_out.0"}
    return names


def to_diffusers(config: PixelModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ADM's tensors by their names -> the same numbers by `UNet2DModel`'s; raises Refused unless these are all."""
    found: dict[str, Tensor] = {}
    names = module_names(config)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if name == "map_augment.weight":
            continue  # it tells of augmentations in training; there are none at inference
        if module not in names:
            raise Refused(f"has a tensor {shown(name)}, which UNet2DModel has no place for")
        try:
            if module.endswith(".qkv"):  # output channels are ordered (head, channel, {q, k, v})
                parts = tensor.reshape(-1, 3, *tensor.shape[1:2]).unbind(1)
                found |= {f"{names[module]}.to_{part}.{kind}": one for part, one in zip("qkv", parts, strict=True)}
            elif module.endswith(".proj"):  # a convolution over 1x1
                found[f"{names[module]}.{kind}"] = tensor.reshape(tensor.shape[:2])
            else:
                found[f"{names[module]}.{kind}"] = tensor.T if module == "map_label" else tensor
        except RuntimeError as error:
            raise Refused(f"has a tensor of another shape than ADM's ({brief(error)})") from error
    expected = _meta_unet(config).state_dict()
    for name in sorted(found.keys() | expected.keys()):
        has, needs = (list(each[name].shape) if name in each else "none" for each in (found, expected))
        if has != needs:
            raise Refused(f"does not fit its own description: of UNet2DModel's {name} it has {has}, not {needs}")
    return found


def _meta_unet(config: PixelModelConfig) -> UNet2DModel:
    with torch.device("meta"):
        return build_unet(config)


def convert(
    config: PixelModelConfig, tensors: dict[str, Tensor], show: Callable[[int, dict[str, float]], None]
) -> PixelModel:
    """The network as a pixel model on the CPU, in float32; in the dict each tensor takes the place of the file's."""
    for done, (name, tensor) in enumerate(tensors.items(), 1):
        tensors[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        show(done, {})
    unet = _meta_unet(config)
    unet.load_state_dict(tensors, assign=True)
    model = PixelModel(config, unet)
    model.denoiser.eval()
    return model
