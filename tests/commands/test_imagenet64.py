"""The paper's longer run on ImageNet-64, in small, on real images: import, pairs, stage A, best FID, stage B, export.

Everything goes through the command line, by the packaged recipes in their own run folders; only sizes are changed.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from command_line import Tell, fewstep, refused
from edm_files import small_network, write_checkpoint
from fewstep.commands.distill import open_batches
from fewstep.commands.importing import import_edm
from fewstep.embedded.sources import digits
from fewstep.metric_table import metrics_of
from fewstep.models.loading.pretrained import load
from fewstep.models.sampler import Sampler, draw_noise, sample
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.checkpoint import checkpoints, load_state
from fewstep.runtime.runs import best_steps, find
from fewstep.runtime.tracking import read_metrics
from image_sets import encoded, write_edm_zip

FASHION = Path(__file__).parents[2] / ".." / "shared" / "data" / "fashion_mnist_test.parquet"
NUM_IMAGES, SIZE = 200, 8
A, B, LARGE, SHORT = (f"imagenet64-1step{name}" for name in ("-long-a", "-long", "-large", ""))
Command = Callable[[str], None]


class Brightness(torch.nn.Module):
    """A feature network: uint8 (B, 3, H, W) -> (B, 8), the mean brightness of eight rows."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=1).mean(dim=2)[:, ::2]


def write_data(path: Path) -> None:
    """Real grey pictures of ten classes, Fashion-MNIST where it is, else the digits, as EDM's zip."""
    if FASHION.is_file():
        rows = datasets.Dataset.from_parquet(str(FASHION)).select(range(NUM_IMAGES))
        images, labels = list(rows["image"]), list(rows["label"])
    else:
        arrays = digits().fetch(torch.arange(NUM_IMAGES))[:, 0].numpy()
        images, labels = list(map(Image.fromarray, arrays)), digits().labels[:NUM_IMAGES].tolist()
    files = {f"{i // 100:05d}/img{i:08d}.png": encoded(image) for i, image in enumerate(images)}
    write_edm_zip(path, files, [[name, label] for name, label in zip(files, labels, strict=True)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory: what the recipes' placeholders name, and a feature network."""
    folder = tmp_path_factory.mktemp("imagenet64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        (folder / "data").mkdir()
        write_data(folder / "data" / "imagenet-64x64.zip")
    network = small_network(img_resolution=SIZE, img_channels=1, label_dim=10, channel_mult=[1, 1])
    write_checkpoint(folder / "edm.pkl", network)  # attention on its second level; ADM has 128 channels at least
    import_edm(folder / "edm.pkl", folder / "models" / "edm-imagenet-64")
    torch.jit.script(Brightness()).save(folder / "features.pt")
    return folder


@pytest.fixture(scope="module")
def stage_a(place: Path) -> Path:
    """The run of stage A, with pairs of an imported teacher."""
    pairs = "--set regression_weight=0.25 --set regression.pairs=pairs --set regression.sampler=heun:2"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        patch.setattr("fewstep.evaluation.judge.MAX_CLASSES", 9)
        for line in (
            "import edm edm.pkl --out teacher",
            "data pairs --teacher teacher --num 20 --sampler heun:2 --out pairs",
            f"distill {A} {SIZES} {FAST} {JUDGING} {pairs} --set teacher=teacher --set checkpoint_every=2",
        ):
            assert fewstep(line)[::2] == (0, "")
    return place / "runs" / A


@pytest.fixture
def workplace(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ten classes are too many for a classifier, as a thousand are."""
    monkeypatch.setattr("fewstep.commands.evaluate.images_per_second", lambda *args: 1.0)
    monkeypatch.setattr("fewstep.evaluation.judge.MAX_CLASSES", 9)
    return place


@pytest.fixture
def command(tell: Tell) -> Command:
    """Runs a command line in the working directory, and wants it to end well."""

    def well(line: str) -> None:
        assert tell(line) == (0, "")

    return well


SIZES = "--set num_steps=6 --set batch_size=8 --set student_every=2 --set grid_images=4"
JUDGING = (
    "--set evaluation.every=2 --set evaluation.time_share=1 --set evaluation.num_samples=60"
    " --set evaluation.features=features.pt"
)
FAST = "--set student.optimizer.lr=1e-4 --set student.optimizer.warmup_steps=0"
SLOW = "--set student.optimizer.lr=1e-12 --set student.optimizer.weight_decay=0"


def parameters(folder: Path) -> Tensor:
    return torch.cat([p.detach().flatten() for p in load(folder).denoiser.parameters()])


@pytest.mark.slow
def test_import_pairs_two_stages_and_export(command: Command, place: Path, stage_a: Path) -> None:
    assert read_metrics(stage_a / "metrics.jsonl")[-1]["regression_loss"] > 0
    lines = read_metrics(stage_a / "evaluations.jsonl")
    assert [(line["step"], line.keys() - {"step"}) for line in lines] == [
        (step, {*metrics_of("features", "colours", "prompts")}) for step in (2, 4, 6)
    ]
    assert len({line["fid"] for line in lines}) == 3
    assert all("gan_loss" not in line for line in read_metrics(stage_a / "metrics.jsonl"))

    emas = "--set student.ema_decay=[0.3,0.1]"
    command(f"distill {B} {SIZES} {FAST} {JUDGING} {emas}")
    assert read_metrics(place / "runs" / B / "metrics.jsonl")[-1]["gan_critic_loss"] > 0
    judged = read_metrics(place / "runs" / B / "evaluations.jsonl")
    assert judged[-1].keys() >= {"fid", "ema0.1_fid"}
    best = place / "runs" / B / "checkpoints" / f"{best_steps(judged)['ema0.1_fid']:08d}"
    assert find(f"{place}/runs/{B}@best-ema0.1_fid").folder == best / "model-ema0.1"

    command(f"evaluate runs/{A}@best-fid runs/{B} --features features.pt --num-samples 100 --out table")
    rows = json.loads((place / "table" / "results.json").read_text())
    assert [row["model"] for row in rows] == ["real", f"{A}@best-fid", B, f"{B} ema0.1"]
    assert len({row["fid"] for row in rows}) == 4
    assert rows[1]["nfe"] == 1
    assert rows[1].get("accuracy") is None  # of a classifier that there is not

    command(f"export runs/{B}@best-ema0.1_fid --to diffusers exported")
    pipeline = DiffusionPipeline.from_pretrained(place / "exported", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    student = load(best / "model-ema0.1")
    noise = draw_noise(student, 1, 0, 3, seed=0)
    ours = sample(student, Sampler("student", 1), noise, {"label": torch.tensor([3, 0, 7])})
    theirs = pipeline(class_labels=[3, 0, 7], latents=noise[0], output_type="latent").images
    assert (theirs - ours).abs().max() <= 1e-5 * max(1, ours.abs().max())


def test_stage_b_starts_from_the_best_of_stage_a(command: Command, stage_a: Path, tmp_path: Path) -> None:
    """The checkpoint of the best FID, which here is neither the newest nor the first: the lines are put so."""
    shutil.copytree(stage_a, tmp_path / A, copy_function=os.link)
    (tmp_path / A / "evaluations.jsonl").unlink()
    lines = [{"step": 4, "fid": 1.0}, {"step": 6, "fid": 2.0}]
    (tmp_path / A / "evaluations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command(f"distill {B} {SIZES} {SLOW} --out {tmp_path}/{B} --set num_steps=2")
    started = parameters(checkpoints(tmp_path / B)[-1] / "model")
    fourth, sixth = (parameters(tmp_path / A / "checkpoints" / f"{step:08d}" / "model") for step in (4, 6))
    assert (started - fourth).abs().max() < 1e-6
    assert (started - sixth).abs().max() > 5e-5  # an update of Adam at this rate
    state = load_state(find(f"{tmp_path}/{B}").checkpoint)["method"]
    assert state["student_optimizer"]["schedule"]["last_epoch"] == 1  # anew


def test_real_images_are_decoded_only_for_the_gan(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch of 280 is a tenth of a second's work per step, and 410,000 steps of stage A would not look at it."""
    monkeypatch.chdir(place)
    model = load(place / "models" / "edm-imagenet-64")
    batches = [open_batches(load_recipe(name, ["batch_size=4"]), model, place)[0](0, range(4)) for name in (A, B)]
    assert [batch.keys() for batch in batches] == [set(), {"image", "label"}]


@pytest.mark.parametrize("name", [SHORT, LARGE])
def test_the_other_recipes_run_and_give_a_one_step_student(command: Command, name: str, tmp_path: Path) -> None:
    command(f"distill {name} {SIZES} --set num_steps=2 --out {tmp_path}/run")
    (checkpoint,) = checkpoints(tmp_path / "run")
    assert load(checkpoint / "model").timesteps == [80]
    emas = {"model-ema0.99995", "model-ema0.9996"} if name == LARGE else set()
    assert {path.name for path in checkpoint.iterdir()} == {"model", "state", "manifest.json"} | emas


def test_stage_a_says_that_it_needs_a_feature_network(tell: Tell, place: Path) -> None:
    wanted = "features: the classifier serves 1 to 9 classes, the model has 10; give a TorchScript file"
    refused(tell(f"distill {A} --out new {SIZES}"), wanted, "evaluation.features")
    assert not (place / "new").exists()


# --- the recipes' numbers --------------------------------------------------------------------------------------------

PAPER = {  # spec 2: steps, batch, rate, student's and critic's GAN weight
    SHORT: (200_000, 280, 2e-6, 3e-3, 1e-2),
    A: (410_000, 280, 2e-6, 0, 0),
    B: (150_000, 280, 5e-7, 3e-3, 1e-2),
    LARGE: (600_000, 512, 2e-6, 3e-3, 1e-2),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_recipes_hold_the_published_numbers(name: str) -> None:
    recipe = load_recipe(name)
    rates = recipe.student.optimizer.lr, recipe.critic.optimizer.lr
    gan = recipe.gan.student_weight, recipe.gan.critic_weight
    assert (recipe.num_steps, recipe.batch_size, rates[0], *gan) == PAPER[name]
    assert rates[0] == rates[1]
    for rule in (recipe.student.optimizer, recipe.critic.optimizer):
        assert (rule.weight_decay, rule.clip_norm, rule.betas, rule.decay) == (0.01, 10, (0.9, 0.999), "constant")
        assert rule.eps == 1e-8
    levels = [(noise.min_index, noise.max_index) for noise in (recipe.dm.noise, recipe.critic.noise)]
    assert levels == [(20, 980), (0, 999)]
    assert (recipe.student.timesteps, recipe.student_every, recipe.precision) == ([80], 5, "bfloat16")
    assert recipe.guidance_scale == recipe.dm.weight == 1
    assert recipe.student.ema_decay == ([0.9999, 0.99995, 0.9996] if name == LARGE else 0)
    assert recipe.init_from == (f"{A}@best-fid" if name == B else None)
