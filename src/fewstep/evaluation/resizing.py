"""How pictures are made ready for a feature network: as clean-fid does it, or a processor of transformers."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.loading.files import read_config
from fewstep.pictures import to_picture

INCEPTION = 299  # pixels a side, of all Inceptions that FIDs are published with
Resize = Literal["legacy", "clean"]
BICUBIC = Image.Resampling.BICUBIC
Means = tuple[float, float, float]


def clean(images: Tensor, size: tuple[int, int] = (INCEPTION, INCEPTION)) -> Tensor:
    """uint8 (B, C, H, W) -> float32 (B, C, h, w) in 0..255 on the CPU, as clean-fid does it (arXiv 2104.11222).

    Each channel by itself in floats, bicubic with antialiasing by PIL, not rounded, and cut to 0..255. Pictures of that
    size are only made floats.
    """
    if images.shape[2:] == size:
        return images.float()
    planes = images.cpu().float().flatten(0, 1).numpy()  # (B C, H, W)
    resized = _in_threads(lambda plane: Image.fromarray(plane).resize(size[::-1], BICUBIC), planes)
    return resized.clamp(0, 255).reshape(*images.shape[:2], *size)


def _in_threads(resize: Callable[[Any], Image.Image], pictures: Iterable[Any]) -> Tensor:
    """(N, h, w) or (N, h, w, 3): PIL leaves the interpreter to others while it resizes."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.from_numpy(np.stack([*pool.map(lambda each: np.asarray(resize(each)), pictures)]))


@dataclass(frozen=True)
class Preprocessing:
    """uint8 (B, C, H, W) -> float32 (B, 3, h, w): resized and rounded by PIL, cropped, (scale x - mean) / std.

    As processors of transformers do it where torchvision is not installed, whether it is or not. Resized "clean", the
    whole picture is made as large as what is left of it else, in floats and without a crop.
    """

    size: int | tuple[int, int]  # of the shorter side, or height and width
    crop: tuple[int, int] | None  # height and width in the middle
    mean: Means
    std: Means
    resample: int = BICUBIC
    scale: float = 1 / 255
    resize: Resize = "legacy"

    def __call__(self, images: Tensor, device: torch.device | str) -> Tensor:
        whole = self.given if self.resize == "clean" else None
        pixels = (clean(images, whole) if whole else self._cropped(images)).to(device).float()
        mean, std = (torch.tensor(each, device=device).reshape(3, 1, 1) for each in (self.mean, self.std))
        return (pixels * self.scale - mean) / std

    def _cropped(self, images: Tensor) -> Tensor:
        height, width = self.resized(*images.shape[2:])
        if images.shape[2:] != (height, width):
            resized = _in_threads(lambda each: to_picture(each).resize((width, height), self.resample), images.cpu())
            images = resized[:, None] if resized.dim() == 3 else resized.permute(0, 3, 1, 2)  # (B, C, h, w)
        wanted = self.crop or (height, width)
        top, left = (height - wanted[0]) // 2, (width - wanted[1]) // 2
        return images[:, :, top : top + wanted[0], left : left + wanted[1]]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before the crop; of the longer side a fraction of a pixel is left out."""
        if not isinstance(self.size, int):
            return self.size
        short = min(height, width)
        return self.size * height // short, self.size * width // short

    @property
    def given(self) -> tuple[int, int] | None:
        """Height and width of what the network gets; None where they depend on the picture's."""
        return self.crop or (None if isinstance(self.size, int) else self.size)


CLASSES = ("CLIPImageProcessor", "CLIPFeatureExtractor", "BitImageProcessor")
"""Processors that are known, which do the same; the library adds `Fast` or `Pil` to their names."""
HARMLESS = {"image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys"}
HARMLESS |= {"do_convert_rgb", "return_tensors", "data_format", "input_data_format", "device", "disable_grouping"}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PUBLISHED = {  # of both classes, where their file lacks it
    "do_resize": True,
    "size": 224,
    "default_to_square": False,
    "resample": int(BICUBIC),
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
PROCESSOR, PARTS = "preprocessor_config.json", "processor_config.json"  # the second with a tokenizer, since version 5
MAX_SIDE = 4096  # pixels


def read_preprocessing(folder: Path) -> Preprocessing | None:
    """As the folder of a network says it; None where it does not.

    Raises UserError, naming file and key, for a class or a step that is not known.
    """
    for path in (folder / PROCESSOR, folder / PARTS):
        config = read_config(path) if path.is_file() else {}
        told = config.get("image_processor") if path.name == PARTS else config
        if told and isinstance(told, dict):
            return _preprocessing(path, told)
    return None


def _preprocessing(path: Path, given: Mapping[str, Any]) -> Preprocessing:
    told = {name: value for name, value in given.items() if value is not None}
    kind = str(told.get("image_processor_type", told.get("feature_extractor_type", CLASSES[0])))
    if kind.removesuffix("Fast").removesuffix("Pil") not in CLASSES:
        raise UserError(f"{path}: is of the class {kind}; known are {', '.join(CLASSES)}")
    rest = {name: value for name, value in told.items() if name not in PUBLISHED and name not in HARMLESS}
    config = PUBLISHED | told
    rest |= {name: config[name] for name in ("do_resize", "do_rescale") if config[name] is not True}
    if unknown := next((name for name, value in rest.items() if value is not False or name in PUBLISHED), None):
        raise UserError(f"{path}: {unknown} is {rest[unknown]!r}, which is not done here; name another network")
    square = bool(config["default_to_square"])
    found = Preprocessing(
        _checked(path, config, "size", lambda value: _sides(value, square)),
        _checked(path, config, "crop_size", _both_sides) if config["do_center_crop"] else None,
        _means(path, config, "image_mean"),
        _means(path, config, "image_std"),
        _checked(path, config, "resample", Image.Resampling),
        _checked(path, config, "rescale_factor", _positive),
    )
    if found.crop and any(side > least for side, least in zip(found.crop, found.resized(1, 1), strict=True)):
        raise UserError(f"{path}: crop_size is larger than size, which needs a border; name another network")
    return found


def _sides(value: Any, square: bool) -> int | tuple[int, int]:
    """Height and width, or the length of the shorter side: of one number it is that unless it means a square."""
    if isinstance(value, dict):
        return _side(value["shortest_edge"]) if [*value] == ["shortest_edge"] else _both_sides(value)
    return (_side(value),) * 2 if square else _side(value)


def _both_sides(value: Any) -> tuple[int, int]:
    """Height and width."""
    if not isinstance(value, dict):
        return (_side(value),) * 2
    if {*value} != {"height", "width"}:
        raise ValueError
    return _side(value["height"]), _side(value["width"])


def _side(value: Any) -> int:
    if type(value) is not int or not 0 < value <= MAX_SIDE:
        raise ValueError
    return value


def _means(path: Path, config: Mapping[str, Any], name: str) -> Means:
    if not config["do_normalize"]:
        return (0.0, 0.0, 0.0) if name == "image_mean" else (1.0, 1.0, 1.0)

    def read(value: Any) -> Means:
        red, green, blue = map(_positive if name == "image_std" else float, value)
        return red, green, blue

    found: Means = _checked(path, config, name, read)
    return found


def _positive(value: Any) -> float:
    if not 0 < value < float("inf"):
        raise ValueError
    return float(value)


def _checked(path: Path, config: Mapping[str, Any], name: str, read: Callable[[Any], Any]) -> Any:
    try:
        return read(config[name])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {name} is {config[name]!r}, which is not done here; name another network") from error
