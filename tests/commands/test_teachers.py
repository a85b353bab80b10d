"""The verbs on every source of a text-to-image teacher, what their checkpoints cost, and what is where meanwhile."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fake_hub import fake_hub, point_to
from fewstep.cli import main
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.training.dmd2 import DMD2
from single_files import original_weights, write_single_file
from tiny_pipelines import TINY

CLOSED = "http://127.0.0.1:9"
RECIPE = """
kind: distill
teacher: teacher
data: {source: pictures}
num_steps: 4
batch_size: 3
student_every: 2
student: {num_timesteps: 2, optimizer: {lr: 1e-3}}
critic: {optimizer: {lr: 1e-3}}
"""


@pytest.fixture(scope="module", params=TINY)
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher as a folder, as a file and as a folder without weights; captioned pictures; a recipe."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = TINY[request.param](folder / "scratch")
    pipeline.save_pretrained(folder / "teacher")
    write_single_file(folder / "tuned.safetensors", original_weights(pipeline))
    shutil.copytree(folder / "teacher", folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pictures").mkdir()
    with (folder / "pictures" / "metadata.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for index in range(6):
            Image.new("RGB", (20 + index, 24), (40 * index, 90, 200)).save(folder / "pictures" / f"{index}.png")
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


def student_of(run_folder: Path) -> list[torch.Tensor]:
    (model,) = (run_folder / "checkpoints").glob("*/model")
    return list(load(model).denoiser.parameters())


def test_a_student_of_the_file_or_of_the_hub_is_the_student_of_the_folder(
    run, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = "--set teacher=tuned.safetensors --set teacher_config=config"
    assert run(f"fewstep distill recipe.yaml --out {tmp_path}/folder") == (0, "")
    assert run(f"fewstep distill recipe.yaml --out {tmp_path}/file {file}") == (0, "")
    with fake_hub({"owner/name": workplace / "teacher"}, tmp_path / "cache", monkeypatch):
        code, _ = run(f"fewstep distill recipe.yaml --out {tmp_path}/hub --set teacher=owner/name")  # shows progress
    assert code == 0
    expected = student_of(tmp_path / "folder")
    for source in ("file", "hub"):
        for ours, theirs in zip(student_of(tmp_path / source), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    line = f"fewstep distill recipe.yaml --out {tmp_path}/file --resume {file}"
    assert run(line) == (0, "")
    code, error = run(f"{line} --set teacher_prediction_type=v_prediction")
    assert code == 2
    assert "teacher_prediction_type" in error


def test_samples_of_the_file_are_samples_of_the_folder(run, tmp_path: Path) -> None:
    options = "--prompt cat --num 2 --sampler ddim:2 --guidance 2 --out"
    assert run(f"fewstep sample teacher {options} {tmp_path}/folder.png") == (0, "")
    assert run(f"fewstep sample tuned.safetensors --config config {options} {tmp_path}/file.png") == (0, "")
    assert run(f"fewstep sample teacher --prediction-type v_prediction {options} {tmp_path}/v.png") == (0, "")
    pixels = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in ("folder", "file", "v")}
    assert pixels["file"] == pixels["folder"] != pixels["v"]


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ("teacher=tuned.safetensors", ["tuned.safetensors", "teacher_config", "can't be reached"]),
        ("teacher=owner/name", ["owner/name", "can't be reached", "local folder"]),
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
    run, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, fragments: list[str]
) -> None:
    point_to(CLOSED, tmp_path / "cache", monkeypatch)
    (workplace / "model.ckpt").write_bytes(b"\x80\x04N.")
    before = sorted(workplace.rglob("*"))
    code, error = run(f"fewstep distill recipe.yaml --out {tmp_path}/run --set {settings}")
    assert code == 2
    assert error.count("\n") == 1, error
    assert all(fragment in error for fragment in fragments), error
    assert not (tmp_path / "run").exists()
    assert sorted(workplace.rglob("*")) == before


def test_a_hub_that_can_not_be_reached_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": CLOSED, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    answer = subprocess.run(
        [sys.executable, "-c", "from fewstep.cli import main; main()", "sample", "owner/name", "--prompt", "x"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.count("\n") == 1, answer.stderr
    assert "owner/name" in answer.stderr
    assert "name a local folder" in answer.stderr
    assert not (tmp_path / "samples.png").exists()


# --- what checkpoints cost -------------------------------------------------------------------------------------------


def disk_use(folder: Path) -> int:
    """Bytes of the files in a folder, every inode once."""
    return sum({path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}.values())


def test_a_checkpoint_costs_the_unet_and_its_state(run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(f"fewstep distill recipe.yaml --out {out} --set checkpoint_every=2") == (0, "")
    first, second = sorted((out / "checkpoints").iterdir())
    shutil.rmtree(second)
    before = disk_use(out)
    assert run(f"fewstep distill recipe.yaml --out {out} --set checkpoint_every=2 --resume") == (0, "")
    unet, state = (second / "model" / "unet" / "diffusion_pytorch_model.safetensors"), second / "state.pt"
    added = disk_use(out) - before
    own = unet.stat().st_size + state.stat().st_size
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
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, in_steps: set[str]
) -> None:
    events: list[str] = []
    here, step, release = LatentModel._here, DMD2.step, LatentModel.release

    def use(model: LatentModel, part: torch.nn.Module) -> torch.nn.Module:
        events.append("autoencoder" if part is model.autoencoder else "conditioner")
        return here(model, part)

    def counted_step(*arguments: object) -> dict:
        events.append("step")
        metrics = step(*arguments)
        events.append("done")
        return metrics

    monkeypatch.setattr(LatentModel, "_here", use)
    monkeypatch.setattr(LatentModel, "release", lambda model: (events.append("release"), release(model)))
    monkeypatch.setattr(DMD2, "step", counted_step)
    assert run(f"fewstep distill recipe.yaml --out {tmp_path}/run --set {settings}") == (0, "")
    before, *steps = " ".join(events).split("step")
    assert before.split()[-1] == "release"
    assert "autoencoder" not in before
    used = {event for part in steps for event in part.split("done")[0].split()}
    assert used == in_steps  # embeddings are kept, unless there is no room for them
    assert steps[-1].split("done")[1].split() == ["conditioner", "autoencoder", "release"]  # the grid
