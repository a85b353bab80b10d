"""From a diffusers folder of SD or SDXL to a student of it, through the command line."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from fewstep.cli import main
from fewstep.models.loading.pretrained import load
from fewstep.models.sampler import draw_noise
from tiny_pipelines import TINY

RECIPE = """
kind: distill
teacher: teacher
guidance_scale: 1.75
data: {source: pictures}
num_steps: 4
batch_size: 3
student_every: 2
student: {num_timesteps: 2, optimizer: {lr: 1e-3}}
critic: {optimizer: {lr: 1e-3}}
"""


@pytest.fixture(scope="module", params=TINY)
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder, a folder of captioned pictures, and a recipe."""
    folder = tmp_path_factory.mktemp(request.param)
    TINY[request.param](folder / "scratch").save_pretrained(folder / "teacher")
    (folder / "pictures").mkdir()
    with (folder / "pictures" / "metadata.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for index in range(12):
            Image.new("RGB", (20 + index, 24), (20 * index, 90, 200)).save(folder / "pictures" / f"{index}.png")
            rows.writerow([f"{index}.png", f"a picture of {index}"])
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Runs a command line in the work place; gives exit code and standard error."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))

    def command(line: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", line.split())
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return command


def refused(answer: tuple[int, str], *fragments: str) -> None:
    code, error = answer
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert all(fragment in error for fragment in fragments), error


def test_distil_sample_and_open_in_diffusers(run, workplace: Path) -> None:
    assert run("fewstep distill recipe.yaml --out student") == (0, "")
    (model_folder,) = (workplace / "student" / "checkpoints").glob("*/model")
    teacher, student = load(workplace / "teacher"), load(model_folder)
    assert student.timesteps == [999, 499]
    pairs = zip(teacher.denoiser.parameters(), student.denoiser.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert run("fewstep sample student --prompt cat --num 2 --out cat.png") == (0, "")
    assert Image.open(workplace / "cat.png").width > 32
    kind = StableDiffusionXLPipeline if (model_folder / "text_encoder_2").exists() else StableDiffusionPipeline
    pipeline = kind.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    noise = draw_noise(student, 2, 0, 1, seed=0)
    stock = iter(noise[1:])

    def ours(*args, **kwargs) -> torch.Tensor:  # the scheduler renoises with our noise
        return next(stock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", ours)
        picture = pipeline("cat", timesteps=[999, 499], guidance_scale=1.0, latents=noise[0], output_type="pil").images[
            0
        ]
    grid = Image.open(workplace / "cat.png")
    scale = max(1, 48 // 16)
    first = grid.resize((grid.width // scale, grid.height // scale), Image.Resampling.NEAREST).crop((1, 1, 17, 17))
    difference = torch.tensor(list(first.tobytes())) - torch.tensor(list(picture.tobytes()))
    assert difference.abs().max() <= 1


@pytest.mark.parametrize(
    "settings",
    ["gan.student_weight=0 --set gan.critic_weight=0", "student.num_timesteps=1 --set student.timesteps=[399]"],
)
def test_the_other_recipes_of_the_paper_run(run, settings: str, tmp_path: Path) -> None:
    assert run(f"fewstep distill recipe.yaml --out {tmp_path}/run --set {settings}") == (0, "")


SIZES = "--set teacher=teacher --set data.source=pictures --set num_steps=2 --set batch_size=2"


@pytest.mark.parametrize("name", ["sd15-1step", "sdxl-1step", "sdxl-4step"])
def test_the_packaged_recipes_run_on_any_folder(run, workplace: Path, name: str, tmp_path: Path) -> None:
    assert run(f"fewstep distill {name} --out {tmp_path}/run {SIZES} --set init_from=null") == (0, "")
    assert run(f"fewstep sample {tmp_path}/run --prompt cat --num 2 --out {tmp_path}/cat.png") == (0, "")
    assert run(f"fewstep evaluate {tmp_path}/run --num-samples 100 --out {tmp_path}/judged") == (0, "")
    real, student = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert student["nfe"] == len(load(next((tmp_path / "run" / "checkpoints").glob("*/model"))).timesteps)
    assert student["fid"] > real["fid"] > 0
    (model,) = (tmp_path / "run" / "checkpoints").glob("*/model")
    assert load(model).timesteps == {"sd15-1step": [999], "sdxl-1step": [399], "sdxl-4step": [999, 749, 499, 249]}[name]
    grid, images = Image.open(tmp_path / "run" / "samples" / "00000002.png"), 8 if name.startswith("sd15") else 4
    assert grid.size == ((17 * images + 1) * 3, 18 * 3)
    saved, teacher = (load(folder).pipeline.vae.state_dict() for folder in (model, workplace / "teacher"))
    assert all(torch.equal(value, teacher[key]) for key, value in saved.items())  # untouched by bfloat16


class Brightness(torch.nn.Module):
    """A feature network: uint8 (B, 3, H, W) -> (B, 3), the mean of each colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.mark.parametrize("choice", ["", "@best-fid", "@2"])
def test_the_two_stages_of_sd_with_judging_on_the_way(run, workplace: Path, choice: str, tmp_path: Path) -> None:
    """Stage 1 judges itself, stage 2 starts from it with the GAN, and its student can be sampled."""
    features, first, second = tmp_path / "features.pt", tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    torch.jit.script(Brightness()).save(features)
    judging = f"--set evaluation.every=2 --set evaluation.num_samples=12 --set evaluation.features={features}"
    long = f"{SIZES.replace('num_steps=2', 'num_steps=6')} --set student_every=2 {judging}"
    assert run(f"fewstep distill sd15-1step --out {first} {long} --set student.optimizer.lr=1e-2") == (0, "")
    lines = [json.loads(line) for line in (first / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line.keys() - {"step"}) for line in lines] == [
        (step, {"fid", "precision", "recall"}) for step in (2, 4, 6)
    ]
    assert len({line["fid"] for line in lines}) == 3
    kept = {line["step"] for name in ("fid", "precision", "recall") for line in [best(lines, name)]} | {4, 6}
    assert {int(path.name) for path in (first / "checkpoints").iterdir()} == kept
    step = {"": 6, "@best-fid": best(lines, "fid")["step"], "@2": 2}[choice]
    if step not in kept:
        refused(run(f"fewstep distill sd15-1step-gan --out {second} {SIZES} --set init_from={first}{choice}"), "@2")
        return
    slow = "--set student.optimizer.lr=1e-12 --set student.optimizer.weight_decay=0"
    assert run(f"fewstep distill sd15-1step-gan --out {second} {SIZES} {slow} --set init_from={first}{choice}") == (
        0,
        "",
    )
    before, after = (
        load(folder / "model").denoiser.state_dict()
        for folder in (first / "checkpoints" / f"{step:08d}", second / "checkpoints" / "00000002")
    )
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)  # stage 1 has no average
    teacher = load(workplace / "teacher").denoiser.state_dict()
    assert any((teacher[name] - after[name]).abs().max() > 1e-3 for name in before)
    assert json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])["gan_critic_loss"] > 0
    assert run(f"fewstep sample {second} --prompt cat --num 2 --out {tmp_path}/cat.png") == (0, "")


def best(lines: list[dict], metric: str) -> dict:
    return (min if metric == "fid" else max)(lines, key=lambda line: line[metric])


def test_judging_captions_by_a_classifier_is_refused(run, tmp_path: Path) -> None:
    answer = run(
        f"fewstep distill recipe.yaml --out {tmp_path}/x --set evaluation.every=2 --set evaluation.features=classifier"
    )
    refused(answer, "features: ", "give autoencoder or a file")
    assert not (tmp_path / "x").exists()


def test_a_stopped_run_goes_on_to_the_same_weights(run, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(f"fewstep distill recipe.yaml --out {whole} --set checkpoint_every=2") == (0, "")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "00000004")
    assert run(f"fewstep distill recipe.yaml --out {parts} --set checkpoint_every=2 --resume") == (0, "")
    ours, theirs = (load(folder / "checkpoints" / "00000004" / "model") for folder in (whole, parts))
    pairs = zip(ours.denoiser.parameters(), theirs.denoiser.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_does_not_fit_is_refused_in_one_line(run, workplace: Path, tmp_path: Path) -> None:
    refused(run("fewstep sample teacher"), "--prompt")
    refused(run("fewstep sample teacher --prompt x --label 3"), "no --class")
    refused(run(f"fewstep distill recipe.yaml --out {tmp_path}/x --set data.caption_column=words"), "caption_column")
    refused(run(f"fewstep distill recipe.yaml --out {tmp_path}/x --set student.timesteps=[999,0.5]"), "integers")
    index = json.loads((workplace / "teacher" / "model_index.json").read_text())
    shutil.copytree(workplace / "teacher", tmp_path / "other")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    refused(run(f"fewstep sample {tmp_path}/other --prompt x"), "FluxPipeline", "StableDiffusionXLPipeline")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "unet": ["evil", "Network"]}))
    (tmp_path / "other" / "unet" / "evil.py").write_text("open('ran', 'w')\nclass Network: pass\n")
    refused(run(f"fewstep sample {tmp_path}/other --prompt x"), "unet (evil)", "never run")
    assert not (workplace / "ran").exists()
    shutil.copytree(workplace / "teacher", tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "text_encoder")
    refused(run(f"fewstep sample {tmp_path}/torn --prompt x"), "torn", "text_encoder")
    shutil.copytree(workplace / "pictures", tmp_path / "pictures")
    lines = (tmp_path / "pictures" / "metadata.csv").read_text().splitlines()
    (tmp_path / "pictures" / "metadata.csv").write_text("\n".join([*lines[:-2], "4.png,", "5.png,"]))
    refused(run(f"fewstep distill recipe.yaml --out {tmp_path}/x --set data.source={tmp_path}/pictures"), "2 of 12")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "settings",
    [
        "student.backward_simulation=false --set gan.student_weight=0 --set gan.critic_weight=0",
        "precision=bfloat16 --set evaluation.every=2 --set evaluation.num_samples=12",
    ],
)
def test_what_needs_real_images_without_a_gan_or_judges_in_bfloat16_runs(run, settings: str, tmp_path: Path) -> None:
    assert run(f"fewstep distill recipe.yaml --out {tmp_path}/run --set {settings}") == (0, "")
