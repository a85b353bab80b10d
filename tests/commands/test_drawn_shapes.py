"""The captioned shapes through the command line: autoencoder, latents, teacher, student, sampling and judging."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from command_line import Tell, fewstep, refused
from fewstep.embedded import shapes
from fewstep.embedded.shape_checker import ATTRIBUTES
from fewstep.evaluation import judge as judges
from fewstep.metric_table import metrics_of
from fewstep.models.autoencoder import load_autoencoder
from fewstep.models.loading.pretrained import load
from fewstep.recipes import loading
from fewstep.runtime.runs import find

NUM_PICTURES = 48
SMALL = "--set num_steps=2 --set batch_size=4 --set device=cpu"
VAE = f"{SMALL} --set model.block_out_channels=[8,8,16] --set model.norm_num_groups=4"
UNET = f"{SMALL} --set model.block_out_channels=[16,32] --set model.norm_num_groups=8 --set model.attention_head_dim=8"
ON_LATENTS = "--set model.autoencoder=runs/vae --set data.source=latents"
STUDENT = f"{SMALL} --set student_every=2 --set teacher=runs/teacher --set data.source=latents"


def shrink(patch: pytest.MonkeyPatch) -> None:
    """A few pictures and prompts, and no time spent on measuring speed."""
    patch.setattr(shapes, "shapes", partial(shapes.shapes, length=NUM_PICTURES))
    prompts = judges.evaluation_prompts()[:10]  # every fourth has two objects
    patch.setattr(judges, "evaluation_prompts", lambda: prompts)
    patch.setattr("fewstep.commands.evaluate.images_per_second", lambda *arguments: 7.0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/vae, latents, runs/teacher on those, runs/student of it, and runs/digits, which are no pictures of text."""
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shrink(patch)
        for line in (
            f"teach shapes-autoencoder --out runs/vae {VAE}",
            "data latents --model runs/vae --source shapes --out latents --device cpu",
            f"teach shapes-teacher --out runs/teacher {UNET} {ON_LATENTS}",
            f"distill shapes-4step --out runs/student --set init_from=null {STUDENT}",
            f"teach digits-teacher --out runs/digits {SMALL}",
        ):
            assert fewstep(line)[0] == 0, line
    return folder


@pytest.fixture
def tell(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> Tell:
    shrink(monkeypatch)
    return tell


def test_the_teacher_has_the_runs_autoencoder_and_its_latents(workplace: Path) -> None:
    alone = load_autoencoder(find(workplace / "runs" / "vae").folder)
    for name in ("teacher", "student"):
        model = load(find(workplace / "runs" / name).folder)
        assert model.latent_space == alone.latent_space
        assert model.timesteps == (None if name == "teacher" else [999, 899, 749, 499])
    described = [json.loads(path.read_text()) for path in (workplace / "latents").glob("*.json")]
    assert any(each.get("count") == NUM_PICTURES and each.get("source") == "shapes" for each in described)


def test_a_missing_autoencoder_is_trained_first(tell: Tell, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = shutil.copytree(loading.FOLDER, workplace / "recipes", ignore=shutil.ignore_patterns("*.py*"))
    text = (recipes / "shapes-autoencoder.yaml").read_text().replace("num_steps: 3000", "num_steps: 2")
    text = text.replace("[16, 32, 64]", "[8, 8, 16]").replace("batch_size: 16", "batch_size: 4")
    (recipes / "shapes-autoencoder.yaml").write_text(text)
    monkeypatch.setattr(loading, "FOLDER", recipes)
    assert tell(f"teach shapes-teacher --out new/teacher {UNET}") == (0, "")
    trained = load_autoencoder(find(workplace / "new" / "shapes-autoencoder").folder)
    assert trained.vae.config.block_out_channels == [8, 8, 16]
    assert load(find(workplace / "new" / "teacher").folder).latent_space == trained.latent_space


@pytest.mark.parametrize("what", ["student", "teacher --sampler unipc:2@1.5"])
def test_a_prompt_is_sampled(tell: Tell, workplace: Path, what: str) -> None:
    assert tell(f"sample runs/{what} --num 2 --prompt circle --out sampled.png --overwrite --device cpu")[0] == 0
    assert Image.open(workplace / "sampled.png").width > 2 * 32


def test_the_scale_in_a_samplers_name_guides(tell: Tell, workplace: Path) -> None:
    line = "sample runs/teacher --prompt red --num 1 --device cpu"
    pictures = []
    for more in ("--sampler ddim:2", "--sampler ddim:2@5", "--sampler ddim:2 --guidance 5"):
        assert tell(f"{line} {more} --out guided.png --overwrite")[0] == 0
        pictures.append((workplace / "guided.png").read_bytes())
    assert pictures[1] == pictures[2]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("num_prompts", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_text_runs_are_judged_together(
    tell: Tell, workplace: Path, num_prompts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their diversity is that of images which are drawn for it."""
    scenes = (*shapes.one_object_scenes()[: num_prompts - 3], *shapes.two_object_scenes(3))
    monkeypatch.setattr(judges, "evaluation_prompts", lambda: [scene.caption for scene in scenes])
    line = "evaluate runs/teacher runs/student --num-samples 100 --sampler ddim:2 --sampler dpm++:2@1.5 --device cpu"
    assert tell(f"{line} --out {tmp_path}/judged")[0] == 0
    rows = json.loads((tmp_path / "judged" / "results.json").read_text())
    names = [(row["model"], row["sampler"], row["nfe"]) for row in rows]
    teachers = [("teacher", "ddim 2", 2), ("teacher", "dpm++ 2 @1.5", 4)]
    assert names == [("real", None, None), *teachers, ("student", "student", 4)]
    keys = {"model", "sampler", "nfe", "intervals", "interval_kinds", "attributes"}
    keys |= {*metrics_of("features", "scenes", "colours", "prompts", "clock")}
    assert all(row.keys() == keys for row in rows)
    assert rows[0]["prompt_accuracy"] >= 0.98  # of drawn pictures
    assert rows[0]["two_objects"] >= 0.95
    assert all(row["prompt_accuracy"] <= 0.2 for row in rows[1:])  # of networks that have learned nothing
    assert rows[0]["attributes"]["prompt_accuracy"].keys() == set(ATTRIBUTES) - {"relation"}
    assert rows[0]["attributes"]["two_objects"].keys() == set(ATTRIBUTES) - {"place"}


def test_prompts_of_one_and_two_objects_alternate_as_in_the_training_pictures() -> None:
    scenes = [shapes.parse(prompt) for prompt in judges.evaluation_prompts()]
    assert [len(scene.things) for scene in scenes] == [1, 1, 1, 2] * 80
    assert len({scene.caption for scene in scenes if len(scene.things) == 1}) == 240


class Brightness(torch.nn.Module):
    """A feature network: uint8 (B, 3, H, W) -> (B, 3), the mean of each colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def test_a_torchscript_file_judges_too(tell: Tell, workplace: Path) -> None:
    torch.jit.script(Brightness()).save(workplace / "brightness.pt")
    line = "evaluate runs/student --num-samples 100 --features brightness.pt --out bright --device cpu"
    assert tell(line)[0] == 0
    real, student = json.loads((workplace / "bright" / "results.json").read_text())
    assert student["fid"] > real["fid"]
    assert "of those of brightness, resized legacy" in (workplace / "bright" / "report.html").read_text()


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        (f"teach shapes-autoencoder --out x {SMALL} --set model.image_size=16", ["shapes have 32 pixels", "model 16"]),
        (f"teach shapes-teacher --out x {UNET} --set model.autoencoder=nowhere", ["model.autoencoder", "'nowhere'"]),
        (f"teach shapes-teacher --out x {UNET} --set model.autoencoder=runs/teacher/samples", ["samples"]),
        (f"teach shapes-autoencoder --out x {SMALL} --set evaluation.every=1", ["evaluation.every"]),
        ("evaluate runs/student runs/digits --num-samples 100 --out x", ["runs/digits", "models that are alike"]),
        ("evaluate runs/digits runs/student --num-samples 100 --out x", ["runs/student", "models that are alike"]),
        ("evaluate runs/student --features classifier --num-samples 100 --out x", ["features: ", "autoencoder"]),
        ("evaluate runs/teacher --sampler plms:3 --num-samples 100 --out x", ["plms:3", "unipc:STEPS"]),
        ("data latents --model runs/digits --source shapes --out x", ["runs/digits", "no latents"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tell: Tell, workplace: Path, line: str, fragments: list[str]) -> None:
    refused(tell(line), *fragments)
    assert not (workplace / "x").exists()
