"""Rows 29 to 31 of what people reported, with relatives: what leaves with a model says the truth, and nothing private.

And what a card tells users of ComfyUI and A1111 is what the formulas of their schedulers give.
"""

import json
import math
import os
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors import safe_open

from command_line import fewstep, refused
from fake_hub import fake_hub
from fewstep.commands.exporting import published
from fewstep.export.card import Card, Provenance, interface_settings, last_part, model_card
from fewstep.networks.families.stable_diffusion import VP
from fewstep.recipes.loading import KINDS
from fewstep.settings import is_path
from tiny_pipelines import TINY

STUDENT = {
    "kind": "distill",
    "num_steps": 1,
    "batch_size": 2,
    "gan": {"student_weight": 0, "critic_weight": 0},
    "student": {"num_timesteps": 4, "timesteps": [999, 749, 499, 249]},
}
SECRET = "somebody-private"
SD = "StableDiffusionPipeline"


def distilled(folder: Path, teacher: str, source: Path) -> None:
    """A student in `folder/run`, by a recipe in which every path that may be absolute is."""
    (folder / "prompts.txt").write_text("a cat\na mat\n")
    places = {"teacher": teacher, "data": {"source": str(folder / "photos")}}
    places |= {"prompts": {"source": str(source)}, "embeddings": {"folder": str(folder / "kept")}}
    (folder / "r.yaml").write_text(yaml.safe_dump(STUDENT | places))
    code, _, errors = fewstep(f"distill {folder}/r.yaml --out {folder}/run")
    assert code == 0, errors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with somebody's name, in which a student of `models/sd` was made, with `models/sd` as it was named."""
    folder = tmp_path_factory.mktemp("home") / SECRET
    pipeline = TINY["sd"](folder / "scratch")
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        pipeline.components[name].register_to_config(
            _name_or_path=f"/home/{SECRET}/sd"
        ) if name != "text_encoder" else 0
    pipeline.tokenizer.init_kwargs["special_tokens_map_file"] = f"/home/{SECRET}/map.json"
    pipeline.save_pretrained(folder / "models" / "sd")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        distilled(folder, "models/sd", folder / "prompts.txt")
        yield folder


@pytest.fixture(scope="module")
def hub(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a student of `owner/name` was made, which is on the hub."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, fake_hub({"owner/name": place / "models/sd"}, folder / "cache", patch):
        patch.chdir(folder)
        (folder / "prompts.txt").write_text("a cat\n")
        distilled(folder, "owner/name", folder / "prompts.txt")
        yield folder


def exported(run: Path, out: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The card's front matter, and the header of the single file, both made where one happens to be."""
    for target in (out, out.with_suffix(".safetensors")):
        code, _, errors = fewstep(f"export {run} {target}")
        assert code == 0, errors
    with safe_open(out.with_suffix(".safetensors"), "pt") as file:
        header = file.metadata()
    return yaml.safe_load((out / "README.md").read_text().split("---\n")[1]), header


@pytest.mark.parametrize("beside", [False, True], ids=["row-29-from-elsewhere", "row-29-where-it-stands"])
def test_a_folder_is_no_hub_id(beside: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place if beside else tmp_path)
    front, header = exported(place / "run", tmp_path / "out")
    assert "base_model" not in front
    assert "fewstep.base_model" not in header
    assert header["fewstep.teacher"] == "sd"
    assert front["license_name"] == "that-of-the-teacher"
    assert "license_link" not in front


@pytest.mark.parametrize("shadow", [False, True], ids=["row-29-relative-hub", "row-29-relative-a-folder-called-owner"])
def test_a_hub_id_stays_one(shadow: bool, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shadow:
        (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    front, header = exported(hub / "run", tmp_path / "out")
    assert front["base_model"] == header["fewstep.base_model"] == header["fewstep.teacher"] == "owner/name"
    assert front["license_link"] == "https://huggingface.co/owner/name"
    assert yaml.safe_load(header["fewstep.recipe"])["teacher"] == "owner/name"


def test_row_29_relative_a_run_made_before_says_nothing_of_the_hub(hub: Path, tmp_path: Path) -> None:
    run = shutil.copytree(hub / "run", tmp_path / "run")
    (model,) = run.glob("checkpoints/*/model")
    description = json.loads((model / "fewstep.json").read_text())
    assert description.pop("base_model") == "owner/name"
    (model / "fewstep.json").write_text(json.dumps(description))
    (model.parent / "manifest.json").unlink()
    front, header = exported(run, tmp_path / "out")
    assert "base_model" not in front
    assert header["fewstep.teacher"] == "name"


def filled(kind: type[BaseModel], value: str) -> Any:
    """Settings in which every path, of every part, is this one."""
    content: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        inner = [each for each in (field.annotation, *get_args(field.annotation)) if isinstance(each, type)]
        nested = [each for each in inner if not isinstance(each, types.GenericAlias) and issubclass(each, BaseModel)]
        content |= {name: filled(nested[0], value)} if nested else {name: value} if is_path(field) else {}
        if field.is_required():
            content.setdefault(name, "x")
    return kind.model_construct(**content)


def values(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """By dotted keys."""
    for key, value in content.items():
        yield from values(value, f"{before}{key}.") if isinstance(value, dict) else [(before + key, value)]


PATHS = {
    "row-30": (f"/mnt/{SECRET}/my photos", "my photos"),
    "row-30-relative-home": (f"{os.path.expanduser('~')}/{SECRET}/sd.safetensors", "sd.safetensors"),
    "row-30-relative-only-home": (f"/home/{SECRET}", "~"),
    "row-30-relative-windows": (rf"C:\Users\{SECRET}\sd", "sd"),
    "row-30-relative-windows-home": (rf"C:\Users\{SECRET}", "~"),
    "row-30-relative-address": (f"file:///mnt/{SECRET}/sd/", "sd"),
    "row-30-relative-checkpoint": (f"../{SECRET}/first@best-fid", "first@best-fid"),
    "row-30-relative-name": ("digits", "digits"),
}


@pytest.mark.parametrize(("path", "last"), PATHS.values(), ids=PATHS)
def test_of_every_path_of_a_recipe_its_last_part_is_published(path: str, last: str) -> None:
    found = set()
    for kind in KINDS.values():
        content = dict(values(published(filled(kind, path), None)))
        assert not [key for key, value in content.items() if SECRET in str(value)]
        found |= {key for key, value in content.items() if value == last}
    first = {"teacher", "teacher_config", "data.source", "prompts.source", "embeddings.folder", "evaluation.features"}
    assert first | {"init_from", "regression.pairs", "regression.lpips", "regression.decoder"} <= found


def test_row_30_no_file_of_an_export_says_whose_folder_it_was(place: Path, tmp_path: Path) -> None:
    (place / "evaluated").mkdir()
    rows = [{"model": "real"}, {"model": "run", "fid": 1.5, "features": f"/home/{SECRET}/inception.pt"}]
    (place / "evaluated" / "results.json").write_text(json.dumps(rows))
    for out in ("folder", "half --dtype float16", "file.safetensors"):
        line = f"export {place}/run {tmp_path}/{out} --evaluation {place}/evaluated --license mit"
        code, _, errors = fewstep(line)
        assert code == 0, errors
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"README.md", "fewstep.json", "samples.png", "tokenizer_config.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        assert str(tmp_path.parent).encode() not in content, path
    recipe = json.loads((tmp_path / "folder" / "fewstep.json").read_text())["export"]["fewstep.recipe"]
    assert yaml.safe_load(recipe)["prompts"]["source"] == "prompts.txt"
    assert "| run | 1.5 | inception.pt |" in (tmp_path / "folder" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("", "--license '': the hub knows no such licence: write other", id="row-31-empty"),
        pytest.param("MIT", "did you mean 'mit'?", id="row-31-capitals"),
        pytest.param("no such licence", "'no such licence': the hub knows no such licence", id="row-31-unknown"),
        pytest.param("Apache 2.0", "did you mean 'apache-2.0'?", id="row-31-relative-apache"),
        pytest.param("openrail++-m", "did you mean 'openrail++'?", id="row-31-relative-openrail"),
        pytest.param("mit\n", "did you mean 'mit'?", id="row-31-relative-line-end"),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_refused(name: str, said: str, place: Path, tmp_path: Path) -> None:
    refused(fewstep(f"export {place}/run {tmp_path}/out --license '{name}'"), said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mit", "openrail++", "cc-by-4.0", "other"])
def test_row_31_relative_one_that_it_knows_stands_in_the_card(name: str) -> None:
    made = Provenance("sd", "", [999.0], 1, 1, "raw", license=name)
    front = yaml.safe_load(
        model_card(Card("x", "StableDiffusionPipeline", torch.float32, False), made).split("---\n")[1]
    )
    assert front["license"] == name
    assert ("license_name" in front) == (name == "other")


def test_a_regression_is_not_called_dmd2(tmp_path: Path) -> None:
    card = Card("x", SD, torch.float32, True)
    text = model_card(card, Provenance("sd", "kind: regress\n", [399.0], 8, 1, "raw", kind="regress"))
    assert "dmd2" not in text.lower()
    assert "regression on the teacher's pairs" in text
    assert "| guidance (CFG) of the teacher, in drawing the pairs | 8 |" in text
    assert (
        "dmd2" in yaml.safe_load(model_card(card, Provenance("sd", "", [399.0], 8, 1, "raw")).split("---\n")[1])["tags"]
    )


def test_classes_have_their_names_in_the_card() -> None:
    card = Card("x", ["pipeline", "P"], torch.float32, False, 2, class_names=["cat", "wild\ndog"])
    text = model_card(card, Provenance("t", "", [80.0], 1, 1, "raw"))
    assert "Its classes, for `class_labels`: 0 cat, 1 wild dog." in text


# The schedulers of the interfaces, by the formulas in their sources (ComfyUI: comfy/samplers.py, model_sampling.py;
# A1111: modules/sd_schedulers.py, sd_samplers_lcm.py), on noise levels sigma_t = sqrt(1 - a_t) / sqrt(a_t).


def levels() -> torch.Tensor:
    alphas = VP.scaled_linear().alphas_cumprod.double()
    return ((1 - alphas) / alphas).sqrt()


def simple(sigmas: torch.Tensor, steps: int) -> list[float]:
    return [sigmas[-(1 + int(x * len(sigmas) / steps))].item() for x in range(steps)]


def nearest(sigmas: torch.Tensor, sigma: float) -> int:
    """What both tell the network of a noise level."""
    return int((math.log(sigma) - sigmas.log()).abs().argmin())


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_what_the_card_says_of_comfyui_and_a1111_is_what_their_formulas_give(steps: int) -> None:
    sigmas = levels()
    own = [float(999 - 1000 * k // steps) for k in range(steps)]
    told = interface_settings(own)
    assert [nearest(sigmas, sigma) for sigma in simple(sigmas, steps)] == own  # ComfyUI's simple
    uniform = torch.linspace(999, 0, steps + 1)[:-1].tolist()  # sgm_uniform
    assert all(abs(u - o) < 1 for u, o in zip(uniform, own, strict=True))
    few = sigmas[19::20]  # A1111's LCM knows 50 levels
    twentieth = [nearest(few, sigma) * 20 + 19 for sigma in simple(few, steps)]
    assert f"Set {steps} {'step' if steps == 1 else 'steps'}, CFG 1" in told
    for timesteps in (own, uniform, twentieth):
        assert f" {', '.join(f'{t:g}' for t in timesteps)}" in told


@pytest.mark.parametrize("timesteps", [[399.0], [999.0, 299.0]])
def test_other_timesteps_are_not_promised(timesteps: list[float]) -> None:
    """At 399 the interfaces would begin with noise of size 0.76, and the student with noise of size 1."""
    sigma = levels()[399]
    assert (sigma / (1 + sigma**2).sqrt()).item() == pytest.approx(0.7576, abs=1e-4)
    assert "Neither draws what this model draws" in interface_settings(timesteps)
    assert "sgm_uniform" not in interface_settings(timesteps)


def test_a_velocity_is_not_for_a1111() -> None:
    assert "this one predicts v" in interface_settings([999.0], "v_prediction")


def test_the_console_says_it_too_and_the_next_command_runs(place: Path, tmp_path: Path) -> None:
    code, told, _ = fewstep(f"export {place}/run {tmp_path}/x.safetensors")
    assert code == 0
    settings, wrote, following = told.splitlines()
    assert "sampler `lcm`, scheduler `simple`" in settings
    assert wrote.startswith(f"wrote {tmp_path}/x.safetensors (")
    assert fewstep(following.removeprefix("next: ") + f" --num 1 --out {tmp_path}/x.png")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("x.safetensors --to diffusers", "x.safetensors: is a file's name"),
        ("x --to single-file", "x: a single file's name ends in .safetensors"),
        ("x.ckpt", "x.ckpt: a single file's name ends in .safetensors"),
        ("x.SAFETENSORS", "x.SAFETENSORS: a single file's name ends in .safetensors"),
    ],
)
def test_the_name_and_to_agree(words: str, said: str, place: Path, tmp_path: Path) -> None:
    refused(fewstep(f"export {place}/run {tmp_path}/{words}"), said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/more.txt", "vae/config.json", "tokenizer"],
)
@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_link_in_a_model_folder_is_not_followed(name: str, target: str, place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    (model,) = run.glob("checkpoints/*/model")
    (model.parent / "manifest.json").unlink()
    secret = tmp_path / "secret"
    if (model / name).exists():
        shutil.move(model / name, secret)
    else:
        secret.write_text("a key")
    (model / name).symlink_to(secret)
    refused(fewstep(f"export {run} {tmp_path}/{target}"), f"{model / name}: is a link")
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize("content", [None, b"", b"no picture"], ids=["a link", "emptied", "wrong"])
def test_nor_is_one_among_the_samples_nor_what_is_no_picture(
    content: bytes | None, place: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    (sample,) = (run / "samples").iterdir()
    sample.unlink()
    if content is None:
        sample.symlink_to(next((place / "run" / "samples").iterdir()))
    else:
        sample.write_bytes(content)
    assert fewstep(f"export {run} {tmp_path}/out")[0] == 0
    assert not (tmp_path / "out" / "samples.png").exists()


def test_last_parts() -> None:
    paths = {"sd": "sd", "a/b": "b", "a/b/": "b", "/": "", os.path.expanduser("~"): "~"}
    assert {path: last_part(path) for path in paths} == paths
