"""What the README shows works: its commands (with fewer steps), its Python, its make targets, its links."""

import io
import json
import re
import shlex
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import AutoencoderTiny
from PIL import Image

from edm_files import small_network, write_checkpoint
from fewstep.cli import app, main
from tiny_pipelines import TINY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = {
    "teach": "--set num_steps=2 --set batch_size=4",
    "distill digits-1step": "--set num_steps=2 --set batch_size=4 --set teacher=runs/digits-teacher",
    "distill": "--set num_steps=2 --set batch_size=2",
    "evaluate": "--num-samples 100",
    "data pairs": "--num 4",
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
SHELL = [block for page in PAGES for block in blocks("sh", page) if "make " not in block and "pip " not in block]


def run(line: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A line as it is shown, with fewer steps and images: what is said last counts."""
    _, verb, *words = shlex.split(line.removeprefix("$ "), comments=True)
    less = SMALL.get(f"{verb} {words[0]}", SMALL.get(verb, "")) if words else ""
    patch.setattr("sys.argv", ["fewstep", verb, *words, *less.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, f"{line}\n{capsys.readouterr().err}"


def test_the_commands_run_in_the_order_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(blocks("console")).splitlines()
    assert len(lines) >= 6
    for line in lines:
        run(line, monkeypatch, capsys)
    for made in (
        "threes.png",
        "threes/00000.png",
        "both/00000-2.png",
        "digits-1step/README.md",
        "evaluation/report.html",
        "evaluation/results.json",
        "runs/digits-1step/recipe.yaml",
    ):
        assert (tmp_path / made).stat().st_size > 0


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


def picture(size: int, index: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L" if size < 1024 else "RGB", (size, size), 5 * index if size < 1024 else (5 * index, 90, 200)).save(
        stream, "PNG"
    )
    return stream.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README takes for granted: tiny models under the names shown, captioned pictures, and small files."""
    folder = tmp_path_factory.mktemp("readme")
    TINY["sdxl"](folder / "scratch").save_pretrained(folder / "models" / "sdxl")
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
        folder / "models" / "taesdxl"
    )
    torch.jit.script(Brightness()).save(folder / "inception.pt")
    (folder / "prompts.txt").write_text("a cat\na red dog\ntwo birds")
    with tarfile.open(folder / "captioned.tar", "w") as tar:
        for index in range(40):  # as many as judging needs, of the size that --min-side lets pass
            for name, content in ((f"{index}.png", picture(1024, index)), (f"{index}.txt", f"a {index}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(folder / "imagenet-64x64.zip", "w") as archive:
        labels = [[f"{index}.png", index % 10] for index in range(20)]
        [archive.writestr(name, picture(8, index)) for index, (name, _) in enumerate(labels)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    network = small_network(img_resolution=8, img_channels=1, label_dim=10, channel_mult=[1, 1])
    write_checkpoint(folder / "edm-imagenet-64x64-cond-adm.pkl", network)
    return folder


@pytest.mark.parametrize("block", SHELL, ids=range(len(SHELL)))
def test_the_lines_of_a_block_run_as_shown_in_the_place_of_those_before(
    block: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(place / "cache"))
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    for line in block.strip().splitlines():
        run(line, monkeypatch, capsys)


def test_what_the_blocks_make_is_there(place: Path) -> None:
    made = {"student", "student.safetensors", "samples.png", "evaluation/report.html", "models/edm-imagenet-64"}
    assert all((place / name).exists() for name in made)
    runs = ("sdxl-4step", "sdxl-1step-init", "sdxl-1step", "imagenet64-1step")
    assert all(list((place / "runs" / name / "checkpoints").glob("*/model/fewstep.json")) for name in runs)
    recipe = yaml.safe_load((place / "runs" / "sdxl-4step" / "recipe.yaml").read_text())
    assert (recipe["precision"], recipe["data"]["source"]) == ("bfloat16", "latents")  # the two that did not fit


def test_the_python_runs() -> None:
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    assert names["timesteps"].tolist() == [999, 749, 499, 249]
    assert names["x0"].shape == (2, 4, 64, 64)
    assert torch.isfinite(names["x0"]).all()


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z-]+)", README)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_oldest_versions_are_the_bounds() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text().lower(), flags=re.M))
    for needed in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, bound = needed.replace("_", "-").split(">=")
        pinned = pins.get(name) or pins[name.replace("-", "_")]
        assert name == "torch" or f"{pinned}.".startswith(f"{bound}."), needed  # torch: see the file's first line


def test_the_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_files_named_exist() -> None:
    files = {str(path) for path in (ROOT / "src" / "fewstep").rglob("*.py")} | {
        str(path) for path in ROOT.glob("tests/**/*.py")
    }
    for page in PAGES:
        for name in re.findall(r"[\w/]+\.py\b", page):
            assert any(path.endswith(f"/{name}") for path in files), name


def test_the_verbs_named_exist() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"`?fewstep (demo|teach|distill|sample|evaluate|export|recipes)", README)) == verbs
