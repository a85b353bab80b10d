"""Damage times verbs: each ends in one line that names what is damaged, or in what the undamaged files give."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from command_line import Answer, fewstep
from fewstep.runtime.checkpoint import load_state
from fewstep.runtime.manifest import write_manifest
from image_sets import encoded
from small_runs import VERBS, bounded, make_place
from steps import write_state

Act = Callable[[Path], object]
CHECKPOINT = "student/checkpoints/00000004"
MODEL = f"{CHECKPOINT}/model"
WEIGHTS = f"{MODEL}/unet/diffusion_pytorch_model.safetensors"
DESCRIPTION = f"{MODEL}/fewstep.json"
STATE = f"{CHECKPOINT}/state"
SHARD, INDEX = f"{STATE}/shard-00000.safetensors", f"{STATE}/state.json"
NESTED = b"[" * 100_000
PICTURE = encoded(Image.new("L", (8, 8)))


class Damage(NamedTuple):
    """What is done to a file of the run of the student; where no manifest tells of it, the files speak themselves."""

    name: str
    path: str
    act: Act
    kinds: tuple[str, ...] = ("label", "text")


class Code:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("code-was-run",)


def content(what: bytes | str) -> Act:
    """Another file in its place, whose hard links stay as they were."""

    def act(path: Path) -> None:
        remove(path)
        path.write_bytes(what.encode() if isinstance(what, str) else what)

    return act


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def replaced(make: Act) -> Act:
    """Something else in its place."""

    def act(path: Path) -> None:
        remove(path)
        make(path)

    return act


def halved(path: Path) -> None:
    """With all hard links of it, as by a torn disk."""
    os.truncate(path, path.stat().st_size // 2)


def edited(**values: object) -> Act:
    """A JSON object with other values."""
    return lambda path: content(json.dumps(json.loads(path.read_text()) | values))(path)


def tensors(change: Callable[[dict[str, torch.Tensor], str], object]) -> Act:
    """Weights of which the first are changed."""

    def act(path: Path) -> None:
        found = load_file(path)
        change(found, min(found))
        remove(path)
        save_file(found, path)

    return act


def set_to(value: Callable[[torch.Tensor], torch.Tensor]) -> Act:
    def change(found: dict[str, torch.Tensor], name: str) -> None:
        found[name] = value(found[name])

    return tensors(change)


def index(name: object) -> Act:
    """An index of shards beside the weights; it names a file."""
    return lambda path: path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(name if isinstance(name, list) else {"metadata": {}, "weight_map": {"conv_in.weight": name}})
    )


def state(change: Callable[[dict], object], old: bool = False) -> Act:
    """Another state, as it is written today, or as it was before."""

    def act(path: Path) -> None:
        found = load_state(path.parent)
        found = change(found) or found
        remove(path)
        if old:
            torch.save(found, path.with_name("state.pt"))
        else:
            write_state(path, 4, found)
            index = json.loads((path / "state.json").read_text())
            (path / "state.json").write_text(json.dumps(index | {"step": index["state"].get("step", 4)}))

    return act


def recipe(**values: object) -> Act:
    return lambda path: content(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))(path)


FOLDER, LOOP = replaced(Path.mkdir), replaced(lambda path: path.symlink_to(path.name))
FIFO, MISSING = replaced(os.mkfifo), replaced(lambda path: None)
LEFT = replaced(lambda path: path.symlink_to("/proc/self/environ"))
KINDS = [  # of which 26 of the first order, and relatives of them
    Damage("weights-cut", WEIGHTS, halved),
    Damage("weights-empty", WEIGHTS, content("")),
    Damage("weights-a-picture", WEIGHTS, content(PICTURE)),
    Damage("weights-missing", WEIGHTS, MISSING),
    Damage("weights-a-folder", WEIGHTS, FOLDER),
    Damage("weights-a-fifo", WEIGHTS, FIFO),
    Damage("weights-a-loop", WEIGHTS, LOOP),
    Damage("weights-from-outside", WEIGHTS, LEFT),
    Damage("weights-nan", WEIGHTS, set_to(lambda tensor: tensor * float("nan"))),
    Damage("weights-other-shape", WEIGHTS, set_to(lambda tensor: tensor[:1].clone())),
    Damage("weights-bytes", WEIGHTS, set_to(lambda tensor: tensor.to(torch.uint8))),
    Damage("weights-fewer", WEIGHTS, tensors(lambda found, name: found.pop(name))),
    Damage("weights-more", WEIGHTS, tensors(lambda found, name: found.update(more=torch.ones(2)))),
    Damage("weights-huge-header", WEIGHTS, content(b"\xff" * 7 + b"\x7f{}")),
    Damage("weights-a-pickle", WEIGHTS, replaced(lambda path: torch.save(Code(), path))),
    Damage("index-of-a-missing-shard", WEIGHTS, index("no.safetensors")),
    Damage("index-of-an-outer-shard", WEIGHTS, index("../../../../../../secret.safetensors")),
    Damage("index-a-list", WEIGHTS, index([1])),
    Damage("index-of-numbers", WEIGHTS, index(3)),
    Damage("unet-missing", f"{MODEL}/unet", MISSING),
    Damage("unet-a-file", f"{MODEL}/unet", content("x")),
    *(
        Damage(f"{name}-{what}", f"{MODEL}/{path}", act, kinds)
        for name, path, kinds in [
            ("description", "fewstep.json", ("label", "text")),
            ("config", "unet/config.json", ("label", "text")),
            ("index", "model_index.json", ("text",)),
            ("scheduler", "scheduler/scheduler_config.json", ("text",)),
            ("tokenizer", "tokenizer/tokenizer_config.json", ("text",)),
            ("vocabulary", "tokenizer/tokenizer.json", ("text",)),
            ("encoder", "text_encoder/config.json", ("text",)),
        ]
        for what, act in [
            ("empty", content("")),
            ("list", content("[]")),
            ("nested", content(NESTED)),
            ("latin", content(b'{"a": "\xe9"}')),
            ("number", content("3")),
            ("null", content("null")),
            ("missing", MISSING),
            ("folder", FOLDER),
            ("fifo", FIFO),
            ("loop", LOOP),
            ("from-outside", LEFT),
        ]
    ),
    *(
        Damage(f"timesteps-{what}", DESCRIPTION, edited(timesteps=value))
        for what, value in [
            ("words", ["a", "b"]),
            ("nan", [float("nan")]),
            ("rising", [1, 40]),
            ("huge", [1e30]),
            ("a-word", "40"),
            ("an-object", {}),
            ("none", []),
            ("negative", [-5]),
            ("nested", [[40]]),
        ]
    ),
    Damage("another-family", DESCRIPTION, edited(family="wan")),
    Damage("family-a-list", DESCRIPTION, edited(family=[])),
    Damage("config-of-words", DESCRIPTION, edited(config={"image_size": "big"}), ("label",)),
    Damage("config-huge", DESCRIPTION, edited(config={"image_size": 10**9}), ("label",)),
    Damage("image-size-huge", DESCRIPTION, edited(image_size=10**9), ("text",)),
    Damage("sample-size-huge", f"{MODEL}/unet/config.json", edited(sample_size=100_000)),
    Damage("sample-size-a-word", f"{MODEL}/unet/config.json", edited(sample_size="big")),
    Damage("channels-huge", f"{MODEL}/unet/config.json", edited(block_out_channels=[2**40, 2**40])),
    Damage("layers-huge", f"{MODEL}/unet/config.json", edited(layers_per_block=10**9)),
    Damage("blocks-unknown", f"{MODEL}/unet/config.json", edited(down_block_types=["a", "b"])),
    Damage("pipeline-unknown", f"{MODEL}/model_index.json", edited(_class_name="OtherPipeline"), ("text",)),
    Damage("pipeline-a-list", f"{MODEL}/model_index.json", edited(_class_name=["x", "y"]), ("text",)),
    Damage("part-a-word", f"{MODEL}/model_index.json", edited(unet="x"), ("text",)),
    Damage("part-foreign", f"{MODEL}/model_index.json", edited(unet=["os", "UNet2DConditionModel"]), ("text",)),
    Damage("vocabulary-size", f"{MODEL}/text_encoder/config.json", edited(vocab_size=10**12), ("text",)),
    Damage("betas-of-words", f"{MODEL}/scheduler/scheduler_config.json", edited(beta_start="a"), ("text",)),
    Damage("times-huge", f"{MODEL}/scheduler/scheduler_config.json", edited(num_train_timesteps=10**12), ("text",)),
    Damage("length-huge", f"{MODEL}/tokenizer/tokenizer_config.json", edited(model_max_length=10**12), ("text",)),
    Damage(
        "foreign-tokenizer",
        f"{MODEL}/tokenizer/tokenizer_config.json",
        edited(auto_map={"AutoTokenizer": ["x--y.Z", None]}, tokenizer_class="Z"),
        ("text",),
    ),
    Damage("encoder-cut-in-all", f"{MODEL}/text_encoder/model.safetensors", halved, ("text",)),
    Damage(
        "vae-nan", f"{MODEL}/vae/diffusion_pytorch_model.safetensors", set_to(lambda t: t * float("nan")), ("text",)
    ),
    *(
        Damage(f"recipe-{what}", "student/recipe.yaml", act)
        for what, act in [
            ("empty", content("")),
            ("list", content("- a")),
            ("nested", content(NESTED)),
            ("binary", content(PICTURE)),
            ("of-another-kind", lambda path: content(yaml.safe_dump({"kind": "teach"}))(path)),
            ("other-settings", recipe(teacher=[3])),
            ("kind-a-list", recipe(kind=["distill"])),
            ("missing", MISSING),
            ("folder", FOLDER),
            ("fifo", FIFO),
            ("loop", LOOP),
        ]
    ),
    *(
        Damage(f"{path.split('.')[0]}-{what}", f"student/{path}", act)
        for path in ("metrics.jsonl", "evaluations.jsonl")
        for what, act in [
            ("binary", content(PICTURE)),
            ("lists", content("[{}]\n[1, {}\n")),
            ("words", content('{"step": "a", "fid": "b"}\n')),
            ("without-steps", content('{"fid": 1}\n')),
            ("objects", content('{"step": 2, "fid": {"a": 1}}\n')),
            ("huge", content('{"step": 1e999, "fid": 1}\n')),
            ("numbers", content("1}\n2\n")),
            ("nested", content(NESTED + b"}\n")),
            ("folder", FOLDER),
            ("fifo", FIFO),
            ("loop", LOOP),
        ]
    ),
    *(
        Damage(f"{name}-{what}", path, act)
        for name, path in [("shard", SHARD), ("state", INDEX)]
        for what, act in [
            ("cut", halved),
            ("empty", content("")),
            ("missing", MISSING),
            ("a-folder", FOLDER),
            ("a-fifo", FIFO),
            ("a-loop", LOOP),
            ("with-code", replaced(lambda path: torch.save(Code(), path))),
            ("with-old-code", replaced(lambda path: torch.save(Code(), path, _use_new_zipfile_serialization=False))),
        ]
    ),
    Damage("shard-huge-header", SHARD, content(b"\xff" * 7 + b"\x7f{}")),
    Damage("shard-of-others", SHARD, replaced(lambda path: save_file({"a": torch.ones(1)}, path))),
    Damage("state-a-list", INDEX, content("[1]")),
    Damage("state-nested", INDEX, content('{"step": 4, "shards": 1, "state": ' + "[" * 100_000)),
    Damage("state-of-no-steps", INDEX, edited(step=None)),
    Damage("state-endless", INDEX, edited(shards=10**30)),
    Damage("state-of-no-tensors", INDEX, edited(state={"method": {"student": {"a": {"$tensor": []}}}})),
    Damage("state-without-method", STATE, state(lambda found: found.pop("method") and None)),
    Damage("state-without-student", STATE, state(lambda found: found["method"].pop("student") and None)),
    Damage("state-of-words", STATE, state(lambda found: found.update(method="a", step="b"))),
    Damage("state-step-huge", STATE, state(lambda found: found.update(step=10**30))),
    Damage("state-metrics-a-list", STATE, state(lambda found: found.update(metrics=[]))),
    Damage(
        "state-other-shape",
        STATE,
        state(lambda found: found["method"]["student"].update({min(found["method"]["student"]): torch.ones(1)})),
    ),
    Damage("old-state-with-code", STATE, state(lambda found: {"method": Code()}, old=True)),
    Damage("old-state-a-list", STATE, state(lambda found: [1], old=True)),
    *(
        Damage(f"manifest-{what}", f"{CHECKPOINT}/manifest.json", act)
        for what, act in [
            ("empty", content("")),
            ("list", content("[]")),
            ("pairs", content('[["a", 1]]')),
            ("words", content('{"state/state.json": "x"}')),
            ("without-digests", content('{"state/state.json": {"size": 1}}')),
            ("of-an-outer-file", content('{"../../../../secret": {"size": 1, "sha256": "x"}}')),
            ("nested", content(NESTED)),
            ("binary", content(PICTURE)),
            ("folder", FOLDER),
            ("fifo", FIFO),
        ]
    ),
    Damage("checkpoints-a-file", "student/checkpoints", content("x")),
    Damage("checkpoints-missing", "student/checkpoints", MISSING),
    Damage("checkpoints-a-loop", "student/checkpoints", LOOP),
    Damage("checkpoint-a-file", CHECKPOINT, content("x")),
    Damage("checkpoint-empty", CHECKPOINT, FOLDER),
    Damage("checkpoint-a-loop", CHECKPOINT, LOOP),
    Damage("model-missing", MODEL, MISSING),
    Damage("model-a-file", MODEL, content("x")),
    Damage("grid-a-folder", "student/samples/00000004.png", FOLDER),
    Damage("grid-a-fifo", "student/samples/00000004.png", FIFO),
    Damage("grid-from-outside", "student/samples/00000004.png", LEFT),
    Damage("grid-no-picture", "student/samples/00000004.png", content("x")),
    Damage("results-a-list-of-words", "student/results.json", content('["a"]')),
    Damage("results-nested", "student/results.json", content(NESTED)),
    Damage("run-a-file", "student", content("x")),
    Damage("run-a-loop", "student", LOOP),
    Damage("run-missing", "student", MISSING),
]


ALWAYS = (  # 26, which times four verbs are 104; all others, and text runs but for some, when slow
    "weights-cut weights-empty weights-a-picture weights-missing weights-a-folder weights-nan weights-other-shape "
    "weights-bytes weights-a-pickle index-of-a-missing-shard index-of-an-outer-shard index-a-list description-empty "
    "description-list description-nested timesteps-words timesteps-rising timesteps-none recipe-list "
    "recipe-of-another-kind metrics-binary shard-cut shard-with-code manifest-list checkpoints-a-file checkpoint-a-loop"
)
SOMETIMES = "index-nested vocabulary-from-outside part-foreign"  # of text runs
CASES = [
    pytest.param(kind, each, id=f"{kind}-{each.name}", marks=[] if each.name in always.split() else pytest.mark.slow)
    for kind, always in (("label", ALWAYS), ("text", SOMETIMES))
    for each in KINDS
    if kind in each.kinds
]


Whole = Callable[[str], tuple[Path, dict[str, dict[str, bytes]]]]


@pytest.fixture(scope="module")
def whole(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """From a kind of run to its place and what every verb gives there; made when it is first asked for."""

    @cache
    def made(kind: str) -> tuple[Path, dict[str, dict[str, bytes]]]:
        place, given = tmp_path_factory.mktemp(kind), {}
        with pytest.MonkeyPatch.context() as there:
            there.chdir(place)
            make_place(kind, place)
            assert call(kind, "evaluate")[0] == 0  # which leaves a classifier and references behind
            shutil.rmtree("out")
            shutil.copyfile(WEIGHTS, "secret.safetensors")
            for verb in VERBS:
                assert call(kind, verb)[0] == 0
                given[verb] = result(verb)
                remove(Path("out"))
                remove(Path("out.png"))
        return place, given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield made


def call(kind: str, verb: str) -> Answer:
    with bounded():
        return fewstep(VERBS[verb] + " --prompt cat" * (kind == "text" and verb == "sample"))


def result(verb: str) -> dict[str, bytes]:
    """What a verb is called for: pictures, numbers, a folder, or the weights of the last step."""
    wanted = {"sample": ["out.png", "out/*"], "evaluate": ["out/results.json"], "export": ["out/**/*"]}
    paths = [path for pattern in wanted.get(verb, [f"{MODEL}/**/*"]) for path in Path().glob(pattern)]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def snapshot() -> dict[str, bytes | str]:
    """Every file with its content, every folder and every link; what was set aside counts as it was called before."""
    found: dict[str, bytes | str] = {}
    for path in Path().rglob("*"):
        name = str(path).replace(".damaged", "")
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
        elif path.suffix != ".damaged":
            found[name] = "folder" if path.is_dir() else "fifo"
    return found


def told(error: str, damage: Damage) -> bool:
    """One line that names the file or a folder that it lies in."""
    above = [part for part in (Path(damage.path), *Path(damage.path).parents) if part != Path()]
    return error.startswith("fewstep: ") and error.count("\n") == 1 and any(str(part) in error for part in above)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("kind", "damage"), CASES)
def test_damage_is_told_in_one_line_or_changes_nothing(
    whole: Whole, kind: str, damage: Damage, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, given = whole(kind)
    subprocess.run(["cp", "-a", place, tmp_path / "place"], check=True)  # keeps hard links
    monkeypatch.chdir(tmp_path / "place")
    speaks = damage.path.startswith(STATE)
    if "manifest" not in damage.path and not speaks and verb != "resume":
        for manifest in Path("student").rglob("manifest.json"):
            manifest.unlink()
    damage.act(Path(damage.path))
    if speaks:  # a manifest that knows what was done
        write_manifest(Path(CHECKPOINT))
    before = snapshot()
    opener = subprocess.Popen(["sh", "-c", f"sleep 15; : <>{damage.path}"]) if "fifo" in damage.name else None
    try:
        code, _, errors = call(kind, verb)
    finally:
        hung = opener is not None and opener.poll() is not None
        if opener:
            opener.kill()
            opener.wait()
    assert not hung, "waits for a FIFO"
    assert not Path("code-was-run").exists()
    if code == 0:
        assert all(told(line, damage) for line in errors.splitlines(keepends=True) if line.startswith("fewstep: "))
        found = result(verb)
        if damage.path.startswith("student/samples") and verb == "export":  # whose card then has no picture
            assert found.keys() == given[verb].keys() - {"out/samples.png"}
            return
        assert {name: found.get(name) for name in given[verb]} == given[verb]
    else:
        lines = errors.splitlines(keepends=True)
        assert code == 2, errors
        assert all(told(line, damage) for line in lines), errors
        assert len(lines) == 1 or verb == "resume", errors  # which sets aside, line by line, what it can't go on from
        assert snapshot() == before
