"""Teachers out of folders, single files and the hub: the same numbers from each, and one line where it can't be."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fake_hub import fake_hub, point_to
from fewstep.errors import UserError
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.hub import is_hub_id
from fewstep.models.loading.pretrained import configured, load
from fewstep.models.loading.single_file import base_model
from fewstep.networks.fingerprint import fingerprint
from single_files import original_weights, write_single_file
from steps import draws
from tiny_pipelines import TINY

PROMPTS = ["a red cat", "a mat"]
BASES = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
CLOSED = "http://127.0.0.1:9"


def written(place: Path, kind: str) -> Path:
    """A `folder`, the `file.safetensors` of the same pipeline, and a `config` folder without any weights."""
    pipeline = TINY[kind.removesuffix("2")](place / "scratch")
    if kind == "sd2":
        pipeline.text_encoder.config.hidden_act = "gelu"
    pipeline.save_pretrained(place / "folder")
    write_single_file(place / "file.safetensors", original_weights(pipeline))
    shutil.copytree(place / "folder", place / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    return place


@pytest.fixture(scope="module", params=BASES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `place`, for SD alone."""
    return written(tmp_path_factory.mktemp("sd"), "sd")


def outputs(model: LatentModel) -> dict[str, Tensor]:
    """What a model makes of fixed inputs: x0 predictions, conditions, latents and pictures."""
    numbers = draws(2)
    x_t, t = numbers.randn(4, 8, 8), torch.tensor([20, 700])
    images = numbers.randint(0, 256, 3, 16, 16).to(torch.uint8)
    condition = model.text_condition(PROMPTS)
    with torch.no_grad():
        x0 = model.denoiser(x_t, t, condition)
    null = {f"null {name}": tensor for name, tensor in model.null_condition.items()}
    latents = model.encode_x0({"image": images}, numbers)
    return {"x0": x0, "latents": latents, "pictures": model.decode(x0).float(), **condition, **null}


def same(ours: LatentModel, theirs: LatentModel, tolerance: float = 1e-6) -> None:
    """Both models are of the same numbers."""
    pairs, expected = outputs(ours), outputs(theirs)
    assert pairs.keys() == expected.keys()
    for name, tensor in pairs.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def refused(*fragments: str, source: object, config: object = None, prediction_type: str | None = None) -> str:
    """Loading raises one line with these fragments."""
    with pytest.raises(UserError) as error:
        load(source, config, prediction_type)
    line = str(error.value)
    assert "\n" not in line
    assert all(fragment in line for fragment in fragments), line
    return line


# --- single files ----------------------------------------------------------------------------------------------------


def test_a_single_file_is_the_folder(place: Path) -> None:
    same(load(place / "file.safetensors", place / "config"), load(place / "folder"))


def test_what_the_file_lacks_comes_from_the_configuration(place: Path, tmp_path: Path) -> None:
    weights = load_file(place / "file.safetensors")
    left_out = ("first_stage_model.", "cond_stage_model.", "conditioner.")
    unet = {name: tensor for name, tensor in weights.items() if not name.startswith(left_out)}
    path = write_single_file(tmp_path / "unet.safetensors", unet)
    same(load(path, place / "folder"), load(place / "folder"))
    refused("unet.safetensors", "lacks", "vae", str(place / "config"), source=path, config=place / "config")


def test_half_precision_is_computed_in_float32(place: Path, tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in load_file(place / "file.safetensors").items()}
    rounded = write_single_file(tmp_path / "rounded.safetensors", {n: t.float() for n, t in weights.items()})
    half = write_single_file(tmp_path / "half.safetensors", weights)
    wanted = load(rounded, place / "config")
    same(load(half, place / "config"), wanted)
    pipeline = load(rounded, place / "config").pipeline
    pipeline.to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half folder")
    same(load(tmp_path / "half folder"), wanted)
    pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
    assert (tmp_path / "variant" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    same(load(tmp_path / "variant"), wanted)


class Made(TorchDispatchMode):
    """The (dtype, shape) of everything that is made, but for views of files."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple] = set()

    def __torch_dispatch__(self, function, types, given=(), named=None):
        output = function(*given, **(named or {}))
        self.made |= {
            (x.dtype, x.shape) for x in tree_leaves(output) if isinstance(x, Tensor) and x.device.type == "cpu"
        }
        return output


@pytest.mark.parametrize("kept", [torch.float16, torch.float32])
@pytest.mark.parametrize("whole", [True, False])
def test_a_network_in_bfloat16_never_is_in_float32(sd: Path, tmp_path: Path, whole: bool, kept: torch.dtype) -> None:
    source, config = tmp_path / "x", None
    if whole:
        source, config = tmp_path / "x.safetensors", sd / "config"
        write_single_file(source, {name: x.to(kept) for name, x in load_file(sd / "file.safetensors").items()})
    else:
        load(sd / "folder").pipeline.to(kept).save_pretrained(source)
    expected = load(source, config)
    with Made() as seen:
        model = load(source, config, dtype=torch.bfloat16)
    ours, theirs = model.network.state_dict(), expected.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == torch.bfloat16 for name in ours)
    assert all(torch.equal(ours[name], theirs[name].to(torch.bfloat16)) for name in ours)
    for part in ("vae", "text_encoder"):  # nothing else is rounded
        others = getattr(model.pipeline, part).state_dict(), getattr(expected.pipeline, part).state_dict()
        assert all(x.dtype == torch.float32 and torch.equal(x, others[1][name]) for name, x in others[0].items())
    elsewhere = {x.shape for part in ("vae", "text_encoder") for x in getattr(model.pipeline, part).parameters()}
    own = {x.shape for x in ours.values()} - elsewhere
    assert len(own) > 3
    assert {dtype for dtype, shape in seen.made if shape in own} - {torch.uint8} == {
        torch.bfloat16,
        kept,
    }  # bytes of files
    assert not any(x.is_meta for x in [*model.denoiser.parameters(), *model.denoiser.buffers()])
    with torch.no_grad():  # and it runs
        assert model.denoiser(torch.randn(1, 4, 8, 8), torch.tensor([20]), model.text_condition(["a"])).isfinite().all()


def test_a_network_as_its_files_have_it_is_a_view_of_them(sd: Path, tmp_path: Path) -> None:
    """So ranks that divide it share one copy, which nothing that is written to it changes."""
    load(sd / "folder").pipeline.to(torch.float16).save_pretrained(tmp_path)
    whole, viewed = load(tmp_path), load(tmp_path, dtype=None)
    told = fingerprint([whole.network], first=64)
    assert {p.dtype for p in viewed.network.parameters()} == {torch.float16}
    assert str(tmp_path / "unet") in Path("/proc/self/maps").read_text()
    for _ in range(2):
        assert fingerprint([load(tmp_path, dtype=None).network], first=64, dtype=torch.float32) == told
        for parameter in viewed.network.parameters():
            parameter.data.zero_()


def test_what_is_wrong_with_a_file_is_told_in_bfloat16_too(sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd / "folder", tmp_path / "folder")
    file = next((folder / "unet").glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("conv1.weight"))
    weights[name][0, 0, 0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(UserError, match=rf"{file}: {name} holds NaN"):
        load(folder, dtype=torch.bfloat16)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"is missing or damaged"):
        load(folder, dtype=torch.bfloat16)


def test_files_that_are_no_sd_or_sdxl_model_are_named(sd: Path, tmp_path: Path) -> None:
    for names, what in {
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",): "a LoRA",
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight",): "a LoRA",
        ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",): "FLUX",
        ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight",): "SD3",
        ("mid_block.resnets.0.conv1.weight",): "diffusers folder",
        ("weight",): "without the UNet",
    }.items():
        save_file({name: torch.zeros(2) for name in names}, tmp_path / "other.safetensors")
        source = tmp_path / "other.safetensors"
        refused("other.safetensors", what, "supported", "SDXL", source=source, config=sd / "folder")


class Trap(str):
    """A path; unpickling it leaves a file there."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self),)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".safetensors"])
def test_a_pickle_is_refused_and_never_opened(sd: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps({"state_dict": Trap(tmp_path / "ran")}))
    refused(path.name, "safetensors", source=path)
    shutil.copytree(sd / "folder", tmp_path / "folder")
    (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(path, tmp_path / "folder" / "unet" / f"diffusion_pytorch_model{suffix}")
    refused("folder", source=tmp_path / "folder")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_refused(sd: Path, tmp_path: Path) -> None:
    content, path = (sd / "file.safetensors").read_bytes(), tmp_path / "torn.safetensors"
    for torn in (b"", content[:5], content[:2000], content[: len(content) // 2], b"x" * 1000):
        path.write_bytes(torn)
        refused("torn.safetensors", "not a whole safetensors file", source=path, config=sd / "folder")
    refused("gone.safetensors", "no such file", source=tmp_path / "gone.safetensors")
    for part in ("output_blocks.0", "first_stage_model.decoder.mid", "transformer.text_model.encoder.layers.1"):
        weights = {name: tensor for name, tensor in load_file(sd / "file.safetensors").items() if part not in name}
        path = write_single_file(tmp_path / "incomplete.safetensors", weights)
        refused("incomplete.safetensors", "lacks", "tensors", source=path, config=sd / "folder")


def test_a_configuration_that_does_not_fit_is_refused(sd: Path, tmp_path: Path) -> None:
    file = sd / "file.safetensors"
    TINY["sdxl"](tmp_path / "scratch").save_pretrained(sdxl := tmp_path / "sdxl")
    refused("StableDiffusionPipeline", "StableDiffusionXLPipeline", str(sdxl), source=file, config=sdxl)
    refused("model_index.json", "scratch", source=file, config=sd / "scratch")
    refused("'noise'", "v_prediction", source=sd / "folder", prediction_type="noise")
    shutil.copytree(sd / "folder", tmp_path / "config")
    settings = json.loads((sd / "folder" / "unet" / "config.json").read_text())
    (tmp_path / "config" / "unet" / "config.json").write_text(json.dumps({**settings, "cross_attention_dim": 24}))
    refused("unet", "other sizes", str(tmp_path / "config"), source=file, config=tmp_path / "config")
    refused("only a single .safetensors file", source=sd / "folder", config=sd / "folder")


# --- folders ---------------------------------------------------------------------------------------------------------


def set_entry(folder: Path, key: str, value: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, key: value}))


def weights_of(part: Path) -> Path:
    (path,) = part.glob("*.safetensors")
    return path


def thin(path: Path) -> None:
    """Leaves out a tenth of the tensors, which the libraries would replace by random ones."""
    save_file({name: tensor for index, (name, tensor) in enumerate(load_file(path).items()) if index % 10}, path)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), ["lacks the subfolder vae"]),
        (lambda folder: set_entry(folder, "text_encoder", [None, None]), ["without text_encoder"]),
        (
            lambda folder: set_entry(folder, "_class_name", "FluxPipeline"),
            ["FluxPipeline", "StableDiffusionXLPipeline"],
        ),
        (lambda folder: (folder / "model_index.json").write_text("{"), ["damaged"]),
        (lambda folder: (folder / "unet" / "config.json").unlink(), ["damaged", "config.json"]),
        (lambda folder: os.truncate(weights_of(folder / "vae"), 20_000), ["damaged"]),
        (lambda folder: os.truncate(weights_of(folder / "text_encoder"), 20_000), ["damaged"]),
        (lambda folder: thin(weights_of(folder / "unet")), ["unet lacks", "tensors"]),
        (lambda folder: thin(weights_of(folder / "vae")), ["vae lacks", "tensors"]),
        (lambda folder: thin(weights_of(folder / "text_encoder")), ["text_encoder lacks", "tensors"]),
    ],
)
def test_a_damaged_folder_is_refused(sd: Path, tmp_path: Path, damage, fragments: list[str]) -> None:
    shutil.copytree(sd / "folder", tmp_path / "copy")
    damage(tmp_path / "copy")
    refused(str(tmp_path / "copy"), *fragments, source=tmp_path / "copy")


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_model_on_the_hub_is_the_folder_and_only_what_is_needed_is_fetched(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "folder", tmp_path / "served")
    for path in list((tmp_path / "served").rglob("*.safetensors")):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
        shutil.copy(path, path.with_suffix(".bin"))
    for extra in ("single.safetensors", "unet/evil.py", "safety_checker/model.safetensors", "README.md"):
        (tmp_path / "served" / extra).parent.mkdir(exist_ok=True)
        (tmp_path / "served" / extra).write_text("not wanted")
    with fake_hub({"owner/name": tmp_path / "served"}, tmp_path / "cache", monkeypatch) as fetched:
        same(load("owner/name"), wanted := load(place / "folder"))
    parts = {path.split("/")[0] for path in fetched}
    assert {path.rsplit(".", 1)[1] for path in fetched} <= {"json", "txt", "safetensors"}
    assert not [path for path in fetched if ".fp16." in path]
    assert {path for path in fetched if "/" not in path} == {"model_index.json"}
    assert "safety_checker" not in parts
    point_to(CLOSED, tmp_path / "cache", monkeypatch)
    same(load("owner/name"), wanted)  # what was fetched once needs no hub


@pytest.mark.parametrize("shard_size", ["1GB", "200KB"])
def test_half_precision_is_fetched_where_there_is_nothing_else(
    sd: Path, shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd / "folder")
    pipeline.save_pretrained(tmp_path / "served", variant="fp16", max_shard_size=shard_size)
    assert (len(list((tmp_path / "served" / "unet").glob("*.fp16*.safetensors"))) > 1) == (shard_size == "200KB")
    with fake_hub({"owner/half": tmp_path / "served"}, tmp_path / "cache", monkeypatch):
        same(load("owner/half"), load(sd / "folder"))


def test_a_single_file_is_configured_from_the_hub_without_its_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BASES["sdxl" if (place / "folder" / "text_encoder_2").exists() else "sd"]
    served = {"owner/name": place / "folder", base: place / "folder"}
    with fake_hub(served, tmp_path / "cache", monkeypatch) as fetched:
        same(load(place / "file.safetensors", "owner/name"), wanted := load(place / "folder"))
        same(load(place / "file.safetensors"), wanted)
    assert fetched
    assert not [path for path in fetched if path.endswith(".safetensors")]


def test_the_base_model_is_told_by_family_and_width() -> None:
    attention = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    pooled = {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}
    assert base_model({attention: torch.zeros(320, 768)}) == BASES["sd"]
    assert base_model({attention: torch.zeros(320, 1024)}) == BASES["sd2"]
    assert base_model({attention: torch.zeros(640, 2048)} | pooled) == BASES["sdxl"]


def test_what_the_hub_does_not_have_is_refused_before_anything_is_fetched(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sd / "folder", tmp_path / "flux")
    set_entry(tmp_path / "flux", "_class_name", "FluxPipeline")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.md").write_text("a data set, say")
    models = {"owner/flux": tmp_path / "flux", "owner/none": tmp_path / "none"}
    with fake_hub(models, tmp_path / "cache", monkeypatch) as fetched:
        refused("owner/gone", "no such model on the hub", source="owner/gone")
        refused("owner/flux", "FluxPipeline", "supported", source="owner/flux")
        refused("owner/none", "model_index.json", source="owner/none")
        line = refused("file.safetensors", "no such model", source=sd / "file.safetensors", config="owner/gone")
    assert "teacher_config" in line
    assert "--config" in line
    assert fetched == ["model_index.json"]


def test_without_a_hub_the_line_says_at_once_what_to_name_instead(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(CLOSED, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
    refused("owner/name", "can't be reached", "name a local folder", source="owner/name")
    line = refused("file.safetensors", "can't be reached", source=sd / "file.safetensors")
    assert "--config" in line
    assert "teacher_config" in line


def test_a_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_id("owner/name-1.0")
    for path in ("runs/gone", "name", "/owner/name", "./name", "a/b/c", "../name", "owner/", "owner/.hidden"):
        assert not is_hub_id(path), path


@pytest.mark.parametrize(
    ("sources", "wanted"),
    [
        (["run", "a.safetensors"], ["a.safetensors"]),
        (["run", "a.sft", "B.SAFETENSORS"], ["a.sft", "B.SAFETENSORS"]),
        (["run", "other"], ["run"]),  # which says that it has its own
    ],
)
def test_a_configuration_is_of_every_single_file_whatever_its_suffix(sources: list[str], wanted: list[str]) -> None:
    assert configured(sources) == wanted
