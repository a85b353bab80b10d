"""Weights from file to file: read back by the library that others read them with, and without holding the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.export.weights import convert_part, count_tensors, write_safetensors

NAME = "diffusion_pytorch_model.safetensors"


def convert(source: Path, target: Path, dtype: torch.dtype, replaced: dict[str, Tensor] | None = None) -> None:
    target.mkdir()
    convert_part(source, target, dtype, "5GB", {"key": "value"}, replaced or {}, lambda: None)


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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    save_file(weights(), tmp_path / "unet" / NAME)
    return tmp_path / "unet"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_library_reads_what_is_written(source: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    assert count_tensors(source) == 8
    convert(source, tmp_path / "out", dtype)
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == (NAME.replace(".", ".fp16.") if dtype == torch.float16 else NAME)
    before, after = load_file(source / NAME), load_file(file)
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


def test_tensors_are_replaced_by_name(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", torch.float32, {"a": torch.ones(3, 5)})
    assert torch.equal(load_file(tmp_path / "out" / NAME)["a"], torch.ones(3, 5))
    for wrong in ({"a": torch.ones(5, 3)}, {"b": torch.ones(1)}):
        with pytest.raises(UserError, match="don't fit"):
            convert_part(source, tmp_path, torch.float32, "5GB", {}, wrong, lambda: None)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    for name, value in (("fine", torch.tensor([1.0, -65504.0])), ("large", torch.tensor([1.0, 70_000.0]))):
        (tmp_path / name).mkdir()
        save_file({"weight": value}, tmp_path / name / NAME)
    convert(tmp_path / "fine", tmp_path / "out", torch.float16)
    with pytest.raises(UserError, match="weight holds numbers beyond"):
        convert(tmp_path / "large", tmp_path / "no", torch.float16)


def test_a_damaged_file_is_named(source: Path, tmp_path: Path) -> None:
    content = (source / NAME).read_bytes()
    (source / NAME).write_bytes(content[:-10])
    with pytest.raises(UserError, match="damaged"):
        convert(source, tmp_path / "out", torch.float32)


CHILD = """
import re, sys, torch
from pathlib import Path
from fewstep.export.diffusers_folder import Format, write_diffusers_folder
from fewstep.export.provenance import Provenance
import diffusers

def export(size, dtype, shards):
    folder, provenance = Path(sys.argv[1]), Provenance("teacher", "recipe", [80.0], 1.0, 1, "0.9")
    write_diffusers_folder(folder / size, folder / f"{size} {dtype} {shards}", provenance, Format(dtype, shards))

def peak():  # of this program; ru_maxrss would be at least that of the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

export("small", torch.float32, "5GB")
before = peak()
export("large", getattr(torch, sys.argv[2]), sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "shards"), [("float32", "5GB"), ("float16", "5GB"), ("float16", "50MB")])
def test_the_peak_memory_of_an_export_is_below_that_of_the_weights(dtype: str, shards: str, tmp_path: Path) -> None:
    sizes = {"small": 2**10, "large": 2**22}
    for size, numbers in sizes.items():
        unet = tmp_path / size / "unet"
        unet.mkdir(parents=True)
        save_file({f"{index:03d}": torch.randn(numbers) for index in range(10)}, unet / NAME)
        (unet / "config.json").write_text("{}")
        description = {"family": "pixel", "config": {"sigma_data": 0.5, "num_classes": 0}, "timesteps": [80.0]}
        (tmp_path / size / "fewstep.json").write_text(json.dumps(description))
    command = [sys.executable, "-c", CHILD, str(tmp_path), dtype, shards]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    total = 10 * 4 * sizes["large"]
    assert 0 < int(printed.stdout) <= 1.3 * total, int(printed.stdout) / total
