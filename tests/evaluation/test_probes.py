"""What is read off images: patches, colours and plug-ins' scores, each against the same in PIL, numpy or by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fewstep.errors import UserError
from fewstep.evaluation import probes
from fewstep.evaluation.clip import Clip
from fewstep.evaluation.extractors import open_extractor
from fewstep.evaluation.gathering import FeatureProbe, Gathered, Probe, gather
from fewstep.evaluation.probes import ClipProbe, ColourProbe, PatchProbe, ScorerProbe
from fewstep.evaluation.resizing import clean
from fewstep.evaluation.scorers import open_scorer, open_scorers
from tiny_encoders import save_clip, save_dino


def pixels(num: int, channels: int = 3, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, height, width), generator=random, dtype=torch.uint8)


class Floats(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class Pixels:
    """The pictures themselves as features."""

    name, identity = "pixels", "pixels"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


# --- patches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "corner"), [(14, 13, (2, 2)), (12, 10, (2, 0)), (15, 18, (3, 4))])
def test_a_patch_is_the_middle_where_torchvision_has_it(height: int, width: int, corner: tuple[int, int]) -> None:
    """int(round((side - 9) / 2.0)): 2.5 is 2, 1.5 is 2, 0.5 is 0, 4.5 is 4."""
    images = pixels(3, 3, height, width)
    top, left = int(round((height - 9) / 2.0)), int(round((width - 9) / 2.0))  # noqa: RUF046, as it stands there
    assert (top, left) == corner
    found = PatchProbe(Pixels(), 9).read(images, range(3))["patches"]
    assert torch.equal(found, images[:, :, top : top + 9, left : left + 9].flatten(1).float())


def test_pictures_no_larger_than_a_patch_have_none() -> None:
    probe = PatchProbe(Pixels(), 9)
    assert probe.read(pixels(3, 3, 9, 9), range(3)) == probe.read(pixels(3, 1, 20, 9), range(3)) == {}
    assert PatchProbe(Pixels()).size == 299
    assert probe.identity != PatchProbe(Pixels()).identity
    found = gather([pixels(6, 3, 9, 9)], [PatchProbe(Pixels(), 8), ColourProbe()], 6, "photos")
    assert found.numbers["patches"].shape == (6, 192)
    assert found.sums("patches").count == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_all_probes_read_one_set_whatever_its_batches(channels: int, tmp_path: Path) -> None:
    """bfloat16 CLIP, DINOv2's patches, a file resized clean and colours, of grey and of coloured pictures."""
    save_clip(tmp_path / "clip", torch.bfloat16)
    save_dino(tmp_path / "dino")
    clip, images = Clip(tmp_path / "clip", "cpu"), pixels(7, channels, 40, 44)
    torch.jit.script(nn.Sequential(Floats(), nn.AdaptiveAvgPool2d(2), nn.Flatten())).save(tmp_path / "pooled.pt")
    pooled = open_extractor(str(tmp_path / "pooled.pt"), "cpu", "clean")
    dino = PatchProbe(open_extractor(str(tmp_path / "dino"), "cpu"), 30)
    read: list[Probe] = [FeatureProbe(pooled), dino, ClipProbe(clip, ["a cat", "a dog"]), ColourProbe()]
    whole, parts = gather([images], read, 7, "photos"), gather(images.split(3), read, 7, "photos")
    assert {name: tuple(found.shape) for name, found in whole.numbers.items()} == {
        "features": (7, 12),
        "patches": (7, 16),
        "clip": (7, 1),
        "colours": (7, 3),
    }
    for name, found in whole.numbers.items():
        torch.testing.assert_close(parts.numbers[name], found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.features, adaptive_avg_pool2d(clean(images).expand(-1, 3, -1, -1), 2).flatten(1))
    patch = PatchProbe(open_extractor(str(tmp_path / "pooled.pt"), "cpu", "clean"), 39).read(images, range(7))[
        "patches"
    ]
    cropped = clean(images[:, :, :39, 2:41])  # half a pixel to the even, 0; two and a half, 2
    torch.testing.assert_close(patch, adaptive_avg_pool2d(cropped.expand(-1, 3, -1, -1), 2).flatten(1))
    assert len({each.identity for each in read}) == 4


# --- colours ----------------------------------------------------------------------------------------------------------


def test_colours_are_those_of_pil_and_numpy() -> None:
    images = pixels(5, 3, 16, 24)
    found = ColourProbe().read(images, range(5))["colours"]
    for image, (brightness, contrast, saturation) in zip(images, found.double().tolist(), strict=True):
        array = image.permute(1, 2, 0).numpy()
        grey = array.astype(np.float64) @ [0.299, 0.587, 0.114] / 255
        assert (brightness, contrast) == pytest.approx((grey.mean(), grey.std()), rel=1e-5)
        assert saturation == pytest.approx((array.max(2).astype(float) - array.min(2)).mean() / 255, rel=1e-5)
        rounded = np.asarray(Image.fromarray(array).convert("L")) / 255  # PIL's grey is whole numbers
        assert (brightness, contrast) == pytest.approx((rounded.mean(), rounded.std()), abs=0.5 / 255)


def test_grey_pictures_have_no_saturation_and_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = pixels(5, 1)
    found = ColourProbe().read(grey, range(5))["colours"]
    torch.testing.assert_close(found[:, 0], grey.float().mean((1, 2, 3)) / 255)
    torch.testing.assert_close(found[:, 1], grey.float().flatten(1).std(1, correction=0) / 255)
    assert found[:, 2].tolist() == [0] * 5
    monkeypatch.setattr(probes, "MAX_VALUES", 130)
    torch.testing.assert_close(ColourProbe().read(grey, range(5))["colours"], found)


@pytest.mark.parametrize(("value", "expected"), [(0, [0, 0, 0]), (255, [1, 0, 0])])
def test_plain_pictures_are_at_the_ends(value: int, expected: list[float]) -> None:
    images = torch.full((2, 3, 4, 4), value, dtype=torch.uint8)
    torch.testing.assert_close(ColourProbe().read(images, range(2))["colours"], torch.tensor([expected] * 2).float())


# --- plug-ins ---------------------------------------------------------------------------------------------------------

PLUGINS = '''
import torch


class Redness:
    """The mean of red, more where the prompt says so."""

    def __init__(self, device):
        self.device = device

    def score(self, images, prompts):
        asked = torch.tensor([float("red" in each) for each in prompts])
        return images[:, 0].double().mean((1, 2)) / 255 + asked


class Fid(Redness): ...


class Unmade(Redness):
    def __init__(self): ...


class Given(Redness):
    given = None

    def score(self, images, prompts):
        return type(self).given(images)


class Broken(Redness):
    def score(self, images, prompts):
        raise KeyError("two\\nlines")


class Silent: ...


number = 3
'''


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder, new in every test."""
    name = f"plugins_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(PLUGINS)
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_plug_in_scores_pictures_with_their_prompts_in_turn(plugins: str) -> None:
    scorer, images = open_scorer(f"{plugins}:Redness", "cpu"), pixels(5)
    probe = ScorerProbe(scorer, ["a red cat", "a dog", "a cow"])
    found: Gathered = gather([images[:2], images[2:]], [probe], 5, "photos")
    red = images[:, 0].float().mean((1, 2)) / 255
    torch.testing.assert_close(found.numbers["redness"], (red + torch.tensor([1, 0, 0, 1, 0]))[:, None])
    torch.testing.assert_close(ScorerProbe(scorer, []).read(images, range(5))["redness"], red[:, None])
    assert (scorer.name, scorer.plugin.device) == ("redness", "cpu")
    assert scorer.identity == open_scorer(f"{plugins}:Redness", "cpu").identity
    assert scorer.identity != open_scorer(f"{plugins}:Given", "cpu").identity
    assert probe.identity != ScorerProbe(scorer, []).identity


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere:Redness", "can't be imported .*No module named 'nowhere'.* write MODULE:CLASS"),
        ("nowhere", "can't be imported"),
        ("", "can't be imported"),
        ("faulty:Redness", "can't be imported .ZeroDivisionError"),
        ("PLUGINS:Absent", "can't be imported .*Absent"),
        ("PLUGINS:number", "is no class with a method `score"),
        ("PLUGINS:Silent", "is no class with a method `score"),
        ("PLUGINS:Unmade", r"can't be made by Unmade\(device\) .TypeError"),
        ("PLUGINS:Fid", "its column would be `fid`, which there is"),
    ],
)
def test_a_plug_in_that_is_not_there_or_none_is_one_line(plugins: str, name: str, told: str) -> None:
    reference = name.replace("PLUGINS", plugins)
    with pytest.raises(UserError, match=rf"^scorer {reference}: {told}.* \(--scorer, .* evaluation\.scorers\)$"):
        open_scorer(reference, "cpu")


def test_a_plug_in_that_works_in_place_changes_nothing_for_others(plugins: str) -> None:
    """Other probes read the same images behind it, and the grid shows them."""
    scorer, images = open_scorer(f"{plugins}:Given", "cpu"), pixels(4)
    type(scorer.plugin).given = staticmethod(lambda images: images.zero_()[:, 0, 0, 0].float())
    found = gather([images.clone()], [ScorerProbe(scorer, []), ColourProbe()], 4, "photos")
    assert torch.equal(found.pictures, images)
    assert torch.equal(found.numbers["colours"], ColourProbe().read(images, range(4))["colours"])


def test_two_plug_ins_of_one_name_are_refused(plugins: str) -> None:
    (Path.cwd() / "others.py").write_text(f"class Redness:\n{PLUGINS.split('class Redness:')[1].split('class Fid')[0]}")
    scorers = open_scorers([f"{plugins}:Redness", f"{plugins}:Given"], "cpu")
    assert [each.name for each in scorers] == ["redness", "given"]
    for twice in ("others:Redness", f"{plugins}:Redness"):
        with pytest.raises(UserError, match=rf"^scorer {twice}: has the same column `redness` as {plugins}:Redness; "):
            open_scorers([f"{plugins}:Redness", f"{plugins}:Given", twice], "cpu")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda images: [1.0] * len(images), r"gives a list for 4 images; it must give a tensor \(4,\)"),
        (lambda images: (torch.zeros(len(images)), 1), "gives a tuple"),
        (lambda images: torch.zeros(len(images), 1), r"gives numbers \(4, 1\)"),
        (lambda images: torch.tensor(1.0), r"gives numbers \(\)"),
        (lambda images: torch.full((len(images),), torch.nan), "gives NaN or infinity"),
        (lambda images: images[:, :, 9, 0], "fails .IndexError"),
        (None, "fails .KeyError"),
    ],
)
def test_a_plug_in_that_gives_something_else_is_one_line(plugins: str, given: object, told: str) -> None:
    name = f"{plugins}:{'Given' if given else 'Broken'}"
    scorer = open_scorer(name, "cpu")
    type(scorer.plugin).given = staticmethod(given) if given else None
    with pytest.raises(UserError, match=rf"^photos: scorer {name}: {told}[^\n]*$"):
        gather([pixels(4)], [ScorerProbe(scorer, ["a cat"])], 4, "photos")
