"""What the README shows works: its commands (with fewer steps), its Python, its make targets, its links."""

import re
import shlex
import sys
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from PIL import Image

from apart import Here
from command_line import fewstep
from edm_files import small_network, write_checkpoint
from fewstep.cli.verbs import VERBS
from fewstep.evaluation import extractors
from fewstep.models.loading.outlines import STANDARDS
from fewstep.training import teacher_errors
from image_sets import encoded, write_edm_zip, write_files, write_tar
from single_files import original_weights, write_single_file
from tiny_pipelines import TINY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = {
    "teach digits-teacher": "--set num_steps=2 --set batch_size=4 --set model.block_out_channels=[8,8] "
    "--set model.norm_num_groups=4",
    "teach emoji-teacher.yaml": "--set num_steps=2 --set batch_size=4 --set model.block_out_channels=[32,32]",
    "teach": "--set num_steps=2 --set batch_size=4",
    "distill my-sdxl.yaml": "--set num_steps=2 --set batch_size=2 --set accumulate=2",
    "plan": "--set lora.rank=4 --set batch_size=1 --set accumulate=1",
    "distill sdxl-4step-lora": "--set num_steps=2 --set batch_size=2 --set accumulate=2 --set lora.rank=4",
    "sweep": "--num 1",
    "extract": "--num 2",
    "distill digits-1step": "--set num_steps=2 --set batch_size=4 --set teacher=runs/digits-teacher "
    "--set init_from=null",
    "distill": "--set num_steps=2 --set batch_size=2",
    "sample runs/emoji-1step": "--num 2 --sampler heun:2",
    "evaluate runs/emoji-teacher": "--num-samples 100 --sampler euler:1",
    "evaluate": "--num-samples 100",
    "data pairs": "--num 4",
    "ablate my-study.yaml": "--num-samples 100 --set num_steps=2 --set batch_size=4 --seeds 0",
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


LINKED = dict.fromkeys(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))  # in the order of the README
PAGES = [README, *((ROOT / page).read_text() for page in LINKED)]
SHELL = [block for page in PAGES for block in blocks("sh", page) if "make " not in block and "pip " not in block]


def run(line: str) -> None:
    """A line as it is shown, with fewer steps and images: what is said last counts."""
    _, verb, *words = shlex.split(line.removeprefix("$ "), comments=True)
    less = SMALL.get(f"{verb} {words[0]}", SMALL.get(verb, "")) if words else ""
    code, _, errors = fewstep(f"{shlex.join([verb, *words])} {less}")
    assert code == 0, f"{line}\n{errors}"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worse classifier, an SDXL of 17 transformer blocks, not 70, and no time spent on measuring speed."""
    monkeypatch.setattr(extractors, "train_classifier", partial(extractors.train_classifier, num_steps=5))
    monkeypatch.setattr("fewstep.commands.evaluate.images_per_second", lambda *args: 1.0)
    monkeypatch.setattr("fewstep.recipes.new.SECONDS", 0)
    monkeypatch.setitem(STANDARDS["sdxl"]["network"], "transformer_layers_per_block", [1, 1, 1])
    monkeypatch.setattr(teacher_errors, "MOST_BATCHES", 1)
    monkeypatch.setattr("fewstep.commands.ablate.run_apart", Here())


def test_the_commands_run_in_the_order_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(blocks("console")).splitlines()
    assert len(lines) >= 6
    for line in lines:
        run(line)
    made = [
        "threes.png",
        "threes/00000.png",
        "both/00000-2.png",
        "digits-1step/README.md",
        "runs/digits-1step/recipe.yaml",
    ]
    for name in [*made, "evaluation/report.html", "evaluation/results.json"]:
        assert (tmp_path / name).stat().st_size > 0


class Brightness(torch.nn.Module):
    """As FID's network: uint8 (B, 3, H, W) -> (B, 3)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


class Distance(torch.nn.Module):
    """As the package `lpips` has it: two (B, 3, H, W) -> (B, 1, 1, 1)."""

    def __init__(self, net: str, verbose: bool):
        super().__init__()

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first - second).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README takes for granted: tiny models under the names shown, captioned pictures, and small files."""
    folder = tmp_path_factory.mktemp("readme")
    pipeline = TINY["sdxl"](folder / "scratch")
    pipeline.save_pretrained(folder / "models" / "sdxl")
    write_single_file(folder / "my-finetune.safetensors", original_weights(pipeline))
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
        folder / "models" / "taesdxl"
    )
    torch.jit.script(Brightness()).save(folder / "inception.pt")
    for name in ("prompts.txt", "my-prompts.txt"):
        (folder / name).write_text("a cat\na red dog\ntwo birds")
    (folder / "my-sdxl.yaml").write_text(blocks("yaml", (ROOT / "docs" / "your-own-sdxl.md").read_text())[0])
    study = blocks("yaml", (ROOT / "docs" / "ablations.md").read_text())[0]
    (folder / "my-study.yaml").write_text(f"{study}samplers: ['euler:1']\n")  # which takes a 35th of the time
    large = [encoded(Image.new("RGB", (1024, 1024), (5 * i, 90, 200))) for i in range(40)]  # enough to judge by
    pairs = [((f"{i}.png", image), (f"{i}.txt", f"a {i}".encode())) for i, image in enumerate(large)]
    write_tar(folder / "captioned.tar", dict(member for pair in pairs for member in pair))
    write_files(folder / "pictures", dict(member for pair in pairs for member in pair))
    photos = [encoded(Image.new("RGB", (8, 8), (i % 250, 90, 200))) for i in range(300)]
    write_files(folder / "photos", {f"{('faces', 'hands', 'signs')[i % 3]}/{i}.png": p for i, p in enumerate(photos)})
    small = {f"{i}.png": encoded(Image.new("L", (8, 8), 5 * i)) for i in range(20)}
    write_edm_zip(folder / "imagenet-64x64.zip", small, [[f"{i}.png", i % 10] for i in range(20)])
    network = small_network(img_resolution=8, img_channels=1, label_dim=10, channel_mult=[1, 1])
    write_checkpoint(folder / "edm-imagenet-64x64-cond-adm.pkl", network)
    return folder


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=pytest.mark.slow) if "teach shapes" in block else block for block in SHELL],
    ids=range(len(SHELL)),
)
def test_the_lines_of_a_block_run_as_shown_in_the_place_of_those_before(
    block: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(place / "cache"))
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    for line in block.strip().splitlines():
        run(line)


def test_prompts_alone_train_as_the_page_says(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    whole, instead = blocks("yaml", (ROOT / "docs" / "your-own-sdxl.md").read_text())
    Path("alone.yaml").write_text(yaml.safe_dump(yaml.safe_load(whole) | yaml.safe_load(instead)))
    run(f"fewstep distill alone.yaml {SMALL['distill my-sdxl.yaml']}")


def test_what_the_blocks_make_is_there(place: Path) -> None:
    made = {"student", "student.safetensors", "samples.png", "evaluation/report.html", "models/edm-imagenet-64"}
    made |= {
        "cat.png",
        "my-evaluation/report.html",
        "my-sdxl-4step.safetensors",
        "my-sdxl-4step",
        "four-steps.png",
        "emoji.png",
        "my-4step.safetensors",
        "with-lora.png",
        "my-sweep/grid.png",
        "extracted.safetensors",
        "runs/studies/my-study/plot.png",
    }
    assert all((place / name).exists() for name in made)
    runs = ("sdxl-4step", "sdxl-1step-init", "sdxl-1step", "imagenet64-1step")
    assert all(list((place / "runs" / name / "checkpoints").glob("*/model/fewstep.json")) for name in runs)
    recipe = yaml.safe_load((place / "runs" / "sdxl-4step" / "recipe.yaml").read_text())
    assert (recipe["precision"], recipe["data"]["source"]) == ("bfloat16", "latents")  # the two that did not fit


def test_the_python_runs() -> None:
    (code,) = blocks("python", (ROOT / "docs" / "using.md").read_text())
    names: dict = {}
    exec(code, names)
    assert names["timesteps"].tolist() == [999, 749, 499, 249]
    assert names["x0"].shape == (2, 4, 64, 64)
    assert torch.isfinite(names["x0"]).all()


def test_diffusers_draws_with_the_lora_as_shown(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU in float32; the folder stands for the file, in which diffusers expects released sizes."""
    pytest.importorskip("peft")
    monkeypatch.chdir(place)
    folder = StableDiffusionXLPipeline.from_pretrained("models/sdxl")
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", lambda file, torch_dtype: folder)
    (code,) = blocks("python", (ROOT / "docs" / "one-card.md").read_text())
    names: dict = {}
    exec(code, names)
    assert folder.get_active_adapters()
    assert names["image"].size == (16, 16)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets <= set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))


def test_the_oldest_versions_are_the_bounds() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text().lower(), flags=re.M))
    for needed in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, bound = needed.replace("_", "-").split(">=")
        pinned = pins.get(name) or pins[name.replace("-", "_")]
        assert name == "torch" or f"{pinned}.".startswith(f"{bound}."), needed  # torch: see the file's first line


def test_the_links_lead_somewhere_and_to_every_page() -> None:
    for folder, page in (("", README), *(("docs", text) for text in PAGES[1:])):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (ROOT / folder / link).exists(), link
    assert {Path(page) for page in LINKED} == {path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md")}


def test_the_files_named_exist() -> None:
    files = {str(path) for folder in ("src/fewstep", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    for name in re.findall(r"[\w/]+\.py\b", "\n".join(PAGES)):
        assert any(path.endswith(f"/{name}") for path in files), name


def test_the_verbs_named_exist() -> None:
    verbs = {name for name in VERBS if " " not in name}
    named = r"`?fewstep (demo|teach|distill|plan|sample|sweep|evaluate|export|extract|recipes|report|ablate|benchmark)"
    assert set(re.findall(named, "".join(PAGES))) == verbs
