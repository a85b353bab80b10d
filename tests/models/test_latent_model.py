"""SD- and SDXL-shaped models against the diffusers pipelines that they are made of."""

import copy
import filecmp
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from fewstep.diffusion.denoiser import Guided
from fewstep.diffusion.sampling import rollout
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.networks.families.stable_diffusion import vp_schedule
from fewstep.training.teacher import drop_condition
from steps import draws
from tiny_pipelines import BETAS, TINY

PROMPTS = ["a red cat", "a mat", "a prompt that is longer than the tokenizer's twenty tokens"]


@pytest.fixture(scope="module", params=TINY)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    pipeline = TINY[request.param](tmp_path_factory.mktemp(request.param))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeddings(pipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What the pipeline itself makes of prompts, with the embedding of its null prompt."""
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        outputs = pipeline.encode_prompt(prompts, **options)
    return dict(zip(("text", "null text", "pooled", "null pooled"), outputs, strict=False))


def test_the_condition_is_the_pipelines_own(pipeline) -> None:
    model, theirs = LatentModel(pipeline), embeddings(pipeline, PROMPTS)
    condition, null = model.text_condition(PROMPTS), model.null_condition
    for name in ("text", "pooled"):
        if name in theirs:
            assert torch.equal(condition[name], theirs[name])
            assert torch.equal(null[name], theirs[f"null {name}"][:1])
    assert model.conditioner.too_long(PROMPTS).tolist() == [False, False, True]


def test_the_micro_conditioning_is_the_whole_square_image(tmp_path: Path) -> None:
    pipeline = TINY["sdxl"](tmp_path)
    ours = LatentModel(pipeline).text_condition(["a", "b"])["time_ids"]
    theirs = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 12)
    assert torch.equal(ours, theirs.repeat(2, 1))


@pytest.mark.parametrize(("timesteps", "scale"), [([999, 749, 499, 249], 1.0), ([399], 1.0), ([999, 499], 3.0)])
def test_the_rollout_is_the_whole_pipeline_call_with_the_lcm_scheduler(pipeline, timesteps, scale) -> None:
    model = LatentModel(pipeline)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    draws = torch.Generator().manual_seed(0)
    options = {"timesteps": timesteps, "guidance_scale": scale, "generator": draws, "output_type": "latent"}
    theirs = pipeline("a red cat", **options).images
    draws = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(1, 4, 8, 8, generator=draws) for _ in timesteps])
    denoiser = Guided(model.denoiser, scale, model.null_condition) if scale != 1 else model.denoiser
    condition = model.text_condition(["a red cat"])
    with torch.no_grad():
        ours = rollout(denoiser, noise, torch.tensor(timesteps), condition, stop=len(timesteps) - 1)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_prediction_type_and_zero_terminal_snr_are_diffusers_own(prediction: str, zero_snr: bool) -> None:
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction, rescale_betas_zero_snr=zero_snr, clip_sample=False)
    schedule, parameterization = vp_schedule(scheduler.config)
    scheduler.set_timesteps(1000)
    x_t, output = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for t in (0, 399, 749, 998):
        theirs = scheduler.step(output, t, x_t).pred_original_sample
        c_skip, c_out, _ = parameterization(*schedule.alpha_sigma(torch.tensor([t])))
        torch.testing.assert_close((c_skip * x_t + c_out * output).float(), theirs, rtol=1e-5, atol=1e-5)


def test_latents_and_pictures_are_the_autoencoders(pipeline) -> None:
    model = LatentModel(pipeline)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ours = model.encode_x0({"image": images}, draws(2, seed=1))
    pixels = pipeline.image_processor.preprocess(images.float() / 255)
    with torch.no_grad():
        theirs = pipeline.vae.encode(pixels).latent_dist.sample(draws(2, seed=1).generator)
        decoded = pipeline.vae.decode(theirs).sample
    torch.testing.assert_close(ours, theirs * pipeline.vae.config.scaling_factor)
    expected = pipeline.image_processor.postprocess(decoded, output_type="pt") * 255
    assert (model.decode(ours).float() - expected).abs().max() <= 0.5 + 1e-3


def test_a_saved_student_is_a_pipeline_folder_that_loads_again(pipeline, tmp_path: Path) -> None:
    model = LatentModel(pipeline)
    student = model.student(model.denoiser, torch.tensor([999.0, 499.0]))
    student.save(tmp_path)
    again = load(tmp_path)
    assert again.timesteps == [999.0, 499.0]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 249])
    with torch.no_grad():
        expected = model.denoiser(x, t, model.text_condition(["a", "b"]))
        assert torch.equal(again.denoiser(x, t, again.text_condition(["a", "b"])), expected)
    type(pipeline).from_pretrained(tmp_path)


def test_the_trained_network_is_saved_by_the_names_of_its_weights(pipeline, tmp_path: Path) -> None:
    """What a state lacks is the model's own; the model keeps its weights."""
    model, name = LatentModel(pipeline), "network.unet.conv_out.weight"
    before = model.network.conv_out.weight.detach().clone()
    model.save_frozen(tmp_path)
    assert not (tmp_path / "unet").exists()
    model.save_trained(tmp_path, {name: before + 1})
    again = load(tmp_path)
    assert torch.equal(again.network.conv_out.weight, before + 1)
    assert torch.equal(again.network.conv_in.weight, model.network.conv_in.weight)
    assert torch.equal(model.network.conv_out.weight, before)


def test_dropping_replaces_whole_samples_by_the_null_condition(pipeline) -> None:
    model, numbers = LatentModel(pipeline), draws(200)
    condition = model.text_condition(["a"] * 200)
    dropped = drop_condition(condition, model.null_condition, 0.25, numbers)
    is_null = (dropped["text"] == model.null_condition["text"]).flatten(1).all(dim=1)
    assert 25 < is_null.sum() < 75
    assert torch.equal(dropped["text"][~is_null], condition["text"][~is_null])


def test_embeddings_make_the_condition_that_their_captions_make(pipeline) -> None:
    model = LatentModel(pipeline)
    whole = model.encode_condition({"caption": PROMPTS})
    with torch.no_grad():
        kept = model.conditioner.embed(PROMPTS)
    assert set(kept) == set(whole) - {"time_ids"}
    model.conditioner.forward = model.conditioner.embed = None  # nothing is embedded again
    again = model.encode_condition({"caption": PROMPTS, **kept})
    assert set(again) == set(whole)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_a_prompt_of_a_grid_is_embedded_once(pipeline) -> None:
    model = LatentModel(pipeline)
    asked = []
    model.conditioner.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[0]))
    condition = model.conditions(range(3, 8), ["a red cat", "a mat"])
    assert asked == [["a mat", "a red cat"]]
    wanted = model.text_condition(["a mat", "a red cat"])["text"]
    assert torch.equal(condition["text"], wanted[[0, 1, 0, 1, 0]])


def test_latents_in_a_batch_are_x0_as_they_are(pipeline) -> None:
    model = LatentModel(pipeline)
    model.autoencoder.encode = None
    latents = torch.randn(2, 4, 8, 8).half()
    x0 = model.encode_x0({"latent": latents}, draws(len(latents)))
    assert x0.dtype == torch.float32
    assert torch.equal(x0, latents.float())


def test_the_fingerprint_of_an_autoencoder_is_of_its_weights_and_its_scale(pipeline) -> None:
    model = LatentModel(copy.deepcopy(pipeline))
    before = model.latent_space
    assert before == LatentModel(pipeline).latent_space
    assert (before["shape"], before["image_size"]) == ([4, 8, 8], 16)
    factor = model.autoencoder.config.scaling_factor
    model.autoencoder.register_to_config(scaling_factor=2 * factor)
    assert model.latent_space["autoencoder"] != before["autoencoder"]
    model.autoencoder.register_to_config(scaling_factor=factor)
    assert model.latent_space == before
    next(model.autoencoder.parameters()).data[0] += 1e-6
    assert model.latent_space["autoencoder"] != before["autoencoder"]


def test_the_fingerprint_of_a_conditioner_is_of_its_weights_and_its_tokenizers(pipeline) -> None:
    model = LatentModel(copy.deepcopy(pipeline))
    before = model.conditioner.fingerprint()
    model.text_condition(PROMPTS)
    assert model.conditioner.fingerprint() == before == LatentModel(pipeline).conditioner.fingerprint()
    model.conditioner.tokenizers[-1].pad_token = "#"
    assert (by_tokens := model.conditioner.fingerprint()) != before
    list(model.conditioner.parameters())[-1].data[0] += 1e-6
    assert model.conditioner.fingerprint() not in (before, by_tokens)


def tracked(model: LatentModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The moves of what surrounds the denoiser, as (part, device); back from the device `meta` there is no way."""
    moves: list[tuple[str, str]] = []
    for name in ("autoencoder", "conditioner"):
        part = getattr(model, name)

        def move(device: object, name: str = name, part=part, to=part.to) -> torch.nn.Module:
            moves.append((name, str(device)))
            return to(device) if str(device) == "meta" else part

        monkeypatch.setattr(part, "to", move)
    return moves


def test_text_encoders_and_autoencoder_are_on_the_device_only_from_use_to_release(
    pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    moves = tracked(model, monkeypatch)
    model.to(torch.device("meta"))
    assert model.device.type == "meta"
    assert moves == []
    assert model.text_condition(["a"])["text"].device.type == "meta"
    assert moves == [("conditioner", "meta")]
    model.conditions(range(1))
    _ = model.null_condition
    assert len(moves) == 1
    model.decode(torch.zeros(1, 4, 8, 8, device="meta"))
    model.encode_x0({"image": torch.zeros(1, 3, 16, 16)}, draws(1))
    assert moves[1:] == [("autoencoder", "meta")]
    model.release()
    assert sorted(moves[2:]) == [("autoencoder", "cpu"), ("conditioner", "cpu")]


def test_saving_with_a_frozen_folder_links_weights_and_copies_what_people_edit(pipeline, tmp_path: Path) -> None:
    model = LatentModel(pipeline)
    (tmp_path / ".frozen.tmp" / "half written").mkdir(parents=True)
    for name in ("first", "second"):
        model.save(tmp_path / name, tmp_path / "frozen")
    model.save(tmp_path / "plain")
    files, *others = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "plain", tmp_path / "first", tmp_path / "second")
    )
    assert others == [files, files]
    assert not (tmp_path / "first" / "half written").exists()
    for file in files:
        first, second = tmp_path / "first" / file, tmp_path / "second" / file
        shared = file.suffix == ".safetensors" and file.parts[0] != "unet"
        assert (first.stat().st_ino == second.stat().st_ino) == shared, file
        assert filecmp.cmp(first, second, shallow=False), file  # bytes in an assertion would take minutes to print
        assert filecmp.cmp(first, tmp_path / "plain" / file, shallow=False), file


def test_without_links_on_the_file_system_the_folder_is_as_complete(
    pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.link", Mock(side_effect=PermissionError))
    LatentModel(pipeline).save(tmp_path / "model", tmp_path / "frozen")
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_nlink == 1
    assert filecmp.cmp(weights, tmp_path / "frozen" / "vae" / weights.name, shallow=False)
    type(pipeline).from_pretrained(tmp_path / "model")


def test_pictures_go_through_the_autoencoder_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, numbers = LatentModel(TINY["sd"](tmp_path)), draws(5)
    x0, images = numbers.randn(*model.shape), numbers.randint(0, 256, 3, 16, 16).to(torch.uint8)
    noise = numbers.randn(*model.shape)
    whole = model.decode(x0), model.encode_images(images, noise)
    monkeypatch.setattr("fewstep.models.latent_model.AT_ONCE", 2 * x0[0].numel() + 1)
    for name, given in (("encode", 3), ("decode", 4)):
        sizes: list[tuple[int, ...]] = []
        called = getattr(model.autoencoder, name)
        monkeypatch.setattr(
            model.autoencoder, name, lambda x, f=called, n=sizes, **more: (n.append(x.shape), f(x, **more))[1]
        )
        if name == "encode":
            torch.testing.assert_close(model.encode_images(images, noise), whole[1], rtol=1e-5, atol=1e-5)
        else:
            assert (model.decode(x0).int() - whole[0].int()).abs().max() <= 1
        assert [size[:2] for size in sizes] == [(2, given), (2, given), (1, given)]
