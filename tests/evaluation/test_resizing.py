"""Resizing as clean-fid does it and as processors of transformers do, against PIL and transformers themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BitImageProcessorPil, CLIPImageProcessorPil

from fewstep.errors import UserError
from fewstep.evaluation.extractors import TorchScriptExtractor, open_extractor
from fewstep.evaluation.resizing import clean, read_preprocessing

INCEPTION = Path(__file__).parents[2] / ".." / "shared" / "data" / "inception_768.pt"


def pixels(num: int, channels: int, height: int, width: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, channels, height, width), generator=random, dtype=torch.uint8)


def by_clean_fid(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The steps of its `build_resizer("clean")`: uint8 (H, W, C) to float32 (*size, C)."""
    channels = [Image.fromarray(image[:, :, k].astype(np.float32), mode=None) for k in range(image.shape[2])]
    assert {each.mode for each in channels} == {"F"}
    resized = [np.asarray(each.resize(size[::-1], resample=Image.BICUBIC)).clip(0, 255) for each in channels]
    return np.stack(resized, axis=2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 37), (20, 31, 37), (37, 39, 37), (90, 39, 37)])
def test_clean_is_clean_fids_bit_for_bit(channels: int, height: int, width: int, size: int) -> None:
    images = pixels(3, channels, height, width)
    found = clean(images, (size, size + 2))
    assert found.dtype == torch.float32
    for image, resized in zip(images, found, strict=True):
        assert np.array_equal(
            resized.permute(1, 2, 0).numpy(), by_clean_fid(image.permute(1, 2, 0).numpy(), (size, size + 2))
        )


class Corner(nn.Module):
    """Some pixels of exactly three channels; floats and uint8 alike."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1] == 3
        return images[:, :, 0, :5].flatten(1).float()


class BytesAlone(Corner):
    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images[:, :, 0, :5].flatten(1).float()


class UnitFloats(Corner):
    """Takes floats as in [-1, 1], which a clean picture's are not."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images if images.is_floating_point() else images.float() / 127.5 - 1
        return pixels[:, :, 0, :5].flatten(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_gets_clean_pictures_as_floats_and_rounded_where_it_must(channels: int, tmp_path: Path) -> None:
    images = pixels(2, channels, 40, 40)
    wanted = clean(images).expand(-1, 3, -1, -1)[:, :, 0, :5].flatten(1)
    assert (wanted != wanted.round()).any()
    for network, expected in (
        (Corner(), wanted),
        (BytesAlone(), wanted.round()),
        (UnitFloats(), wanted.round() / 127.5 - 1),
    ):
        torch.jit.script(network).save(path := tmp_path / "net.pt")
        extractor = open_extractor(str(path), "cpu", "clean")
        assert torch.equal(extractor.features(images), expected)
        legacy = open_extractor(str(path), "cpu", "legacy")
        assert (extractor.name, legacy.name) == ("net, resized clean", "net, resized legacy")
        assert extractor.identity != legacy.identity


def test_a_network_for_another_size_says_what_it_was_given(tmp_path: Path) -> None:
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(48, 2))).save(path := tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"net\.pt: must take uint8 images \(2, 3, 299, 299\) and give features"):
        TorchScriptExtractor(path, "cpu", "clean").features(pixels(2, 3, 4, 4))


@pytest.mark.skipif(not INCEPTION.is_file(), reason="no shared data here")
def test_the_two_ways_differ_where_pictures_shrink_and_agree_at_299() -> None:
    legacy, other = (TorchScriptExtractor(INCEPTION, "cpu", each) for each in ("legacy", "clean"))
    large, native = pixels(1, 3, 512, 512), pixels(1, 3, 299, 299)
    torch.testing.assert_close(legacy.features(native), other.features(native))
    shrunk, cleanly = legacy.features(large), other.features(large)
    assert (shrunk - cleanly).norm() > 0.1 * shrunk.norm()
    by_hand = torch.from_numpy(by_clean_fid(large[0].permute(1, 2, 0).numpy(), (299, 299))).permute(2, 0, 1)[None]
    torch.testing.assert_close(cleanly, other.network(by_hand))


# --- processors of transformers ---------------------------------------------------------------------------------------

CROPPED = {"size": {"shortest_edge": 20}, "crop_size": {"height": 17, "width": 16}}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (CLIPImageProcessorPil, CROPPED),
        (CLIPImageProcessorPil, {"size": {"height": 12, "width": 15}, "do_center_crop": False, "resample": 2}),
        (BitImageProcessorPil, CROPPED | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
        (BitImageProcessorPil, CROPPED | {"do_normalize": False, "resample": 1}),
        (BitImageProcessorPil, CROPPED | {"rescale_factor": 1 / 127.5, "resample": 0}),
        (CLIPImageProcessorPil, {}),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(20, 20), (33, 25), (9, 14)])
def test_what_a_processor_file_says_is_what_transformers_does(
    kind: Any, options: dict[str, Any], height: int, width: int, tmp_path: Path
) -> None:
    (processor := kind(**options)).save_pretrained(tmp_path)
    images = pixels(2, 3, height, width)
    found = read_preprocessing(tmp_path)(images, "cpu")
    wanted = processor([each.permute(1, 2, 0).numpy() for each in images], return_tensors="pt").pixel_values
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    grey = read_preprocessing(tmp_path)(images[:, :1], "cpu")
    rgb = processor([each[:1].expand(3, -1, -1).permute(1, 2, 0).numpy() for each in images], return_tensors="pt")
    torch.testing.assert_close(grey, rgb.pixel_values, rtol=0, atol=1e-5)


def test_sizes_as_older_files_write_them(tmp_path: Path) -> None:
    (path := tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": 20, "crop_size": 16, "do_pad": False, "pad_size": None})
    )
    assert read_preprocessing(tmp_path).resized(30, 40) == (20, 26)
    assert read_preprocessing(tmp_path).given == (16, 16)
    path.write_text(json.dumps({"size": 20, "default_to_square": True, "do_center_crop": False}))
    assert read_preprocessing(tmp_path).resized(30, 40) == read_preprocessing(tmp_path).given == (20, 20)


def test_a_processor_saved_with_a_tokenizer_is_found_and_one_by_itself_goes_first(tmp_path: Path) -> None:
    """As `CLIPProcessor` of transformers 5 writes it."""
    assert read_preprocessing(tmp_path) is None
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert read_preprocessing(tmp_path) is None
    told = CLIPImageProcessorPil(size={"shortest_edge": 20}).to_dict() | {"crop_size": {"height": 7, "width": 9}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": told}))
    assert read_preprocessing(tmp_path).given == (7, 9)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | {"crop_size": 11}))
    assert read_preprocessing(tmp_path).given == (11, 11)


@pytest.mark.parametrize(
    ("told", "fragment"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "is of the class ViTImageProcessor; known are CLIP"),
        ({"do_pad": True}, "do_pad is True, which is not done here"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"crop_pct": 0.9}, "crop_pct is 0.9"),
        ({"size": {"longest_edge": 224}}, "size is {'longest_edge': 224}"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "size is {"),
        ({"size": -3}, "size is -3"),
        ({"size": 5000}, "size is 5000"),
        ({"size": "large"}, "size is 'large'"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size is {"),
        ({"crop_size": 300}, "crop_size is larger than size"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std is \[0.5, 0, 0.5\]"),
        ({"resample": 9}, "resample is 9"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
    ],
)
def test_a_processor_that_does_something_else_is_refused_in_one_line(
    told: dict[str, Any], fragment: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: {fragment}[^\n]*$"):
        read_preprocessing(tmp_path)
