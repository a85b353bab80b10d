"""`fewstep import edm`: the folder is a teacher like any other, and is written whole or not at all."""

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edm_files import edm_pickle, small_network, write_checkpoint
from fewstep import cli
from fewstep.models.loading.pretrained import load

MEASURE = """
import sys
from pathlib import Path
from fewstep.commands.importing import import_edm
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
import_edm(Path(sys.argv[1]), Path(sys.argv[2]))
print((peak() - before) / sum(file.stat().st_size for file in Path(sys.argv[2], "unet").glob("*.safetensors")))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = small_network(channel_mult=[1, 1])
    return write_checkpoint(tmp_path_factory.mktemp("edm") / "edm.pkl", network)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Runs a command line in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return command


def test_the_folder_is_a_model_that_samples(run, checkpoint: Path, tmp_path: Path) -> None:
    network = small_network(channel_mult=[1, 1])
    code, out, err = run("import", "edm", checkpoint, "--out", "models/small")
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
    code, _, err = run("sample", "models/small", "--num", 5, "--sampler", "heun:2", "--out", "grid.png")
    assert (code, err) == (0, "")
    assert Path("grid.png").stat().st_size > 100


def refused(run, *words: object) -> str:
    """The one line; nothing is left in the folder."""
    before = sorted(Path.cwd().rglob("*"))
    code, _, err = run("import", "edm", *words)
    assert code == 2
    assert err.startswith("fewstep: ")
    assert err.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == before
    return err


def test_a_target_that_exists_is_left_alone(run, checkpoint: Path) -> None:
    Path("there").mkdir()
    assert "there: exists already" in refused(run, checkpoint, "--out", "there")


def test_a_target_that_cannot_be_written_is_told_first(run, checkpoint: Path) -> None:
    Path("file").write_text("")
    assert "not a folder that can be written to" in refused(run, checkpoint, "--out", "file/model")


@pytest.mark.parametrize("left", [1000, 1_000_000])
def test_a_disk_that_fills_is_one_line_and_leaves_nothing(run, checkpoint: Path, left: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, limits[1]))
    try:
        err = refused(run, checkpoint, "--out", "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "model: can't be written" in err


def test_an_interrupted_import_leaves_nothing(run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: object, folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.models.pixel_model.PixelModel.save", interrupt)
    code, _, _ = run("import", "edm", checkpoint, "--out", "model")
    assert (code, list(Path.cwd().iterdir())) == (130, [])


def test_what_is_no_checkpoint_is_one_line(run, checkpoint: Path) -> None:
    Path("evil.pkl").write_bytes(pickle.dumps({"ema": print}))
    Path("cut.pkl").write_bytes(checkpoint.read_bytes()[:1_000_000])
    Path("other.pkl").write_bytes(edm_pickle(torch.nn.ModuleDict()))
    lost = small_network(channel_mult=[1, 1])
    lost.model.dec["8x8_block0"].skip.bias[3] = float("nan")
    write_checkpoint(Path("nan.pkl"), lost)
    assert "nan.pkl: dec.8x8_block0.skip.bias holds NaN or infinity" in refused(run, "nan.pkl", "--out", "model")
    assert "names builtins.print" in refused(run, "evil.pkl", "--out", "model")
    assert "cut off or damaged" in refused(run, "cut.pkl", "--out", "model")
    assert "preconditioned by ModuleDict" in refused(run, "other.pkl", "--out", "model")
    assert "no such file" in refused(run, "nowhere.pkl", "--out", "model")
    assert "no such file" in refused(run, ".", "--out", "model")


def measured(checkpoint: Path, out: Path) -> float:
    """Peak memory of an import beyond that of its imports, in weights."""
    command = [sys.executable, "-c", MEASURE, str(checkpoint), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_weights_are_in_memory_once(protocol: int, tmp_path: Path) -> None:
    """100 MB of them; 1.1 was measured."""
    network = small_network(channel_mult=[1, 2, 3])
    checkpoint = write_checkpoint(tmp_path / "edm.pkl", network, protocol)
    assert measured(checkpoint, tmp_path / "model") <= 1.3
