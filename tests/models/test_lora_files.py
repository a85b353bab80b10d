"""LoRA files of every layout are read as the same changes, and files that are none, or another model's, are refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.latent_model import LatentModel
from fewstep.models.lora_files import apply_lora, open_lora, open_loras, with_loras, write_diffusers_lora
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


# --- what the header says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "scale"),
    [
        ({"unet.r": 3, "unet.lora_alpha": 12}, 4.0),
        ({"unet.lora_alpha": 12, "unet.use_rslora": True}, 12 / 3**0.5),
        ({"unet.lora_alpha": 12, "unet.alpha_pattern": {"in": 9, "^conv_in": 6, "attn1.to_q": 9}}, 2.0),
        ({"text_encoder.lora_alpha": 12}, 1.0),
    ],
    ids=str,
)
def test_pefts_metadata_say_the_scale(network: nn.Module, tmp_path: Path, told: dict, scale: float) -> None:
    change = random_lora(network)["conv_in"]
    weights = {"unet.conv_in.lora_A.weight": change.down, "unet.conv_in.lora_B.weight": change.up}
    save_file(weights, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    found = open_lora(tmp_path / "x.safetensors", network, SDXL).lora["conv_in"]
    torch.testing.assert_close(found.delta(), change.with_alpha(3).delta() * scale / (ALPHA / 3))


def test_ranks_may_differ_between_modules_and_text_encoders_are_told(network: nn.Module, tmp_path: Path) -> None:
    """In float16, with layers that are written as convolutions, in a folder."""
    weights = kohya(original)(network, "conv_in", random_lora(network, 2)["conv_in"])
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    change = random_lora(network, 5)[attention]
    wide = LowRank(change.down[:, :, None, None], change.up[:, :, None, None], 5.0)
    weights |= kohya(original)(network, attention, wide)
    weights |= {"lora_te1_text_model_x.lora_down.weight": torch.ones(2, 2), "lora_te2_x.alpha": torch.tensor(1.0)}
    save_file({name: weight.half() for name, weight in weights.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    found = open_lora(tmp_path, network, SDXL)
    assert {name: (each.rank, each.alpha) for name, each in found.lora.items()} == {
        "conv_in": (2, 2),
        attention: (5, 5),
    }
    torch.testing.assert_close(found.lora[attention].delta(), change.up @ change.down, rtol=5e-3, atol=5e-3)
    assert found.lora[attention].delta().dtype == torch.float32
    assert found.notes == ("leaves out its 2 weights of text encoders",)


def test_what_a_layer_is_called_is_said_by_one_name_alone(network: nn.Module) -> None:
    paths = [path for path, _ in network.named_modules() if path in layers(network)]
    names = {name.replace(".", "_"): path for path in paths for name in (path, original(network, path))}
    assert len(names) == 2 * len(paths)


# --- what is refused -------------------------------------------------------------------------------------------------

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
DOWN, UP = torch.ones(2, 32), torch.ones(32, 2)


def pair(name: str, down: Tensor = DOWN, up: Tensor = UP, alpha: float | None = None) -> Weights:
    pieces = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return pieces | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
REFUSED = {
    "nothing": ({}, ["no LoRA: it holds nothing"]),
    "nan": (pair(NAME, DOWN * torch.nan), ["lora_down.weight holds NaN or infinity"]),
    "infinite alpha": (pair(NAME, alpha=math.inf), ["alpha holds NaN or infinity"]),
    "alpha 0": (pair(NAME, alpha=0.0), ["the alpha of mid_block.attentions.0", "is 0, which no LoRA has"]),
    "alpha -4": (pair(NAME, alpha=-4.0), ["is -4, which no LoRA has"]),
    "ranks": (pair(NAME, torch.ones(4, 32)), ["lora_down.weight is [4, 32]", "[32, 2]", "their ranks differ"]),
    "rank 0": (pair(NAME, torch.ones(0, 32), torch.ones(32, 0)), ["their ranks differ"]),
    "vectors": (pair(NAME, torch.ones(2), torch.ones(2)), ["their ranks differ"]),
    "half": ({f"{NAME}.lora_up.weight": UP}, ["lacks the matrix 'down' of mid_block.attentions.0"]),
    "twice": (pair(NAME) | pair(NAME.replace("lora_unet", "lycoris")), ["attn2.to_k twice, as l", "leave one"]),
    "alpha twice": (pair(NAME, alpha=1.0) | {f"unet.{NAME[10:]}.alpha": torch.tensor(1.0)}, ["twice"]),
    "sd 1": (pair(NAME, torch.ones(2, 768)), ["is [2, 768], where the model's weight is [32, 32]", "LoRA of SD 1.x"]),
    "sd 2": (pair(NAME, torch.ones(2, 1024)), ["looks like a LoRA of SD 2.x"]),
    "sdxl, other blocks": (
        pair("lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k", torch.ones(2, 2048)) | pair(NAME),
        ["2 of its 4 weights are not of this model (lora_unet_input_blocks_8_1", "looks like a LoRA of SDXL"],
    ),
    "flux": (pair(FLUX), ["2 of its 2 weights", "looks like a LoRA of the FLUX family"]),
    "sd 3": (pair("transformer.transformer_blocks.0.attn.to_q"), ["looks like a LoRA of the SD3 family"]),
    "wan": (pair("diffusion_model.blocks.0.cross_attn.k"), ["not of this model", "name a LoRA of its family"]),
    "loha": ({f"{NAME}.hada_w1_a": UP}, [f"{NAME}.hada_w1_a is of a LoHa, which is not read"]),
    "lokr": ({f"{NAME}.lokr_w1": UP}, ["of a LoKr"]),
    "dora": (pair(NAME) | {f"{NAME}.dora_scale": UP}, ["of a DoRA"]),
    "mid": (pair(NAME) | {f"{NAME}.lora_mid.weight": UP}, ["convolutions in three matrices"]),
    "biases": (pair(NAME) | {"unet.conv_in.lora_B.bias": UP}, ["of biases"]),
    "differences": (pair(NAME) | {"diffusion_model.x.diff_b": UP}, ["of whole differences"]),
    "weights beside": (pair(NAME) | {"unet.conv_in.bias": UP}, ["1 of its 3 weights", "unet.conv_in.bias"]),
    "8 bits": (pair(NAME, DOWN.to(torch.float8_e4m3fn)), ["quantised"]),
    "text alone": (pair("lora_te_text_model_x"), ["a LoRA of text encoders alone"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_of_this_network_is_refused(network: nn.Module, tmp_path: Path, case: str) -> None:
    weights, fragments = REFUSED[case]
    save_file({name: weight.clone() for name, weight in weights.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: ") as error:
        open_lora(tmp_path / "x.safetensors", network, SDXL)
    assert "\n" not in str(error.value)
    assert all(fragment in str(error.value) for fragment in fragments), error.value


@pytest.mark.parametrize(
    "header",
    [
        {"lora_adapter_metadata": "{"},
        {"lora_adapter_metadata": "[1]"},
        {"lora_adapter_metadata": '{"unet.use_dora": true}'},
        {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'},
        {"lora_adapter_metadata": '{"unet.lora_alpha": -1}'},
        {"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}'},
        {"fewstep.timesteps": "[1, 5]"},
        {"fewstep.timesteps": "[999.5]"},
        {"fewstep.timesteps": "[1000]"},
        {"fewstep.timesteps": '"x"'},
        {"fewstep.timesteps": "[]"},
    ],
    ids=str,
)
def test_headers_that_say_what_can_not_be_are_refused(tmp_path: Path, header: dict[str, str]) -> None:
    model = LatentModel(tiny_sd(tmp_path / "scratch"))
    name = NAME.removeprefix("lora_unet_")
    width = model.network.config.cross_attention_dim
    save_file(pair(f"unet.{name}", torch.ones(2, width)), tmp_path / "x.safetensors", header)
    with pytest.raises(UserError, match=r"x\.safetensors: ") as error:
        open_loras([str(tmp_path / "x.safetensors")], model)
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_a_whole_model_are_refused(network: nn.Module, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: no LoRA: .* named without --lora"):
        open_lora(tmp_path / "x.safetensors", network, SDXL)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match=r"x\.safetensors: not a whole LoRA file"):
        open_lora(tmp_path / "x.safetensors", network, SDXL)
