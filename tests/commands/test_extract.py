"""A student that was trained whole as a LoRA: what is of its rank comes back exactly, and what is left out is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from command_line import fewstep, refused
from fewstep.commands import extract
from fewstep.models.image_model import ImageModel
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.lora_files import open_lora
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.lora import LowRank, merged
from fewstep.networks.lora_layers import find_targets
from fewstep.networks.settings import PixelModelConfig
from tiny_pipelines import TINY

CONFIG = PixelModelConfig(num_classes=3, block_out_channels=[16, 16], norm_num_groups=4)
TIMES = "999,749,499,249"


def tune(model: ImageModel, rank: int = 0, all_of_it: bool = False) -> None:
    """Changes the target layers by so many ranks, or everything a little."""
    random = torch.Generator().manual_seed(1)
    if all_of_it:
        for parameter in model.network.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)
    for name in find_targets(model.network, "official"):
        weight = model.network.get_submodule(name).weight.data
        down = torch.randn(rank, weight[0].numel(), generator=random)
        up = torch.randn(len(weight), rank, generator=random)
        weight += 0.05 * (up @ down).reshape(weight.shape)


def pixels(seed: int, timesteps: list[float] | None, config: PixelModelConfig = CONFIG) -> PixelModel:
    torch.manual_seed(seed)
    return PixelModel(config, build_unet(config), timesteps)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extract")
    pixels(0, None).save(folder / "pixels")
    grid = pixels(0, None).denoiser.schedule.grid(2).tolist()
    for name, how in {"ranked": {"rank": 2}, "tuned": {"rank": 3, "all_of_it": True}, "same": {}}.items():
        student = pixels(0, grid)
        tune(student, **how)
        student.save(folder / name)
    pixels(1, None, CONFIG.model_copy(update={"block_out_channels": [8, 16]})).save(folder / "narrow")
    pipeline = TINY["sdxl"](folder / "scratch")
    pipeline.save_pretrained(folder / "sdxl")
    student = LatentModel(pipeline, [float(t) for t in TIMES.split(",")])
    tune(student, rank=2)
    student.save(folder / "sdxl-student")
    norms = load(folder / "same")
    norms.network.conv_norm_out.weight.data += 1
    norms.save(folder / "norms")
    shutil.copytree(folder / "ranked", folder / "adapted")
    description = json.loads((folder / "adapted" / "fewstep.json").read_text())
    (folder / "adapted" / "fewstep.json").write_text(json.dumps(description | {"lora": {"rank": 2}}))
    TINY["sd"](folder / "scratch 2").save_pretrained(folder / "v")
    config = json.loads((folder / "v" / "scheduler" / "scheduler_config.json").read_text())
    torch.manual_seed(0)
    shutil.copytree(folder / "v", folder / "v-student")
    path = folder / "v-student" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    (folder / "v-student" / "fewstep.json").write_text(json.dumps({"family": "latent", "timesteps": [999]}))
    (folder / "prompts.txt").write_text("a cat\ntwo red dogs\n")
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def changed(base: str, file: Path) -> tuple[ImageModel, dict[str, str], dict[str, LowRank]]:
    """The base with the LoRA merged into it, and the file's header and changes."""
    model = load(base)
    read = open_lora(file, model.network, model.family)
    for name, change in read.lora.items():
        layer = model.network.get_submodule(name)
        layer.weight.data = merged(layer.weight, change)
    return model, read.metadata, read.lora


def distance(model: ImageModel, other: ImageModel) -> float:
    pairs = zip(model.network.state_dict().values(), other.network.state_dict().values(), strict=True)
    return max((one - two).abs().max().item() for one, two in pairs)


def test_sdxl_comes_back_from_its_file_and_draws_what_the_student_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "CHECKED", 2)
    file = tmp_path / "made.safetensors"
    code, output, error = fewstep(
        f"extract sdxl sdxl-student {file} --rank 2 --dtype float32 --data prompts.txt --num 2"
    )
    assert (code, error) == (0, "")
    model, metadata, lora = changed("sdxl", file)
    assert distance(model, load("sdxl-student")) < 1e-5
    assert metadata["fewstep.timesteps"] == "[999.0, 749.0, 499.0, 249.0]"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (metadata["fewstep.teacher"], metadata["fewstep.student"]) == ("sdxl", "sdxl-student")
    assert "fewstep.step" not in metadata
    assert {change.alpha for change in lora.values()} == {2}
    facts = json.loads(metadata["fewstep.extraction"])
    assert facts["error"] < 1e-4
    assert {*facts["output_error"]} == {"999.0", "749.0", "499.0", "249.0"}
    for t, without in facts["output_error_without"].items():
        assert facts["output_error"][t] < 1e-4 < 0.01 < without
    assert "network's output at timestep 999: 0.00% from the student's" in output
    commands = {"a": f"sample sdxl --lora {file}", "b": "sample sdxl-student"}
    pictures = []
    for name, command in commands.items():
        assert fewstep(f"{command} --prompt 'a cat' --num 1 --grid-only --out {tmp_path / name}.png")[0] == 0
        pictures.append(np.array(Image.open(tmp_path / f"{name}.png")).astype(int)[20:])
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_of_a_pixel_model_what_is_left_out_is_measured(tmp_path: Path) -> None:
    base, student = load("pixels").network.state_dict(), load("tuned").network.state_dict()
    names = [f"{name}.weight" for name in find_targets(load("pixels").network, "official")]
    share = {n: (student[n] - base[n]).double().square().sum().item() for n in base}
    outside = 1 - sum(share[name] for name in names) / sum(share.values())
    facts = {}
    for rank in (3, 6):
        file = tmp_path / f"{rank}.safetensors"
        code, output, _ = fewstep(
            f"extract pixels tuned {file} --rank {rank} --data classes --num 6 --targets official"
        )
        assert code == 0
        model, metadata, lora = changed("pixels", file)
        facts[rank] = told = json.loads(metadata["fewstep.extraction"])
        left = sum((student[n] - model.network.state_dict()[n]).double().square().sum().item() for n in names)
        assert told["error"] == pytest.approx((left / sum(share[n] for n in names)) ** 0.5, rel=1e-4)
        assert told["outside_targets"] == pytest.approx(outside, rel=1e-4)
        assert {change.rank for change in lora.values()} == {rank}
        assert all(told["output_error"][t] < error / 2 for t, error in told["output_error_without"].items())
        better = min(("plain", "weighted"), key=lambda how: sum(e**2 for e in told[f"output_error_{how}"].values()))
        assert told["output_error"] == told[f"output_error_{better}"]
        assert told["weighted"] == (better == "weighted") == ("plain SVD" not in output)
        with safe_open(file, "pt") as content:
            assert {content.get_tensor(name).dtype for name in content.keys()} == {torch.float16}  # noqa: SIM118
    assert facts[6]["error"] < facts[3]["error"]
    assert list(facts[3]["worst"].values()) == sorted(facts[3]["worst"].values(), reverse=True)


def test_small_layers_have_the_rank_they_can_and_targets_may_be_named(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    code, output, _ = fewstep(f"extract pixels ranked {file} --rank 64 --targets conv1,time_emb_proj --dtype float32")
    assert code == 0
    assert "smaller layers have what rank they can" in output
    _, metadata, lora = changed("pixels", file)
    assert all(name.endswith(("conv1", "time_emb_proj")) for name in lora)
    assert {change.rank for change in lora.values()} == {16, 32}  # the smaller sides
    assert json.loads(metadata["fewstep.extraction"])["error"] < 1e-5


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("pixels ranked made.pt", ["made.pt", ".safetensors"]),
        ("pixels ranked prompts.safetensors --dtype int8", ["--dtype int8", "float16"]),
        ("pixels ranked nowhere/prompts.txt/made.safetensors", ["prompts.txt"]),
        ("pixels same made.safetensors", ["same", "pixels"]),
        ("pixels norms made.safetensors", ["norms", "pixels"]),
        ("ranked pixels made.safetensors", ["pixels", "no few-step student"]),
        ("narrow ranked made.safetensors", ["ranked", "another size or family", "narrow"]),
        ("v ranked made.safetensors", ["ranked"]),
        ("pixels adapted made.safetensors", ["adapted", "export --to lora"]),
        ("v v-student made.safetensors", ["v-student", "predicts other things"]),
        ("sdxl sdxl-student made.safetensors --data classes", ["--data classes", "prompts"]),
        ("pixels ranked made.safetensors --data prompts.txt", ["takes no text"]),
        ("pixels ranked made.safetensors --data nothing.txt", ["--data nothing.txt"]),
        ("pixels ranked made.safetensors --targets nose", ["'nose' matches no layer"]),
        ("pixels nowhere made.safetensors", ["nowhere"]),
        ("pixels ranked pixels", [".safetensors"]),
    ],
)
def test_what_can_not_be_extracted_is_told_in_one_line(place: Path, line: str, fragments: list[str]) -> None:
    line = line.replace("nowhere/prompts.txt", "prompts.txt")
    before = sorted(place.rglob("*"))
    refused(fewstep(f"extract {line}"), *fragments)
    assert sorted(place.rglob("*")) == before


def test_all_layers_are_the_first_and_the_last_too_so_that_norms_and_biases_alone_are_left(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    assert fewstep(f"extract pixels tuned {file} --rank 64 --dtype float32")[0] == 0
    model, metadata, lora = changed("pixels", file)
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= lora.keys()
    pairs = zip(model.network.named_parameters(), load("tuned").network.parameters(), strict=True)
    off = {name for (name, ours), theirs in pairs if (ours - theirs).abs().max() > 1e-4}
    assert off == {name for name, value in model.network.named_parameters() if value.ndim == 1 or "class" in name}
    assert json.loads(metadata["fewstep.extraction"])["targets"] == "all"


def test_a_file_that_is_there_stays_unless_told(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("mine")
    refused(fewstep(f"extract pixels ranked {file}"), "exists already", "--overwrite")
    assert file.read_text() == "mine"
    assert fewstep(f"extract pixels ranked {file} --overwrite --rank 2")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
