"""Latents, prompts and kept embeddings through the command line, on tiny pipelines."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from command_line import Run, refused
from fewstep.data import latents as latents_module
from fewstep.data.images import batch_indices
from fewstep.data.latents import load_latents
from fewstep.data.settings import DataSettings, EmbeddingSettings
from fewstep.embedded.sources import open_captioned_images
from fewstep.evaluation.reference import captioned_batches
from fewstep.models.autoencoder import Autoencoder
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.runtime.runs import find
from fewstep.seeding import generator
from fewstep.training.batches import open_texts
from fewstep.training.dmd2 import DMD2
from fewstep.training.pool import Samples
from image_sets import picture, write_captioned
from steps import curves, dying, last_state, same, spy
from tiny_pipelines import TINY

RECIPE = """
kind: distill
teacher: teacher
data: {source: pictures}
num_steps: 4
batch_size: 3
student_every: 2
student: {num_timesteps: 2, optimizer: {lr: 1e-3}}
critic: {optimizer: {lr: 1e-3}}
"""
NUM = 6
NO_GAN = "--set gan.student_weight=0 --set gan.critic_weight=0"
LATENTS = "fewstep data latents --model teacher --source pictures --out"


def pixels(index: int) -> torch.Tensor:
    """uint8 (3, 16, 16) of the picture."""
    return torch.from_numpy(np.array(picture(index, 16, 16))).permute(2, 0, 1)


# SD's as a whole when there is time: it has less than SDXL, and shorter cases below that are always run
@pytest.fixture(scope="module", params=[pytest.param("sd", marks=pytest.mark.slow), "sdxl"])
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    TINY[request.param](folder / "scratch").save_pretrained(folder / "teacher")
    captions = [f"picture {index}" + " that has a very long caption" * (index == 3) for index in range(NUM)]
    write_captioned(folder / "pictures", [picture(index, 16, 16) for index in range(NUM)], captions)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "prompts.txt").write_text("".join(f"prompt {index}\n" for index in range(5)))
    return folder


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The batches that training steps get."""
    seen: list[dict] = []
    spy(monkeypatch, DMD2, "step", lambda self, parts, number, **named: seen.append(parts[0][1]))
    return seen


# --- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_latents_are_samples_of_the_autoencoders_posterior(run: Run, place: Path, batch_size: int) -> None:
    told = run(f"{LATENTS} latents --seed 3 --batch-size {batch_size}")
    wrote = "wrote latents, 6 latents\nnext: fewstep distill RECIPE --set data.source=latents\n"
    assert told == (0, f"kept 6 of 6 images; dropped: none\n{wrote}", "")
    model = load(place / "teacher")
    latents = load_latents(place / "latents", model.latent_space)
    vae = model.pipeline.vae
    for index in range(NUM):
        with torch.no_grad():
            sample = vae.encode(pixels(index)[None] / 127.5 - 1).latent_dist.sample(generator(3, "latent", index))
        batch = latents.batch(torch.tensor([index]))
        torch.testing.assert_close(batch["latent"].float(), sample * vae.config.scaling_factor, rtol=1e-3, atol=1e-4)
        assert batch["caption"][0].startswith(f"picture {index}")


def test_what_cannot_be_used_is_counted(run: Run, place: Path) -> None:
    pictures = [picture(index, 15 if index == 4 else 16, 40) for index in range(NUM)]
    rows = ["picture 0,6", "picture 1,6", ",6", "picture 3,6", "picture 4,6", "picture 5,1"]
    write_captioned(place / "pictures", pictures, rows, "text,score")
    (place / "pictures" / "1.png").write_bytes((place / "pictures" / "1.png").read_bytes()[:100])
    code, told, error = run(f"{LATENTS} out --min-side 16 --aesthetic-column score --min-aesthetic 5.5")
    assert (code, error) == (0, "")
    assert told == (
        "kept 2 of 6 images; dropped: 1 without a caption, 1 aesthetic score below 5.5, "
        "1 truncated, 1 smaller than 16 pixels\n"
        "wrote out, 2 latents\nnext: fewstep distill RECIPE --set data.source=out\n"
    )
    model = load(place / "teacher")
    assert load_latents(place / "out", model.latent_space).captions == ["picture 0", "picture 3"]
    refused(run(f"{LATENTS} none --aesthetic-column score --min-aesthetic 9"), "no image is left", "5 aesthetic score")
    assert not (place / "none").exists()


def test_the_ground_of_latents_is_theirs(run: Run, place: Path) -> None:
    """Of another ground they are others; what judges them lays the images on the same."""
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    write_captioned(place / "pictures", [clear] * NUM, [f"picture {index}" for index in range(NUM)])
    assert run(f"{LATENTS} latents --background #102030")[0] == 0
    images = open_captioned_images(DataSettings(source="latents"), 16)
    assert images.fetch(torch.tensor([0]))[0, :, 0, 0].tolist() == [16, 32, 48]
    refused(run(f"{LATENTS} latents"), "background: #102030 -> white", "another --out")
    refused(run(f"{LATENTS} others --background wite"), "--background wite", "white")
    assert not (place / "others").exists()


def test_a_stop_is_told_and_the_same_command_goes_on(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_module, "ROWS", 2)
    assert run(f"{LATENTS} whole --batch-size 2")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, Autoencoder, "encode_images", dying(2, KeyboardInterrupt()))
        code, _, error = run(f"{LATENTS} parts --batch-size 2")
    assert (code, error) == (130, "fewstep: stopped; the same command goes on with parts\n")
    refused(run("fewstep distill recipe.yaml --out x --set data.source=parts"), "parts", "not all images are encoded")
    refused(run(f"{LATENTS} parts --seed 1"), "seed: 0 -> 1", "another --out")
    whole = (place / "pictures" / "5.png").read_bytes()
    picture(7, 16, 15).save(place / "pictures" / "5.png")
    refused(run(f"{LATENTS} parts --batch-size 2"), "latents made otherwise (content: ", "another --out")
    (place / "pictures" / "5.png").write_bytes(whole)
    assert run(f"{LATENTS} parts --batch-size 2")[0] == 0
    names = sorted(path.name for path in (place / "whole").iterdir())
    assert len(names) == 4
    assert all((place / "whole" / name).read_bytes() == (place / "parts" / name).read_bytes() for name in names)


def test_training_on_latents_encodes_nothing(
    run: Run, place: Path, batches: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(f"{LATENTS} latents")[0] == 0
    monkeypatch.setattr(LatentModel, "encode_images", None)
    assert run("fewstep distill recipe.yaml --out student --set data.source=latents")[0] == 0
    latents = load_latents(place / "latents", load(place / "teacher").latent_space)
    for step, batch in enumerate(batches):
        wanted = latents.batch(batch_indices(NUM, 3, step, seed=0))
        assert batch["caption"] == wanted["caption"]
        assert torch.equal(batch["latent"], wanted["latent"])
    assert len(batches) == 4


FITS = [("sdxl", "", torch.float32)]
HALF = ("sd", NO_GAN, torch.float16)
RARER = [pytest.param(*each, marks=pytest.mark.slow) for each in (HALF, ("sd", *FITS[0][1:]), ("sdxl", *HALF[1:]))]


@pytest.mark.parametrize(("workshop", "gan", "stored"), FITS + RARER, indirect=["workshop"])
def test_latents_fit_a_run_in_bfloat16_which_resumes_bit_for_bit(
    run: Run, place: Path, gan: str, stored: torch.dtype
) -> None:
    """The teacher may be stored in half precision, too; its embeddings are kept in the run's own."""
    load(place / "teacher").pipeline.to(stored).save_pretrained(place / "stored")
    assert run(f"{LATENTS} latents".replace("teacher", "stored"))[0] == 0
    line = f"fewstep distill recipe.yaml --set precision=bfloat16 --set data.source=latents --set teacher=stored {gan}"
    line += " --set checkpoint_every=2 --out student"
    assert run(line)[0] == 0
    last = place / "student" / "checkpoints" / "00000004"
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    whole = (last / weights).read_bytes()
    shutil.rmtree(last)
    assert run(f"{line} --resume")[0] == 0
    assert (last / weights).read_bytes() == whole


def test_latents_are_judged_by_the_very_images_that_they_were_made_of(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another column of captions, one image without one and one too small, as when they were encoded."""
    pictures = [picture(index, 16, 8 if index == 1 else 16) for index in range(NUM)]
    write_captioned(place / "pictures", pictures, [*(f"told {index}" for index in range(NUM - 1)), ""], "words")
    assert run(f"{LATENTS} latents --caption-column words --min-side 16")[0] == 0
    prompts: list[str] = []
    images = torch.cat([*captioned_batches(open_captioned_images(DataSettings(source="latents"), 16), 100, prompts)])
    assert sorted(prompts) == ["told 0", "told 2", "told 3", "told 4"]
    for prompt, image in zip(prompts, images, strict=True):
        assert torch.equal(image, pixels(int(prompt[-1])))


def test_latents_that_do_not_fit_are_refused(run: Run, place: Path) -> None:
    assert run(f"{LATENTS} latents")[0] == 0
    distill = "fewstep distill recipe.yaml --out x --set data.source=latents"
    for part, change, told in (
        ("vae", {"scaling_factor": 0.5}, ["latents of another autoencoder", "fewstep data latents"]),
        ("unet", {"sample_size": 16}, ["latents of another size", "[4, 8, 8]", "[4, 16, 16]"]),
    ):
        config = shutil.copytree(place / "teacher", place / f"other-{part}") / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        refused(run(f"{distill} --set teacher=other-{part}"), *told)
    shard = place / "latents" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(run(distill), "00000.safetensors", "damaged")
    (place / "latents" / "latents.json").write_text("{")
    refused(run(distill), "latents.json", "can't be read")
    assert not (place / "x").exists()


def test_only_text_models_have_latents(run: Run, place: Path, tiny_model) -> None:
    (place / "pixel").mkdir()
    tiny_model.save(place / "pixel")
    refused(run("fewstep data latents --model pixel --source pictures --out out"), "a pixel model has no latents")
    refused(run(f"{LATENTS} recipe.yaml"), "--out")
    refused(run(f"{LATENTS} out --min-aesthetic 5"), "aesthetic-column", "both or neither")
    assert not (place / "out").exists()


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_the_student_draws_for_prompts_and_the_critic_sees_captions(run: Run, place: Path, batches: list[dict]) -> None:
    assert run("fewstep distill recipe.yaml --out x --set prompts.source=prompts.txt --set embeddings.max_gb=0")[0] == 0
    for step, batch in enumerate(batches):
        images = batch_indices(NUM, 3, step, seed=0)
        prompts = batch_indices(5, 3, step, seed=0, purpose="prompts")
        assert [caption[:9] for caption in batch["caption"]] == [f"picture {index}" for index in images.tolist()]
        assert batch["prompt"] == {"caption": [f"prompt {index}" for index in prompts.tolist()]}
    drawn = {text for batch in batches for text in batch["prompt"]["caption"]}
    assert drawn == {f"prompt {index}" for index in range(5)}


def test_the_condition_of_fakes_is_that_of_the_prompts(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Samples, Samples]] = []
    spy(monkeypatch, DMD2, "critic_gradients", lambda self, fake, real, weight: seen.append((fake, real)))
    assert run("fewstep distill recipe.yaml --out x --set prompts.source=prompts.txt")[0] == 0
    model = load(place / "teacher")
    for step, (fake, real) in enumerate([each.condition["text"] for each in pair] for pair in seen):
        prompts = batch_indices(5, 3, step, seed=0, purpose="prompts").tolist()
        torch.testing.assert_close(fake, model.text_condition([f"prompt {index}" for index in prompts])["text"])
        assert not torch.equal(fake, real)


def test_with_prompts_and_without_gan_no_images_are_needed(run: Run, place: Path, batches: list[dict]) -> None:
    shutil.rmtree(place / "pictures")
    alone = "fewstep distill recipe.yaml --set prompts.source=prompts.txt --set data.source=null"
    assert run(f"{alone} --out x {NO_GAN}")[0] == 0
    assert all(set(batch) == {"prompt"} for batch in batches)
    code, told, _ = run(f"{alone} --out z")
    assert (code, "no images (data.source is null): prompts alone, and no GAN" in told) == (0, True)
    assert same(last_state(place / "x"), last_state(place / "z"))
    refused(
        run(f"{alone} --out y --set gan.critic_weight=0.1 --set gan.student_weight=0.1"),
        "data.source: null",
        "without GAN",
    )
    refused(run(f"fewstep distill recipe.yaml --out y --set data.source=null {NO_GAN}"), "data.source: null", "prompts")
    assert not (place / "y").exists()


def test_mistakes_in_prompts_are_one_line(run: Run, place: Path) -> None:
    (place / "empty.txt").write_text("\n")
    distill = "fewstep distill recipe.yaml --out x --set"
    refused(run(f"{distill} prompts.source=empty.txt"), "empty.txt: holds no prompts")
    refused(run(f"{distill} prompts.source=gone.csv"), "gone.csv", "can't be read")
    refused(run(f"{distill} prompts.source=pictures/metadata.csv --set prompts.column=words"), "no column 'words'")
    refused(run(f"{distill} prompts.source=a --set prompts.colum=b"), "prompts.colum: unknown key", "prompts.column'")
    assert not (place / "x").exists()


# --- kept embeddings -------------------------------------------------------------------------------------------------


def weights(run_folder: Path) -> list[torch.Tensor]:
    return list(load(find(run_folder).folder).denoiser.parameters())


PROMPTS = "--set prompts.source=prompts.txt"
SHOWN = [("sdxl", PROMPTS)]
MORE = [
    pytest.param(*each, marks=pytest.mark.slow)
    for each in (("sd", ""), ("sd", PROMPTS), ("sd", NO_GAN), ("sdxl", ""), ("sdxl", NO_GAN))
]


@pytest.mark.parametrize(("workshop", "settings"), SHOWN + MORE, indirect=["workshop"])
def test_kept_embeddings_make_the_same_student_as_fresh_ones(run: Run, place: Path, settings: str) -> None:
    assert run(f"fewstep distill recipe.yaml --out kept {settings}")[0] == 0
    assert run(f"fewstep distill recipe.yaml --out warm {settings}")[0] == 0
    assert run(f"fewstep distill recipe.yaml --out fresh {settings} --set embeddings.max_gb=0")[0] == 0
    kept, warm, fresh = (curves(place / name) for name in ("kept", "warm", "fresh"))
    assert kept == warm
    assert kept[0] == pytest.approx(fresh[0], rel=1e-4)  # rounding depends on a batch's size
    assert all(torch.equal(a, b) for a, b in zip(weights(place / "kept"), weights(place / "warm"), strict=True))


def test_kept_embeddings_are_the_fresh_ones_bit_for_bit(place: Path) -> None:
    model = load(place / "teacher")
    texts = ["a cat", "a mat", "a cat", "a prompt that is longer than twenty tokens"]
    kept = open_texts(texts, "prompts", model.conditioner, EmbeddingSettings(), place)
    ours = model.encode_condition(kept.batch(torch.tensor([1, 3, 2])))
    fresh = model.text_condition(["a cat", "a mat", texts[3]])  # in the batch in which they were embedded
    assert all(torch.equal(ours[key], fresh[key][[1, 2, 0]]) for key in fresh)
    for key, value in model.text_condition(["a mat"]).items():
        torch.testing.assert_close(ours[key][:1], value, rtol=1e-5, atol=1e-6)


def test_no_text_encoder_runs_in_a_step(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, in_steps, step = [], [], DMD2.step

    def marked(self: DMD2, *given: object, **named: object) -> dict:
        before = len(calls)
        metrics = step(self, *given, **named)
        in_steps.extend(calls[before:])
        return metrics

    for kind in (CLIPTextModel, CLIPTextModelWithProjection):
        spy(monkeypatch, kind, "forward", lambda *given, **named: calls.append(1))
    monkeypatch.setattr(DMD2, "step", marked)
    guided = "--set guidance_scale=2 --set prompts.source=prompts.txt"
    assert run(f"fewstep distill recipe.yaml --out kept {guided}")[0] == 0
    assert calls
    assert not in_steps
    assert run(f"fewstep distill recipe.yaml --out fresh {guided} --set embeddings.max_gb=0")[0] == 0
    assert in_steps  # the count would show it


def test_cut_captions_and_a_list_over_the_limit_are_told_once(run: Run, batches: list[dict]) -> None:
    told = [
        "pictures: 6 RGB images with captions of metadata.csv, 16x16; taken as they are",
        "1 of 6 captions are longer than 20 tokens and were cut",
    ]
    assert run("fewstep distill recipe.yaml --out kept/x") == (0, "\n".join([*told, ""]), "")
    assert all("text" in batch for batch in batches)
    batches.clear()
    assert run("fewstep distill recipe.yaml --out none/x --set embeddings.max_gb=0") == (0, "\n".join([*told, ""]), "")
    code, over, _ = run("fewstep distill recipe.yaml --out over/x --set embeddings.max_gb=1.0e-6")
    excess = "embeddings of 6 captions exceed embeddings.max_gb=1e-06; made at every step"
    assert (code, over.splitlines()) == (0, [*told, excess])
    assert not any("text" in batch for batch in batches)
    assert [Path(name, "embeddings").exists() for name in ("kept", "none", "over")] == [True, False, False]


def test_a_full_disk_is_told_before_anything_is_written(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(100))
        refused(run("fewstep distill recipe.yaml --out runs/x"), "of disk are free", "embeddings.max_gb=0")
    assert not (place / "runs").exists()
    assert run("fewstep distill recipe.yaml --out runs/x --set embeddings.max_gb=0")[0] == 0


def test_the_folder_of_embeddings_can_be_chosen(run: Run, place: Path) -> None:
    assert run("fewstep distill recipe.yaml --out runs/x --set embeddings.folder=kept")[0] == 0
    assert not (place / "runs" / "embeddings").exists()
    assert len(list((place / "kept").glob("embeddings-*/00000.safetensors"))) == 1
