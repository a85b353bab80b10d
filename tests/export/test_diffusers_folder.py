"""Exported folders against our own rollout: what diffusers draws of them by itself, on the same noise."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from safetensors.torch import load_file

from fewstep.diffusion.sampling import rollout
from fewstep.diffusion.timesteps import index_grid
from fewstep.errors import UserError
from fewstep.export.card import Provenance
from fewstep.export.diffusers_folder import Format, lcm_scheduler, write_diffusers_folder
from fewstep.export.stored import open_stored
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig
from limits import file_size_limit
from tiny_pipelines import BETAS, TINY

CLASSES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
EPS, V = {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True}
PROMPT = "a red cat"
PIXEL_STEPS = {1: [80.0], 4: [80.0, 9.5, 2.0, 0.3]}


def provenance(timesteps: list[float]) -> Provenance:
    return Provenance("teacher", "kind: distill\n", timesteps, 1.75, 7, "0.999")


@pytest.fixture(scope="module", autouse=True)
def _module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """diffusers copies a folder's code to a cache before it runs it."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


@pytest.fixture(scope="module", params=TINY)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A pipeline, and the name of its kind."""
    return TINY[request.param](tmp_path_factory.mktemp(request.param)), request.param


def export(model: LatentModel | PixelModel, folder: Path, written: Format | None = None, **options) -> Path:
    """The folder `folder/out` of a student that was saved in `folder/model`."""
    model.save(folder / "model")
    stored = open_stored(folder / "model")
    write_diffusers_folder(stored, folder / "out", provenance(model.timesteps), written or Format(), **options)
    return folder / "out"


def opened(folder: Path, **options) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(shape: tuple[int, ...], count: int, seed: int = 5) -> torch.Tensor:
    """The start, and what a generator of this seed gives to the scheduler afterwards; (count, 1, ...)."""
    draws = torch.Generator().manual_seed(seed)
    start = torch.randn(1, *shape, generator=torch.Generator().manual_seed(99))
    return torch.stack([start, *(torch.randn(1, *shape, generator=draws) for _ in range(count - 1))])


def expected(model: LatentModel | PixelModel, condition: dict[str, torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    timesteps = torch.tensor(model.timesteps, dtype=torch.float64)
    return rollout(model.denoiser, noise, timesteps, condition, stop=len(timesteps) - 1)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert theirs.shape == ours.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1, ours.abs().max())


@pytest.mark.parametrize(
    ("timesteps", "settings"),
    [
        ([999, 749, 499, 249], EPS),
        ([999, 749, 499, 249], ZERO_SNR),
        ([999], V),
        ([999], ZERO_SNR),
        ([399], EPS),
        ([399], ZERO_SNR),
        ([999, 666, 333], EPS),
    ],
    ids=str,
)
def test_the_pipelines_own_call_is_our_rollout(teacher, timesteps, settings, tmp_path: Path) -> None:
    pipeline, kind = teacher
    pipeline.scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, **settings)
    model = LatentModel(pipeline, [float(t) for t in timesteps])
    folder = export(model, tmp_path)
    theirs = opened(folder)
    assert type(theirs) is CLASSES[kind]
    assert type(theirs.scheduler) is LCMScheduler
    noise, seed = drawn(model.shape, len(timesteps)), torch.Generator().manual_seed(5)
    call = {"num_inference_steps": len(timesteps), "guidance_scale": 0, "latents": noise[0]}
    latent = theirs(PROMPT, **call, generator=seed, output_type="latent").images
    ours = expected(model, model.text_condition([PROMPT]), noise)
    close(ours, latent)
    if settings is not EPS or len(timesteps) == 3:
        return
    picture = theirs(PROMPT, **call, generator=seed.manual_seed(5), output_type="np").images
    assert abs(picture * 255 - model.decode(ours).permute(0, 2, 3, 1).numpy()).max() <= 0.51
    again = load(folder)
    assert again.timesteps == timesteps
    close(ours, expected(again, again.text_condition([PROMPT]), noise))


@pytest.mark.parametrize("timesteps", [[999, 500, 60], [999, 5]], ids=str)
def test_uneven_timesteps_must_be_named_and_a_call_without_them_is_refused(teacher, timesteps, tmp_path: Path) -> None:
    """At t = 5 LCM's own boundary condition would be off by 1e-4."""
    pipeline, _ = teacher
    pipeline.scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    model = LatentModel(pipeline, timesteps)
    theirs = opened(export(model, tmp_path))
    with pytest.raises(ValueError, match="num_inference_steps"):
        theirs(PROMPT, num_inference_steps=len(timesteps), guidance_scale=0)
    assert f"timesteps={timesteps}" in (tmp_path / "out" / "README.md").read_text()
    noise, call = drawn(model.shape, len(timesteps)), {"timesteps": timesteps, "guidance_scale": 0}
    call |= {"latents": noise[0], "generator": torch.Generator().manual_seed(5), "output_type": "latent"}
    latent = theirs(PROMPT, **call).images
    close(expected(model, model.text_condition([PROMPT]), noise), latent)


@pytest.mark.parametrize("first", [999, 399])
def test_the_scheduler_finds_every_even_grid(first: int) -> None:
    for num in [*range(1, 12), 16, 25, 32, 50]:
        timesteps = index_grid(num, first + 1).tolist()
        scheduler, named = lcm_scheduler(BETAS, timesteps)
        scheduler = LCMScheduler.from_config(json.loads(scheduler.to_json_string()))
        scheduler.set_timesteps(num)
        assert scheduler.timesteps.tolist() == timesteps
        assert not named


@pytest.mark.parametrize("settings", [EPS, ZERO_SNR], ids=str)
def test_a_student_of_another_first_time_has_the_whole_schedule(settings: dict) -> None:
    config = {**BETAS, **settings}
    scheduler, _ = lcm_scheduler(config, [399])
    again = LCMScheduler.from_config(json.loads(scheduler.to_json_string()))
    assert torch.equal(again.alphas_cumprod, DDIMScheduler(**config).alphas_cumprod)
    assert again.config.prediction_type == settings["prediction_type"]


def test_four_steps_are_not_taken_for_fifty() -> None:
    scheduler, _ = lcm_scheduler(BETAS, [999, 749, 499, 249])
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(50)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]


def test_a_timestep_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="end above 0"):
        lcm_scheduler(BETAS, [999, 0])


@pytest.fixture(scope="module", params=[(1, 0), (4, 3)], ids=["1 step", "4 steps, classes"])
def pixel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PixelModel, Path]:
    """A student on pixels, and its export."""
    num, classes = request.param
    config = PixelModelConfig(
        num_classes=classes, null_class=classes > 0, block_out_channels=[8, 8], norm_num_groups=4, sigma_data=0.4
    )
    torch.manual_seed(1)
    model = PixelModel(config, build_unet(config), PIXEL_STEPS[num])
    model.denoiser.eval()
    return model, export(model, tmp_path_factory.mktemp("pixel"))


def test_a_pixel_folder_draws_our_rollout(pixel) -> None:
    model, folder = pixel
    theirs, num = opened(folder, trust_remote_code=True), len(model.timesteps)
    noise, labels = drawn(model.shape, num), [2] if model.config.num_classes else None
    call = {"class_labels": labels, "latents": noise[0]}
    ours = expected(model, {"label": torch.tensor(labels)} if labels else {}, noise)
    close(ours, theirs(**call, generator=torch.Generator().manual_seed(5), output_type="latent").images)
    decoded = model.decode(ours)
    for output in ("np", "pt"):
        images = theirs(**call, generator=torch.Generator().manual_seed(5), output_type=output).images
        images = images if output == "pt" else torch.from_numpy(images).permute(0, 3, 1, 2)
        assert (images * 255 - decoded).abs().max() <= 0.51
    picture = theirs(**call, generator=torch.Generator().manual_seed(5)).images[0]
    assert (torch.tensor(list(picture.tobytes())).reshape(8, 8) - decoded[0, 0].int()).abs().max() <= 1
    again = load(folder)
    assert again.timesteps == model.timesteps
    close(ours, expected(again, {"label": torch.tensor(labels)} if labels else {}, noise))
    assert (folder / "pipeline.py").read_text().count("fewstep.") == 0


def test_a_pixel_folder_takes_classes_batches_and_fewer_steps(pixel) -> None:
    model, folder = pixel
    theirs, classes = opened(folder, trust_remote_code=True), model.config.num_classes
    same = [theirs(batch_size=4, generator=torch.manual_seed(0), output_type="np").images for _ in range(2)]
    assert (same[0] == same[1]).all()
    with pytest.raises(ValueError, match="trained for"):
        theirs(num_inference_steps=len(model.timesteps) + 1)
    with pytest.raises(ValueError, match="latents are"):
        theirs(latents=torch.zeros(1, 3, 8, 8))
    if not classes:
        with pytest.raises(ValueError, match="no classes"):
            theirs(class_labels=1)
        return
    in_turn = theirs(class_labels=[0, 1, 2, 0], generator=torch.manual_seed(0), output_type="np").images
    assert (in_turn == same[0]).all()
    of_one = theirs(class_labels=1, batch_size=4, generator=torch.manual_seed(0), output_type="np").images
    assert (of_one[1] == in_turn[1]).all()
    assert (of_one[0] != in_turn[0]).any()
    for wrong in ([3], -1, [0, 1, 2]):
        with pytest.raises(ValueError, match="class_labels must be"):
            theirs(class_labels=wrong, batch_size=2)
    call = {"class_labels": [1], "latents": drawn(model.shape, 1)[0], "output_type": "latent"}
    two = theirs(**call, num_inference_steps=2, generator=torch.manual_seed(5))
    noise, times = drawn(model.shape, 2), torch.tensor([80.0, 2.0], dtype=torch.float64)
    close(rollout(model.denoiser, noise, times, {"label": torch.tensor([1])}, stop=1), two.images)


def test_without_trust_no_code_is_run(pixel) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(pixel[1])


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *(("60KB", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        ("5GB", torch.float16),
        *(pytest.param("5GB", dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_shards_and_halves_open_as_the_whole(teacher, dtype: torch.dtype, size: str, tmp_path: Path) -> None:
    pipeline, _ = teacher
    model = LatentModel(pipeline, [999.0])
    folder = export(model, tmp_path, Format(dtype, size))
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) == 1 if size == "5GB" else len(shards) > 2
    assert all((".fp16" in path.name) == (dtype == torch.float16) for path in folder.rglob("*.safetensors"))
    assert sum(len(load_file(shard)) for shard in shards) == len(model.network.state_dict())
    theirs = opened(folder, dtype=dtype, **({"variant": "fp16"} if dtype == torch.float16 else {}))
    networks = {name: part for name, part in theirs.components.items() if isinstance(part, torch.nn.Module)}
    for part, network in networks.items():
        for name, value in network.state_dict().items():
            assert torch.equal(value, getattr(pipeline, part).state_dict()[name].to(dtype)), (part, name)
    again = load(folder)
    assert again.timesteps == [999]
    assert torch.equal(again.network.conv_in.weight, pipeline.unet.conv_in.weight.to(dtype).float())


def test_shards_and_halves_of_a_pixel_model(pixel, tmp_path: Path) -> None:
    model, whole = pixel
    folder = export(model, tmp_path, Format(torch.float16, "5KB"))
    theirs = opened(folder, variant="fp16", trust_remote_code=True)
    ours, ordinary = load(folder).network, UNet2DModel.from_pretrained(whole, subfolder="unet")
    assert len(list((folder / "unet").glob("*.fp16-*.safetensors"))) > 2
    for name, value in model.network.state_dict().items():
        for network, expected in ((theirs.unet, value.half().float()), (ours, value.half().float()), (ordinary, value)):
            assert torch.equal(network.state_dict()[name], expected)
    assert torch.isfinite(theirs(output_type="pt").images).all()


def test_what_it_came_from_stands_in_the_weights_and_no_path_of_the_teacher(teacher, tmp_path: Path) -> None:
    from safetensors import safe_open

    pipeline, _ = teacher
    pipeline.save_pretrained(tmp_path / "teacher")
    model = LatentModel(type(pipeline).from_pretrained(tmp_path / "teacher"), [999.0])
    folder = export(model, tmp_path)
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["fewstep.timesteps"]) == [999]
    assert metadata["fewstep.recipe"] == "kind: distill\n"
    assert metadata["fewstep.teacher_guidance_scale"] == "1.75"
    texts = [path.read_text() for path in folder.rglob("*.json")]
    assert not [text for text in texts if str(tmp_path) in text]
    assert json.loads((folder / "fewstep.json").read_text())["export"]["fewstep.step"] == "7"


def test_a_disk_that_fills_leaves_what_was_there(pixel, tmp_path: Path) -> None:
    model, _ = pixel
    folder = export(model, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stored = open_stored(tmp_path / "model")
    with file_size_limit(20_000), pytest.raises(UserError, match="can't be written") as error:
        write_diffusers_folder(stored, folder, provenance(model.timesteps), Format(), overwrite=True)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
