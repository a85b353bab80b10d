"""LoRA files are what ComfyUI, A1111 and diffusers read, by their rules for names and by diffusers itself."""

import json
import re
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.export.card import Provenance
from fewstep.export.lora import header, kohya_tensors, write_lora
from fewstep.models.latent_model import LatentModel
from fewstep.models.lora_files import open_lora, with_loras
from fewstep.models.original_names import of_unet
from fewstep.models.sampler import Sampler, sample
from fewstep.networks.lora import LowRank
from fewstep.networks.lora_layers import find_targets
from real_sizes import UNETS
from tiny_pipelines import tiny_sd, tiny_sdxl

MADE = Provenance("teachers/base", "kind: distill\n", [999.0, 749.0, 499.0, 249.0], 8.0, 100, "0.999", license="mit")
RANK, ALPHA = 2, 0.5
X = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def make_lora(network: nn.Module, device: str = "cpu") -> dict[str, LowRank]:
    random, lora = torch.Generator(device).manual_seed(0) if device == "cpu" else None, {}
    for name in find_targets(network, "official"):
        weight = network.get_submodule(name).weight
        down = torch.randn(RANK, *weight.shape[1:], generator=random, device=device)
        up = torch.randn(len(weight), RANK, *(1,) * (weight.ndim - 2), generator=random, device=device)
        lora[name] = LowRank(down, 0.2 * up, ALPHA)
    return lora


# --- the readers' rules (design of the layouts, and their sources) ---------------------------------------------------


def comfy(originals: set[str], ours: set[str]) -> set[str]:
    """All names of modules that ComfyUI looks for: of the UNet's weights in original names and in diffusers'."""
    names = {f"lora_unet_{name.replace('.', '_')}" for name in originals | ours}
    names |= {f"diffusion_model.{name}" for name in originals} | {f"lycoris_{name.replace('.', '_')}" for name in ours}
    processors = {re.sub(r"\.to_out\.0$", ".to_out", name.replace(".to_", ".processor.to_")) for name in ours}
    return names | processors | {f"unet.{name}" for name in processors}


def a1111(name: str) -> str:
    """The original path, its dots as underscores, that A1111 makes of what stands before the first dot."""
    name = name.removeprefix("lora_unet_")
    if match := re.fullmatch(r"(down|up)_blocks_(\d+)_(resnets|attentions)_(\d+)_(.+)", name):
        way, level, kind, index, rest = match.groups()
        number = 3 * int(level) + int(index) + (way == "down")
        rest = X.get(rest, rest) if kind == "resnets" else rest
        return f"{'input' if way == 'down' else 'output'}_blocks_{number}_{int(kind == 'attentions')}_{rest}"
    if match := re.fullmatch(r"mid_block_(resnets|attentions)_(\d+)_(.+)", name):
        kind, index, rest = match.groups()
        return f"middle_block_{2 * int(index)}_{X.get(rest, rest)}" if kind == "resnets" else f"middle_block_1_{rest}"
    if match := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"input_blocks_{3 + 3 * int(match[1])}_0_op"
    if match := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"output_blocks_{2 + 3 * int(match[1])}_{1 if match[1] == '0' else 2}_conv"
    return name


@cache
def released(version: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[version])


@pytest.mark.parametrize(("version", "count"), [("xl_base", 788), ("v1", 278), ("v2", 278)])
def test_every_layer_of_the_released_models_is_found_by_every_reader(version: str, count: int) -> None:
    """Of the official set; the lean one is of some of its layers."""
    network = released(version)
    state = {name.removesuffix(".weight"): weight for name, weight in network.state_dict().items()}
    tensors = kohya_tensors(make_lora(network, "meta"), network)
    stems = {name.partition(".")[0] for name in tensors}
    assert len(stems) == count
    assert {name.partition(".")[2] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}

    originals = {
        name.removesuffix(".weight"): weight for name, weight in of_unet(network, network.state_dict()).items()
    }
    assert stems <= comfy(set(originals), set(state))

    flat = {name.replace(".", "_"): weight for name, weight in originals.items()}
    assert len({a1111(stem) for stem in stems}) == count
    for stem in stems:
        size = len(tensors[f"{stem}.lora_up.weight"]), *tensors[f"{stem}.lora_down.weight"].shape[1:]
        assert size == flat[a1111(stem)].shape, stem

    converted = _maybe_map_sgm_blocks_to_diffusers(tensors, network.config)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(converted)
    theirs = convert_unet_state_dict_to_peft({name.removeprefix("unet."): t for name, t in converted.items()})
    assert set(alphas.values()) == {ALPHA}
    assert len(theirs) == 2 * count
    for name in find_targets(network, "official"):
        size = len(theirs[f"{name}.lora_B.weight"]), *theirs[f"{name}.lora_A.weight"].shape[1:]
        assert size == state[name].shape, name


def test_names_of_peft_are_what_those_readers_do_not_read() -> None:
    """So that the table of readers can fail: ComfyUI finds 228 of peft's 788, A1111 none of them."""
    network = released("xl_base")
    ours = {name.removesuffix(".weight") for name in network.state_dict()}
    originals = {name.removesuffix(".weight") for name in of_unet(network, network.state_dict())}
    names = find_targets(network, "official")
    assert set(find_targets(network, "lean")) <= set(names)
    assert len({f"unet.{name}" for name in names} & comfy(originals, ours)) == 228
    assert "unet" not in {name.replace(".", "_") for name in originals}
    drops = {a1111("lora_unet_" + name.replace(".", "_")) for name in names} - {n.replace(".", "_") for n in originals}
    assert drops == {"output_blocks_2_1_conv"}  # of diffusers' names, in which DMD2's own LoRA of SDXL is


# --- the files -------------------------------------------------------------------------------------------------------


class Place:
    """A tiny base with a LoRA of its UNet in both layouts."""

    def __init__(self, family: str, folder: Path):
        self.family = family
        self.pipeline = {"sd": tiny_sd, "sdxl": tiny_sdxl}[family](folder / "scratch")
        self.model = LatentModel(self.pipeline)
        self.lora = make_lora(self.model.network)
        self.files = {}
        for layout, dtype in (("kohya", torch.float16), ("diffusers", torch.float32), ("exact", torch.float32)):
            self.files[layout] = path = folder / f"my-{layout}.safetensors"
            version = {"sd": "v1", "sdxl": "xl-v1-base"}[family]
            told = header(path, self.lora, MADE, version, "epsilon", 16)
            write_lora(path, self.lora, self.model.network, "unet", told, layout.replace("exact", "kohya"), dtype)

    def expected(self, strength: float) -> UNet2DConditionModel:
        """The UNet with weights that are summed here, in float64."""
        network = UNet2DConditionModel(**self.pipeline.unet.config).eval()
        state = {name: value.double() for name, value in self.pipeline.unet.state_dict().items()}
        for name, change in self.lora.items():
            product = torch.einsum("or,r...->o...", change.up.flatten(1).double(), change.down.double())
            state[f"{name}.weight"] += strength * ALPHA / RANK * product
        network.load_state_dict(state)
        return network


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(request.param, tmp_path_factory.mktemp(request.param))


def test_what_is_written_is_read_again(place: Place) -> None:
    for layout, tolerance in (("kohya", 1e-3), ("diffusers", 1e-6), ("exact", 1e-6)):
        found = open_lora(place.files[layout], place.model.network, place.model.family)
        assert found.lora.keys() == place.lora.keys()
        assert found.layout == layout.replace("exact", "kohya")
        assert (found.timesteps, found.notes) == (MADE.timesteps, ())
        for name, change in found.lora.items():
            expected = place.lora[name].delta()
            assert (change.delta() - expected).norm() <= tolerance * expected.norm(), name
            assert change.alpha == (RANK if layout == "diffusers" else ALPHA)


def test_the_header_says_what_uis_look_for(place: Place, tmp_path: Path) -> None:
    with safe_open(place.files["kohya"], "pt") as file:
        metadata = file.metadata()
    version, architecture = {"sd": ("sd_v1", "v1"), "sdxl": ("sdxl_base_v1-0", "xl-v1-base")}[place.family]
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == f"stable-diffusion-{architecture}/lora"
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "0.5",
        "ss_v2": "False",
    }
    expected |= {
        "ss_output_name": "my-kohya",
        "modelspec.title": "my-kohya",
        "modelspec.license": "mit",
        "format": "pt",
    }
    expected |= {"modelspec.prediction_type": "epsilon", "fewstep.teacher": "teachers/base", "fewstep.step": "100"}
    assert expected.items() <= metadata.items()
    assert "<lora:my-kohya:1>" in metadata["modelspec.usage_hint"]
    assert "ComfyUI: sampler `lcm`, scheduler `simple`" in metadata["modelspec.usage_hint"]
    assert json.loads(metadata["fewstep.timesteps"]) == MADE.timesteps
    assert {"lora_adapter_metadata", "ss_v_parameterization"}.isdisjoint(metadata)  # diffusers refuses it beside alpha
    tensors = load_file(place.files["kohya"])
    alphas = [tensor for name, tensor in tensors.items() if name.endswith(".alpha")]
    assert all(alpha.shape == () and alpha.dtype == torch.float32 and alpha == ALPHA for alpha in alphas)
    assert len(alphas) * 3 == len(tensors)
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".weight")} == {torch.float16}
    told = header(tmp_path / "v.safetensors", place.lora, MADE, "v2-768-v", "v_prediction", 16)
    expected = {"ss_v_parameterization": "True", "ss_base_model_version": "sd_v2_v", "ss_v2": "True"}
    assert (expected | {"modelspec.prediction_type": "v"}).items() <= told.items()
    assert all(isinstance(value, str) for value in told.values())
    one = header(tmp_path / "one.safetensors", place.lora, replace(MADE, timesteps=[999.0]), "v1", "epsilon", 16)
    assert ": 1 step, LCM, CFG 1" in one["ss_training_comment"]


# --- diffusers itself ------------------------------------------------------------------------------------------------

needs_peft = pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed")


def opened(place: Place) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The base anew."""
    network = UNet2DConditionModel(**place.pipeline.unet.config).eval()
    network.load_state_dict(place.pipeline.unet.state_dict())
    parts = {
        **place.pipeline.components,
        "unet": network,
        "scheduler": LCMScheduler.from_config(place.pipeline.scheduler.config),
    }
    if place.family == "sdxl":
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def output(place: Place, network: UNet2DConditionModel) -> Tensor:
    condition = place.model.text_condition(["a cat"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]} if "pooled" in condition else None
    with torch.no_grad():
        return network(noise, 500, condition["text"], added_cond_kwargs=added).sample


@needs_peft
@pytest.mark.parametrize("layout", ["exact", "diffusers"])
def test_diffusers_loads_it_at_any_strength_and_fuses_it(place: Place, layout: str) -> None:
    pipeline, bare = opened(place), output(place, place.pipeline.unet)
    pipeline.load_lora_weights(place.files[layout], adapter_name="x")
    for strength in (1.0, 0.7):
        pipeline.set_adapters(["x"], [strength])
        expected = output(place, place.expected(strength))
        effect = (expected - bare).abs().max()
        assert effect > 1e-2
        assert (output(place, pipeline.unet) - expected).abs().max() <= 1e-5 * effect, strength
    pipeline.set_adapters(["x"], [1.0])
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    assert (output(place, pipeline.unet) - expected).abs().max() <= 1e-5 * effect


@needs_peft
def test_four_steps_of_diffusers_are_our_rollout(place: Place) -> None:
    pipeline, noises = opened(place), torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    pipeline.load_lora_weights(place.files["exact"])
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(7)
    torch.randn(1, 4, 8, 8, generator=random)  # the first noise is given as latents
    times = [int(t) for t in MADE.timesteps]
    call = {"timesteps": times, "guidance_scale": 0, "generator": random, "output_type": "latent"}
    theirs = pipeline(["a cat"], num_inference_steps=4, latents=noises[0], **call).images
    model = LatentModel(opened(place))
    student = with_loras(model, [(open_lora(place.files["exact"], model.network, model.family), 1.0)])
    ours = sample(student, Sampler("student", 4), noises, student.text_condition(["a cat"]))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
