"""`fewstep export RUN --to lora` of runs that trained one, and what is drawn with the file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from command_line import Run, fewstep, refused
from fewstep.models.loading.pretrained import load
from fewstep.models.lora_files import open_lora
from fewstep.runtime.checkpoint import load_state
from tiny_pipelines import TINY

MODEL = {"num_classes": 10, "null_class": True, "block_out_channels": [8, 8], "norm_num_groups": 4}
RECIPES = {
    "t": {"kind": "teach", "model": MODEL, "class_dropout": 0.1, "data": {"source": "digits"}, "num_steps": 1},
    "pixels": {"teacher": "teacher", "data": {"source": "digits"}},
    "text": {"teacher": "sdxl", "data": {"source": None}, "prompts": {"source": "prompts.txt"}, "num_steps": 4},
}
LOOP = {"batch_size": 2, "num_steps": 2, "student_every": 1, "checkpoint_every": 2}
OPTIMIZER = {"num_timesteps": 2, "ema_decay": 0.5, "optimizer": {"lr": 1e-2}}
STUDENT = {"kind": "distill", "student": OPTIMIZER, "lora": {"rank": 4, "alpha": 2, "targets": "official"}} | LOOP
STUDENT |= {"gan": {"student_weight": 0, "critic_weight": 0}, "guidance_scale": 1.5}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base and its student of each kind, as LoRAs, and a student that was trained whole."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "prompts.txt").write_text("a cat\n")
    TINY["sdxl"](folder / "scratch").save_pretrained(folder / "sdxl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        for name, recipe in RECIPES.items():
            whole = recipe if name == "t" else STUDENT | recipe
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
        lines = ["teach t.yaml --out teacher", "distill pixels.yaml --out pixels", "distill text.yaml --out text"]
        for line in [*lines, "distill pixels.yaml --set lora=null --out whole"]:
            assert fewstep(line)[0] == 0, line
        yield folder


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(workplace)
    return fewstep


def drawn(run: Run, line: str, out: Path) -> np.ndarray:
    """What `sample` draws, and it says nothing on the way."""
    code, _, told = run(f"sample {line} --num 2 --grid-only --overwrite --out {out}")
    assert (code, told) == (0, ""), told
    return np.array(Image.open(out)).astype(int)


@pytest.mark.parametrize(
    ("name", "base", "options", "prompt"),
    [
        ("text", "sdxl", "--dtype float32", "--prompt cat"),
        ("text@2", "sdxl", "--format diffusers", "--prompt cat"),
        ("pixels", "teacher", "", ""),
    ],
)
def test_the_base_with_the_file_draws_what_the_run_draws(
    run: Run, tmp_path: Path, name: str, base: str, options: str, prompt: str
) -> None:
    file = tmp_path / "new" / "x.safetensors"
    code, told, error = run(f"export {name} {file} --to lora {options}")
    assert (code, error) == (0, "")
    assert re.search(
        rf"^wrote {file} \([\d.]+ (MB|bytes)\)\nnext: fewstep sample {base} --lora {file}", told, re.MULTILINE
    )
    assert ("<lora:x:1>" in told) == bool(prompt)
    theirs = drawn(run, f"{name} {prompt}", tmp_path / "run.png")
    assert abs(drawn(run, f"{base} --lora {file} {prompt}", tmp_path / "x.png") - theirs).max() <= 1
    assert abs(drawn(run, f"{base} --lora {file}:0 {prompt}", tmp_path / "0.png") - theirs).max() >= 3
    assert [path.name for path in file.parent.iterdir()] == ["x.safetensors"]


def test_averaged_or_as_trained_and_the_true_alpha_in_float16(run: Run, tmp_path: Path) -> None:
    assert run(f"export text {tmp_path}/average.safetensors --to lora --license mit")[0] == 0
    assert run(f"export text {tmp_path}/raw.safetensors --to lora --raw")[0] == 0
    newest = max(Path("text").glob("checkpoints/*"))
    model = load("sdxl")
    network, family = model.network, model.family
    average, raw = (open_lora(tmp_path / f"{name}.safetensors", network, family) for name in ("average", "raw"))
    state = load_state(newest)["method"]["student"]
    trained = open_lora(newest / "model" / "lora", network, family).lora
    assert average.lora.keys() == raw.lora.keys() == trained.keys()
    for name, change in raw.lora.items():
        down, up = (state[f"network.unet.{name}.lora_{letter}"] for letter in "AB")
        torch.testing.assert_close(change.down, down.half())
        torch.testing.assert_close(change.up, up.half())
        error = (average.lora[name].delta() - trained[name].delta()).norm()
        assert error <= 1e-3 * trained[name].delta().norm()
        assert (change.alpha, average.lora[name].alpha, change.rank) == (2, 2, 4)
    assert any(
        (raw.lora[name].delta() - trained[name].delta()).norm() > 1e-2 * trained[name].delta().norm()
        for name in trained
    )
    assert (average.metadata["fewstep.ema"], raw.metadata["fewstep.ema"]) == ("0.5", "raw")
    assert average.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert average.metadata["modelspec.license"] == "mit"
    assert average.metadata["fewstep.recipe"] == Path("text/recipe.yaml").read_text()
    assert json.loads(average.metadata["fewstep.timesteps"]) == [999, 499]


def test_what_a_sweep_found_best_goes_into_the_header(run: Run, tmp_path: Path) -> None:
    export = f"export pixels {tmp_path}/x.safetensors --to lora --format diffusers --overwrite"
    assert run(export)[0] == 0
    how = (
        f"--lora {tmp_path}/x.safetensors --strength 0.5,1 --cfg 1,2 --class 3 --best diversity --out {tmp_path}/sweep"
    )
    assert run(f"sweep teacher {how}")[0] == 0
    assert run(f"{export} --evaluation {tmp_path}/sweep")[0] == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        recommended = json.loads(file.metadata()["fewstep.recommended"])
    assert recommended == json.loads((tmp_path / "sweep" / "results.json").read_text())["best"]


def test_a_merged_export_is_the_base_and_its_change_and_knows_its_own_lora(run: Run, tmp_path: Path) -> None:
    """In float32; bfloat16 is told to lose most of the change."""
    assert run(f"export text {tmp_path}/x.safetensors --to lora --dtype float32")[0] == 0
    assert run(f"export text {tmp_path}/folder")[::2] == (0, "")
    assert run(f"export text {tmp_path}/file.safetensors --dtype float32")[::2] == (0, "")
    code, _, told = run(f"export text {tmp_path}/half --dtype bfloat16")
    assert (code, told.count("\n")) == (0, 1)
    assert "--dtype bfloat16: rounds away" in told
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| weights | averaged, EMA 0.5; a LoRA (rank 4, alpha 2), merged in float32; float32 |" in card
    base = load("sdxl")
    lora = open_lora(tmp_path / "x.safetensors", base.network, base.family).lora
    state, weights = base.network.state_dict(), load(tmp_path / "file.safetensors", "sdxl").network.state_dict()
    stored = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in state.items():
        change = lora.get(name.removesuffix(".weight"))
        expected = weight if change is None else weight.double() + change.delta().double()
        for found in (stored[name], weights[name]):
            torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-7)
    for source in ("folder", "file.safetensors --config sdxl"):
        line = f"sample {tmp_path}/{source} --lora {tmp_path}/x.safetensors --prompt cat --num 1 --grid-only"
        code, _, told = run(f"{line} --out {tmp_path}/x.png --overwrite")
        assert code == 0
        assert told.count("one already: it is changed twice") == told.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("whole x.safetensors --to lora --format diffusers", ["whole: was trained whole", "`fewstep extract BASE STU"]),
        ("pixels x.safetensors --to lora --format kohya", ["--format kohya", "--format diffusers"]),
        ("text x.safetensors --to lora --format peft", ["--format peft", "kohya or diffusers"]),
        ("text x --format kohya", ["--format kohya: is of --to lora"]),
        ("text x --to lora", ["x: a single file's name ends in .safetensors"]),
        ("text x.safetensors --to lora --shard-size 1GB", ["--shard-size"]),
        ("text there.safetensors --to lora", ["there.safetensors: exists already", "--overwrite"]),
        ("text x.safetensors --to lora --ema 0.9", ["has no average '0.9'"]),
        ("text x.safetensors --to loras", ["--to loras: write diffusers or single-file or lora"]),
    ],
)
def test_what_can_not_be_written_is_one_line(run: Run, workplace: Path, line: str, fragments: list[str]) -> None:
    (workplace / "there.safetensors").write_text("precious")
    refused(run(f"export {line}"), *fragments)
    assert not (workplace / "x.safetensors").exists()
    assert (workplace / "there.safetensors").read_text() == "precious"
