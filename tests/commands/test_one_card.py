"""A LoRA of one's own single file by one command, from prompts alone or with pictures, up to the file for a UI."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from command_line import fewstep, refused
from fewstep.commands.distill import distill
from fewstep.diffusion.parameterizations import v
from fewstep.errors import Interrupted
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.checkpoint import checkpoints
from fewstep.training.dmd2 import DMD2
from image_sets import picture, write_captioned
from single_files import original_weights, write_single_file
from steps import curves, interrupt_at, last_state, same, spy
from tiny_pipelines import TINY

WHOLE = ["teacher=my.safetensors", "teacher_config=models/sdxl", "prompts.source=prompts.txt"]
SMALL = [
    "lora.rank=4",
    "num_steps=4",
    "batch_size=2",
    "accumulate=2",
    "checkpoint_every=2",
    "student_every=2",
    "grid_images=2",
]
SMALL += ["student.optimizer.lr=1e-2", "student.optimizer.warmup_steps=0"]  # so that it moves in two updates


def command(*settings: str) -> str:
    return "distill sdxl-4step-lora " + " ".join(f"--set {setting}" for setting in (*WHOLE, *SMALL, *settings))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of SDXL in 16 bits that predict noise, or v with zero terminal SNR, and what goes with them."""
    pipeline = TINY["sdxl"](tmp_path / "scratch")
    pipeline.save_pretrained(tmp_path / "models" / "sdxl")
    weights = {name: tensor.half() for name, tensor in original_weights(pipeline).items()}
    for name, flags in (("my", ()), ("noob", ("v_pred", "ztsnr")), ("odd", ("ztsnr",))):
        write_single_file(tmp_path / f"{name}.safetensors", weights, *flags)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\ntwo birds\n")
    write_captioned(tmp_path / "pictures", [picture(index, 16, 16) for index in range(6)], ["a cat", "a dog"] * 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=float)


@pytest.mark.parametrize("file", [pytest.param("my", marks=pytest.mark.slow), "noob"])
def test_from_one_file_to_a_lora_for_a_ui(place: Path, file: str) -> None:
    given = f"teacher={file}.safetensors"
    code, told, errors = fewstep(command(given))
    assert (code, "prompts alone, and no GAN" in told) == (0, True), errors
    run = place / "runs" / "sdxl-4step-lora"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["gan"]["student_weight"], recipe["lora"]["rank"], recipe["precision"]) == (0, 4, "bfloat16")

    stopped = load_recipe("sdxl-4step-lora", [*WHOLE, *SMALL, given, "log_every=1"])
    with pytest.raises(Interrupted):
        distill(stopped, place / "stopped", report=interrupt_at(1))
    assert fewstep(f"{command(given)} --out stopped --resume")[0] == 0  # the teacher is told from others as before
    assert same(last_state(run), last_state(place / "stopped"))
    model = load(checkpoints(run)[-1] / "model")
    assert (model.denoiser.parameterization is v) == (file == "noob")
    assert model.denoiser.schedule.alphas_cumprod[-1].item() == pytest.approx(0 if file == "noob" else 0.0047, abs=1e-4)
    assert torch.isfinite(torch.cat([weight.flatten() for weight in model.denoiser.parameters()])).all()

    assert fewstep("export runs/sdxl-4step-lora my-4step.safetensors --to lora")[0] == 0
    with safe_open("my-4step.safetensors", framework="pt") as lora:
        header, names = lora.metadata(), list(lora.keys())
    assert header["modelspec.prediction_type"] == ("v" if file == "noob" else "epsilon")
    assert json.loads(header["fewstep.timesteps"]) == [999, 749, 499, 249]
    assert any(name.endswith(".alpha") for name in names)
    with_lora = f"sample {given.partition('=')[2]} --config models/sdxl --lora my-4step.safetensors"
    drawn = {"run": "sample runs/sdxl-4step-lora", "lora": with_lora, "none": f"{with_lora}:0"}
    for name, line in drawn.items():
        assert fewstep(f"{line} --prompt 'a cat' --out {name}.png")[0] == 0
    ours, theirs, base = (pixels(f"{name}.png") for name in drawn)
    # The run's base is rounded to bfloat16, the file's is not.
    assert np.abs(ours - theirs).mean() < 0.2 * np.abs(base - theirs).mean()


def test_pictures_bring_the_gan_by_one_setting(place: Path) -> None:
    code, told, errors = fewstep(command("data.source=pictures", "prompts=null", "num_steps=2"))
    assert (code, "no GAN" in told) == (0, False), errors
    recipe = yaml.safe_load((place / "runs" / "sdxl-4step-lora" / "recipe.yaml").read_text())
    assert (recipe["gan"]["student_weight"], recipe["gan"]["critic_weight"]) == (5e-3, 1e-2)
    assert "gan_critic_loss" in curves(place / "runs" / "sdxl-4step-lora")[-1]


def test_what_can_not_be_is_one_line_before_anything_is_made(place: Path) -> None:
    refused(fewstep(command("prompts=null")), "data.source: null", "prompts.source")
    refused(fewstep(command("teacher=odd.safetensors")), "student.timesteps: 999 is pure noise", "v_prediction")
    refused(fewstep(command("teacher=odd.safetensors", "lora.rank=400")), "lora.rank: 400")
    assert not (place / "runs" / "sdxl-4step-lora").exists()


@pytest.mark.parametrize("name", ["sdxl-4step-lora-16gb", "sdxl-4step-lora-12gb", "sd15-4step-lora", "sd15-1step-lora"])
def test_other_cards_and_sd15_are_the_same_command(name: str) -> None:
    alone, pictured = (load_recipe(name, [setting]) for setting in ("prompts.source=x", "data.source=x"))
    assert alone.gan.student_weight == alone.gan.critic_weight == 0
    assert (pictured.gan.student_weight, pictured.gan.critic_weight) == (5e-3 if "sdxl" in name else 1e-3, 1e-2)
    assert alone.precision == "bfloat16"
    assert alone.lora.targets == ("official" if "16gb" in name else "lean")
    # Adam's first steps are of one size in all of them, lr alpha / rank sqrt(rank), but for one step, which has more
    size = alone.student.optimizer.lr * alone.lora.alpha / alone.lora.rank**0.5
    assert size == pytest.approx(5e-5 * (2 if "1step" in name else 1))


# --- what is on the device in a step ---------------------------------------------------------------------------------


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[set[str]]]:
    """What surrounds the network and was used since it was last sent away, at both ends of each step."""
    there: set[str] = set()
    seen: list[set[str]] = []
    spy(monkeypatch, LatentModel, "_here", lambda model, part: there.add(type(part).__name__))
    spy(monkeypatch, LatentModel, "release", lambda model: there.clear())
    step = DMD2.step

    def watched(*given: object, **named: object) -> dict:
        seen.append(set(there))
        metrics = step(*given, **named)
        seen.append(set(there))
        return metrics

    monkeypatch.setattr(DMD2, "step", watched)
    return lambda: seen


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], [set()]),  # prompts are embedded once and kept
        pytest.param(["data.source=latents", "prompts=null"], [set()], marks=pytest.mark.slow),
        # embedded in every step
        pytest.param(["embeddings.max_gb=0"], [set(), {"SDXLText"}], marks=pytest.mark.slow),
        (["data.source=pictures"], [set(), {"AutoencoderKL"}]),  # no latents
    ],
)
def test_a_step_has_no_text_encoder_and_no_autoencoder_on_the_device(
    place: Path, on_device: Callable[[], list[set[str]]], settings: list[str], expected: list[set[str]]
) -> None:
    if "data.source=latents" in settings:
        line = "data latents --model my.safetensors --config models/sdxl --source pictures --out latents"
        assert fewstep(line)[0] == 0
    assert fewstep(command(*settings, "sample_every=2"))[0] == 0  # the first grid is drawn behind the second step
    seen = on_device()
    assert len(seen) == 8
    assert {frozenset(each) for each in seen} == {frozenset(each) for each in expected}
    assert seen[0] == seen[4] == set()  # at the beginning, and behind a grid


def test_a_grid_is_decoded_without_text_encoders_on_the_device(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[str] = []
    decoded: list[list[str]] = []
    spy(monkeypatch, LatentModel, "_here", lambda model, part: there.append(type(part).__name__))
    spy(monkeypatch, LatentModel, "release", lambda model: there.clear())
    spy(monkeypatch, LatentModel, "decode", lambda model, x0: decoded.append([*there]))
    assert fewstep(command("sample_every=2"))[0] == 0
    assert len(decoded) == 2 * (1 + 11)  # a grid, and a panel: the samples, and at five levels two predictions of them
    assert {name for names in decoded for name in names} == {"AutoencoderKL"}
