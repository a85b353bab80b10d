"""`fewstep import edm`: the folder is a teacher like any other, and is written whole or not at all."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from command_line import fewstep, refused
from edm_files import edm_pickle, small_network, write_checkpoint
from fewstep.models.loading.pretrained import load
from limits import extra_memory, file_size_limit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = small_network(channel_mult=[1, 1])
    return write_checkpoint(tmp_path_factory.mktemp("edm") / "edm.pkl", network)


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)


def test_the_folder_is_a_model_that_samples(checkpoint: Path) -> None:
    network = small_network(channel_mult=[1, 1])
    code, out, err = fewstep(f"import edm {checkpoint} --out models/small")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{checkpoint}: EDM, an ADM network, 8x8x3, 5 classes",
        f"wrote models/small: {sum(p.numel() for p in network.parameters()):,} parameters",
    ]
    assert os.listdir("models") == ["small"]
    assert sorted(os.listdir("models/small")) == ["fewstep.json", "unet"]
    assert json.loads(Path("models/small/fewstep.json").read_text())["timesteps"] is None
    model = load(Path("models/small"))
    x_t, t, label = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 7.0]), torch.tensor([1, 3])
    with torch.no_grad():
        torch.testing.assert_close(model.denoiser(x_t, t, {"label": label}), network(x_t, t, label))
    code, _, err = fewstep("sample models/small --num 5 --sampler heun:2 --out grid.png")
    assert (code, err) == (0, "")
    assert Path("grid.png").stat().st_size > 100


def refused_whole(file: object, out: str, *fragments: str) -> None:
    """One line, and nothing is left in the folder."""
    before = sorted(Path.cwd().rglob("*"))
    refused(fewstep(f"import edm {file} --out {out}"), *fragments)
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_target_that_is_there_or_cannot_be_written_is_told_first(checkpoint: Path) -> None:
    Path("there").mkdir()
    Path("file").write_text("")
    refused_whole(checkpoint, "there", "there: exists already")
    refused_whole(checkpoint, "file/model", "not a folder that can be written to")


@pytest.mark.parametrize("left", [1000, 1_000_000])
def test_a_disk_that_fills_is_one_line_and_leaves_nothing(checkpoint: Path, left: int) -> None:
    with file_size_limit(left):
        refused_whole(checkpoint, "model", "model: can't be written")


def test_an_interrupted_import_leaves_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: object, folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.models.pixel_model.PixelModel.save", interrupt)
    code, _, _ = fewstep(f"import edm {checkpoint} --out model")
    assert (code, list(Path.cwd().iterdir())) == (130, [])


def test_what_is_no_checkpoint_is_one_line(checkpoint: Path) -> None:
    Path("evil.pkl").write_bytes(pickle.dumps({"ema": print}))
    Path("cut.pkl").write_bytes(checkpoint.read_bytes()[:1_000_000])
    Path("other.pkl").write_bytes(edm_pickle(torch.nn.ModuleDict()))
    lost = small_network(channel_mult=[1, 1])
    lost.model.dec["8x8_block0"].skip.bias[3] = float("nan")
    write_checkpoint(Path("nan.pkl"), lost)
    refused_whole("nan.pkl", "model", "nan.pkl: dec.8x8_block0.skip.bias holds NaN or infinity")
    refused_whole("evil.pkl", "model", "names builtins.print")
    refused_whole("cut.pkl", "model", "cut off or damaged")
    refused_whole("other.pkl", "model", "preconditioned by ModuleDict")
    refused_whole("nowhere.pkl", "model", "no such file")
    refused_whole(".", "model", "no such file")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_weights_are_in_memory_once(protocol: int, tmp_path: Path) -> None:
    """100 MB of them; 1.1 was measured."""
    checkpoint = write_checkpoint(tmp_path / "edm.pkl", small_network(channel_mult=[1, 2, 3]), protocol)
    imports = "from fewstep.commands.importing import import_edm"
    peak = extra_memory(imports, "import_edm(*map(Path, arguments))", checkpoint, tmp_path / "model")
    assert peak <= 1.3 * sum(file.stat().st_size for file in (tmp_path / "model" / "unet").glob("*.safetensors"))
