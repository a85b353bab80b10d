"""CLIP and DINOv2 folders as feature networks, and CLIP scores, against transformers' own processors and models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel

from fewstep.errors import UserError
from fewstep.evaluation.clip import Clip
from fewstep.evaluation.encoders import Encoder
from fewstep.evaluation.extractors import open_extractor
from fewstep.evaluation.gathering import FeatureProbe, gather
from fewstep.evaluation.probes import ClipProbe
from tiny_encoders import save_clip, save_clip_vision, save_dino
from tiny_pipelines import LENGTH

SIZES = ((24, 24), (40, 31), (13, 20))


def pixels(num: int, channels: int = 3, height: int = 24, width: int = 24, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, height, width), generator=random, dtype=torch.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    save_clip(folder / "clip")
    save_clip_vision(folder / "vision")
    save_dino(folder / "dino")
    return folder


def processed(processor: Any, images: Tensor) -> Tensor:
    arrays = [each.expand(3, -1, -1).permute(1, 2, 0).numpy() for each in images]
    found: Tensor = processor(arrays, return_tensors="pt").pixel_values
    return found


def clips(size: int = 24) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def dinos(size: int = 256, crop: int = 224) -> Any:
    """As in the folders of DINOv2 on the hub."""
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return BitImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}, **means)


@torch.no_grad()
def expected(name: str, network: Any, values: Tensor) -> Tensor:
    if name == "dino":
        return network(pixel_values=values).pooler_output
    if name == "vision":
        return network(pixel_values=values).image_embeds
    return network.get_image_features(pixel_values=values).pooler_output


NETWORKS: dict[str, Callable[[Path], Any]] = {"clip": save_clip, "vision": save_clip_vision, "dino": save_dino}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_transformers_as_published(name: str, channels: int, place: Path, tmp_path: Path) -> None:
    network, processor = NETWORKS[name](tmp_path / "other"), dinos() if name == "dino" else clips()
    extractor = open_extractor(str(place / name), "cpu")
    for height, width in SIZES[: 1 if name == "dino" else 3]:
        images = pixels(3, channels, height, width)
        found = extractor.features(images)
        torch.testing.assert_close(found, expected(name, network, processed(processor, images)), rtol=0, atol=1e-5)
        assert (found - found.mean(0)).abs().max() > 1e-2  # pictures are told apart
    assert extractor.name == f"{name}, resized by its processor"


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_the_folders_own_processor(name: str, tmp_path: Path) -> None:
    network, folder = NETWORKS[name](tmp_path / "own"), tmp_path / "own"
    processor = (
        dinos(40, 28)
        if name == "dino"
        else CLIPImageProcessorPil(
            size={"height": 24, "width": 24}, do_center_crop=False, resample=2, image_mean=[0.5] * 3
        )
    )
    plain = Encoder(folder, "cpu").identity
    processor.save_pretrained(folder)
    extractor = Encoder(folder, "cpu")
    assert extractor.identity not in (plain, open_extractor(str(folder), "cpu").name)
    assert extractor.identity == Encoder(folder, "cpu").identity
    for height, width in SIZES:
        images = pixels(3, 3, height, width)
        wanted = expected(name, network, processed(processor, images))
        torch.testing.assert_close(extractor.features(images), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_resized_clean_the_whole_picture_is_seen_in_floats(name: str, place: Path, tmp_path: Path) -> None:
    """By PIL, channel by channel: the steps of clean-fid, then mean and deviation of the processor."""
    network, side = NETWORKS[name](tmp_path / "other"), 224 if name == "dino" else 24
    means = dinos() if name == "dino" else clips()
    images, mean, std = pixels(2, 3, 50, 30), torch.tensor(means.image_mean), torch.tensor(means.image_std)
    planes = [
        Image.fromarray(each.float().numpy()).resize((side, side), Image.BICUBIC) for each in images.flatten(0, 1)
    ]
    resized = torch.tensor(np.stack(planes)).clamp(0, 255).reshape(2, 3, side, side).permute(0, 2, 3, 1)
    wanted = expected(name, network, ((resized / 255 - mean) / std).permute(0, 3, 1, 2))
    extractor, other = (open_extractor(str(place / name), "cpu", each) for each in ("clean", "legacy"))
    torch.testing.assert_close(extractor.features(images), wanted, rtol=0, atol=1e-5)
    assert (other.features(images) - wanted).abs().max() > 1e-2
    assert (extractor.name, other.name) == (f"{name}, resized clean", f"{name}, resized by its processor")
    assert extractor.identity != other.identity


def test_the_largest_dinov2_has_gates(tmp_path: Path) -> None:
    """Whose weights two to a tensor are in files, and apart in the network."""
    network = save_dino(tmp_path / "giant", use_swiglu_ffn=True)
    dinos(40, 28).save_pretrained(tmp_path / "giant")
    images = pixels(2, 1)
    wanted = expected("dino", network, processed(dinos(40, 28), images))
    torch.testing.assert_close(Encoder(tmp_path / "giant", "cpu").features(images), wanted, rtol=0, atol=1e-5)


def test_parts_of_a_batch_are_the_whole_and_the_text_tower_is_let_go(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, images = Encoder(place / "clip", "cpu"), pixels(7)
    whole = extractor.features(images)
    monkeypatch.setattr("fewstep.evaluation.encoders.AT_ONCE", 3)
    torch.testing.assert_close(extractor.features(images), whole, rtol=0, atol=1e-6)
    assert not any("text" in name for name, _ in extractor.network.named_parameters())
    found = gather([images], [FeatureProbe(extractor)], 7, "photos")
    torch.testing.assert_close(found.features, whole, rtol=0, atol=1e-6)


# --- scores -----------------------------------------------------------------------------------------------------------


def cosines(network: Any, clip: Clip, prompts: list[str], images: Tensor) -> Tensor:
    """(B,) of pictures and prompts in turn, from the logits of transformers."""
    tokens = clip.tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = network(**tokens, pixel_values=processed(clips(), images)).logits_per_image
    every = logits / network.logit_scale.exp()
    return torch.stack([every[index, index % len(prompts)] for index in range(len(images))])


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(
    ("prefix", "start"), [("", ""), ("A photo depicts", "A photo depicts "), ("a ", "a ")], ids=["none", "words", "a"]
)
def test_scores_are_the_logits_of_transformers(
    place: Path, height: int, width: int, prefix: str, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, network = Clip(place / "clip", "cpu"), CLIPModel.from_pretrained(place / "clip").eval()
    prompts, images = ["a cat", "two dogs", "a"], pixels(7, 3, height, width)
    probe = ClipProbe(clip, prompts, prefix)
    found = gather([images[:2], images[2:]], [probe], 7, "photos").numbers["clip"]
    wanted = cosines(network, clip, [start + each for each in prompts], images)
    torch.testing.assert_close(found, wanted[:, None], rtol=0, atol=1e-5)
    assert wanted.std() > 1e-3
    if not prefix:
        torch.testing.assert_close(clip.score(clip.features(images), prompts), wanted, rtol=0, atol=1e-5)
        assert capsys.readouterr().out == ""
    assert probe.identity == ClipProbe(clip, [*prompts], prefix).identity
    assert probe.identity not in (ClipProbe(clip, prompts[1:], prefix).identity, ClipProbe(clip, prompts, "b").identity)


def test_every_prompt_goes_through_the_text_tower_once_and_cut_ones_are_told_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, passes = Clip(place / "clip", "cpu"), list[int]()
    clip.network.text_model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("fewstep.evaluation.clip.PROMPTS_AT_ONCE", 3)
    prompts = ["cat", "dog", "cat", "x" * 19, "cow", "x" * 40]  # of 20 tokens with start and end fit 18 letters
    images, probe = pixels(12), ClipProbe(clip, prompts)
    gather([images[:5], images[5:]], [probe], 12, "photos")
    assert passes == [3, 2]
    assert capsys.readouterr().out == "2 of 5 prompts are longer than CLIP's 20 tokens and were cut\n"
    prompts.append("hen")  # as captions come while their pictures are read
    probe.read(images[:1], range(6, 7))
    prompts.append("y" * 50)
    clip.score(clip.features(images), prompts)
    assert passes == [3, 2, 1, 1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_of_half_precision_scores_as_its_weights_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    network = save_clip(tmp_path / "half", dtype).float()
    clip, images = Clip(tmp_path / "half", "cpu"), pixels(4, 1)
    found = ClipProbe(clip, ["a cat", "a dog"]).read(images, range(4))["clip"][:, 0]
    torch.testing.assert_close(found, cosines(network, clip, ["a cat", "a dog"], images), rtol=0, atol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def damage(folder: Path, tensor: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = torch.full_like(tensors.get(tensor, torch.empty(3)), value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without(folder: Path, tensor: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if name != tensor}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def processor(folder: Path, **settings: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "of-another-kind": (
        "dino",
        lambda it: change(it, model_type="vit"),
        "is a vit; known are clip, clip_vision_model, d",
    ),
    "without-a-kind": ("dino", lambda it: change(it, model_type=None), "network without a model_type; known are clip"),
    "no-json": ("dino", lambda it: (it / "config.json").write_text("{"), r"config\.json"),
    "no-config": ("dino", lambda it: (it / "config.json").unlink(), r"no folder of a CLIP or DINOv2 model .*no config"),
    "cut": ("dino", cut, r"model\.safetensors: is missing or damaged"),
    "pickled": ("dino", pickled, "holds no weights in safetensors"),
    "missing": ("dino", lambda it: without(it, "layernorm.weight"), r"lacks 1 tensors \(layernorm\.weight"),
    "attention-missing": (
        "dino",
        lambda it: without(it, "encoder.layer.0.attention.attention.key.bias"),
        "lacks 1 tensor",
    ),
    "more": ("dino", lambda it: damage(it, "head.weight", 1), r"holds 1 tensors that no part takes \(head\.weight"),
    "nan": ("dino", lambda it: damage(it, "layernorm.weight", torch.nan), r"layernorm\.weight holds NaN"),
    "other-sizes": ("dino", lambda it: change(it, hidden_size=32), "has other sizes than its configuration"),
    "grey": ("dino", lambda it: (shutil.rmtree(it), save_dino(it, num_channels=1)), "in 1 channels, not square ones"),
    "padding": ("dino", lambda it: processor(it, do_pad=True), r"preprocessor_config\.json: do_pad is True"),
    "another-size": (
        "clip",
        lambda it: processor(it, size=30, crop_size=30),
        r"gives .*30, 30.*takes those of \(24, 24\)",
    ),
    "no-crop": ("vision", lambda it: processor(it, size=24, do_center_crop=False), "gives pictures of any size"),
    "no-size": ("dino", lambda it: processor(it, size=28, do_center_crop=False), "gives pictures of any size"),
    "less-than-a-patch": ("dino", lambda it: processor(it, size=20, crop_size=9), r"gives pictures of \(9, 9\)"),
    "its-own-processor": ("dino", lambda it: processor(it, auto_map={"AutoImageProcessor": "own.P"}), "auto_map is {"),
    "a-link": (
        "clip",
        lambda it: (it / "notes").symlink_to("/etc/hostname"),
        "notes: is a link out of its model folder",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_feature_network_is_refused_in_one_line(name: str, place: Path, tmp_path: Path) -> None:
    source, spoil, told = WRONG[name]
    shutil.copytree(place / source, folder := tmp_path / "folder")
    spoil(folder)
    with pytest.raises(UserError, match=rf"^--features {folder}[^\n]*{told}[^\n]*$"):
        open_extractor(str(folder), "cpu")


def test_no_code_of_a_folder_is_run(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "dino", folder := tmp_path / "folder")
    change(folder, auto_map={"AutoModel": "own.Network", "AutoConfig": "own.Config"}, architectures=["own.Network"])
    (folder / "own.py").write_text("raise SystemExit('was run')\n")
    images = pixels(1)
    assert torch.equal(Encoder(folder, "cpu").features(images), Encoder(place / "dino", "cpu").features(images))


def without_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("source", "spoil", "told"),
    [
        ("clip", without_tokenizer, r"holds neither tokenizer\.json nor vocab\.json with merges\.txt"),
        ("clip", cut, "is missing or damaged"),
        ("dino", lambda it: None, "is a dinov2; known are clip$"),
        ("vision", lambda it: None, "is a clip_vision_model; known are clip$"),
        ("clip", lambda it: (it / "config.json").unlink(), "no folder of a CLIP model of transformers"),
    ],
    ids=["no-tokenizer", "cut", "dino", "vision-alone", "no-config"],
)
def test_what_is_no_clip_is_refused_in_one_line(
    source: str, spoil: Callable[[Path], object], told: str, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / source, folder := tmp_path / "folder")
    spoil(folder)
    with pytest.raises(UserError, match=rf"^--clip {folder}[^\n]*{told}"):
        Clip(folder, "cpu")


def test_a_text_encoder_alone_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    CLIPTextModel(
        CLIPTextConfig(vocab_size=9, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    ).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="is a clip_text_model; known are clip"):
        open_extractor(str(tmp_path / "text"), "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder of a CLIP or DINOv2 model"):
        open_extractor(str(tmp_path / "empty"), "cpu")
    with pytest.raises(UserError, match="not a readable TorchScript file"):
        open_extractor(str(tmp_path / "nowhere"), "cpu")
