"""A single file has the names, shapes and numbers of the original layout, and opens as the same model everywhere."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fewstep.embedded.settings import AutoencoderConfig, TextModelConfig
from fewstep.embedded.small_models import build_autoencoder, build_pipeline
from fewstep.errors import UserError
from fewstep.export.single_file import original_weights, write_single_file
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.loading.single_file import convert
from real_sizes import UNETS
from tiny_pipelines import BETAS, POOLED, text_encoder, tiny_sd, tiny_sdxl, unet

PREFIXES = {
    "sd": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
PROMPTS = ["a red cat"]
OPENCLIP = {"hidden_size": 24, "hidden_act": "gelu"}  # another width than the first encoder's, and the exact GELU


def pipeline_of(family: str, folder: Path) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A tiny pipeline of SD 1.x, SD 2.x or SDXL with that family's kinds of layers."""
    if family == "sd":
        return tiny_sd(folder)
    if family == "sd2":
        pipeline = tiny_sd(folder)
        pipeline.register_modules(
            text_encoder=text_encoder(CLIPTextModel, 1, **OPENCLIP), unet=unet(24, use_linear_projection=True)
        )
        return pipeline
    pipeline = tiny_sdxl(folder)
    encoder = text_encoder(CLIPTextModelWithProjection, 2, **OPENCLIP)
    pipeline.register_modules(text_encoder_2=encoder, unet=unet(40, **POOLED, use_linear_projection=True))
    return pipeline


class Place:
    """A student with its `folder` and its `file`."""

    def __init__(self, family: str, folder: Path):
        self.family, self.folder, self.file = family, folder / "folder", folder / "student.safetensors"
        pipeline = pipeline_of(family, folder / "scratch")
        pipeline.save_pretrained(self.folder)
        self.model = LatentModel(pipeline, [999.0, 499.0])
        write_single_file(self.model, self.file, {"fewstep.teacher": "tiny"}, torch.float32)


@pytest.fixture(scope="module", params=PREFIXES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place("sd", tmp_path_factory.mktemp("sd alone"))


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit, in the same names."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the word that transformers has in some names."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def test_diffusers_conversions_give_back_every_tensor_and_leave_none(place: Place) -> None:
    weights, pipeline = load_file(place.file), place.model.pipeline
    stems = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", **PREFIXES[place.family]}
    parts = {part: {n: t for n, t in weights.items() if n.startswith(stem)} for part, stem in stems.items()}
    assert sum(map(len, parts.values())) == len(weights)
    equal(convert_ldm_unet_checkpoint(parts["unet"], pipeline.unet.config), pipeline.unet.state_dict())
    equal(convert_ldm_vae_checkpoint(parts["vae"], pipeline.vae.config), pipeline.vae.state_dict())
    for part, stem in PREFIXES[place.family].items():
        encoder = pipeline.components[part]
        if "transformer" in stem:
            found = convert_ldm_clip_checkpoint(parts[part], remove_prefix=stem)
        else:
            found = convert_open_clip_checkpoint(encoder, parts[part], prefix=stem)
        equal(flat(found), flat(encoder.state_dict()))


def test_diffusers_opens_the_file_and_draws_the_same_pictures(place: Place) -> None:
    kind = StableDiffusionXLPipeline if place.family == "sdxl" else StableDiffusionPipeline
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def picture(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(PROMPTS, latents=noise, num_inference_steps=3, output_type="pt").images

    unet_only = {"safety_checker": None} if place.family != "sdxl" else {"add_watermarker": False}
    file = kind.from_single_file(str(place.file), config=str(place.folder), local_files_only=True, **unet_only)
    folder = kind.from_pretrained(place.folder, local_files_only=True)
    assert (picture(file) - picture(folder)).abs().max() <= 1e-5


def test_we_open_the_file_as_the_student_that_it_is(place: Place) -> None:
    model = load(place.file, place.folder)
    assert model.timesteps == [999, 499]
    equal(model.network.state_dict(), place.model.network.state_dict())
    equal(model.pipeline.vae.state_dict(), place.model.pipeline.vae.state_dict())
    condition, expected = model.text_condition(PROMPTS), place.model.text_condition(PROMPTS)
    equal(condition, expected)


def test_the_header_says_what_the_model_is(place: Place) -> None:
    with safe_open(place.file, "pt") as file:
        metadata = file.metadata()
    architectures = {
        "sd": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
    }
    assert metadata["modelspec.architecture"] == architectures[place.family]
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.title"] == "student"
    assert metadata["modelspec.resolution"] == "16x16"
    assert json.loads(metadata["fewstep.timesteps"]) == [999, 499]
    assert metadata["fewstep.teacher"] == "tiny"
    assert metadata["format"] == "pt"  # transformers refuses files without


def test_a_teacher_has_no_timesteps_and_metadata_have_the_last_word(sd: Place, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    write_single_file(LatentModel(sd.model.pipeline), path, {"modelspec.title": "A teacher"}, torch.float32)
    assert load(path, sd.folder).timesteps is None
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.title"] == "A teacher"


@pytest.mark.parametrize("timesteps", ["[1000]", "[999, 0.5]", "[-1]", "999", '["a"]', "[999"])
def test_timesteps_that_no_student_has_are_refused(sd: Place, tmp_path: Path, timesteps: str) -> None:
    write_single_file(sd.model, tmp_path / "x.safetensors", {"fewstep.timesteps": timesteps}, torch.float32)
    with pytest.raises(UserError, match=r"x\.safetensors: .*timesteps") as error:
        load(tmp_path / "x.safetensors", sd.folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_weights(sd: Place, tmp_path: Path, dtype: torch.dtype) -> None:
    write_single_file(sd.model, tmp_path / "half.safetensors", {}, dtype)
    equal(load_file(tmp_path / "half.safetensors"), {name: t.to(dtype) for name, t in load_file(sd.file).items()})
    assert sd.model.network.dtype == torch.float32


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_and_zero_terminal_snr_are_empty_tensors(sd: Place, tmp_path: Path, zero_snr: bool) -> None:
    model = relay(sd, DDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr))
    write_single_file(model, tmp_path / "v.safetensors", {}, torch.float16)
    weights = load_file(tmp_path / "v.safetensors")
    assert {name for name, tensor in weights.items() if not tensor.numel()} == {"v_pred", *["ztsnr"] * zero_snr}
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
    again = load(tmp_path / "v.safetensors", sd.folder).denoiser
    t = torch.tensor([0, 500, 999])
    for ours, theirs in zip(again.schedule.alpha_sigma(t), model.denoiser.schedule.alpha_sigma(t), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert again.parameterization is model.denoiser.parameterization


def relay(place: Place, scheduler: DDIMScheduler) -> LatentModel:
    """The student with another scheduler."""
    parts = {**place.model.pipeline.components, "scheduler": scheduler}
    return LatentModel(StableDiffusionPipeline(**parts, requires_safety_checker=False), [999.0])


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [({"prediction_type": "sample"}, "prediction_type sample"), ({"beta_end": 0.02}, "noise schedule")],
)
def test_what_the_layout_can_not_say_is_refused(sd: Place, tmp_path: Path, settings: dict, fragment: str) -> None:
    model = relay(sd, DDIMScheduler(**{**BETAS, **settings}))
    with pytest.raises(UserError, match=fragment):
        write_single_file(model, tmp_path / "new" / "x.safetensors", {}, torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"shift_factor": 0.1}, "latents are shifted"),
        ({"latents_mean": [0.5, 0, 0, 0], "latents_std": [2.0] * 4}, "latents are shifted"),
        ({"scaling_factor": 0.18215}, r"scaling_factor is 0.18215, not 0.13025,"),
    ],
    ids=str,
)
def test_other_latents_are_refused_for_no_header_says_them(tmp_path: Path, settings: dict, what: str) -> None:
    model = LatentModel(tiny_sdxl(tmp_path / "scratch"), [999.0])
    model.pipeline.vae.register_to_config(**settings)
    with pytest.raises(UserError, match=rf"vae: its {what} .* export the model as a diffusers folder"):
        write_single_file(model, tmp_path / "new" / "x.safetensors", {}, torch.float32)
    assert not (tmp_path / "new").exists()


def test_a_tensor_without_a_place_is_refused_by_name(sd: Place) -> None:
    model = LatentModel(sd.model.pipeline)
    model.denoiser.network.unet = UNet2DConditionModel(
        **{**sd.model.network.config, "encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}
    )
    with pytest.raises(UserError, match=r"no place for its encoder_hid_proj\.weight"):
        original_weights(model)


def test_the_students_own_weights_are_written_not_its_teachers(sd: Place, tmp_path: Path) -> None:
    model, other = LatentModel(sd.model.pipeline, [999.0]), UNet2DConditionModel(**sd.model.network.config)
    model.denoiser.network.unet = other
    write_single_file(model, tmp_path / "x.safetensors", {}, torch.float32)
    equal(load(tmp_path / "x.safetensors", sd.folder).network.state_dict(), other.state_dict())


def test_a_disk_that_fills_leaves_nothing(sd: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "x.safetensors").write_text("before")
    monkeypatch.setattr("fewstep.export.weights.converted", full)
    with pytest.raises(UserError, match=r"x\.safetensors: can't be written .*No space left"):
        write_single_file(sd.model, tmp_path / "x.safetensors", {}, torch.float32)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


class Copies(TorchDispatchMode):
    """Counts the bytes of the copies that are alive at once."""

    now = peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("_to_copy", "clone", "cat", "copy"):
            self._count(made.nbytes)
            weakref.finalize(made, self._count, -made.nbytes)
        return made

    def _count(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def test_no_second_copy_of_the_weights_is_held(sd: Place, tmp_path: Path) -> None:
    sizes = [tensor.nbytes for tensor in load_file(sd.file).values()]
    with Copies() as copies:
        write_single_file(sd.model, tmp_path / "half.safetensors", {}, torch.float16)
    assert max(sizes) / 2 <= copies.peak <= 2 * max(sizes) <= 0.3 * sum(sizes)


CLIP_L = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_H = {"num_hidden_layers": 23, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
BIG_G = {"num_hidden_layers": 32, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
RELEASED = {  # tensors of the UNet, the VAE and the text encoders of the released files; left out: see the test
    "v1": (UNETS["v1"], (686, 248, 197 - 1)),
    "v2": (UNETS["v2"], (686, 248, 23 * 12 + 4)),
    "xl_base": (UNETS["xl_base"], (1680, 248, 197 - 1 + 390 - 1)),
}
KNOWN = {  # names and shapes in the released files
    "v1": {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (640, 640),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    },
    "v2": {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
    "xl_base": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias": (3840,),
    },
}


@pytest.mark.parametrize("family", RELEASED)
def test_the_released_models_have_their_published_names_shapes_and_counts(family: str) -> None:
    """On the meta device. Of the released files only what diffusers does not have either is left out: `position_ids`
    (0, 1, 2, ...), `logit_scale`, which training had, and SD 2.x's last text layer and projection, which it never used.
    """
    settings, (num_unet, num_vae, num_text) = RELEASED[family]
    with torch.device("meta"):
        first = CLIP_H if family == "v2" else CLIP_L
        encoder = CLIPTextModel(CLIPTextConfig(**first, hidden_act="gelu" if family == "v2" else "quick_gelu"))
        parts = {"text_encoder": encoder, "vae": AutoencoderKL(**VAE)}
        if family == "xl_base":
            config = CLIPTextConfig(**BIG_G, hidden_act="gelu", projection_dim=1280)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
        unet = UNet2DConditionModel(**settings)
    pipeline = SimpleNamespace(**parts, components=parts)
    weights = original_weights(SimpleNamespace(network=unet, pipeline=pipeline))
    counts = [sum(name.startswith(stem) for name in weights) for stem in ("model.diff", "first_stage", "cond")]
    assert counts == [num_unet, num_vae, num_text]
    assert KNOWN[family].items() <= {name: tuple(tensor.shape) for name, tensor in weights.items()}.items()
    assert infer_diffusers_model_type(weights) == family
    assert (CHECKPOINT_KEY_NAMES["v1"] in weights) == (family != "xl_base")
    assert {name: t.shape for name, t in convert(weights, "unet", unet).items()} == {
        name: t.shape for name, t in unet.state_dict().items()
    }
    copied = sum(tensor.numel() for name, tensor in weights.items() if ".in_proj_" in name)
    assert copied <= 0.1 * sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("architecture", ["sd", "sdxl"])
def test_a_model_of_our_own_sizes_comes_back(tmp_path: Path, architecture: str) -> None:
    """Three levels of two layers with several transformer blocks, an autoencoder without attention, v-prediction."""
    sizes = {"block_out_channels": [16, 16, 32], "layers_per_block": 2, "norm_num_groups": 8}
    autoencoder = build_autoencoder(AutoencoderConfig(**sizes))
    autoencoder.register_to_config(scaling_factor={"sd": 0.18215, "sdxl": 0.13025}[architecture])
    config = TextModelConfig(
        architecture=architecture,
        **sizes,
        transformer_layers=2,
        attention_head_dim=8,
        text_width=16,
        prediction_type="v_prediction",
    )
    model = LatentModel(build_pipeline(config, autoencoder, ["a red circle", "a cat"]), [999.0])
    model.save(tmp_path / "folder")
    write_single_file(model, tmp_path / "x.safetensors", {}, torch.float32)
    again = load(tmp_path / "x.safetensors", tmp_path / "folder")
    for part in ("unet", "vae", *(name for name in model.pipeline.components if name.startswith("text_encoder"))):
        equal(again.pipeline.components[part].state_dict(), model.pipeline.components[part].state_dict())
    assert again.denoiser.parameterization is model.denoiser.parameterization
