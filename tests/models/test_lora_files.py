"""LoRA files of every layout are read as the same changes, and files that are none, or another model's, are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.latent_model import LatentModel
from fewstep.models.lora_files import apply_lora, open_lora, with_loras, write_diffusers_lora
from fewstep.models.original_names import of_unet
from fewstep.networks.families import FAMILIES
from fewstep.networks.lora import LowRank
from tiny_pipelines import POOLED, tiny_sd, unet

SD, SDXL = FAMILIES["StableDiffusionPipeline"], FAMILIES["StableDiffusionXLPipeline"]
Weights = dict[str, Tensor]
ALPHA, SCALE = 2.0, 2.0 / 3


def layers(network: nn.Module) -> dict[str, Tensor]:
    """The weights that a LoRA can change: all linear and convolutional layers'."""
    return {name: m.weight for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def random_lora(network: nn.Module, rank: int = 3, seed: int = 0) -> dict[str, LowRank]:
    random = torch.Generator().manual_seed(seed)
    lora = {}
    for name, weight in layers(network).items():
        down = torch.randn(rank, *weight.shape[1:], generator=random)
        up = torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2), generator=random)
        lora[name] = LowRank(down, up, ALPHA)
    return lora


@pytest.fixture(scope="module")
def network() -> UNet2DConditionModel:
    return unet(32, **POOLED)


def original(network: nn.Module, name: str) -> str:
    return next(iter(of_unet(network, {f"{name}.weight": None}))).removesuffix(".weight")


def kohya(module: Callable[[nn.Module, str], str], prefix: str = "lora_unet_") -> Callable[..., Weights]:
    def make(network: nn.Module, name: str, change: LowRank) -> Weights:
        stem = prefix + module(network, name).replace(".", "_")
        pieces = {f"{stem}.lora_down.weight": change.down, f"{stem}.lora_up.weight": change.up}
        return pieces | {f"{stem}.alpha": torch.tensor(change.alpha)}

    return make


def dotted(pattern: str, down: str, up: str) -> Callable[..., Weights]:
    """Without alpha, which is therefore in the second matrix."""

    def make(network: nn.Module, name: str, change: LowRank) -> Weights:
        stem = pattern.format(name=name, original=original(network, name))
        return {stem + down: change.down, stem + up: change.up * SCALE}

    return make


def processors(network: nn.Module, name: str, change: LowRank) -> Weights:
    """What diffusers wrote until 2023, of attention alone; the other layers as it writes them now."""
    if ".to_" not in name:
        return dotted("unet.{name}", ".lora.down.weight", ".lora.up.weight")(network, name, change)
    stem = "unet." + name.replace(".to_", ".processor.to_").removesuffix(".0")
    return {f"{stem}_lora.down.weight": change.down, f"{stem}_lora.up.weight": change.up * SCALE}


LAYOUTS = {
    "kohya, original": kohya(original),
    "kohya, diffusers": kohya(lambda network, name: name),
    "lycoris": kohya(lambda network, name: name, "lycoris_"),
    "peft of diffusers": dotted("unet.{name}", ".lora_A.weight", ".lora_B.weight"),
    "peft of a UNet": dotted("base_model.model.{name}", ".lora_A.weight", ".lora_B.weight"),
    "peft with its adapter": dotted("{name}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft of parameters": dotted("{name}", ".lora_A", ".lora_B"),
    "ComfyUI": dotted("diffusion_model.{original}", ".lora_A.weight", ".lora_B.weight"),
    "ComfyUI, up and down": dotted("diffusion_model.{original}", ".lora_down.weight", ".lora_up.weight"),
    "diffusers, 2023": dotted("unet.{name}", ".lora.down.weight", ".lora.up.weight"),
    "layers of diffusers": dotted("unet.{name}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "processors": processors,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_the_same_changes(network: nn.Module, tmp_path: Path, layout: str) -> None:
    lora, weights = random_lora(network), Weights()
    for name, change in lora.items():
        weights |= LAYOUTS[layout](network, name, change)
    assert len(weights) == len(lora) * (3 if ".alpha" in " ".join(weights) else 2)
    save_file(weights, tmp_path / "x.safetensors")
    found = open_lora(tmp_path / "x.safetensors", network, SDXL)
    assert found.lora.keys() == lora.keys()
    for name, change in found.lora.items():
        expected = SCALE * torch.einsum("or,r...->o...", lora[name].up.flatten(1), lora[name].down)
        torch.testing.assert_close(change.delta(), expected)
        assert change.shape == layers(network)[name].shape
    assert found.layout == ("kohya" if "lora_down" in " ".join(weights) else "diffusers")
    assert (found.notes == ("does not say its alpha: taken at scale 1, as all programs do",)) == (
        layout == "ComfyUI, up and down"
    )


def test_strengths_add_up_and_the_order_is_no_matter(tmp_path: Path) -> None:
    model = LatentModel(tiny_sd(tmp_path / "scratch"))
    before = {name: weight.clone() for name, weight in layers(model.network).items()}
    loras = [random_lora(model.network, seed=seed) for seed in (1, 2)]
    paths = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    for path, lora in zip(paths, loras, strict=True):
        write_diffusers_lora(path, lora, "unet")
    one, two = (open_lora(path, model.network, SD) for path in paths)
    with_loras(model, [(one, 0.5), (two, -0.25)])
    apply_lora(model, two, 1.0)
    apply_lora(model, one, 0.2)
    for name, weight in layers(model.network).items():
        expected = before[name].double() + 0.7 * loras[0][name].delta() + 0.75 * loras[1][name].delta()
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_model_is_no_lora(network: UNet2DConditionModel, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: no LoRA: .* named without --lora"):
        open_lora(tmp_path / "x.safetensors", network, SDXL)
