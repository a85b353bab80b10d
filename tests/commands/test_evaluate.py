"""`fewstep evaluate`: the same numbers however the work is cut, of models and of images, against any reference."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import fewstep.commands.evaluate as module
from command_line import Run, refused
from fewstep.diffusion.denoiser import Denoiser
from fewstep.evaluation import rows as row_files
from fewstep.evaluation.extractors import train_classifier
from fewstep.files import folder_lock
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig
from image_sets import encoded, write_captioned, write_files, write_tar
from tiny_encoders import save_clip
from tiny_pipelines import TINY

SIDE, NUM = 8, 130
LINE = f"fewstep evaluate student --data real --features net.pt --num-samples {NUM} --batch-size 25 --device cpu"


class Features(torch.nn.Module):
    """uint8 (B, 3, H, W) -> (B, 7): means of pieces, and the deviation."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        pieces = torch.nn.functional.adaptive_avg_pool2d(x[:, :1], 2).flatten(1)
        return torch.cat([pieces, x.mean(dim=(1, 2, 3))[:, None], x.std(dim=(1, 2, 3))[:, None], x[:, 0, 0, :1]], 1)


def noise_pictures(num: int, seed: int, side: int = SIDE) -> list[Image.Image]:
    draws = np.random.default_rng(seed)
    return [Image.fromarray(draws.integers(0, 200, (side, side), dtype=np.uint8)) for _ in range(num)]


def pixel_model(seed: int, timesteps: list[float] | None) -> PixelModel:
    torch.manual_seed(seed)
    config = PixelModelConfig(num_classes=3, null_class=True, block_out_channels=[8, 8], norm_num_groups=4)
    return PixelModel(config, build_unet(config), timesteps)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student/ and teacher/, net.pt, and 150 images in real/ that are none of theirs."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, timesteps in (("student", [80.0, 2.0]), ("teacher", None)):
        (folder / name).mkdir()
        pixel_model(len(name), timesteps).save(folder / name)
    torch.jit.script(Features()).save(folder / "net.pt")
    write_files(folder / "real", {f"{i:03d}.png": encoded(each) for i, each in enumerate(noise_pictures(150, 1))})
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "images_per_second", lambda model, sampler, batch: 4.0 if batch == 1 else 8.0)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(row_files, "FILE_ROWS", 50)  # 50, 50, 30


def table(out: str) -> list[dict]:
    return json.loads(Path(out, "results.json").read_text())


def judged(run: Run, line: str, out: str) -> list[dict]:
    code, _, error = run(f"{line} --out {out}")
    assert code == 0, error
    return table(out)


def stopping_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a row ends where file `number` of it would be written."""
    save = row_files.save_shard

    def stop(path: Path, *args: object) -> None:
        if path.name == f"{number:05d}.safetensors" and path.parent.name != "within":
            raise KeyboardInterrupt
        save(path, *args)

    monkeypatch.setattr(row_files, "save_shard", stop)


# --- the same numbers ------------------------------------------------------------------------------------------------


def test_a_stopped_command_goes_on_to_the_same_table_with_what_it_has(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judged(run, LINE, "whole")
    assert not Path("whole/rows").exists()
    with monkeypatch.context() as patch:
        stopping_at(2, patch)
        code, _, error = run(f"{LINE} --out parts")
        assert (code, "the same command goes on with parts" in error) == (130, True)
    (folder,) = Path("parts/rows").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert before.keys() == {"00000.safetensors", "00001.safetensors"}
    drawn: list[range] = []
    real = module.generate_batches
    monkeypatch.setattr(module, "generate_batches", lambda *a, **k: drawn.append(a[2]) or real(*a, **k))
    assert judged(run, LINE, "parts") == whole
    assert drawn == [range(100, 130), range(132, 144)]  # what lacked, and four of each class behind the row


def test_ranks_make_their_shares_and_the_first_the_table(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judged(run, LINE, "whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused(run(f"{LINE} --out ranks"), "ranks: 1 files of other ranks are not there yet; the same command goes on")
    monkeypatch.setenv("RANK", "1")
    assert run(f"{LINE} --out ranks")[1] == "ranks: rank 1 of 2 has made its share\n"
    assert not Path("ranks/results.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert judged(run, LINE, "ranks") == whole
    monkeypatch.setenv("RANK", "2")
    refused(run(f"{LINE} --out ranks --overwrite"), "RANK=2: must be below WORLD_SIZE=2")


def test_two_commands_do_not_write_to_one_place(run: Run, place: Path) -> None:
    """The first would remove what the second reads; ranks of one command share it."""
    for name, code in ((".0.lock", 2), (".1.lock", 0)):
        with folder_lock(Path("out"), name):
            answer = run(f"{LINE} --out out")
            assert answer[0] == code, answer[2]
            assert code == 0 or "out: process" in answer[2]


@pytest.mark.parametrize("name", ["rows/precious", "rows/mine/precious.safetensors", "images/precious", "precious"])
def test_what_else_is_in_the_place_stays(run: Run, place: Path, name: str) -> None:
    write_files(Path("out"), {name: b"mine"})
    judged(run, f"{LINE} --keep-images", "out")
    assert Path("out", name).read_bytes() == b"mine"
    assert {path.name for path in Path("out").iterdir()} == {
        "results.json",
        "report.html",
        "images",
        name.split("/")[0],
    }


@pytest.mark.parametrize("batch_size", [1, 7])
def test_another_batch_size_changes_no_image_by_more_than_rounding(run: Run, place: Path, batch_size: int) -> None:
    """Convolutions of other batch sizes may add up in another order: one grey level at most, and 1e-4 of any metric."""
    lines = {"first": LINE, "other": LINE.replace("--batch-size 25", f"--batch-size {batch_size}")}
    first, other = (judged(run, f"{line} --keep-images", out) for out, line in lines.items())
    folders = [Path(out, "images", "student") for out in lines]
    for path in sorted(folders[0].glob("*.png")):
        ours, theirs = (np.asarray(Image.open(folder / path.name)).astype(int) for folder in folders)
        assert abs(ours - theirs).max() <= 1
    for ours, theirs in zip(first, other, strict=True):
        for name, value in ours.items():
            if isinstance(value, float) and name != "images_per_second":
                assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_noise_and_classes_do_not_depend_on_the_place_in_the_table(run: Run, place: Path) -> None:
    line = LINE.replace("student", "{}") + " --sampler heun:2 --sampler euler:3"
    one = judged(run, line.format("student teacher"), "one")
    other = judged(run, line.format("teacher student"), "other")
    by_name = lambda rows: {(row["model"], row["sampler"]): row for row in rows}  # noqa: E731
    assert by_name(one) == by_name(other)
    assert [row["sampler"] for row in one] == [None, "student", "heun 2", "euler 3"]
    assert (one[1]["latency"], one[1]["images_per_second"], one[1]["nfe"]) == (0.25, 8.0, 2)


# --- the stops of a student -------------------------------------------------------------------------------------------

STOPS = LINE.replace("student", "three --stops")


@pytest.fixture
def three(place: Path) -> None:
    """A student of three steps, three/, and what is left of it with the later ones cut from its file, one/ and two/."""
    pixel_model(5, [80.0, 2.0, 0.5]).save(Path("three"))
    for name, timesteps in {"one": [80.0], "two": [80.0, 2.0]}.items():
        shutil.copytree("three", name)
        told = json.loads(Path(name, "fewstep.json").read_text())
        Path(name, "fewstep.json").write_text(json.dumps(told | {"timesteps": timesteps}))


@pytest.mark.usefixtures("three")
def test_a_stop_has_the_numbers_of_the_student_cut_behind_it_and_one_rollout_has_all_stops(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = judged(run, STOPS.replace("three --stops", "three one two teacher --sampler heun:1"), "cut")
    calls, forward = [], Denoiser.forward
    monkeypatch.setattr(Denoiser, "forward", lambda self, x, *more: calls.append(len(x)) or forward(self, x, *more))
    rows = judged(run, f"{STOPS} teacher --sampler heun:1 --keep-images", "out")
    assert sum(calls) == 3 * NUM + NUM + (1 + 2 + 3 + 1) * 12  # and four of each class for the distances within
    assert [row["nfe"] for row in rows] == [None, 3, 1, 2, 1]
    assert [row.pop("model") for row in rows] == ["real", "three", *STOP_NAMES, "teacher"]
    assert [row.pop("model") for row in cut] == ["real", "three", "one", "two", "teacher"]
    assert rows == cut
    kept = "fewstep evaluate out/images/three-stop-2-of-3 --data real --features net.pt --num-samples"
    assert judged(run, f"{kept} {NUM}", "again")[1]["fid"] == pytest.approx(rows[3]["fid"], rel=1e-9)


STOP_NAMES = ["three, stop 1 of 3", "three, stop 2 of 3"]


@pytest.mark.usefixtures("three")
def test_stops_go_on_after_a_stop_of_the_command_and_in_ranks_to_the_same_table(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judged(run, STOPS, "whole")
    with monkeypatch.context() as patch:
        stopping_at(1, patch)
        assert run(f"{STOPS} --out parts")[0] == 130
    made = {path.parent.name.rpartition("-")[0]: path for path in Path("parts/rows").glob("*/00000.safetensors")}
    assert made.keys() == {"three", "three-stop-1-of-3", "three-stop-2-of-3"}
    made["three-stop-1-of-3"].unlink()  # of which no other row has need
    assert judged(run, STOPS, "parts") == whole
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        code, _, error = run(f"{STOPS} --out ranks")
        assert code == 0, error
    assert table("ranks") == whole


def test_a_student_whose_numbers_are_not_finite_leaves_no_stops_behind(run: Run, place: Path) -> None:
    model = pixel_model(1, [80.0, 2.0])
    next(model.denoiser.parameters()).data.fill_(1e38)
    model.save(Path("three"))
    refused(run(f"{STOPS} --out out"), "three: images 0 to 24 are not finite")
    assert not Path("out").exists()


# --- images that are kept, or that something else made ----------------------------------------------------------------


def test_kept_images_are_judged_to_the_same_and_made_again_where_some_lack(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{LINE} --keep-images"
    whole = judged(run, line, "out")
    kept = Path("out/images/student")
    assert [path.name for path in sorted(kept.glob("[!.]*"))] == [f"{index:05d}.png" for index in range(NUM)]
    alone = judged(run, f"fewstep evaluate {kept} --data real --features net.pt --num-samples {NUM}", "again")
    same = [name for name in whole[1] if name in alone[1] and isinstance(whole[1][name], float)]
    assert {"fid", "kid", "precision", "brightness"} <= {*same}
    assert [alone[1][name] for name in same] == pytest.approx([whole[1][name] for name in same], rel=1e-9)
    assert (alone[1]["sampler"], alone[1]["nfe"]) == ("images", None)
    with monkeypatch.context() as patch:  # a stop after the first file, of which an image is lost
        stopping_at(1, patch)
        assert run(f"{line} --out later")[0] == 130
    Path("later/images/student/00007.png").unlink()
    assert judged(run, line, "later") == whole
    assert len([*Path("later/images/student").glob("*.png")]) == NUM
    monkeypatch.setattr(module, "holds_results", lambda folder: False)
    judged(run, f"{line.replace(str(NUM), '100')} --seed 4", "later")  # of another plan: none of the old is left
    assert len([*Path("later/images/student").glob("*.png")]) == 100
    write_files(Path("mixed/images/student"), {"mine.txt": b"precious"})
    refused(run(f"{line} --out mixed"), "mixed/images/student: holds other files")


def test_a_folder_of_runs_is_no_folder_of_images(run: Run, place: Path) -> None:
    """Though it holds some: the grids that runs have drawn."""
    write_files(Path("runs/first/samples"), {"00000010.png": encoded(noise_pictures(1, 0)[0])})
    Path("runs/first/recipe.yaml").touch()
    refused(run(LINE.replace("student", "runs")), "runs: not a run folder", "name one that")


def test_images_of_two_rows_are_not_kept_in_one_folder(run: Run, place: Path) -> None:
    """Of two that are called s their paths are the names, one of which is as that of a third where files have it."""
    for folder in ("a/s", "b/s", "a-s"):
        shutil.copytree("student", folder)
    told = Path("a-s/fewstep.json")
    told.write_text(told.read_text().replace("2.0", "1.0"))  # another second timestep
    line = LINE.replace("student", "a/s b/s a-s") + " --keep-images"
    refused(run(f"{line} --out out"), "--keep-images: two rows would go to out/images/a-s; rename one of them")
    assert not Path("out").exists()


def test_images_in_a_tar_a_parquet_file_and_a_folder_are_the_same_images(run: Run, place: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    cells = {f"{i:03d}.png": encoded(each) for i, each in enumerate(noise_pictures(60, 2))}
    write_files(Path("made"), cells)
    write_tar(Path("made.tar"), cells)
    parquet.write_table(
        pyarrow.table({"image": [{"bytes": cell, "path": None} for cell in cells.values()]}), "made.parquet"
    )
    rows = judged(
        run, "fewstep evaluate made made.tar made.parquet --data real --features net.pt --num-samples 100", "out"
    )
    first, *others = ({key: value for key, value in row.items() if key != "model"} for row in rows[1:])
    assert others == [first, first]
    assert "student" not in {row["sampler"] for row in rows}


def test_a_part_of_many_images_is_a_random_one(run: Run, place: Path) -> None:
    """Folders are often sorted."""
    pictures = [Image.new("L", (SIDE, SIDE), index) for index in range(200)]
    write_files(Path("sorted"), {f"{i:03d}.png": encoded(each) for i, each in enumerate(pictures)})
    _, row = judged(run, "fewstep evaluate sorted --data sorted --features net.pt --num-samples 100", "out")
    assert abs(row["brightness"]) < 0.05  # the first half would be 0.2 darker


# --- references -------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_numpy_and_give_the_same_fid(run: Run, place: Path) -> None:
    whole = judged(run, f"{LINE} --statistics real.npz", "whole")
    network = torch.jit.load("net.pt")
    features = [
        network(torch.from_numpy(np.array(each))[None, None].expand(-1, 3, -1, -1)) for each in noise_pictures(150, 1)
    ]
    features = torch.cat(features).double().numpy()
    with np.load("real.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["mu"], features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(features, rowvar=False), rtol=1e-9, atol=1e-15)
        assert (file["mu"].dtype, file["sigma"].dtype) == (np.float64, np.float64)
        told = {name: str(file[name]) for name in file.files if name not in ("mu", "sigma")}
    assert told.items() >= {"count": "150", "name": "net, resized legacy", "size": "8", "source": "real"}.items()
    np.savez("plain.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))  # as others write them
    for name in ("real", "plain"):
        real, student = judged(run, LINE.replace("--data real", f"--data {name}.npz"), f"of-{name}")
        assert student["fid"] == pytest.approx(whole[1]["fid"], rel=1e-9)
        assert student["diversity"] == whole[1]["diversity"]
        assert "kid" not in student  # of which a mean and a covariance know nothing
        assert {name for name, value in real.items() if isinstance(value, float)} == set()


@pytest.mark.parametrize(
    ("arrays", "fragment"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "statistics of 5 features, but net, resized legacy gives 7"),
        ({"mu": np.zeros(7), "sigma": np.eye(6)}, "no statistics of features"),
        ({"mu": np.zeros(7)}, "no statistics of features"),
        ({"mu": np.full(7, np.nan), "sigma": np.eye(7)}, "no statistics of features"),
        ({"mu": np.zeros(7), "sigma": np.triu(np.ones((7, 7)))}, "no statistics of features"),
        ({"mu": np.zeros(7, object), "sigma": np.eye(7)}, "no statistics of features"),
        ({"mu": np.zeros(7), "sigma": np.eye(7), "network": "abc"}, "statistics of another network"),
        ({"mu": np.zeros(7), "sigma": np.eye(7), "size": 32}, "statistics of another image size"),
    ],
)
def test_statistics_that_do_not_fit_are_one_line(run: Run, place: Path, arrays: dict, fragment: str) -> None:
    np.savez("ref.npz", **arrays)
    refused(run(f"{LINE.replace('--data real', '--data ref.npz')} --out out"), "ref.npz: ", fragment)
    assert not Path("out").exists()


@pytest.mark.parametrize("content", [b"", b"notes", b"PK\x03\x04 torn"])
def test_a_broken_file_of_statistics_is_one_line(run: Run, place: Path, content: bytes) -> None:
    Path("ref.npz").write_bytes(content)
    refused(run(f"{LINE.replace('--data real', '--data ref.npz')} --out out"), "ref.npz: no statistics of features")


def test_all_are_brought_to_one_size_where_it_is_said(run: Run, place: Path) -> None:
    """As files are: the kept images, read at that size, have the same numbers; and so has a .npz of that size."""
    large = {f"{i:03d}.png": encoded(each) for i, each in enumerate(noise_pictures(60, 3, 20))}
    write_files(Path("large"), large)
    line = LINE.replace("--data real", "--data large")
    refused(run(f"{line} --out out"), "large: has images of 20x20, but those of student have 8x8", "--size 8")
    assert not Path("out").exists()
    whole = judged(run, f"{line} --size 4 --keep-images --statistics four.npz", "out")
    again = judged(
        run, f"fewstep evaluate out/images/student --data large --size 4 --features net.pt --num-samples {NUM}", "again"
    )
    assert again[1]["fid"] == pytest.approx(whole[1]["fid"], rel=1e-9)
    of_file = judged(run, f"{line.replace('large', 'four.npz')} --size 4", "file")
    assert of_file[1]["fid"] == pytest.approx(whole[1]["fid"], rel=1e-9)
    refused(run(f"{line.replace('large', 'four.npz')} --out no"), "four.npz: statistics of another image size")


# --- bad input --------------------------------------------------------------------------------------------------------


def colourful(place: Path) -> None:
    write_files(Path("red"), {f"{i}.png": encoded(Image.new("RGB", (SIDE, SIDE), (i, 9, 9))) for i in range(50)})


def few(place: Path) -> None:
    write_files(Path("few"), {f"{i}.png": encoded(each) for i, each in enumerate(noise_pictures(39, 5))})


def captioned(place: Path) -> None:
    write_files(Path("texts"), {"seven.txt": b"\n".join([b"a cat"] * 7), "five.txt": b"\n".join([b"a cat"] * 5)})


def wide(place: Path) -> None:
    class Wide(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().flatten(1).repeat(1, 11)[:, :2048]

    torch.jit.script(Wide()).save("wide.pt")


BAD: list[tuple[Callable[[Path], None] | None, str, list[str]]] = [
    (colourful, f"{LINE} red", ["red: its images are RGB, but those of student are grey"]),
    (colourful, LINE.replace("--data real", "--data red"), ["red: its images are RGB"]),
    (few, f"{LINE} few", ["few: has 39 images; judging needs at least 40"]),
    (None, "fewstep evaluate real --features net.pt", ["real: images, and no run", "give --data"]),
    (None, "fewstep evaluate real --data real", ["features: ", "TorchScript file"]),
    (None, f"{LINE} --clip-prefix x", ["--clip-prefix: goes before prompts in CLIP; name its folder with --clip"]),
    (None, f"{LINE} --clip nowhere", ["--clip: compares pictures with prompts, and there are none"]),
    (None, "fewstep evaluate real --data real --features net.pt --lpips l.pt", ["--lpips: is of several images"]),
    (captioned, f"{LINE} --prompts texts/five.txt", ["--prompts: the model takes no text"]),
    (captioned, f"{LINE} real --prompts texts/seven.txt", ["real: has 150 images, which 7 prompts (--prompts) do not"]),
    (None, LINE.replace("student", "teacher --stops"), ["--stops: is of students of several steps, and there is none"]),
    (None, f"{LINE} --resize nicely", ["--resize 'nicely': write legacy or clean"]),
    (None, f"{LINE} --statistics mean.npy", ["--statistics mean.npy: is a .npz file"]),
    (None, f"{LINE} --scorer no_such:Thing", ["scorer no_such:Thing: can't be imported"]),
    (
        wide,
        LINE.replace("net.pt", "wide.pt"),
        ["130 images are too few for a FID of 2048 features", "takes 512 or more"],
    ),
]


@pytest.mark.parametrize(("prepare", "line", "fragments"), BAD)
def test_what_can_not_be_judged_is_one_line_before_anything_is_drawn(
    run: Run,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Path], None] | None,
    line: str,
    fragments: list[str],
) -> None:
    if prepare:
        prepare(place)
    monkeypatch.setattr(module, "generate_batches", None)
    refused(run(f"{line} --out out"), *fragments)
    assert not Path("out").exists()


# --- prompts, plug-ins, runs ------------------------------------------------------------------------------------------


@pytest.fixture
def text(place: Path) -> Path:
    """With sd/, a text-to-image model of 16 pixels, clip/, a distance.pt, a plug-in, and six prompts."""
    TINY["sd"](place / "scratch").save_pretrained(place / "sd")
    save_clip(place / "clip")
    torch.jit.script(Squares()).save(place / "distance.pt")
    (place / "scoring.py").write_text(
        "class Redness:\n    def __init__(self, device): pass\n"
        "    def score(self, images, prompts): return images[:, 0].float().mean((1, 2)) + len(prompts[0])\n"
    )
    (place / "six.txt").write_text("\n".join(f"{number} cat" for number in range(6)))
    pictures = [each.convert("RGB") for each in noise_pictures(60, 8, 16)]
    write_captioned(place / "pictures", pictures, [f"picture {number}" for number in range(60)])
    return place


class Squares(torch.nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).square().mean(dim=(1, 2, 3))


def test_pictures_of_prompts_are_scored_alike_by_whom_they_were_made(
    run: Run, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept ones, with what they were drawn for beside them, and the same with the prompts in their order."""
    monkeypatch.syspath_prepend(text)
    means = "--data pictures --features net.pt --clip clip --clip-prefix 'A photo depicts ' --scorer scoring:Redness"
    line = f"fewstep evaluate sd --sampler ddim:1 --num-samples 102 --device cpu --keep-images {means}"
    real, drawn = judged(run, f"{line} --prompts six.txt --lpips distance.pt", "out")
    assert {"clip", "redness", "lpips_diversity", "diversity"} <= drawn.keys()
    assert "redness" in real
    kept = Path("out/images/sd-ddim-1")
    captions = kept.joinpath("metadata.csv").read_text().splitlines()
    assert (len(captions), captions[8]) == (103, "00007.png,1 cat")
    again = f"fewstep evaluate {kept} --num-samples 102 --device cpu {means}"
    beside = judged(run, again, "beside")[1]
    kept.joinpath("metadata.csv").unlink()
    given = judged(run, f"{again} --prompts six.txt", "given")[1]
    assert beside == given
    for name in ("clip", "redness", "fid"):
        assert beside[name] == pytest.approx(drawn[name], rel=1e-6), name
    shuffled = text / "shuffled.txt"
    shuffled.write_text("\n".join(reversed((text / "six.txt").read_text().splitlines())))
    assert judged(run, f"{again} --prompts shuffled.txt", "shuffled")[1]["clip"] != given["clip"]
    page = Path("out/report.html").read_text()
    assert "prompts: 6 of six.txt<br>" in page
    assert "before every prompt in CLIP: &#x27;A photo depicts &#x27;<br>" in page
    own = judged(run, line.replace("--keep-images", ""), "own")
    assert "clip" in own[0]  # of the real pictures with their own captions
    refused(run(f"{line.replace('pictures', 'pictures.npz')} --out no"), "pictures.npz: ")


def test_stops_of_pictures_of_prompts_are_those_of_the_student_cut_behind_them(run: Run, text: Path) -> None:
    names = {"sd": [999, 499], "cut": [999]}
    shutil.copytree("sd", "cut")
    for name, timesteps in names.items():
        Path(name, "fewstep.json").write_text(json.dumps({"family": "latent", "timesteps": timesteps}))
    means = "--num-samples 100 --device cpu --data pictures --features net.pt --prompts six.txt"
    _, last, stop = judged(run, f"fewstep evaluate sd --stops {means}", "out")
    cut = judged(run, f"fewstep evaluate cut {means}", "again")[1]
    assert stop == cut | {"model": "sd, stop 1 of 2"}
    assert last["fid"] != cut["fid"]


@pytest.mark.slow
def test_a_low_rank_student_of_several_averages_goes_on_after_a_stop(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.evaluation.extractors.train_classifier", partial(train_classifier, num_steps=10))
    loop = {"num_steps": 2, "batch_size": 4, "student_every": 1, "checkpoint_every": 9, "lora": {"rank": 2}}
    student = {"num_timesteps": 2, "ema_decay": [0.3, 0.1], "optimizer": {"lr": 0.1}}
    model = {"num_classes": 10, "block_out_channels": [8, 8], "norm_num_groups": 4}
    teach = {"kind": "teach", "model": model, "num_steps": 1, "batch_size": 4, "device": "cpu"}
    distil = {"kind": "distill", "teacher": "digits", "student": student, "device": "cpu", **loop}
    for name, recipe in {"teach": teach, "distil": distil}.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    assert run("fewstep teach teach.yaml --out digits")[0] == 0
    code, _, error = run("fewstep distill distil.yaml --out few")
    assert code == 0, error
    line = "fewstep evaluate few digits@1 --stops --sampler heun:2 --num-samples 100 --batch-size 25 --device cpu"
    whole = judged(run, line, "whole")
    few, other = "few, stop 1 of 2", "few ema0.1, stop 1 of 2"
    assert [row["model"] for row in whole] == ["real", "few", few, "few ema0.1", other, "digits@1"]
    assert len({row["fid"] for row in whole}) == 6
    assert {"accuracy", "diversity", "latency"} <= whole[1].keys()
    with monkeypatch.context() as patch:
        stopping_at(1, patch)
        assert run(f"{line} --out parts")[0] == 130
    assert judged(run, line, "parts") == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_loses_one_file_at_most(run: Run, place: Path, number: int) -> None:
    """And several processes at the same time find the table of one."""
    line = LINE.replace(f"--num-samples {NUM} --batch-size 25", "--num-samples 4000 --batch-size 50")
    command = [sys.executable, "-c", "from fewstep.cli import main; main()", *shlex.split(f"{line} --out parts")[1:]]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as running:
        while len(before := [*Path("parts").glob("rows/*/0*.safetensors")]) < 2:
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(number)
        running.wait()
    kept = {path: path.stat().st_mtime_ns for path in before}
    told = "clock: images_per_second latency"
    whole, parts, ranks = (
        [{k: v for k, v in row.items() if k not in told} for row in found] for found in _three(run, line, command)
    )
    assert whole == parts == ranks
    assert kept


def _three(run: Run, line: str, command: list[str]) -> list[list[dict]]:
    at_once = []
    for rank in range(2):
        more = {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        words = [*command[:-1], "ranks"]
        at_once.append(subprocess.Popen(words, env=os.environ | more, stdout=subprocess.DEVNULL))
    assert [each.wait() for each in at_once] == [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "FILE_ROWS", 500)
        return [judged(run, line, "whole"), judged(run, line, "parts"), table("ranks")]
