"""`fewstep export` on runs that the other verbs made."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from command_line import Run, fewstep, refused
from fewstep.models.loading.pretrained import load
from fewstep.runtime.checkpoint import load_state
from steps import write_state
from tiny_pipelines import TINY

MODEL = {"num_classes": 10, "null_class": True, "block_out_channels": [8, 8], "norm_num_groups": 4}
LOOP = {"num_steps": 2, "batch_size": 4, "data": {"source": "digits"}}
TEACHER = {"kind": "teach", "model": MODEL, "class_dropout": 0.1, **LOOP}
STUDENT = {
    "kind": "distill",
    "teacher": "teacher",
    **LOOP,
    "num_steps": 4,
    "checkpoint_every": 2,
    "student_every": 1,
    "student": {"num_timesteps": 2, "ema_decay": 0.9, "optimizer": {"lr": 1e-2}},
}
LATENT = {
    "kind": "distill",
    "teacher": "latent-teacher",
    "guidance_scale": 1.75,
    "num_steps": 2,
    "batch_size": 2,
    "data": {"source": None},
    "prompts": {"source": "prompts.txt"},
    "gan": {"student_weight": 0, "critic_weight": 0},
    "student": {"num_timesteps": 1, "timesteps": [399], "optimizer": {"lr": 1e-3}},
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs of a teacher, of its student, and of a text-to-image student."""
    folder = tmp_path_factory.mktemp("workshop")
    for name, recipe in (("t", TEACHER), ("d", STUDENT), ("l", LATENT)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "prompts.txt").write_text("a cat\na mat\n")
    TINY["sd"](folder / "scratch").save_pretrained(folder / "latent-teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder / "modules"))
        patch.syspath_prepend(str(folder / "modules"))
        for verb in ("teach t.yaml --out teacher", "distill d.yaml --out student", "distill l.yaml --out latent"):
            assert fewstep(verb)[0] == 0
        lines = [{"step": step, "fid": 9.0 - step, "precision": 0.5} for step in (2, 4)]
        (folder / "student" / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        yield folder


@pytest.fixture
def run(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in the workshop; gives exit code, output and errors."""
    monkeypatch.chdir(workshop)
    return fewstep


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    """Runs the card's code where the folder lies; gives the picture that it saves."""
    monkeypatch.chdir(folder.parent)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(compile(code[1], "snippet", "exec"), {})
    return Image.open(folder.parent / "picture.png")


def newest(name: str) -> Path:
    """The model folder of a run's newest checkpoint."""
    return max(Path(name).glob("checkpoints/*/model"))


@pytest.mark.parametrize(("name", "options"), [("student", ""), ("latent", ""), ("latent", " --dtype float16")])
def test_export_and_the_cards_snippet(run: Run, name: str, options: str, tmp_path: Path, monkeypatch) -> None:
    student, out = load(newest(name)), tmp_path / "not-yet-there" / "my-export"
    code, told, errors = run(f"export {name} --to diffusers {out}{options}")
    assert (code, errors) == (0, "")
    assert re.match(rf"wrote {out} \([\d.]+ MB\)\nnext: fewstep sample {out}", told)
    assert (out / "samples.png").read_bytes() == max(Path(name).glob("samples/*.png")).read_bytes()
    assert load(out).timesteps == student.timesteps
    assert [path.name for path in out.parent.iterdir()] == ["my-export"]
    picture = run_snippet(out, monkeypatch)
    assert picture.size == ((8, 8) if name == "student" else (16, 16))
    assert len(set(picture.tobytes())) > 1


def test_the_weights_are_the_averaged_ones_or_those_as_trained(run: Run, tmp_path: Path) -> None:
    assert run(f"export student {tmp_path}/averaged")[0] == run(f"export student {tmp_path}/raw --raw")[0] == 0
    file = "unet/diffusion_pytorch_model.safetensors"
    averaged, raw, saved = (
        load_file(folder / file) for folder in (tmp_path / "averaged", tmp_path / "raw", newest("student"))
    )
    state = load_state(newest("student").parent)["method"]["student"]
    assert all(torch.equal(value, saved[name]) for name, value in averaged.items())
    assert all(torch.equal(value, state[f"network.unet.{name}"]) for name, value in raw.items())
    assert raw.keys() == averaged.keys()
    assert any((raw[name] - averaged[name]).abs().max() > 1e-4 for name in raw)
    cards = [(tmp_path / name / "README.md").read_text() for name in ("averaged", "raw")]
    assert "| weights | averaged, EMA 0.9; float32 |" in cards[0]
    assert "| weights | as trained; float32 |" in cards[1]


@pytest.mark.parametrize(("choice", "step"), [("", 4), ("@2", 2), ("@best-fid", 4), ("@best-precision", 2)])
def test_a_checkpoint_is_chosen_and_its_scores_stand_in_the_card(run: Run, choice: str, step: int, tmp_path) -> None:
    assert run(f"export student{choice} {tmp_path}/out --license mit")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| checkpoint | step {step} (critic updates) |" in card
    assert f"| fid ↓ | {9 - step} | – |" in card
    assert "| precision ↑ | 0.5 | 0.4691 to 0.5309 |" in card
    assert "license: mit" in card
    assert Path("student/recipe.yaml").read_text() in card
    facts = json.loads((tmp_path / "out" / "fewstep.json").read_text())["export"]
    assert facts["fewstep.recipe"] == Path("student/recipe.yaml").read_text()
    assert json.loads(facts["fewstep.scores"])["fid"] == {"value": 9 - step, "interval": None}


def test_one_of_several_averages(run: Run, tmp_path: Path) -> None:
    """A checkpoint with another average beside `model`."""
    shutil.copytree("student", tmp_path / "run")
    other = shutil.copytree(newest(tmp_path / "run"), newest(tmp_path / "run").parent / "model-ema0.99995")
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(next(Path("student/checkpoints/00000002/model/unet").glob("*.safetensors")).read_bytes())
    assert run(f"export {tmp_path}/run {tmp_path}/out --ema 0.99995")[0] == 0
    ours, theirs = load_file(tmp_path / "out" / "unet" / file.name), load_file(file)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "averaged, EMA 0.99995" in card
    assert "None were computed" in card  # the scores are of the other average
    assert run(f"export {tmp_path}/run {tmp_path}/first --ema 0.9")[0] == 0  # by its name, too
    assert "averaged, EMA 0.9;" in (tmp_path / "first" / "README.md").read_text()
    refused(run(f"export {tmp_path}/run {tmp_path}/no --ema 0.5"), "it has 0.99995")


def test_rows_of_an_evaluation(run: Run, tmp_path: Path) -> None:
    (tmp_path / "judged").mkdir()
    rows = [{"model": "real", "fid": 0.125}, {"model": "student", "sampler": "student", "nfe": 2, "fid": 1.5}]
    (tmp_path / "judged" / "results.json").write_text(json.dumps(rows))
    assert run(f"export student {tmp_path}/out --evaluation {tmp_path}/judged")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| real | – | – | 0.125 |" in card
    assert "| student | student | 2 | 1.5 |" in card


def test_overwriting(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is nothing
    assert run(f"export latent {out}")[0] == 0
    refused(run(f"export student {out}"), "--overwrite")
    assert (out / "vae").exists()
    assert run(f"export student {out} --overwrite")[0] == 0
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "fewstep.json", "model_index.json", "pipeline.py", "samples.png", "unet")
    }


def test_a_single_file_has_the_provenance_and_the_weights_that_were_asked_for(run: Run, tmp_path: Path) -> None:
    for name, options in (("half", ""), ("raw", "--raw --dtype float32")):
        assert run(f"export latent {tmp_path}/{name}.safetensors --to single-file {options}")[0] == 0
    half, raw = (load_file(tmp_path / f"{name}.safetensors") for name in ("half", "raw"))
    state = load_state(newest("latent").parent)["method"]["student"]
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert half[name].dtype == torch.float16
    assert torch.equal(raw[name], state["network.unet.conv_in.weight"])
    with safe_open(tmp_path / "half.safetensors", "pt") as file:
        assert file.metadata()["fewstep.recipe"] == Path("latent/recipe.yaml").read_text()
    refused(run(f"export student {tmp_path}/pixel.safetensors --to single-file"), "pixel model")
    assert not (tmp_path / "pixel.safetensors").exists()


def snapshot(*folders: Path) -> dict[Path, bytes | None]:
    """Every file with its bytes, and every folder."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("export nowhere OUT", ["nowhere", "no such run folder"]),
        ("export cache OUT", ["cache", "not a run folder"]),
        ("export latent-teacher OUT", ["latent-teacher", "not a run folder"]),
        ("export empty OUT", ["empty", "no checkpoint"]),
        ("export student@3 OUT", ["@3", "@2, @4"]),
        ("export student@best-recall OUT", ["best-recall", "@best-fid"]),
        ("export teacher OUT", ["teacher", "distil it first"]),
        ("export student OUT --ema 0.5", ["no average '0.5'", "it has none"]),
        ("export student OUT --ema 0.9 --raw", ["--ema 0.9", "leave out one"]),
        ("export student OUT --to onnx", ["--to onnx", "diffusers or single-file"]),
        ("export student OUT --dtype int8", ["--dtype int8", "float16"]),
        ("export student OUT --shard-size 5", ["--shard-size 5", "5GB"]),
        ("export student OUT --shard-size 0GB", ["--shard-size 0GB", "5GB"]),
        ("export student student", ["student", "no export"]),
        ("export student student --overwrite", ["student", "never replaced"]),
        ("export student latent-teacher --overwrite", ["latent-teacher", "never replaced"]),
        ("export student student/checkpoints/00000004/model --overwrite", ["00000004/model", "never replaced"]),
        ("export student recipe-file --overwrite", ["recipe-file", "never replaced"]),
        ("export student d.yaml/out", ["d.yaml", "not a folder"]),
        ("export student OUT --evaluation nowhere", ["nowhere/results.json", "fewstep evaluate"]),
        ("export damaged OUT", ["damaged", "unet", "is missing or damaged"]),
        ("export flipped OUT", ["flipped/checkpoints", "unet/", "has other bytes than were written"]),
        ("export damaged OUT --raw", ["/state: ", "can't be read"]),
        ("export latent OUT --to single-file", ["OUT", "ends in .safetensors"]),
        ("export latent OUT.safetensors --to single-file --shard-size 5GB", ["--shard-size", "no shards"]),
        ("export latent there.safetensors --to single-file", ["there.safetensors", "--overwrite"]),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    run: Run, workshop: Path, line: str, fragments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("student", "teacher", "latent", "latent-teacher"):
        (tmp_path / name).symlink_to(workshop / name)
    for name in ("cache", "empty"):
        (tmp_path / name).mkdir()
    for file in ("empty/recipe.yaml", "d.yaml", "recipe-file"):
        shutil.copy(workshop / "student" / "recipe.yaml", tmp_path / file)
    (tmp_path / "there.safetensors").touch()
    damaged = shutil.copytree(workshop / "student", tmp_path / "damaged")
    shard = newest(damaged).parent / "state" / "shard-00000.safetensors"
    for file in (newest(damaged) / "unet" / "diffusion_pytorch_model.safetensors", shard):
        file.write_bytes(file.read_bytes()[:-300])
    (newest(damaged).parent / "manifest.json").unlink()  # as of an earlier version
    weights = newest(shutil.copytree(workshop / "student", tmp_path / "flipped")) / "unet"
    weights /= "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path, workshop)
    refused(run(line), *fragments)
    assert snapshot(tmp_path, workshop) == before


Change = Callable[[dict[str, torch.Tensor]], object]
Damage = Callable[[Path], object]


def weights_of(model: Path, part: str) -> Path:
    return model / part / ("model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors")


def changed(part: str, change: Change) -> Damage:
    """The tensors of a part, changed."""

    def damage(model: Path) -> None:
        file = weights_of(model, part)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return damage


def raw(change: Change) -> Damage:
    """The weights as trained, by their names in the network, changed."""

    def damage(model: Path) -> None:
        state = load_state(model.parent)
        student = state["method"]["student"]
        start = next(name for name in student if name.endswith("conv_in.weight")).removesuffix("conv_in.weight")
        tensors = {name.removeprefix(start): value for name, value in student.items()}
        change(tensors)
        state["method"]["student"] = {start + name: value for name, value in tensors.items()}
        shutil.rmtree(model.parent / "state")
        write_state(model.parent / "state", state.pop("step"), state)

    return damage


def put(name: str, number: float) -> Change:
    """The first number of the first tensor with that end."""
    return lambda t: next(v for n, v in t.items() if n.endswith(name)).view(-1)[:1].fill_(number)


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:8].clone()


def shard(model: Path) -> None:
    """An index of two shards, of which one is there."""
    file = weights_of(model, "unet")
    names = {name: f"shard-{index % 2}.safetensors" for index, name in enumerate(load_file(file))}
    file.rename(file.with_name("shard-0.safetensors"))
    (file.parent / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def lose(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def text(name: str, content: str) -> Damage:
    return lambda model: (model / name).write_text(content)


def copied(source: str, target: str) -> Damage:
    return lambda model: shutil.copy(model / source, model / target)


LOSE: Change = lambda tensors: tensors.pop("conv_in.bias")  # noqa: E731
MORE: Change = lambda tensors: tensors.update(more=torch.ones(1))  # noqa: E731
UNET, VAE, TEXT = (f"{weights_of(Path(), part)}" for part in ("unet", "vae", "text_encoder"))
NAN = changed("unet", put("conv_in.weight", math.nan))
BAD, WIDTH = "is missing or damaged", ["conv_in.weight is [8, 4, 3, 3]", "[16, 4, 3, 3] by its configuration"]
OTHER = '{"family": "pixel", "timesteps": [80], "config": {"channels": 7}}'
NO_TIMES = '{"family": "pixel", "timesteps": null, "config": {}}'
DAMAGES: dict[str, tuple[Damage, list[str]]] = {  # by name, which has the options, too: what is done; what is said
    "no file": (lose(UNET), ["model/unet: holds no weights"]),
    "no file, raw": (lose(UNET), ["model/unet: holds no weights"]),
    "no file of the VAE": (lose(VAE), ["vae: holds no weights"]),
    "no VAE": (lambda m: shutil.rmtree(m / "vae"), ["lacks the subfolder vae"]),
    "no tensors": (changed("unet", lambda tensors: tensors.clear()), ["/unet lacks", "tensors (c"]),
    "no config": (lose("unet/config.json"), ["unet/config.json", "No such file"]),
    "a torn config": (text("vae/config.json", "{"), ["vae/config.json", "JSONDecodeError"]),
    "a config of nonsense": (text("unet/config.json", '{"block_out_channels": "wide"}'), [f"unet/config.json: {BAD}"]),
    "no description": (lose("fewstep.json"), [f"fewstep.json: {BAD} (KeyError"]),
    "another description": (text("fewstep.json", OTHER), [f"fewstep.json: {BAD} (ValidationError"]),
    "no timesteps": (text("fewstep.json", NO_TIMES), [f"fewstep.json: {BAD} (TypeError"]),
    "a scheduler of nothing": (
        text("scheduler/scheduler_config.json", "{}"),
        ["scheduler/scheduler_config.json: scheduler: a ", "without betas"],
    ),
    "a torn index": (text("model_index.json", "{"), ["model_index.json: is damaged (JSONDecodeError"]),
    "another part": (copied(TEXT, UNET), ["/unet lacks", "tensors (conv_in.bias"]),
    "cut off": (lambda m: os.truncate(m / VAE, 5000), [f"{VAE}: {BAD} (SafetensorError"]),
    "another width": (changed("unet", narrow), [f"{UNET}: has other sizes", *WIDTH]),
    "a tensor less": (
        changed("vae", lambda t: t.pop("encoder.conv_in.bias")),
        ["vae lacks 1 tensors (encoder.conv_in."],
    ),
    "a tensor more": (changed("text_encoder", MORE), [f"{TEXT} holds 1 tensors", "(more"]),
    "NaN": (NAN, [f"{UNET}: conv_in.weight holds NaN or infinity"]),
    "infinite": (changed("vae", put("conv_out.bias", math.inf)), ["vae/", "conv_out.bias", "holds NaN or infinity"]),
    "NaN of text, raw": (
        changed("text_encoder", put("final_layer_norm.bias", -math.inf)),
        [TEXT, "final_layer_norm.bias", "holds NaN or infinity"],
    ),
    "a missing shard": (shard, ["index.json: names shard-1.safetensors"]),
    "twice": (copied(UNET, "unet/more.safetensors"), ["unet/more.safetensors", f"also in {Path(UNET).name}"]),
    "too large, float16": (changed("vae", put("conv_out.bias", 1e6)), ["--dtype float16: ", "conv_out.bias", "65504"]),
    "too large, raw, float16": (raw(put("conv_out.bias", -7e4)), ["--dtype float16: ", "numbers beyond its 65504"]),
    "NaN, raw": (raw(put("conv_out.bias", math.nan)), ["/state: conv_out.bias", "holds NaN or infinity"]),
    "a tensor less, raw": (raw(LOSE), ["/state lacks 1 tensors (conv_in.bias"]),
    "a tensor more, raw": (raw(MORE), ["/state holds 1 tensors", "(more"]),
    "another width, raw": (raw(narrow), ["/state: has other sizes", *WIDTH]),
}
ONLY_PIXEL = ("another description",)
PIXEL = ("no file", "no tensors", "NaN, raw", "a tensor less, raw", "a missing shard", "no timesteps", *ONLY_PIXEL)


@pytest.mark.parametrize(
    ("name", "target", "damage"),
    [("latent", target, name) for name in DAMAGES if name not in ONLY_PIXEL for target in ("diffusers", "single-file")]
    + [("student", "diffusers", name) for name in PIXEL],
)
def test_what_is_not_whole_is_never_exported(run: Run, name: str, target: str, damage: str, tmp_path: Path) -> None:
    """One line with the part, the file and the tensor, before anything is written."""
    change, fragments = DAMAGES[damage]
    damaged = shutil.copytree(name, tmp_path / "damaged")
    (newest(damaged).parent / "manifest.json").unlink()  # which would notice all of it
    change(newest(damaged))
    before = set(tmp_path.rglob("*"))
    options = " --raw" * (", raw" in damage) + " --dtype float16" * ("float16" in damage)
    out = tmp_path / ("out.safetensors" if target == "single-file" else "out")
    refused(run(f"export {damaged} {out}{options}"), *fragments)
    assert set(tmp_path.rglob("*")) == before


def test_nor_is_another_average(run: Run, tmp_path: Path) -> None:
    damaged = shutil.copytree("student", tmp_path / "damaged")
    (newest(damaged).parent / "manifest.json").unlink()
    NAN(shutil.copytree(newest(damaged), newest(damaged).parent / "model-ema0.99"))
    line = f"export {damaged} {tmp_path}/out --ema 0.99"
    refused(run(line), "model-ema0.99/unet/", "conv_in.weight", "holds NaN or infinity")
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}
