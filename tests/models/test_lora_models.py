"""Models whose low-rank weights were trained: what is written once, and what is read back is what was computed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.diffusion.sampling import rollout
from fewstep.errors import UserError
from fewstep.export.stored import open_stored
from fewstep.models.image_model import ImageModel
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.lora_files import LORA_WEIGHTS
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.lora_layers import lora_of
from fewstep.networks.settings import LoRASettings, PixelModelConfig
from fewstep.runtime.ema import EMA, trainable_state
from fewstep.training.roles import make_roles
from tiny_pipelines import TINY

LORA = LoRASettings(rank=4, alpha=6.0)
TIMES = {"pixel": [80.0, 1.0], "sd": [999.0, 499.0], "sdxl": [999.0, 499.0]}


def make_model(kind: str, folder: Path) -> ImageModel:
    if kind != "pixel":
        return LatentModel(TINY[kind](folder / "scratch"))
    torch.manual_seed(0)
    sizes = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention": [False, True], "attention_head_dim": 8}
    config = PixelModelConfig(num_classes=3, null_class=True, **sizes)
    return PixelModel(config, build_unet(config))


def make_student(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> ImageModel:
    """A student of two steps on the unmerged tree, with low-rank weights that count."""
    model = make_model(kind, folder)
    torch.manual_seed(1)
    student = make_roles(model, dtype=dtype, lora=LORA).student
    for value in trainable_state(student).values():
        value += 0.05 * torch.randn(value.shape)
    return model.student(student, TIMES[kind])


@torch.no_grad()
def drawn(model: ImageModel) -> Tensor:
    noise = torch.randn(2, 3, *model.shape, generator=torch.Generator().manual_seed(2))
    asked = ["a cat", "a mat", ""] if model.kind == "text" else [0, 1, 2]
    times = torch.tensor(model.timesteps, dtype=torch.float64)
    return rollout(model.denoiser, noise, times, model.conditions(range(3), asked), stop=1)


@pytest.mark.parametrize("kind", TIMES)
def test_what_is_loaded_draws_what_the_tree_drew_in_training(kind: str, tmp_path: Path) -> None:
    student, teacher = make_student(kind, tmp_path), make_model(kind, tmp_path / "2")
    expected, plain = drawn(student), drawn(teacher.student(teacher.denoiser, TIMES[kind]))
    student.save(tmp_path / "model", tmp_path / "frozen")
    loaded = load(tmp_path / "model")
    assert (loaded.timesteps, lora_of(loaded.network)) == (TIMES[kind], {})
    assert (drawn(loaded) - expected).norm() < 1e-5 * (expected - plain).norm()
    assert loaded.fingerprint not in (student.fingerprint, teacher.fingerprint)
    stored, weights = open_stored(tmp_path / "model"), loaded.network.state_dict()
    for name, tensor in stored.parts["unet"].tensors.items():
        assert torch.equal(tensor.read(), weights[name])
    assert "lora" not in stored.description  # of what is exported, which is merged
    assert stored.lora.keys() == lora_of(student.network).keys()


@pytest.mark.parametrize("kind", ["pixel", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_written_once_as_it_was_trained_on(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """By all checkpoints and averages; beside it a checkpoint's model has but small files of its own."""
    student = make_student(kind, tmp_path, dtype)
    ema = EMA(student.denoiser, [0.05, 0.99])
    for value in trainable_state(student.denoiser).values():
        value.mul_(1.5)
    for step in ("1", "2"):
        for name in ("0.05", "0.99"):
            with ema.applied(name):
                student.save(tmp_path / step / f"model{name}", tmp_path / "frozen")
                trees = drawn(student)
        if step == "1":
            ema.update()
    weights = "unet/diffusion_pytorch_model.safetensors"
    copies = [*tmp_path.glob(f"*/model*/{weights}")]
    assert len(copies) == 4
    assert {path.stat().st_ino for path in copies} == {(tmp_path / "frozen" / weights).stat().st_ino}
    base = load_file(copies[0])
    assert {value.dtype for value in base.values()} == {dtype}
    assert all(torch.equal(value, student.network.state_dict()[name]) for name, value in base.items())
    assert not any("lora" in name for name in base)
    files = [tmp_path / step / f"model{name}/lora/{LORA_WEIGHTS}" for step in "12" for name in ("0.05", "0.99")]
    assert (
        len({sum(value.double().sum().item() for value in load_file(path).values()) for path in files}) == 3
    )  # both averages began alike
    assert {path.stat().st_nlink for path in files} == {1}
    assert json.loads((tmp_path / "1/model0.05/fewstep.json").read_text())["lora"] == LORA.model_dump()
    error = (drawn(load(tmp_path / "2/model0.99")) - trees).norm() / trees.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


def test_a_model_is_also_written_by_itself(tmp_path: Path) -> None:
    student = make_student("pixel", tmp_path)
    student.save(tmp_path / "model")
    torch.testing.assert_close(drawn(load(tmp_path / "model")), drawn(student), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_student("sd", folder).save(folder / "model")
    return folder / "model"


def missing(model: Path) -> None:
    shutil.rmtree(model / "lora")


def torn(model: Path) -> None:
    os.truncate(model / "lora" / LORA_WEIGHTS, 1000)


def of_another(model: Path) -> None:
    make_student("pixel", model.parent / "other").save(model.parent / "pixel")
    shutil.copy(model.parent / "pixel" / "lora" / LORA_WEIGHTS, model / "lora" / LORA_WEIGHTS)


def linked(model: Path) -> None:
    (model / "lora" / LORA_WEIGHTS).rename(model.parent / "elsewhere.safetensors")
    (model / "lora" / LORA_WEIGHTS).symlink_to(model.parent / "elsewhere.safetensors")


def not_finite(model: Path) -> None:
    tensors = load_file(model / "lora" / LORA_WEIGHTS)
    tensors[min(tensors)][0] = torch.nan
    save_file(tensors, model / "lora" / LORA_WEIGHTS)


DAMAGES = {missing: "lora", torn: LORA_WEIGHTS, of_another: "not of this model", linked: "link", not_finite: "NaN"}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("opening", [load, open_stored])
def test_damaged_low_rank_weights_are_told_in_one_line(saved: Path, tmp_path: Path, damage, opening) -> None:
    shutil.copytree(saved, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=DAMAGES[damage]) as told:
        opening(tmp_path / "model")
    assert str(tmp_path / "model") in str(told.value)
    assert "\n" not in str(told.value)
