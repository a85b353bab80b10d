"""What the files of a model say is obeyed, or refused by its name in one line; nothing is ignored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.autoencoder import load_autoencoder
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.pixel_model import PixelModel
from single_files import original_weights, write_single_file
from tiny_pipelines import BETAS, TINY

EXTRA = {"down_blocks.0.resnets.0.lora.weight": torch.zeros(2)}
Place = tuple[Path, Any]
Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], Tensors]


@pytest.fixture(scope="module", params=TINY)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = TINY[request.param](folder / "scratch")
    pipeline.save_pretrained(folder / "model")
    return folder / "model", pipeline


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(made[0], tmp_path / "model"))


@pytest.fixture
def sdxl(tmp_path: Path) -> Path:
    TINY["sdxl"](tmp_path / "scratch").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def configure(folder: Path, **settings: object) -> Path:
    """Changes a part's configuration, or the pipeline's."""
    path = next(folder / name for name in ("config.json", "model_index.json") if (folder / name).is_file())
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def weights_of(part: Path) -> Path:
    (path,) = part.glob("*.safetensors")
    return path


def change(path: Path, edit: Edit) -> None:
    save_file(edit(load_file(path)), path)


def refused(source: Path, *fragments: str, config: Path | None = None) -> None:
    with pytest.raises(UserError) as error:
        load(source, config)
    line = str(error.value)
    assert "\n" not in line
    assert all(fragment in line for fragment in (str(source), *fragments)), line


def poisoned(tensors: Tensors, value: float) -> Tensors:
    """One number of the last tensor is not finite."""
    changed = tensors[max(tensors)].clone()
    changed.view(-1)[-1] = value
    return tensors | {max(tensors): changed}


# --- weights ---------------------------------------------------------------------------------------------------------


EDITS: dict[str, tuple[Edit, list[str]]] = {  # what is done to the tensors, and what the line says
    "nan": (lambda tensors: poisoned(tensors, torch.nan), ["NaN or infinity"]),
    "inf": (lambda tensors: poisoned(tensors, torch.inf), ["NaN or infinity"]),
    "more": (lambda tensors: tensors | EXTRA, [*EXTRA, "holds 1 tensors that no part takes"]),
    "less": (lambda tensors: {n: t for n, t in tensors.items() if n != "conv_in.bias"}, ["lacks 1 ", "conv_in.bias"]),
    "other": (lambda tensors: tensors | {"conv_in.bias": torch.zeros(3)}, ["conv_in.bias", "[3] in the file"]),
    "fp8": (lambda tensors: tensors | {min(tensors): tensors[min(tensors)].to(torch.float8_e4m3fn)}, ["quantised"]),
    "int8": (lambda tensors: tensors | {min(tensors): tensors[min(tensors)].to(torch.int8)}, ["quantised"]),
}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("edit", ["nan", "inf", "more", "fp8", "int8"])
def test_a_part_that_is_not_whole_is_told_with_file_and_tensor(place: Path, part: str, edit: str) -> None:
    names = load_file(weights_of(place / part))
    change(weights_of(place / part), EDITS[edit][0])
    name = {"more": part, "fp8": min(names), "int8": min(names)}.get(edit, max(names).removeprefix("text_model."))
    refused(place, part, name, *EDITS[edit][1])


@pytest.mark.parametrize("edit", ["nan", "more", "less", "other", "int8"])
def test_a_pixel_model_that_is_not_whole_is_refused(tiny_model: PixelModel, tmp_path: Path, edit: str) -> None:
    tiny_model.save(tmp_path)
    change(weights_of(tmp_path / "unet"), EDITS[edit][0])
    refused(tmp_path, "unet", *[max(tiny_model.network.state_dict())] * (edit == "nan"), *EDITS[edit][1])


@pytest.mark.parametrize("edit", ["nan", "more", "fp8"])
def test_an_autoencoder_by_itself_that_is_not_whole_is_refused(place: Path, edit: str) -> None:
    change(weights_of(place / "vae"), EDITS[edit][0])
    with pytest.raises(UserError, match=f"vae.*{EDITS[edit][1][-1]}"):
        load_autoencoder(place)
    TINY["sd"](place / "scratch").vae.save_pretrained(place / "vae")
    change(weights_of(place / "vae"), lambda tensors: {n: t for n, t in tensors.items() if "norm_out" not in n})
    with pytest.raises(UserError, match="vae lacks 4 tensors"):
        load_autoencoder(place)


def test_nan_of_a_single_file_is_told(made: Place, tmp_path: Path) -> None:
    weights = original_weights(made[1])
    weights["model.diffusion_model.out.2.bias"][0] = torch.nan
    refused(write_single_file(tmp_path / "x.safetensors", weights), "conv_out.bias", "NaN", config=made[0])


def test_large_numbers_whose_sum_overflows_are_no_nan(tiny_model: PixelModel, tmp_path: Path) -> None:
    tiny_model.network.conv_in.weight.data.fill_(3e38)
    tiny_model.save(tmp_path)
    assert load(tmp_path).network.conv_in.weight.max() == 3e38


def test_what_text_encoders_of_whole_clip_models_hold_beside_is_let_be(place: Path) -> None:
    extra = {"text_model.embeddings.position_ids": torch.arange(20)[None], "logit_scale": torch.ones(())}
    change(weights_of(place / "text_encoder"), lambda tensors: tensors | extra)
    load(place)


HARMLESS = {
    "model_ema.diffusion_modelout2bias": torch.zeros(4),
    "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
    "alphas_cumprod_prev": torch.zeros(1000),
    "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
    "posterior_mean_coef1": torch.zeros(1000),
    "betas": torch.zeros(1000),
    "logvar": torch.zeros(1000),
    "denoiser.sigmas": torch.zeros(1000),
    "first_stage_model.loss.logvar": torch.zeros(()),
    "first_stage_model.model_ema.decay": torch.zeros(()),
    "embedding_manager.embedder.weight": torch.zeros(2),
}
HARMLESS_TEXT = {
    "sd": ("cond_stage_model.", ["transformer.text_model.embeddings.position_ids", "logit_scale"]),
    "sdxl": (
        "conditioner.embedders.",
        [
            *("0.transformer.text_model.embeddings.position_ids", "0.logit_scale", "0.text_projection.weight"),
            *("0.transformer.text_projection.weight", "1.model.logit_scale", "1.model.attn_mask", "1.logit_scale"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.scale_weight", "quantised"),
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight_scale", "quantised"),
        ("scaled_fp8", "quantised"),
        ("model.diffusion_model.input_blocks.1.9.to_q.weight", "no part takes"),
        ("first_stage_model.decoder.extra.weight", "no part takes"),
        ("cond_stage_model.transformer.text_model.encoder.layers.7.mlp.fc1.weight", "no part takes"),
        ("conditioner.embedders.1.model.transformer.resblocks.9.ln_1.weight", "no part takes"),
        ("adapter.weight", "no part takes"),
        ("edm_mean", "an EDM model"),
        ("edm_vpred.sigma_max", "an EDM model"),
    ],
)
def test_one_tensor_too_many_in_a_single_file_is_named(made: Place, tmp_path: Path, name: str, what: str) -> None:
    weights = original_weights(made[1])
    kind = "sdxl" if "text_encoder_2" in made[1].components else "sd"
    stem, names = HARMLESS_TEXT[kind]
    harmless = HARMLESS | {stem + each: torch.zeros(16, 16) for each in names}
    save_file(weights | harmless, tmp_path / "whole.safetensors")
    load(tmp_path / "whole.safetensors", made[0])
    if name.startswith(("cond_stage_model.", "conditioner.")) and not name.startswith(stem):
        what = "no part takes"  # of the other family
    save_file(weights | {name: torch.zeros(2)}, tmp_path / "more.safetensors")
    known = name.split(".resblocks")[0].split(".encoder.layers")[0] == name and what != "an EDM model"
    refused(tmp_path / "more.safetensors", what, *([name] if known else []), config=made[0])


def test_the_old_names_of_an_autoencoders_attention_are_known(place: Path) -> None:
    expected = load(place).decode(torch.ones(1, 4, 8, 8))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: Tensors) -> Tensors:
        for new, name in old.items():
            tensors = {key.replace(f"attentions.0.{new}", f"attentions.0.{name}"): t for key, t in tensors.items()}
        return tensors

    change(weights_of(place / "vae"), rename)
    assert any("proj_attn" in name for name in load_file(weights_of(place / "vae")))
    assert torch.equal(load(place).decode(torch.ones(1, 4, 8, 8)), expected)


def test_a_pixel_model_has_one_configuration_and_any_width_of_float(tiny_model: PixelModel, tmp_path: Path) -> None:
    tiny_model.save(tmp_path)
    change(weights_of(tmp_path / "unet"), lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    assert torch.equal(load(tmp_path).network.conv_in.weight, tiny_model.network.conv_in.weight.half().float())
    configure(tmp_path / "unet", num_class_embeds=7)
    refused(tmp_path, "num_class_embeds", "7")


# --- schedulers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EDMDPMSolverMultistepScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        EulerDiscreteScheduler(**BETAS, timestep_type="continuous", prediction_type="v_prediction"),
        EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, sigma_min=0.002, sigma_max=80.0),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
)
@pytest.mark.parametrize("prediction_type", [None, "v_prediction"])
def test_a_scheduler_that_is_not_vp_is_refused_by_name(
    place: Path, scheduler: Any, prediction_type: str | None
) -> None:
    configure(place, scheduler=["diffusers", type(scheduler).__name__])
    scheduler.save_pretrained(place / "scheduler")
    with pytest.raises(UserError, match=f"model: scheduler: a {type(scheduler).__name__}") as error:
        load(place, prediction_type=prediction_type)
    assert "\n" not in str(error.value)


def test_how_a_vp_scheduler_spaces_its_steps_is_its_own_matter(place: Path) -> None:
    expected = load(place).denoiser.schedule.alphas_cumprod
    configure(place, scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True).save_pretrained(place / "scheduler")
    assert torch.equal(load(place).denoiser.schedule.alphas_cumprod, expected)


def agrees_with(model: LatentModel, **settings: object) -> None:
    """The model's x0 is that of diffusers' scheduler, at every kind of time."""
    scheduler = DDIMScheduler(**BETAS, **settings, clip_sample=False)
    x_t, condition = torch.randn(1, 4, 8, 8), model.text_condition(["cat"])
    scheduler.set_timesteps(1000)
    for t in (0, 500, 998):
        time = torch.tensor([t])
        with torch.no_grad():
            output, x0 = model.denoiser.network(x_t, time, condition), model.denoiser(x_t, time, condition)
        theirs = scheduler.step(output, t, x_t).pred_original_sample
        assert (x0 - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_single_file_has_the_scheduler_of_its_configuration(
    made: Place, place: Path, prediction: str, zero_snr: bool
) -> None:
    said = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    configure(place, scheduler=["diffusers", "DDIMScheduler"])
    DDIMScheduler(**BETAS, **said, clip_sample=False).save_pretrained(place / "scheduler")
    agrees_with(load(write_single_file(place / "x.safetensors", original_weights(made[1])), place), **said)


def test_the_prediction_type_of_a_folder_can_be_set_right(made: Place) -> None:
    agrees_with(load(made[0], prediction_type="v_prediction"), prediction_type="v_prediction")


@pytest.mark.parametrize(
    ("header", "flags", "asked", "prediction"),
    [
        ({}, [], None, "epsilon"),
        ({}, ["v_pred"], None, "v_prediction"),
        ({}, ["v_pred", "ztsnr"], None, "v_prediction"),
        ({}, [], "v_prediction", "v_prediction"),
        ({}, ["v_pred"], "epsilon", "epsilon"),
        ({"modelspec.prediction_type": "v"}, [], None, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, [], None, "epsilon"),
        ({"modelspec.predict_key": "v"}, ["v_pred"], None, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, [], "epsilon", "epsilon"),
        ({"modelspec.prediction_type": "epsilon"}, ["v_pred"], None, None),
        ({"modelspec.prediction_type": "velocity"}, [], None, None),
    ],
)
def test_headers_and_empty_tensors_say_the_prediction_type_and_the_user_has_the_last_word(
    made: Place, tmp_path: Path, header: dict[str, str], flags: list[str], asked: str | None, prediction: str | None
) -> None:
    path = write_single_file(tmp_path / "file.safetensors", original_weights(made[1]), *flags, header=header)
    if prediction is None:
        refused(path, "prediction type", "--prediction-type", config=made[0])
        return
    model, said = (
        load(path, made[0], asked),
        {"prediction_type": prediction, "rescale_betas_zero_snr": "ztsnr" in flags},
    )
    agrees_with(model, **said)
    if not header:
        model.save(tmp_path / "saved")
        agrees_with(load(tmp_path / "saved"), **said)


# --- sizes, channels, inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "settings", "fragments"),
    [
        ("unet", {"time_cond_proj_dim": 8}, ["time_cond_proj_dim", "LCM"]),
        ("unet", {"sample_size": [8, 16]}, ["sample_size [8, 16]", "square"]),
        ("vae", {"shift_factor": 0.1}, ["vae", "shift_factor"]),
        ("vae", {"latents_mean": [0.0] * 4}, ["vae", "latents_mean"]),
    ],
)
def test_what_is_not_supported_is_refused(place: Path, part: str, settings: dict, fragments: list[str]) -> None:
    if "time_cond_proj_dim" in settings:  # has a layer of its own
        names = {"time_embedding.cond_proj.weight": torch.zeros(16, 8)}
        change(weights_of(place / "unet"), lambda tensors: tensors | names)
    configure(place / part, **settings)
    refused(place, *fragments)


@pytest.mark.parametrize(("end", "name", "number"), [("in", "conv_in.weight", 9), ("out", "conv_out.weight", 8)])
def test_a_unet_of_other_channels_is_refused(place: Path, end: str, name: str, number: int) -> None:
    def widen(tensors: Tensors) -> Tensors:
        if end == "in":
            return tensors | {name: torch.zeros(16, number, 3, 3)}
        return tensors | {name: torch.zeros(number, 16, 3, 3), "conv_out.bias": torch.zeros(number)}

    configure(place / "unet", **{f"{end}_channels": number})
    change(weights_of(place / "unet"), widen)
    refused(place, f" {number}", "channels", "text-to-image")


@pytest.mark.parametrize(("size", "pixels"), [([8, 8], 16), (None, {"sd": 512, "sdxl": 1024}), (4, 8)])
def test_the_size_is_the_configurations_or_the_familys(made: Place, place: Path, size: object, pixels: Any) -> None:
    kind = "sdxl" if "text_encoder_2" in made[1].components else "sd"
    configure(place / "unet", sample_size=size)
    model = load(place)
    wanted = pixels[kind] if isinstance(pixels, dict) else pixels
    assert (model.image_size, model.shape) == (wanted, (4, wanted // 2, wanted // 2))
    model.save(place.parent / "saved")
    configure(place.parent / "saved" / "unet", sample_size=16)
    assert load(place.parent / "saved").image_size == wanted


def test_a_part_of_another_class_is_refused(place: Path) -> None:
    configure(place, vae=["diffusers", "AutoencoderTiny"])
    refused(place, "vae", "AutoencoderTiny", "AutoencoderKL")


# --- SDXL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [True, False])
def test_the_null_condition_is_zeros_or_the_embedding_of_nothing(sdxl: Path, zeros: bool) -> None:
    configure(sdxl, force_zeros_for_empty_prompt=zeros)
    model = load(sdxl)
    with torch.no_grad():
        _, theirs, _, pooled = model.pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    assert theirs.any() == (not zeros)
    assert torch.equal(model.null_condition["text"], theirs)
    assert torch.equal(model.null_condition["pooled"], pooled)
    model.save(sdxl.parent / "saved")
    assert torch.equal(load(sdxl.parent / "saved").null_condition["text"], theirs)


def test_means_and_deviations_of_latents_are_obeyed_as_the_pipeline_does(sdxl: Path) -> None:
    before = load(sdxl).latent_space
    configure(sdxl / "vae", latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.0, 2.0, 0.5, 3.0])
    model = load(sdxl)
    assert model.latent_space["autoencoder"] != before["autoencoder"]
    draws = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 4, 8, 8, generator=draws)
    model.pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []
    decode = model.pipeline.vae.decode
    model.pipeline.vae.decode = lambda z, **kwargs: seen.append(z) or decode(z, **kwargs)
    call = {"prompt": "a cat", "num_inference_steps": 1, "callback_on_step_end": lambda *args: {"latents": x0}}
    model.pipeline(**call, output_type="pt")
    model.decode(x0)
    torch.testing.assert_close(seen[1], seen[0])
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=draws)
    with torch.no_grad():
        mean = model.pipeline.vae.encode(images / 127.5 - 1).latent_dist.mean
    x0 = model.encode_images(images, torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(model.codec.to_z(x0), mean, rtol=1e-4, atol=1e-5)
