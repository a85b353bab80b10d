"""`sample BASE --lora FILE:STRENGTH`: what is drawn, what the pictures' text says of it, and what is refused."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from command_line import fewstep, refused
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.lora_files import write_diffusers_lora
from fewstep.models.sampler import Sampler, generate
from fewstep.networks.lora import LowRank
from fewstep.pictures import to_picture
from tiny_pipelines import TINY

STEPS = [999.0, 499.0]


def make_lora(network: nn.Module, seed: int) -> dict[str, LowRank]:
    """Of rank 2, in the cross-attention."""
    random, lora = torch.Generator().manual_seed(seed), {}
    for name, module in network.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_v", "conv1")):
            down = torch.randn(2, *module.weight.shape[1:], generator=random)
            up = 0.1 * torch.randn(len(module.weight), 2, *(1,) * (module.weight.ndim - 2), generator=random)
            lora[name] = LowRank(down, up, 2.0)
    return lora


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its student, a LoRA of a few-step student and one of a style, and what is none."""
    place = tmp_path_factory.mktemp("place")
    model = LatentModel(TINY["sd"](place / "scratch"))
    model.save(place / "base")
    model.student(model.denoiser, [999.0, 749.0, 499.0, 249.0]).save(place / "student")
    told = {"fewstep.timesteps": json.dumps(STEPS)}
    write_diffusers_lora(place / "few.safetensors", make_lora(model.network, 1), "unet", told)
    write_diffusers_lora(place / "a:style.safetensors", make_lora(model.network, 2), "unet")
    save_file(model.network.state_dict(), place / "whole.safetensors")
    return place


@pytest.fixture
def draw(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs `sample` in the place; gives exit code and standard error."""
    monkeypatch.chdir(place)
    return lambda line: fewstep(f"sample {line} --num 1 --prompt cat --overwrite --out {tmp_path}/x.png")[::2]


def expected(
    place: Path, source: str, sampler: Sampler, timesteps: list[float] | None, few: float, style: float
) -> list:
    """The pictures, by weights that are summed here."""
    model = load(place / source)
    for seed, strength in ((1, few), (2, style)):
        for name, change in make_lora(model.network, seed).items():
            weight = model.network.get_submodule(name).weight
            product = torch.einsum("or,r...->o...", change.up.flatten(1).double(), change.down.double())
            weight.data = (weight.double() + strength * product).float()
    model.timesteps = timesteps
    return [to_picture(image) for image in generate(model, sampler, range(1), asked=["cat"])]


def pixels(picture: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()


@pytest.mark.parametrize(
    ("line", "sampler", "timesteps", "few", "style"),
    [
        ("base --lora few.safetensors:0.5 --lora few.safetensors:0.5", Sampler("student", 2), STEPS, 1, 0),
        ("base --lora few.safetensors:0.7 --guidance 1.6", Sampler("student", 2, 1.6), STEPS, 0.7, 0),
        ("base --lora few.safetensors --steps 3", Sampler("student", 3), [999.0, 666.0, 332.0], 1, 0),
        ("base --lora few.safetensors --sampler lcm:4", Sampler("lcm", 4), None, 1, 0),
        ("base --lora a:style.safetensors:-2 --sampler ddim:3@2", Sampler("ddim", 3, 2.0), None, 0, -2),
        ("base --lora a:style.safetensors --lora few.safetensors:0.5", Sampler("student", 2), STEPS, 0.5, 1),
        ("student --lora a:style.safetensors", Sampler("student", 4), [999.0, 749.0, 499.0, 249.0], 0, 1),
    ],
)
def test_pictures_are_those_of_the_summed_weights(
    place: Path,
    draw,
    tmp_path: Path,
    line: str,
    sampler: Sampler,
    timesteps: list[float] | None,
    few: float,
    style: float,
) -> None:
    assert draw(line) == (0, "")
    wanted = expected(place, line.split()[0], sampler, timesteps, few, style)
    for number, picture in enumerate(wanted):
        found = Image.open(tmp_path / "x" / f"{number:05d}.png")
        assert (pixels(found) - pixels(picture)).abs().max() <= 1, line
        assert json.loads(found.text["fewstep"])["sampler"] == sampler.kind
    bare = expected(place, line.split()[0], sampler, timesteps, 0, 0)[0]
    assert (pixels(bare) - pixels(wanted[0])).abs().max() >= 20


def test_the_text_names_the_loras_as_uis_do(place: Path, draw, tmp_path: Path) -> None:
    assert draw("base --lora few.safetensors:0.7 --lora a:style.safetensors")[0] == 0
    picture = Image.open(tmp_path / "x" / "00000.png")
    title, line = picture.text["parameters"].split("\n")
    assert title == "cat <lora:few:0.7> <lora:a:style:1>"
    content = (place / "few.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert f'Lora hashes: "few: {hashlib.sha256(content[start:]).hexdigest()[:12]}, a:style: ' in line
    assert json.loads(picture.text["fewstep"])["loras"] == {"few.safetensors": 0.7, "a:style.safetensors": 1.0}


def test_beside_a_teacher_the_sampler_is_the_teachers(place: Path, draw, tmp_path: Path) -> None:
    assert draw("base --lora few.safetensors --compare base --sampler ddim:3@2") == (0, "")
    texts = [json.loads(Image.open(tmp_path / "x" / f"00000-{n}.png").text["fewstep"]) for n in (1, 2)]
    assert [(text["sampler"], text["guidance_scale"]) for text in texts] == [("student", 1.0), ("ddim", 2.0)]
    for number, few, how in ((1, 1, Sampler("student", 2)), (2, 0, Sampler("ddim", 3, 2.0))):
        wanted = expected(place, "base", how, STEPS if few else None, few, 0)[0]
        assert (pixels(Image.open(tmp_path / "x" / f"00000-{number}.png")) - pixels(wanted)).abs().max() <= 1
    heads = Image.open(tmp_path / "x.png").text["parameters"]
    assert "base + few:1 student:2" in heads
    assert "base ddim:3@2" in heads


def test_a_students_change_on_a_student_is_told(draw) -> None:
    code, told = draw("student --lora few.safetensors")
    assert (code, told.count("\n")) == (0, 1)
    assert re.match(r"fewstep: few\.safetensors: makes a model a few-step student, and this one is one already", told)


def test_a_student_of_v_on_a_model_of_noise_is_told(place: Path, draw, tmp_path: Path) -> None:
    """A style that was trained on another prediction type is not: people put them together."""
    lora = make_lora(load(place / "base").network, 1)
    told = {"modelspec.prediction_type": "v"}
    write_diffusers_lora(tmp_path / "style.safetensors", lora, "unet", told)
    write_diffusers_lora(tmp_path / "v.safetensors", lora, "unet", told | {"fewstep.timesteps": json.dumps(STEPS)})
    assert draw(f"base --lora {tmp_path}/style.safetensors --sampler ddim:2") == (0, "")
    assert "predicts something else (epsilon or v)" in draw(f"base --lora {tmp_path}/v.safetensors")[1]
    assert draw(f"base --lora {tmp_path}/v.safetensors --prediction-type v_prediction") == (0, "")


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("base --lora gone.safetensors:0.5", ["--lora gone.safetensors: no such file", "FILE:STRENGTH"]),
        ("base --lora few.safetensors:much", ["few.safetensors:much: no such file"]),
        ("base --lora base", ["pytorch_lora_weights.safetensors: not a whole LoRA file", "o such file"]),
        ("base --lora base/fewstep.json", ["fewstep.json: not a whole LoRA file in safetensors"]),
        ("base --lora whole.safetensors", ["whole.safetensors: no LoRA", "without --lora"]),
        ("few.safetensors", ["few.safetensors: a LoRA, not a whole model", "fewstep sample BASE --lora FILE"]),
        ("student --guidance 2", ["--guidance 2: a student has its own"]),
    ],
)
def test_what_can_not_be_is_one_line(draw, tmp_path: Path, line: str, fragments: list[str]) -> None:
    refused(draw(line), *fragments)
    assert not list(tmp_path.iterdir())
