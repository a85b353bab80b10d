"""Weights from file to file: read back by the library that others read them with, and without holding the model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.export.weights import planned, write_safetensors, write_shards
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig
from limits import extra_memory


def convert(tensors: dict[str, Tensor], target: Path, dtype: torch.dtype) -> None:
    write_shards(target, "model", planned(tensors, dtype), tensors.__getitem__, "5GB", {"key": "value"})


def weights() -> dict[str, Tensor]:
    """Of every kind that models hold: odd sizes, scalars, whole numbers, none at all."""
    return {
        "a": torch.randn(3, 5),
        "odd": torch.randn(3).half(),
        "scalar": torch.tensor(1.5),
        "number": torch.arange(7),
        "flag": torch.tensor([True, False]),
        "brain": torch.randn(5).bfloat16(),
        "none": torch.zeros(0, 4),
        "double": torch.randn(2, dtype=torch.float64),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    before = weights()
    convert(before, tmp_path, dtype)
    (file,) = tmp_path.iterdir()
    assert file.name == ("model.fp16.safetensors" if dtype == torch.float16 else "model.safetensors")
    after = load_file(file)
    assert before.keys() == after.keys()
    for name, value in before.items():
        wanted = value.to(dtype) if value.is_floating_point() else value
        assert after[name].dtype == wanted.dtype
        assert torch.equal(after[name], wanted), name
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {"format": "pt", "key": "value"}


def test_the_bytes_are_the_librarys_own(tmp_path: Path) -> None:
    tensors = {name: value for name, value in weights().items() if value.dtype != torch.bfloat16}
    write_safetensors(tmp_path / "ours", tensors, tensors.__getitem__, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    header, ours = parts(tmp_path / "ours")
    reference, theirs = parts(tmp_path / "theirs")
    assert header["__metadata__"] == reference["__metadata__"]
    for name, facts in reference.items():
        if name != "__metadata__":
            (start, end), (first, last) = facts["data_offsets"], header[name]["data_offsets"]
            assert theirs[start:end] == ours[first:last]
            assert first % max(1, (last - first) // max(1, tensors[name].numel())) == 0  # aligned


def parts(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    convert({"weight": torch.tensor([1.0, -65504.0])}, tmp_path, torch.float16)
    with pytest.raises(UserError, match="weight holds numbers beyond"):
        convert({"weight": torch.tensor([1.0, 70_000.0])}, tmp_path, torch.float16)


EXPORT = """
import torch
from fewstep.export.diffusers_folder import Format, write_diffusers_folder
from fewstep.export.card import Provenance
from fewstep.export.stored import open_stored

def export(size, dtype, shards):
    folder, provenance = Path(arguments[0]), Provenance("teacher", "recipe", [80.0], 1.0, 1, "0.9")
    out, written = folder / f"{size} {dtype} {shards}", Format(getattr(torch, dtype), shards)
    write_diffusers_folder(open_stored(folder / size), out, provenance, written)

export("small", "float32", "5GB")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "shards"), [("float32", "5GB"), ("float16", "5GB"), ("float16", "50MB")])
def test_the_peak_memory_of_an_export_is_below_that_of_the_weights(dtype: str, shards: str, tmp_path: Path) -> None:
    for size, width in {"small": 32, "large": 576}.items():
        config = PixelModelConfig(block_out_channels=[width, width], layers_per_block=2)
        model = PixelModel(config, build_unet(config), [80.0])
        model.save(tmp_path / size)
    total = 4 * sum(parameter.numel() for parameter in model.network.parameters())
    peak = extra_memory(EXPORT, "export('large', *arguments[1:])", tmp_path, dtype, shards)
    assert 0 < peak <= 1.3 * total, peak / total
