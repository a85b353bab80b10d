"""Rows 17 to 27 of the faults that people reported, each with relatives: no model is taken for another one.

What the files say is obeyed with the right numbers, or refused by name in one line.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.diffusion.parameterizations import eps, v
from fewstep.errors import UserError
from fewstep.models.image_model import ImageModel
from fewstep.models.loading.pretrained import load
from fewstep.models.pixel_model import PixelModel
from single_files import original_weights, write_single_file
from tiny_pipelines import BETAS, LENGTH, TINY

Change = Callable[[Path], object]
PRETRAINED = {"sd": Path(), "sdxl": Path()}


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory: pytest.TempPathFactory) -> None:
    for kind in TINY:
        folder = tmp_path_factory.mktemp(kind)
        pipeline = TINY[kind](folder / "scratch")
        pipeline.save_pretrained(folder / "model")
        write_single_file(folder / "whole.safetensors", original_weights(pipeline))
        PRETRAINED[kind] = folder


@pytest.fixture(params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(PRETRAINED[request.param] / "model", tmp_path / "model"))


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PRETRAINED["sd"] / "model", tmp_path / "model"))


def refused(source: Path, *fragments: str, config: Path | None = None) -> None:
    with pytest.raises(UserError) as error:
        load(source, config)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 500
    assert all(fragment in line for fragment in (str(source), *fragments)), line


def says(part: str, **settings: object) -> Change:
    """Changes what a JSON file says; `part` is a folder with a config.json, or a file."""

    def change(folder: Path) -> None:
        path = folder / part if part.endswith(".json") else folder / part / "config.json"
        content = {**json.loads(path.read_text()), **settings}
        path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))

    return change


def holds(part: str, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    def change(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        save_file(tensors(load_file(path)), path)

    return change


def scheduler(made: Any, index: str | None = None) -> Change:
    def change(folder: Path) -> None:
        says("model_index.json", scheduler=["diffusers", index or type(made).__name__])(folder)
        made.save_pretrained(folder / "scheduler")

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def wide(number: int) -> Change:
    """A UNet that takes so many channels."""
    weight = holds("unet", lambda tensors: tensors | {"conv_in.weight": torch.zeros(16, number, 3, 3)})
    return both(says("unet", in_channels=number), weight)


EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "_diffusers_version": "0.27.0"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
REFUSED: dict[str, tuple[Change, list[str]]] = {
    "row-18-edm": (
        both(
            says("model_index.json", scheduler=["diffusers", EDM["_class_name"]]),
            lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(EDM)),
        ),
        ["scheduler", "EDMDPMSolverMultistepScheduler"],
    ),
    "row-18-relative-the-file-says-another-class-than-the-index": (
        lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(EDM)),
        ["scheduler", "EDMDPMSolverMultistepScheduler"],
    ),
    "row-18-relative-flow-under-another-name": (
        lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(FLOW)),
        ["scheduler", "FlowMatchEulerDiscreteScheduler"],
    ),
    "row-18-relative-sigmoid-betas": (scheduler(DDPMScheduler(beta_schedule="sigmoid")), ["scheduler", "sigmoid"]),
    "row-19-relative-shift": (says("vae", shift_factor=0.1), ["vae", "shift_factor"]),
    "row-19-relative-half-a-norm": (says("vae", latents_std=[1.0] * 4), ["vae", "latents_"]),
    "row-19-relative-another-autoencoder-by-its-own-file": (
        says("vae", _class_name="AsymmetricAutoencoderKL"),
        ["vae", "AsymmetricAutoencoderKL", "AutoencoderKL"],
    ),
    "row-19-relative-vq": (says("model_index.json", vae=["diffusers", "VQModel"]), ["vae", "VQModel"]),
    "row-19-relative-tiny": (
        both(
            lambda folder: shutil.rmtree(folder / "vae"),
            lambda folder: AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            ).save_pretrained(folder / "vae"),
        ),
        ["vae", "AutoencoderTiny", "AutoencoderKL"],
    ),
    "row-20-relative-bitsandbytes": (
        says("unet", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ["unet", "quantised"],
    ),
    "row-20-relative-nf4": (
        holds("unet", lambda tensors: tensors | {"conv_in.weight": torch.zeros(9, 1, dtype=torch.uint8)}),
        ["unet", "conv_in.weight", "quantised"],
    ),
    "row-22-not-square": (says("unet", sample_size=[8, 12]), ["sample_size [8, 12]", "square"]),
    "row-22-relative-nothing": (says("unet", sample_size=0), ["sample_size", "0"]),
    "row-22-relative-huge": (says("unet", sample_size=100_000), ["sample_size", "100000"]),
    "row-22-relative-half-a-pixel": (says("unet", sample_size=8.5), ["sample_size", "8.5"]),
    "row-22-relative-a-word": (says("unet", sample_size="large"), ["sample_size", "large"]),
    "row-23-inpainting": (wide(9), ["9 channels", "inpainting", "text-to-image"]),
    "row-23-relative-editing": (wide(8), ["8 channels", "editing"]),
    "row-23-relative-learned-variance": (
        both(
            says("unet", out_channels=8),
            holds(
                "unet",
                lambda tensors: (
                    tensors | {"conv_out.weight": torch.zeros(8, 16, 3, 3), "conv_out.bias": torch.zeros(8)}
                ),
            ),
        ),
        ["gives 8"],
    ),
    "lcm": (
        both(
            says("unet", time_cond_proj_dim=8),
            holds("unet", lambda tensors: tensors | {"time_embedding.cond_proj.weight": torch.zeros(16, 8)}),
        ),
        ["time_cond_proj_dim", "LCM"],
    ),
    "another-network": (says("unet", _class_name="UNet3DConditionModel"), ["unet", "UNet3DConditionModel"]),
    "controlnet": (says("model_index.json", _class_name="StableDiffusionControlNetPipeline"), ["ControlNetPipeline"]),
    "gated-attention": (says("unet", attention_type="gated"), ["unet"]),
    "a-number-of-classes": (
        both(
            says("unet", num_class_embeds=5),
            holds("unet", lambda tensors: tensors | {"class_embedding.weight": torch.zeros(5, 64)}),
        ),
        ["num_class_embeds", "5"],
    ),
    "class-embedding": (
        both(
            says("unet", class_embed_type="timestep"),
            holds(
                "unet",
                lambda tensors: (
                    tensors | {f"class_embedding.{n}": t.clone() for n, t in load_embedding(tensors).items()}
                ),
            ),
        ),
        ["class_embed_type", "timestep"],
    ),
    "row-27-nan-in-the-autoencoder": (
        holds("vae", lambda tensors: tensors | {"decoder.conv_out.bias": torch.full((3,), torch.nan)}),
        ["vae", "decoder.conv_out.bias", "NaN"],
    ),
    "row-27-relative-infinity-in-the-text-encoder": (
        holds("text_encoder", lambda tensors: tensors | {min(tensors): tensors[min(tensors)] / 0}),
        ["text_encoder", "infinity"],
    ),
    "row-25-relative-a-tokenizer-of-more-tokens-than-are-embedded": (
        both(
            says("text_encoder", vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=2),
            holds("text_encoder", lambda tensors: {n: t[:100] if t.shape[0] == 190 else t for n, t in tensors.items()}),
        ),
        ["tokenizer", "190", "100"],
    ),
}


def load_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("time_embedding."): t for n, t in tensors.items() if n.startswith("time_embedding.")}


# --- obeyed ----------------------------------------------------------------------------------------------------------


def x0(model: ImageModel) -> Tensor:
    x_t, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 700])
    with torch.no_grad():
        return model.denoiser(x_t, t, model.conditions(range(2), ["a cat", "two"]))


OBEYED: dict[str, Change] = {
    "row-18-relative-karras-levels-are-steps": scheduler(EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)),
    "row-18-relative-spacing-is-steps": scheduler(EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")),
    "row-18-relative-heun-under-the-name-of-euler": scheduler(
        HeunDiscreteScheduler(**BETAS), index="EulerDiscreteScheduler"
    ),
    "row-26-one-variant": lambda folder: renamed(folder, "bf16"),
    "row-26-relative-an-unknown-variant": lambda folder: renamed(folder, "non_ema"),
    "row-26-relative-shards-of-a-variant": lambda folder: sharded(folder, "bf16"),
    "row-26-relative-shards": lambda folder: sharded(folder, None),
}


def renamed(folder: Path, variant: str) -> None:
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(f".{variant}.safetensors"))


def sharded(folder: Path, variant: str | None) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    pipeline.save_pretrained(folder, variant=variant, max_shard_size="60KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", OBEYED)
def test_what_is_the_same_model_is_the_same(sd: Path, name: str) -> None:
    OBEYED[name](sd)
    assert torch.equal(x0(load(sd)), x0(load(PRETRAINED["sd"] / "model")))


def test_of_two_variants_the_one_of_more_digits_is_taken(sd: Path) -> None:
    (path,) = (sd / "unet").glob("*.safetensors")
    save_file({n: t.half() for n, t in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
    assert torch.equal(x0(load(sd)), x0(load(PRETRAINED["sd"] / "model")))
    path.rename(path.with_suffix(".ema_only.safetensors"))
    path.with_suffix(".fp16.safetensors").rename(path.with_suffix(".non_ema.safetensors"))
    refused(sd, "unet", "ema_only, non_ema")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        pytest.param({"trained_betas": [0.01] * 1000}, lambda t: 0.99 ** (t + 1), id="row-18-relative-trained-betas"),
        pytest.param(
            {"rescale_betas_zero_snr": True}, lambda t: 0.0 if t == 999 else None, id="row-18-relative-zero-snr"
        ),
    ],
)
def test_betas_of_the_files_are_obeyed(sd: Path, told: dict[str, Any], expected: Any) -> None:
    scheduler(DDPMScheduler(**{**BETAS, "steps_offset": 0, **told}))(sd)
    abar = load(sd).denoiser.schedule.alphas_cumprod
    for t in (0, 500, 999):
        if (value := expected(t)) is not None:
            assert abar[t].item() == pytest.approx(value, rel=1e-4, abs=1e-7)


def test_row_24_a_unet_without_a_middle_is_distilled_with_its_last_encoder_block(sd: Path) -> None:
    from fewstep.training.roles import make_roles

    says("unet", mid_block_type=None)(sd)
    holds("unet", lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("mid_block.")})(sd)
    model = load(sd)
    roles = make_roles(model)
    assert roles.feature_layer == "unet.down_blocks.1"
    assert x0(model).isfinite().all()


@pytest.mark.parametrize(
    ("length", "taken"),
    [
        pytest.param("gone", LENGTH, id="row-25-no-length"),
        pytest.param(10**30, LENGTH, id="row-25-relative-endless"),
        pytest.param(500, LENGTH, id="row-25-relative-longer-than-the-encoder"),
        pytest.param(9, 9, id="row-25-relative-shorter"),
    ],
)
def test_row_25_a_tokenizers_length_is_what_its_text_encoder_takes(model: Path, length: object, taken: int) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        if (model / name).is_dir():
            says(f"{name}/tokenizer_config.json", model_max_length=length)(model)
    opened = load(model)
    assert opened.conditions(range(1), ["a cat on a very long mat of many letters"])["text"].shape[1] == taken
    opened.save(model.parent / "saved")
    told = json.loads((model.parent / "saved" / "tokenizer" / "tokenizer_config.json").read_text())
    assert told["model_max_length"] == taken


def test_a_ddpm_scheduler_is_opened_without_a_word(sd: Path, capfd: pytest.CaptureFixture) -> None:
    scheduler(DDPMScheduler(**{**BETAS, "steps_offset": 0}, clip_sample=True))(sd)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(sd)
    assert [each for each in caught if issubclass(each.category, FutureWarning)] == []
    assert capfd.readouterr() == ("", "")


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        pytest.param("caf\udce9", "UTF-8", id="row-17-latin-1"),
        pytest.param("\ud800", "UTF-8", id="row-17-relative-half-a-pair"),
        pytest.param("a\0b", None, id="row-17-relative-nul"),
        pytest.param("x" * 100_000, None, id="row-17-relative-long"),
        pytest.param("a " * 50_000, None, id="row-17-relative-many-words"),
        pytest.param("", None, id="row-17-relative-empty"),
    ],
)
def test_row_17_any_text_is_embedded_or_told_in_one_line(prompt: str, told: str | None) -> None:
    model = load(PRETRAINED["sdxl"] / "model")
    if told:
        with pytest.raises(UserError, match=told):
            model.text_condition(["a cat", prompt])
    else:
        assert model.text_condition([prompt])["text"].isfinite().all()


# --- single files ----------------------------------------------------------------------------------------------------


def file_of(kind: str, path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **header: str) -> Path:
    save_file(change(load_file(PRETRAINED[kind] / "whole.safetensors")), path, header or None)
    return path


UNET = "model.diffusion_model."
FILES: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], list[str]]] = {
    "row-20-scale-weight": (
        "sdxl",
        lambda w: (
            w
            | {
                f"{UNET}out.2.weight": w[f"{UNET}out.2.weight"].to(torch.float8_e4m3fn),
                f"{UNET}out.2.scale_weight": torch.ones(()),
            }
        ),
        ["quantised"],
    ),
    "row-20-relative-weight-scale": (
        "sdxl",
        lambda w: w | {f"{UNET}out.2.weight_scale": torch.ones(())},
        ["weight_scale"],
    ),
    "row-20-relative-input-scale": ("sd", lambda w: w | {f"{UNET}out.2.scale_input": torch.ones(())}, ["scale_input"]),
    "row-20-relative-comfy-quant": ("sd", lambda w: w | {f"{UNET}out.2.comfy_quant": torch.ones(1)}, ["comfy_quant"]),
    "row-20-relative-svdquant": (
        "sd",
        lambda w: w | {f"{UNET}out.2.qweight": torch.ones(1, dtype=torch.int8)},
        ["qweight"],
    ),
    "row-23-relative-inpainting-file": (
        "sd",
        lambda w: w | {f"{UNET}input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)},
        ["9 channels", "inpainting"],
    ),
    "refiner": (
        "sdxl",
        lambda w: {
            n.replace("embedders.1.", "embedders.0."): t for n, t in w.items() if "conditioner.embedders.0." not in n
        },
        ["refiner"],
    ),
    "lora": ("sd", lambda w: {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(2)}, ["LoRA"]),
    "lora-beside-a-model": ("sd", lambda w: w | {"lora_unet_x.lora_up.weight": torch.zeros(2)}, ["lora_unet_x"]),
    "sd3": ("sd", lambda w: {f"{UNET}joint_blocks.0.x": torch.zeros(2)}, ["SD3"]),
    "flux": ("sd", lambda w: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, ["FLUX"]),
    "controlnet-file": ("sd", lambda w: {"control_model.input_hint_block.0.weight": torch.zeros(2)}, ["ControlNet"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_single_file_of_another_model_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kind, change, fragments = FILES[name]
    refused(file_of(kind, tmp_path / "x.safetensors", change), *fragments, config=PRETRAINED[kind] / "model")


@pytest.mark.parametrize(
    ("header", "prediction"),
    [
        pytest.param({"modelspec.prediction_type": "v"}, v, id="row-21-v"),
        pytest.param({"modelspec.prediction_type": "V"}, v, id="row-21-relative-capital"),
        pytest.param({"modelspec.predict_key": "epsilon"}, eps, id="row-21-relative-epsilon"),
    ],
)
def test_row_21_the_header_says_what_is_predicted(tmp_path: Path, header: dict[str, str], prediction: Any) -> None:
    path = file_of("sdxl", tmp_path / "x.safetensors", dict, **header)
    assert load(path, PRETRAINED["sdxl"] / "model").denoiser.parameterization is prediction


@pytest.mark.parametrize("stem", ["", "diffusion_model."])
@pytest.mark.parametrize("name", ["unet.safetensors", "unet.sft", "UNET.SAFETENSORS"])
def test_a_unet_alone_opens_in_comfyuis_names_and_under_any_suffix(tmp_path: Path, stem: str, name: str) -> None:
    path = file_of(
        "sdxl",
        tmp_path / name,
        lambda w: {n.replace(UNET, stem, 1): t for n, t in w.items() if n.startswith(UNET)},
    )
    assert torch.equal(x0(load(path, PRETRAINED["sdxl"] / "model")), x0(load(PRETRAINED["sdxl"] / "model")))


def test_averages_beside_the_weights_are_let_be(tmp_path: Path) -> None:
    path = file_of("sd", tmp_path / "x.safetensors", lambda w: w | {"model_ema.diffusion_modelout2bias": torch.ones(4)})
    assert torch.equal(x0(load(path, PRETRAINED["sd"] / "model")), x0(load(PRETRAINED["sd"] / "model")))


# --- links, and what would hang or take all memory -------------------------------------------------------------------


def linked(path: str, to: Path | None = None) -> Change:
    def change(folder: Path) -> None:
        secret = to or folder.parent / "secret"
        if not secret.exists():
            secret.write_text("root:x:0:0")
        target = folder / path
        if target.is_dir():
            shutil.move(target, secret.with_name("moved"))
            secret = secret.with_name("moved")
        else:
            target.unlink(missing_ok=True)
        target.symlink_to(secret)

    return change


def written(path: str, text: str) -> Change:
    return lambda folder: (folder / path).write_text(text)


def fifo(path: str) -> Change:
    return lambda folder: [(folder / path).unlink(), os.mkfifo(folder / path)]


def shards(*names: str) -> Change:
    return written(
        "unet/diffusion_pytorch_model.safetensors.index.json", json.dumps({"weight_map": dict(enumerate(names))})
    )


LINK = "is a link out of its model folder"
HARMFUL: dict[str, tuple[Change, list[str]]] = {
    "a-link-for-a-vocabulary": (linked("tokenizer/vocab.json"), ["tokenizer/vocab.json", LINK]),
    "a-link-for-something-more": (linked("tokenizer/added_tokens.json"), ["tokenizer/added_tokens.json", LINK]),
    "a-link-for-a-configuration": (linked("vae/config.json"), ["vae/config.json", LINK]),
    "a-link-for-the-index": (linked("model_index.json"), ["model_index.json", LINK]),
    "a-link-for-weights": (linked("unet/diffusion_pytorch_model.safetensors"), ["unet", LINK]),
    "a-link-for-a-part": (linked("text_encoder"), ["text_encoder", LINK]),
    "a-link-to-nothing": (lambda folder: (folder / "unet" / "x.json").symlink_to("absent"), ["unet/x.json"]),
    "a-fifo": (fifo("unet/config.json"), ["unet/config.json"]),
    "a-fifo-for-a-tokenizer": (fifo("tokenizer/tokenizer_config.json"), ["tokenizer_config.json"]),
    "a-list-for-an-object": (written("unet/config.json", "[1]"), ["unet/config.json", "object"]),
    "brackets": (written("scheduler/scheduler_config.json", "[" * 100_000), ["scheduler_config.json"]),
    "brackets-of-a-vocabulary": (written("tokenizer/tokenizer_config.json", '{"a":' * 100_000), ["tokenizer"]),
    "a-list-for-the-index": (written("model_index.json", "[]"), ["model_index.json"]),
    "a-number-for-a-part": (says("model_index.json", unet=5), ["unet", "[library, class]"]),
    "a-part-without-a-class": (says("model_index.json", vae=["diffusers"]), ["vae", "[library, class]"]),
    "no-text": (lambda folder: (folder / "vae" / "config.json").write_bytes(b"\xff\xfe"), ["vae/config.json"]),
    "a-shard-that-is-missing": (shards("gone.safetensors"), ["index.json", "gone.safetensors"]),
    "a-shard-from-elsewhere": (shards("../../secret.safetensors"), ["index.json", "../../secret.safetensors"]),
    "a-header-of-absurd-length": (
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 7 + b"\x0f{}"),
        ["unet/diffusion_pytorch_model.safetensors"],
    ),
    "two-files-of-the-same": (
        lambda folder: shutil.copy(
            folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet/more.safetensors"
        ),
        ["unet/more.safetensors", "also in"],
    ),
    "channels-without-end": (says("unet", block_out_channels=[10**6, 10**6]), ["unet", "no part takes"]),
    "more-channels-than-numbers": (says("unet", block_out_channels=[10**12, 32]), ["unet/config.json", "1e+12"]),
    "layers-without-end": (
        says("text_encoder", num_hidden_layers=10**6),
        ["text_encoder/config.json", "num_hidden_layers"],
    ),
    "times-without-end": (
        says("scheduler/scheduler_config.json", num_train_timesteps=10**12),
        ["scheduler_config.json", "num_train_timesteps"],
    ),
    "a-size-that-is-said-twice": (written("fewstep.json", '{"timesteps": null, "image_size": 200000}'), ["200000"]),
    "no-timesteps": (written("fewstep.json", '{"image_size": 16}'), ["fewstep.json", "timesteps"]),
    "timesteps-of-another-kind": (written("fewstep.json", '{"timesteps": [999.5]}'), ["timesteps"]),
    "a-scheduler-that-is-a-function": (
        says("model_index.json", tokenizer=["transformers", "pipeline"]),
        ["tokenizer", "pipeline"],
    ),
}


@pytest.mark.parametrize(
    ("change", "fragments"), [pytest.param(*each, id=name) for name, each in (REFUSED | HARMFUL).items()]
)
def test_another_model_or_a_folder_that_does_harm_is_refused_by_name(
    sd: Path, change: Change, fragments: list[str]
) -> None:
    change(sd)
    refused(sd, *fragments)


def test_links_inside_the_folder_and_into_the_hubs_own_cache_are_followed(tmp_path: Path) -> None:
    expected = x0(load(PRETRAINED["sd"] / "model"))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(PRETRAINED["sd"].joinpath("model").rglob("*.*")):
        target = snapshot / path.relative_to(PRETRAINED["sd"] / "model")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    assert torch.equal(x0(load(snapshot)), expected)
    (tmp_path / "link").symlink_to(snapshot)
    assert torch.equal(x0(load(tmp_path / "link")), expected)
    (snapshot / "tokenizer" / "tokenizer.json").unlink()
    (snapshot / "tokenizer" / "tokenizer.json").symlink_to("/etc/hostname")
    refused(snapshot, "tokenizer.json", LINK)


def test_a_link_in_what_a_run_froze_is_not_followed_into_a_checkpoint(tiny_model: PixelModel, tmp_path: Path) -> None:
    (tmp_path / "frozen" / "tokenizer").mkdir(parents=True)
    (tmp_path / "frozen" / "tokenizer" / "vocab.json").symlink_to("/etc/hostname")
    tiny_model.save(tmp_path / "model", tmp_path / "frozen")
    assert (tmp_path / "model" / "tokenizer" / "vocab.json").is_symlink()


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"image_size": 100_000}, "image_size"), ({"layers_per_block": 10**9}, "layers_per_block")],
)
def test_a_pixel_model_of_absurd_sizes_is_refused(
    tiny_model: PixelModel, tmp_path: Path, settings: dict, told: str
) -> None:
    tiny_model.save(tmp_path)
    description = json.loads((tmp_path / "fewstep.json").read_text())
    (tmp_path / "fewstep.json").write_text(json.dumps(description | {"config": description["config"] | settings}))
    refused(tmp_path, told)
