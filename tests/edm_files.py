"""EDM checkpoints to import: an ADM network in plain torch, written from its description, and its pickle as EDM's.

Names, block structure and order of operations are those of `shared/spec/edm_checkpoint.md` and of arXiv 2105.05233.
"""

import io
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

SOURCE = "raise SystemExit('the source code in a checkpoint was run')\n" * 600  # about 36,000 characters, as EDM's
SMALL = {"model_channels": 128, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


class Linear(nn.Module):
    def __init__(self, num_in: int, num_out: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = num_in, num_out
        self.weight = nn.Parameter(torch.randn(num_out, num_in) / num_in**0.5)
        self.bias = nn.Parameter(torch.randn(num_out) / 10) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """A convolution of 3x3, 1x1 or none (kernel 0), after a change of resolution by 2x2 pixels."""

    def __init__(self, num_in: int, num_out: int, kernel: int, up: bool = False, down: bool = False):
        super().__init__()
        self.up, self.down, self.init_weight = up, down, np.sqrt(1 / 3)
        shape = (num_out, num_in, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape) / (num_in * kernel**2) ** 0.5) if kernel else None
        self.bias = nn.Parameter(torch.randn(num_out) / 10) if kernel else None
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        if self.down:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return (
            x
            if self.weight is None
            else functional.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        )


class GroupNorm(nn.Module):
    def __init__(self, num: int):
        super().__init__()
        self.num_groups, self.eps = min(32, num // 4), 1e-5
        self.weight, self.bias = nn.Parameter(1 + torch.randn(num) / 5), nn.Parameter(torch.randn(num) / 5)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), self.num_groups, -1)
        normal = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, False, keepdim=True) + self.eps).sqrt()
        return normal.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]


class UNetBlock(nn.Module):
    def __init__(
        self, num_in: int, num_out: int, width: int, attention: bool = False, up: bool = False, down: bool = False
    ):
        super().__init__()
        self.num_heads = num_out // 64 if attention else 0
        self.skip_scale = np.float64(1.0)
        self.norm0, self.conv0 = GroupNorm(num_in), Conv2d(num_in, num_out, 3, up, down)
        self.affine, self.norm1 = Linear(width, 2 * num_out), GroupNorm(num_out)
        self.conv1 = Conv2d(num_out, num_out, 3)
        self.skip = None
        if num_in != num_out or up or down:
            self.skip = Conv2d(num_in, num_out, int(num_in != num_out), up, down)
        if attention:
            self.norm2, self.qkv = GroupNorm(num_out), Conv2d(num_out, 3 * num_out, 1)
            self.proj = Conv2d(num_out, num_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.conv0(functional.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(functional.silu(shift + self.norm1(hidden) * (1 + scale)))
        x = hidden + (self.skip(x) if self.skip is not None else x)
        return x + self.attend(x) if self.num_heads else x

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(b, self.num_heads, 64, 3, h * w)  # (head, channel, {q, k, v})
        q, k, v = qkv.unbind(3)
        weights = torch.einsum("bncq,bnck->bnqk", q, k / 8).softmax(dim=-1)
        return self.proj(torch.einsum("bnqk,bnck->bncq", weights, v).reshape(b, c, h, w))


class PositionalEmbedding(nn.Module):
    def __init__(self, num: int):
        super().__init__()
        self.num_channels = num

    def forward(self, t: Tensor) -> Tensor:
        half = self.num_channels // 2
        angles = t[:, None] * 10000.0 ** (-torch.arange(half, dtype=t.dtype) / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class DhariwalUNet(nn.Module):
    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Any = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: Any = (32, 16, 8),
    ):
        super().__init__()
        self.label_dim = label_dim
        width = 4 * model_channels
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(model_channels, width), Linear(width, width)
        self.map_label = Linear(label_dim, width, bias=False) if label_dim else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        last, skips = in_channels, []
        for level, multiple in enumerate(channel_mult):
            num, size = model_channels * multiple, img_resolution >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv2d(last, num, 3)
                skips.append(num)
                last = num
            else:
                self.enc[f"{size}x{size}_down"] = UNetBlock(last, last, width, down=True)
                skips.append(last)
            for index in range(num_blocks):
                block = UNetBlock(last, num, width, attention=size in attn_resolutions)
                self.enc[f"{size}x{size}_block{index}"] = block
                skips.append(num)
                last = num
        for level, multiple in reversed(list(enumerate(channel_mult))):
            num, size = model_channels * multiple, img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{size}x{size}_in0"] = UNetBlock(last, last, width, attention=True)
                self.dec[f"{size}x{size}_in1"] = UNetBlock(last, last, width)
            else:
                self.dec[f"{size}x{size}_up"] = UNetBlock(last, last, width, up=True)
            for index in range(num_blocks + 1):
                block = UNetBlock(last + skips.pop(), num, width, attention=size in attn_resolutions)
                self.dec[f"{size}x{size}_block{index}"] = block
                last = num
        self.out_norm, self.out_conv = GroupNorm(last), Conv2d(last, in_channels, 3)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        emb = self.map_layer1(functional.silu(self.map_layer0(self.map_noise(t))))
        if self.map_label is not None:
            emb = emb + self.map_label(functional.one_hot(label, self.label_dim).to(x.dtype))
        emb, skips = functional.silu(emb), []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return self.out_conv(functional.silu(self.out_norm(x)))


class EDMPrecond(nn.Module):
    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, **settings: Any):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max, self.sigma_data = False, 0, float("inf"), 0.5
        self.model = DhariwalUNet(img_resolution, img_channels, label_dim, **settings)
        self.model._init_args, self.model._init_kwargs = (), settings
        self._init_args, self._init_kwargs = (), {"model_type": "DhariwalUNet", "label_dim": label_dim}

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        s, data = sigma[:, None, None, None], self.sigma_data
        total = (s**2 + data**2).sqrt()
        output = self.model(x / total, sigma.log() / 4, label)
        return data**2 / total**2 * x + s * data / total * output


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    for key, value in content.items():
        value.__module__, value.__qualname__ = name, key
        setattr(made, key, value)
    return made


class EasyDict(dict):
    pass


def _reconstruct_persistent_obj(meta: dict) -> None:
    raise AssertionError("called")


class EdmPickler(pickle.Pickler):
    """Writes the modules of this file as EDM's persistent objects, and all others as they are."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Module) or type(obj) is nn.ModuleDict:
            return NotImplemented
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": type(obj).__name__}
        return _reconstruct_persistent_obj, ({**meta, "state": obj.__dict__},)


def edm_pickle(network: nn.Module, protocol: int = 4, **others: Any) -> bytes:
    """The bytes of a checkpoint with this network."""
    content = {
        "ema": network,
        "loss_fn": None,
        "augment_pipe": None,
        "dataset_kwargs": EasyDict(path="a.zip"),
        **others,
    }
    modules = {
        "dnnlib": module("dnnlib"),
        "dnnlib.util": module("dnnlib.util", EasyDict=EasyDict),
        "torch_utils": module("torch_utils"),
        "torch_utils.persistence": module(
            "torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj
        ),
    }
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in modules.items():
            patch.setitem(sys.modules, name, value)
        EdmPickler(file, protocol).dump(content)
    return file.getvalue()


def small_network(**settings: Any) -> EDMPrecond:
    """8x8 RGB, five classes, attention at 4x4; 13 M parameters, for ADM begins at 128 channels."""
    torch.manual_seed(0)
    chosen = {"img_resolution": 8, "img_channels": 3, "label_dim": 5, **SMALL, **settings}
    return EDMPrecond(**chosen).eval().requires_grad_(False)


def write_checkpoint(path: Path, network: nn.Module, protocol: int = 4) -> Path:
    path.write_bytes(edm_pickle(network, protocol))
    return path
