"""A sweep's cells are what one would draw by hand from merged weights, on the same noise; its table names the best."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from command_line import fewstep, refused
from fewstep.commands import sweep as verb
from fewstep.data.settings import DataSettings
from fewstep.embedded import shapes
from fewstep.evaluation.cells import Cell, best_of, choose_measure, picture, table
from fewstep.models.image_model import ImageModel
from fewstep.models.loading.pretrained import load
from fewstep.models.lora_files import write_diffusers_lora
from fewstep.models.pixel_model import PixelModel
from fewstep.models.sampler import Sampler, draw_noise, generate
from fewstep.networks.families.edm import build_unet
from fewstep.networks.lora import LowRank
from fewstep.networks.settings import PixelModelConfig
from fewstep.pictures import GAP
from fewstep.seeding import generator
from tiny_encoders import save_clip, save_dino
from tiny_pipelines import TINY

LAYERS = ("conv1", "conv2", "to_q", "to_out.0")


def write_lora(
    path: Path, model: ImageModel, seed: int, timesteps: list[float] | None, size: float = 0.1
) -> dict[str, Tensor]:
    """A LoRA of some layers; gives the changes of their weights at strength 1."""
    random, lora = torch.Generator().manual_seed(seed), {}
    for name, module in model.network.named_modules():
        if name.endswith(LAYERS):
            down = torch.randn(2, *module.weight.shape[1:], generator=random)
            up = torch.randn(len(module.weight), 2, *(1,) * (module.weight.ndim - 2), generator=random)
            lora[name] = LowRank(0.1 * down, size * up, 2)
    told = {"fewstep.timesteps": json.dumps(timesteps)} if timesteps else {}
    write_diffusers_lora(path, lora, model.part, told)
    return {name: torch.einsum("or,r...->o...", each.up.flatten(1), each.down) for name, each in lora.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pixel model with a null class, its few-step students and LoRAs of it; a text model, and a CLIP model."""
    folder = tmp_path_factory.mktemp("sweep")
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "block_out_channels": [8, 8], "norm_num_groups": 4, "attention": [False, True]}
    config = PixelModelConfig(**sizes, null_class=True, attention_head_dim=4)
    model = PixelModel(config, build_unet(config))
    model.save(folder / "pixels")
    PixelModel(config, model.network, model.denoiser.schedule.grid(4).tolist()).save(folder / "student")
    PixelModel(config, model.network, [80.0, 1.0]).save(folder / "uneven")
    plain = PixelModelConfig(**sizes, attention_head_dim=4)
    PixelModel(plain, build_unet(plain)).save(folder / "unguided")
    write_lora(folder / "four.safetensors", model, 1, model.denoiser.schedule.grid(4).tolist())
    write_lora(folder / "style.safetensors", model, 2, None)
    pipeline = TINY["sd"](folder / "scratch")
    pipeline.save_pretrained(folder / "text")
    write_lora(folder / "text.safetensors", load(folder / "text"), 1, [999, 749, 499, 249])
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    for name in ("mute", "cut"):
        shutil.copytree(folder / "clip", folder / name, ignore=shutil.ignore_patterns("*token*", "vocab*"))
    (folder / "cut" / "model.safetensors").write_bytes((folder / "clip" / "model.safetensors").read_bytes()[:-9])
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[tuple, Cell]]:
    """The cells of a sweep by strength, steps and scale."""

    def run(line: str) -> dict[tuple, Cell]:
        found: list[Cell] = []
        whole = verb.publish
        monkeypatch.setattr(verb, "publish", lambda order, made, *rest: (found.extend(made), whole(order, made, *rest)))
        code, _, error = fewstep(f"sweep {line} --out {tmp_path / 'out'} --overwrite")
        assert (code, error) == (0, "")
        return {tuple(each.settings.values()): each for each in found}

    return run


def drawn(name: str, changes: dict[str, Tensor], timesteps: list[float], scale: float, num: int, label: int) -> Tensor:
    """uint8 images by hand: predict x0, guided if need be, and renoise it with fresh noise to the next timestep."""
    model = load(name)
    for layer, change in changes.items():
        model.network.get_submodule(layer).weight.data += change
    noise, x = draw_noise(model, len(timesteps), 0, num, 0), None
    with torch.no_grad():
        for k, t in enumerate(timesteps):
            sigma = torch.full((num,), t, dtype=torch.float64)
            x_t = 80 * noise[0] if x is None else x + t * noise[k]
            x = model.denoiser(x_t, sigma, {"label": torch.full((num,), label)})
            null = model.denoiser(x_t, sigma, {"label": torch.full((num,), 3)})
            x = null + scale * (x - null)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def test_every_cell_is_what_merged_weights_draw_and_none_leaves_anything_behind(place: Path, cells) -> None:
    model = load("pixels")
    change = write_lora(place / "again.safetensors", model, 1, model.denoiser.schedule.grid(4).tolist())
    style = write_lora(place / "style.safetensors", model, 2, None)
    found = cells(
        "pixels --lora again.safetensors --lora style.safetensors:0.5 --strength 1.5,-1 --steps 3,2 --cfg 1,3 "
        "--class 1 --num 3"
    )
    assert [*found] == [(s, k, g) for s in (1.5, -1) for k in (3, 2) for g in (1, 3)]
    for (strength, steps, scale), cell in found.items():
        total = {name: strength * change[name] + 0.5 * style[name] for name in change}
        wanted = drawn("pixels", total, model.denoiser.schedule.grid(steps).tolist(), scale, 3, 1)
        assert (cell.pictures.int() - wanted.int()).abs().max() <= 1, (strength, steps, scale)
        assert cell.sampler.nfe == steps * (1 if scale == 1 else 2)
    different = {tuple(each.pictures.flatten().tolist()) for each in found.values()}
    assert len(different) == len(found)


@pytest.mark.parametrize(("name", "kind", "steps"), [("student", "student", [4]), ("pixels", "heun", [2, 4, 8])])
def test_without_a_lora_a_student_or_a_teacher_is_swept_over_steps_and_scales(cells, name, kind, steps) -> None:
    found = cells(f"{name} --cfg 1,2 --num 2")
    assert [*found] == [(None, k, g) for k in steps for g in (1, 2)]
    assert {each.sampler.kind for each in found.values()} == {kind}


def test_a_lora_that_says_no_timesteps_renoises_on_the_even_grid(place: Path, cells) -> None:
    model = load("pixels")
    change = write_lora(place / "style.safetensors", model, 2, None)
    (cell,) = cells("pixels --lora style.safetensors --steps 3 --class 0 --num 2").values()
    assert torch.equal(cell.pictures, drawn("pixels", change, model.denoiser.schedule.grid(3).tolist(), 1, 2, 0))


def test_prompts_come_in_turn_and_their_diversity_is_measured(cells) -> None:
    found = cells("text --lora text.safetensors --strength 0 --steps 1,2 --cfg 2 --prompt cat --prompt dog")
    cell = found[0, 2, 2]
    assert all(each.values["diversity"] > 0 for each in found.values())
    model = load("text")
    student = model.student(model.denoiser, [999, 499])
    assert torch.equal(cell.pictures, generate(student, Sampler("student", 2, 2), range(8), 0, ["cat", "dog"]))


def test_files_say_what_was_drawn_and_which_cell_is_the_best(cells, tmp_path: Path) -> None:
    found = cells("text --lora text.safetensors --strength 0.5,1 --steps 1,2 --prompt 'a cat' --clip clip --seed 7")
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: told[name] for name in ("base", "loras", "seed", "num", "subjects")} == {
        "base": "text",
        "loras": [{"file": "text.safetensors", "strength": 1.0}],
        "seed": 7,
        "num": 4,
        "subjects": ["a cat"],
    }
    assert [{"strength", "steps", "cfg", "nfe", "clip", "diversity", "seconds"} == {*each} for each in told["cells"]]
    best = max(told["cells"], key=lambda each: each["clip"])
    assert told["best"] == {key: best[key] for key in ("strength", "steps", "cfg")} | {
        "measure": "clip",
        "value": best["clip"],
    }
    assert json.loads(Image.open(tmp_path / "out" / "grid.png").text["fewstep"]) == told
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    read = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    assert read[0] == ["strength", "steps", "cfg", "nfe", "clip", "diversity", "s/image"]
    assert len(lines) == 2 + len(found)
    assert read[2][:4] == ["0.5", "1", "1", "1"]


def test_drawn_shapes_are_checked_against_their_prompts(monkeypatch: pytest.MonkeyPatch, cells) -> None:
    """Of a model that draws every second picture right."""
    asked = ["a small red circle at the top left", "a blue square above a large green star"]
    scenes = [shapes.parse(text) for text in asked]
    right, wrong = (shapes.render(each, generator(0, "test")) for each in (scenes, scenes[::-1]))

    ticks = count()
    monkeypatch.setattr(verb, "generate", lambda *_: (next(ticks), torch.cat([right, wrong, right, right]))[1])
    monkeypatch.setattr(verb.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr("fewstep.embedded.shapes.IMAGE_SIZE", 16)
    (cell,) = cells(f"text --prompt '{asked[0]}' --prompt '{asked[1]}' --num 8 --steps 2").values()
    assert (cell.values["prompt_accuracy"], cell.values["two_objects"]) == (0.75, 0.75)
    assert cell.values["seconds"] == 2 / 8  # of one pass: the warm-up is left out


def test_without_a_diversity_it_is_told_what_that_takes(tmp_path: Path) -> None:
    code, output, _ = fewstep(f"sweep pixels --steps 1 --num 11 --out {tmp_path}")
    assert code == 0
    assert "no diversity, which takes 4 images of each: --num 12" in output
    assert "diversity" not in (tmp_path / "table.md").read_text()


def test_what_is_not_finite_is_an_empty_cell_and_the_others_are_written(place: Path, tmp_path: Path) -> None:
    """With changes that overflow; weights are whole again behind them."""
    model, file, out = load("pixels"), tmp_path / "huge.safetensors", tmp_path / "out"
    write_lora(file, model, 1, None, 1e20)
    line = f"sweep pixels --lora {file} --steps 1 --class 0 --out {out} --strength"
    code, output, error = fewstep(f"{line} 1,0")
    assert (code, error) == (
        0,
        "fewstep: lcm:1 at strength 1: its images are not finite, so it stays empty; take a smaller strength or CFG\n",
    )
    broken, whole = json.loads((out / "results.json").read_text())["cells"]
    assert broken == {"strength": 1, "steps": 1, "cfg": 1, "nfe": 1}
    assert whole["diversity"] > 0
    assert "no diversity" not in output
    assert re.search(r"^\| +1 \| +1 \| +1 \| +1 \| +– \| +– \|$", output, re.MULTILINE)
    pixels = np.array(Image.open(out / "grid.png").convert("L"))
    assert (pixels[25:85, 60:115] == 0).all()
    assert (pixels[25:85, 205:260] > 0).any()
    code, _, error = fewstep(f"{line} 1 --overwrite")
    assert code == 2
    assert error.splitlines()[-1] == "fewstep: sweep: no cell's images are finite; take other weights, or float32"


def test_classes_of_a_run_are_checked_by_its_classifier(place: Path, cells, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is there for all classes in turn, and right here in every third image."""
    right = SimpleNamespace(
        name="classifier",
        features=lambda images: images.flatten(1).float(),
        check=lambda images, numbers: [{"accuracy": number % 3 == 0} for number in numbers],
    )
    opened: list[Path] = []
    monkeypatch.setattr(verb, "is_run", lambda source: True)
    monkeypatch.setattr(verb, "run_folder", lambda source: place / "runs" / source)
    monkeypatch.setattr(verb, "read_run_recipe", lambda path: SimpleNamespace(data=DataSettings(source="digits")))
    monkeypatch.setattr(verb, "open_images", lambda data, model: None)
    monkeypatch.setattr(verb, "open_classifier", lambda images, model, path: (opened.append(path), right)[1])
    (cell,) = cells("pixels --steps 1").values()
    assert cell.values["accuracy"] == pytest.approx(1 / 3)
    assert [path.parent for path in opened] == [place / "runs"]
    (one,) = cells("pixels --steps 1 --class 1").values()
    assert "accuracy" not in one.values


def cell(strength: float | None, steps: int, scale: float, shade: int = 0, **values: float) -> Cell:
    return Cell(strength, Sampler("student", steps, scale), values, torch.full((4, 1, 8, 8), shade).byte())


def test_the_best_cell_is_the_cheapest_of_equals_and_diversity_names_none_by_itself() -> None:
    same = [cell(1, 8, 1, clip=0.3, fid=2.0), cell(1, 2, 2, clip=0.3, fid=1.0), cell(1, 2, 1, clip=0.2, fid=3.0)]
    assert best_of(same, "clip") is same[1]
    assert best_of(same, "fid") is same[1]
    assert choose_measure(same, None) == "clip"
    assert choose_measure([cell(1, 2, 1, diversity=1.0, seconds=1.0)], None) is None
    assert best_of([cell(1, 2, 1, seconds=2.0), cell(1, 4, 1, seconds=1.0)], "seconds").sampler.num_steps == 4
    assert table(same).splitlines()[2] == "|        1 |     8 |   1 |   8 | 0.300 | 2.000 |"


@pytest.mark.parametrize("strengths", [(0.5, 1.0, 2.0), (1.0,)])
def test_rows_and_columns_of_the_picture_are_the_axes(strengths: tuple[float, ...]) -> None:
    made = [(s, k, g) for s in strengths for k in (2, 4) for g in (1.0, 1.5)]
    found = [cell(*each, shade=10 * index + 5, clip=0.1) for index, each in enumerate(made)]
    pixels = np.array(picture(found, "clip", found[0]))
    across, down = (strengths, [(2, 1.0), (2, 1.5), (4, 1.0), (4, 1.5)]) if len(strengths) > 1 else ((1.0, 1.5), (2, 4))
    edges = np.isin(pixels, [each.pictures[0, 0, 0, 0] for each in found])
    columns, lines = (np.flatnonzero(edges.sum(axis) > 90) for axis in (0, 1))
    starts = [each[np.diff(each, prepend=-9) > 1][::2] for each in (columns, lines)]  # of two pictures each
    assert [len(each) for each in starts] == [len(across), len(down)]
    for top, row in zip(starts[1], down, strict=True):
        for left, column in zip(starts[0], across, strict=True):
            wanted = (column, *row) if len(strengths) > 1 else (1.0, row, column)
            assert pixels[top, left] == 10 * made.index(wanted) + 5
    assert starts[0][0] > 40 + GAP  # behind the names of the rows


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("pixels --lora four.safetensors --strength 0.5,much", ["--strength '0.5,much'", "0.5,0.7,1"]),
        ("pixels --lora four.safetensors --strength ''", ["--strength ''"]),
        ("pixels --lora four.safetensors --strength nan", ["--strength 'nan'"]),
        ("pixels --lora four.safetensors --strength 1e9", ["from -100 to 100"]),
        ("pixels --strength 0.5", ["--strength", "--lora"]),
        ("pixels --steps 0", ["--steps '0'", "from 1 to 1000"]),
        ("pixels --steps 2.5", ["--steps '2.5'", "whole numbers"]),
        ("pixels --cfg 0.5", ["--cfg '0.5'", "from 1"]),
        (f"pixels --steps {','.join(map(str, range(1, 402)))}", ["401 cells", "at most 400"]),
        ("unguided --cfg 1,2", ["--cfg 1,2", "no null class"]),
        ("uneven --steps 3", ["--steps 3", "not evenly spaced"]),
        ("pixels --prompt cat", ["--prompt", "takes no text"]),
        ("text", ["--prompt"]),
        ("pixels --class 9", ["--class 9", "3 classes"]),
        ("pixels --lora text.safetensors", ["text.safetensors", "not of this model"]),
        ("pixels --lora nothing.safetensors", ["nothing.safetensors"]),
        ("nowhere", ["nowhere"]),
        ("pixels --clip clip", ["--clip"]),
        ("text --prompt cat --clip pixels", ["--clip pixels", "no folder of a CLIP model"]),
        ("text --prompt cat --clip text/text_encoder", ["text/text_encoder"]),
        ("text --prompt cat --clip dino", ["--clip dino", "is a dinov2", "known are clip"]),
        ("text --prompt cat --clip mute", ["--clip mute", "holds neither tokenizer.json nor vocab.json"]),
        ("text --prompt cat --clip cut", ["--clip cut", "model.safetensors", "damaged"]),
        ("pixels --best clip --steps 1", ["--best clip", "--clip names"]),
        ("pixels --best beauty --steps 1", ["--best beauty", "seconds"]),
        ("pixels --out pixels/fewstep.json", ["--out"]),
    ],
)
def test_what_can_not_be_swept_is_told_in_one_line(place: Path, line: str, fragments: list[str]) -> None:
    before = sorted(place.rglob("*"))
    refused(fewstep(f"sweep {line}"), *fragments)
    assert sorted(place.rglob("*")) == before
