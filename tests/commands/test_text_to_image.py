"""From SD or SDXL as a folder, a file or on the hub to a student of it; what checkpoints cost, and what is where."""

import json
import shutil
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from command_line import Tell, refused
from fake_hub import fake_hub, point_to
from fewstep.metric_table import cost, metrics_of
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.sampler import draw_noise, images_per_second
from fewstep.training import loop
from fewstep.training.dmd2 import DMD2
from fewstep.training.settings import EvaluationSettings
from image_sets import write_captioned
from single_files import original_weights, write_single_file
from steps import spy
from tiny_pipelines import TINY

CLOSED = "http://127.0.0.1:9"
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


RARER = [
    ("sd", "sd15-1step"),
    ("sdxl", "sd15-1step"),
    ("sd", "sdxl-1step"),
    ("sd", "sdxl-4step"),
    ("sdxl", "sdxl-4step"),
]


def kinds(*shown: tuple[str, ...], names: str = "workplace") -> pytest.MarkDecorator:
    """Of the kinds of pipelines those that are `shown`, the others when there is time."""
    more = [(kind, *each[1:]) for each in shown for kind in TINY if (kind, *each[1:]) not in shown]
    cases = [*shown, *(pytest.param(*each, marks=pytest.mark.slow) for each in more)]
    return pytest.mark.parametrize(("workplace", *names.split()[1:]), cases, indirect=["workplace"])


@pytest.fixture(scope="module", params=TINY)
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher as a folder, as a file and as a folder without weights; captioned pictures; a recipe."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = TINY[request.param](folder / "scratch")
    pipeline.save_pretrained(folder / "teacher")
    write_single_file(folder / "tuned.safetensors", original_weights(pipeline))
    shutil.copytree(folder / "teacher", folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    pictures = [Image.new("RGB", (20 + index, 24), (20 * index, 90, 200)) for index in range(12)]
    write_captioned(folder / "pictures", pictures, [f"a picture of {index}" for index in range(12)])
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_distil_sample_and_open_in_diffusers(tell: Tell, workplace: Path) -> None:
    assert tell("fewstep distill recipe.yaml --out student") == (0, "")
    (model_folder,) = (workplace / "student" / "checkpoints").glob("*/model")
    teacher, student = load(workplace / "teacher"), load(model_folder)
    assert student.timesteps == [999, 499]
    pairs = zip(teacher.denoiser.parameters(), student.denoiser.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert tell("fewstep sample student --prompt cat --num 2 --out cat.png") == (0, "")
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
        (picture,) = pipeline("cat", timesteps=[999, 499], guidance_scale=1.0, latents=noise[0]).images
    first = Image.open(workplace / "cat" / "00000.png")
    difference = torch.tensor(list(first.tobytes())) - torch.tensor(list(picture.tobytes()))
    assert difference.abs().max() <= 1


@kinds(("sdxl",))
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param("gan.student_weight=0 --set gan.critic_weight=0", marks=pytest.mark.slow),
        "student.num_timesteps=1 --set student.timesteps=[399]",
        "student.backward_simulation=false --set gan.student_weight=0 --set gan.critic_weight=0",
        "precision=bfloat16 --set evaluation.every=2 --set evaluation.time_share=1 --set evaluation.num_samples=64",
    ],
)
def test_other_recipes_run(tell: Tell, settings: str, tmp_path: Path) -> None:
    """Those of the paper; on real images without a GAN; judged in bfloat16."""
    assert tell(f"fewstep distill recipe.yaml --out {tmp_path}/run --set {settings}") == (0, "")


SIZES = "--set teacher=teacher --set data.source=pictures --set num_steps=2 --set batch_size=2"


@kinds(("sd",))
def test_grids_on_the_way_show_ones_own_prompts_in_order(
    tell: Tell, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is trained on; of a list that is longer than a grid its first."""
    (workplace / "mine.txt").write_text("a cat\n\nein Hund, 猫\n4\n")
    shown: list[tuple[str, ...]] = []
    drawn = loop.grid
    monkeypatch.setattr(loop, "grid", lambda images, columns, labels: shown.append(labels) or drawn(images, columns))
    line = f"fewstep distill recipe.yaml --set num_steps=1 --set samples.prompts=mine.txt --out {tmp_path}"
    assert tell(f"{line}/all --set grid_images=4") == (0, "")
    assert tell(f"{line}/two --set grid_images=2") == (0, "")
    assert shown == [["a cat", "ein Hund, 猫", "4", "a cat"], ["a cat", "ein Hund, 猫"]]


@pytest.mark.parametrize(("prompts", "told"), [("gone.txt", "can't be read"), ("list.pdf", ".csv")])
def test_prompts_of_grids_that_can_not_be_read_are_told_before_anything_is_done(
    tell: Tell, prompts: str, told: str, tmp_path: Path
) -> None:
    line = f"fewstep distill recipe.yaml --set samples.prompts={prompts} --set teacher=gone --out {tmp_path}/run"
    refused(tell(line), "samples.prompts", told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("workplace", "name"),
    [("sdxl", "sdxl-1step"), *(pytest.param(*each, marks=pytest.mark.slow) for each in RARER)],
    indirect=["workplace"],
)
def test_the_packaged_recipes_run_on_any_folder(
    tell: Tell, workplace: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = partial(images_per_second, min_seconds=0)
    monkeypatch.setattr("fewstep.commands.evaluate.images_per_second", quick)
    assert tell(f"fewstep distill {name} --out {tmp_path}/run {SIZES} --set init_from=null") == (0, "")
    assert tell(f"fewstep sample {tmp_path}/run --prompt cat --num 2 --out {tmp_path}/cat.png") == (0, "")
    assert tell(f"fewstep evaluate {tmp_path}/run --num-samples 100 --out {tmp_path}/judged") == (0, "")
    real, student = json.loads((tmp_path / "judged" / "results.json").read_text())
    (model,) = (tmp_path / "run" / "checkpoints").glob("*/model")
    timesteps = {"sd15-1step": [999], "sdxl-1step": [399], "sdxl-4step": [999, 749, 499, 249]}[name]
    assert load(model).timesteps == timesteps
    assert student["nfe"] == len(timesteps)
    assert student["fid"] > real["fid"] > 0
    grid, images = Image.open(tmp_path / "run" / "samples" / "00000002.png"), 8 if name.startswith("sd15") else 4
    assert grid.width == 68 * images + 4
    saved, teacher = (load(folder).pipeline.vae.state_dict() for folder in (model, workplace / "teacher"))
    assert all(torch.equal(value, teacher[key]) for key, value in saved.items())  # untouched by bfloat16


class Brightness(torch.nn.Module):
    """A feature network: uint8 (B, 3, H, W) -> (B, 3), the mean of each colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.mark.slow
@kinds(("sd",))
def test_the_two_stages_of_sd_with_judging_on_the_way(tell: Tell, workplace: Path, tmp_path: Path) -> None:
    """Stage 1 judges itself, stage 2 starts from any checkpoint of it with the GAN, and its student can be sampled."""
    features, first = tmp_path / "features.pt", tmp_path / "runs" / "first"
    torch.jit.script(Brightness()).save(features)
    judging = "--set evaluation.every=2 --set evaluation.time_share=1 --set evaluation.num_samples=12"
    judging += f" --set evaluation.features={features}"
    long = f"{SIZES.replace('num_steps=2', 'num_steps=6')} --set student_every=2 {judging}"
    assert tell(f"fewstep distill sd15-1step --out {first} {long} --set student.optimizer.lr=1e-2") == (0, "")
    lines = [json.loads(line) for line in (first / "evaluations.jsonl").read_text().splitlines()]
    steps = [(line["step"], line.keys() - {"step"}) for line in lines]
    names = metrics_of("features", "colours", "prompts")
    assert steps == [(step, {*names}) for step in (2, 4, 6)]
    assert len({line["fid"] for line in lines}) == 3
    kept = {line["step"] for name in {*names} & {*EvaluationSettings().keep} for line in [best(lines, name)]} | {4, 6}
    assert {int(path.name) for path in (first / "checkpoints").iterdir()} == kept
    teacher = load(workplace / "teacher").denoiser.state_dict()
    slow = "--set student.optimizer.lr=1e-12 --set student.optimizer.weight_decay=0"
    for choice, step in {"": 6, "@best-fid": best(lines, "fid")["step"], "@2": 2}.items():
        second = tmp_path / "runs" / f"second{choice}"
        answer = tell(f"fewstep distill sd15-1step-gan --out {second} {SIZES} {slow} --set init_from={first}{choice}")
        if step not in kept:
            refused(answer, "@2")
            continue
        assert answer == (0, "")
        models = (first / "checkpoints" / f"{step:08d}" / "model", second / "checkpoints" / "00000002" / "model")
        before, after = (load(model).denoiser.state_dict() for model in models)
        assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)  # stage 1 has no average
        assert any((teacher[name] - after[name]).abs().max() > 1e-3 for name in before)
        assert json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])["gan_critic_loss"] > 0
    assert tell(f"fewstep sample {tmp_path}/runs/second --prompt cat --num 2 --out {tmp_path}/cat.png") == (0, "")


def best(lines: list[dict], metric: str) -> dict:
    return min(lines, key=lambda line: cost(metric, line[metric]))


def test_judging_captions_by_a_classifier_is_refused(tell: Tell, tmp_path: Path) -> None:
    judged = "--set evaluation.every=2 --set evaluation.time_share=1 --set evaluation.features=classifier"
    refused(
        tell(f"fewstep distill recipe.yaml --out {tmp_path}/x {judged}"), "features: ", "give autoencoder or a file"
    )
    assert not (tmp_path / "x").exists()


def test_what_does_not_fit_is_refused_in_one_line(tell: Tell, workplace: Path, tmp_path: Path) -> None:
    refused(tell(f"fewstep distill recipe.yaml --out {tmp_path}/x --set data.caption_column=words"), "caption_column")
    refused(tell(f"fewstep distill recipe.yaml --out {tmp_path}/x --set student.timesteps=[999,0.5]"), "integers")
    index = json.loads((workplace / "teacher" / "model_index.json").read_text())
    shutil.copytree(workplace / "teacher", tmp_path / "other")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    refused(tell(f"fewstep sample {tmp_path}/other --prompt x"), "FluxPipeline", "StableDiffusionXLPipeline")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "unet": ["evil", "Network"]}))
    (tmp_path / "other" / "unet" / "evil.py").write_text("open('ran', 'w')\nclass Network: pass\n")
    refused(tell(f"fewstep sample {tmp_path}/other --prompt x"), "unet (evil)", "never run")
    assert not (workplace / "ran").exists()
    shutil.copytree(workplace / "teacher", tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "text_encoder")
    refused(tell(f"fewstep sample {tmp_path}/torn --prompt x"), "torn", "text_encoder")
    shutil.copytree(workplace / "pictures", tmp_path / "pictures")
    lines = (tmp_path / "pictures" / "metadata.csv").read_text().splitlines()
    (tmp_path / "pictures" / "metadata.csv").write_text("\n".join(lines[:-2]))
    refused(tell(f"fewstep distill recipe.yaml --out {tmp_path}/x --set data.source={tmp_path}/pictures"), "2 of 12")
    assert not (tmp_path / "x").exists()


# --- a file, or the hub ----------------------------------------------------------------------------------------------


def student_of(run_folder: Path) -> list[torch.Tensor]:
    (model,) = (run_folder / "checkpoints").glob("*/model")
    return list(load(model).denoiser.parameters())


@pytest.mark.slow
@kinds(("sdxl",))
def test_a_student_of_the_file_or_of_the_hub_is_the_student_of_the_folder(
    tell: Tell, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = "--set teacher=tuned.safetensors --set teacher_config=config"
    assert tell(f"fewstep distill recipe.yaml --out {tmp_path}/folder") == (0, "")
    assert tell(f"fewstep distill recipe.yaml --out {tmp_path}/file {file}") == (0, "")
    with fake_hub({"owner/name": workplace / "teacher"}, tmp_path / "cache", monkeypatch):
        code, _ = tell(f"fewstep distill recipe.yaml --out {tmp_path}/hub --set teacher=owner/name")  # shows progress
    assert code == 0
    expected = student_of(tmp_path / "folder")
    for source in ("file", "hub"):
        for ours, theirs in zip(student_of(tmp_path / source), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    line = f"fewstep distill recipe.yaml --out {tmp_path}/file --resume {file}"
    assert tell(line) == (0, "")
    refused(tell(f"{line} --set teacher_prediction_type=v_prediction"), "teacher_prediction_type")


def test_samples_of_the_file_are_samples_of_the_folder(tell: Tell, tmp_path: Path) -> None:
    options = "--prompt cat --num 2 --sampler ddim:2 --guidance 2 --out"
    assert tell(f"fewstep sample teacher {options} {tmp_path}/folder.png") == (0, "")
    assert tell(f"fewstep sample tuned.safetensors --config config {options} {tmp_path}/file.png") == (0, "")
    assert tell(f"fewstep sample teacher --prediction-type v_prediction {options} {tmp_path}/v.png") == (0, "")
    pixels = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in ("folder", "file", "v")}
    assert pixels["file"] == pixels["folder"] != pixels["v"]


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ("teacher=tuned.safetensors", ["tuned.safetensors", "teacher_config", "can't be reached"]),
        ("teacher=owner/name", ["owner/name", "can't be reached", "local folder"]),
        ("sample owner/name --prompt x", ["owner/name", "can't be reached", "name a local folder"]),
        ("teacher=gone.safetensors", ["gone.safetensors", "no such file"]),
        ("teacher=model.ckpt", ["model.ckpt", "only .safetensors"]),
        ("teacher=pictures/gone", ["pictures/gone", "neither a folder"]),
        ("teacher=tuned.safetensors --set teacher_config=pictures", ["pictures", "model_index.json"]),
        ("teacher=digits-teacher --set teacher_config=config", ["digits-teacher", "takes no teacher_config"]),
        ("teacher_config=config", ["teacher", "only a single .safetensors file"]),
        ("teacher_prediction_type=noise", ["teacher_prediction_type", "v_prediction"]),
    ],
)
def test_what_can_not_be_opened_is_one_line_before_anything_is_written(
    tell: Tell, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, fragments: list[str]
) -> None:
    point_to(CLOSED, tmp_path / "cache", monkeypatch)
    (workplace / "model.ckpt").write_bytes(b"\x80\x04N.")
    before = sorted(workplace.rglob("*"))
    line = settings if settings.startswith("sample") else f"distill recipe.yaml --out {tmp_path}/run --set {settings}"
    refused(tell(line), *fragments)
    assert not (tmp_path / "run").exists()
    assert sorted(workplace.rglob("*")) == before


# --- what checkpoints cost -------------------------------------------------------------------------------------------


UNET = "model/unet/diffusion_pytorch_model.safetensors"


def disk_use(folder: Path) -> int:
    """Bytes of the files in a folder, every inode once."""
    return sum({path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}.values())


@pytest.mark.slow
@kinds(("sdxl",))
def test_a_stopped_run_goes_on_to_the_same_weights_and_a_checkpoint_costs_the_unet_and_its_state(
    tell: Tell, tmp_path: Path
) -> None:
    out, line = tmp_path / "run", f"fewstep distill recipe.yaml --out {tmp_path}/run --set checkpoint_every=2"
    assert tell(line) == (0, "")
    first, second = sorted((out / "checkpoints").iterdir())
    whole = load(second / "model").denoiser.state_dict()
    shutil.rmtree(second)
    before = disk_use(out)
    assert tell(f"{line} --resume") == (0, "")
    assert second.name == "00000004"
    assert all(torch.equal(whole[key], value) for key, value in load(second / "model").denoiser.state_dict().items())
    added = disk_use(out) - before
    own = sum(file.stat().st_size for file in (second / UNET, *(second / "state").iterdir()))
    frozen = list((out / "frozen").rglob("*.safetensors"))
    assert own < added < own + 60_000  # tokenizers, settings, a grid
    assert sum(path.stat().st_size for path in frozen) > 90_000
    for path in frozen:
        for checkpoint in (first, second):
            assert (checkpoint / "model" / path.relative_to(out / "frozen")).stat().st_ino == path.stat().st_ino
    shutil.rmtree(out / "frozen")
    load(second / "model")


# --- what is where ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "in_steps"),
    [
        ("gan.student_weight=0 --set gan.critic_weight=0", set()),
        ("seed=1", {"autoencoder"}),
        ("embeddings.max_gb=0", {"autoencoder", "conditioner"}),
    ],
)
def test_a_run_uses_in_its_steps_only_what_they_need_and_releases_the_rest(
    tell: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, in_steps: set[str]
) -> None:
    events: list[str] = []
    step = DMD2.step

    def used(model: LatentModel, part: torch.nn.Module) -> None:
        events.append("autoencoder" if part is model.autoencoder else "conditioner")

    spy(monkeypatch, LatentModel, "_here", used)
    spy(monkeypatch, LatentModel, "release", lambda model: events.append("release"))
    tell_step = lambda *given, **named: (events.append("step"), step(*given, **named), events.append("done"))[1]  # noqa: E731
    monkeypatch.setattr(DMD2, "step", tell_step)
    assert tell(f"fewstep distill recipe.yaml --out {tmp_path}/run --set {settings}") == (0, "")
    before, *steps = " ".join(events).split("step")
    assert before.split()[-1] == "release"
    assert ("autoencoder" in before) == ("autoencoder" in in_steps)  # for the teacher's errors, of real images
    found = {event for part in steps for event in part.split("done")[0].split()}
    assert found == in_steps  # embeddings are kept, unless there is no room for them
    # the grid and the panel, decoded behind the text encoders
    behind = [event for event, _ in groupby(steps[-1].split("done")[1].split())]
    assert behind == [*2 * ["conditioner", "release", "autoencoder"], "release"]
