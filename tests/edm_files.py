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


class Conv2d(nn.Module):
    """A convolution of 3x3, 1x1 or none (kernel 0), after a change of resolution by 2x2 pixels."""

    def __init__(self, num_in: int, num_out: int, kernel: int, up: bool = False, down: bool = False):
        super().__init__()
        self.up, self.down, self.init_weight = up, down, np.sqrt(1 / 3)
        shape = (num_out, num_in, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape) / (num_in * kernel**2) ** 0.5) if kernel else None
        self.bias = nn.Parameter(torch.zeros(num_out)) if kernel else None
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        if self.down:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        weight = self.weight
        return x if weight is None else functional.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


def norm(num: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, num // 4), num, eps=1e-5)


class UNetBlock(nn.Module):
    def __init__(
        self, num_in: int, num_out: int, width: int, attention: bool = False, up: bool = False, down: bool = False
    ):
        super().__init__()
        self.num_heads, self.skip_scale = num_out // 64 if attention else 0, np.float64(1.0)
        self.norm0, self.conv0 = norm(num_in), Conv2d(num_in, num_out, 3, up, down)
        self.affine, self.norm1 = nn.Linear(width, 2 * num_out), norm(num_out)
        self.conv1 = Conv2d(num_out, num_out, 3)
        self.skip = None
        if num_in != num_out or up or down:
            self.skip = Conv2d(num_in, num_out, int(num_in != num_out), up, down)
        if attention:
            self.norm2, self.qkv, self.proj = (
                norm(num_out),
                Conv2d(num_out, 3 * num_out, 1),
                Conv2d(num_out, num_out, 1),
            )

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
        self.label_dim, self.model_channels, width = label_dim, model_channels, 4 * model_channels
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, width), nn.Linear(width, width)
        self.map_label = nn.Linear(label_dim, width, bias=False) if label_dim else None
        self.enc, self.dec, skips = nn.ModuleDict(), nn.ModuleDict(), []
        levels = [(f"{(s := img_resolution >> i)}x{s}", m * model_channels, s) for i, m in enumerate(channel_mult)]
        for level, (name, num, size) in enumerate(levels):
            if level == 0:
                self.enc[f"{name}_conv"], last = Conv2d(in_channels, num, 3), num
            else:
                self.enc[f"{name}_down"] = UNetBlock(last, last, width, down=True)
            skips.append(last)
            for index in range(num_blocks):
                self.enc[f"{name}_block{index}"] = UNetBlock(last, num, width, size in attn_resolutions)
                skips.append(last := num)
        for level, (name, num, size) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(last, last, width, attention=True)
                self.dec[f"{name}_in1"] = UNetBlock(last, last, width)
            else:
                self.dec[f"{name}_up"] = UNetBlock(last, last, width, up=True)
            for index in range(num_blocks + 1):
                self.dec[f"{name}_block{index}"] = UNetBlock(last + skips.pop(), num, width, size in attn_resolutions)
                last = num
        self.out_norm, self.out_conv = norm(last), Conv2d(last, in_channels, 3)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        half = self.model_channels // 2
        angles = t[:, None] * 10000.0 ** (-torch.arange(half, dtype=t.dtype) / half)
        positions = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = self.map_layer1(functional.silu(self.map_layer0(positions)))
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


def edm_pickle(network: nn.Module, protocol: int = 4) -> bytes:
    """The bytes of a checkpoint with this network."""
    content = {"ema": network, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": EasyDict(path="a.zip")}
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("dnnlib.util", EasyDict), ("torch_utils.persistence", _reconstruct_persistent_obj)):
            value.__module__ = name
            patch.setitem(sys.modules, name.split(".")[0], ModuleType(name.split(".")[0]))
            patch.setitem(sys.modules, name, ModuleType(name))
            setattr(sys.modules[name], value.__name__, value)
        EdmPickler(file, protocol).dump(content)
    return file.getvalue()


def small_network(**settings: Any) -> EDMPrecond:
    """8x8 RGB, five classes, attention at 4x4; 13 M parameters, for ADM begins at 128 channels."""
    torch.manual_seed(0)
    chosen = {"img_resolution": 8, "img_channels": 3, "label_dim": 5, **SMALL, **settings}
    network = EDMPrecond(**chosen).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim == 1:  # scales that are not one, and offsets that are not zero
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network


def write_checkpoint(path: Path, network: nn.Module, protocol: int = 4) -> Path:
    path.write_bytes(edm_pickle(network, protocol))
    return path
