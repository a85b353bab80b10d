"""Feature networks in folders of transformers: the vision tower of CLIP, and DINOv2."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.resizing import CLIP_MEAN, CLIP_STD, Preprocessing, Resize, read_preprocessing
from fewstep.models.loading.files import check_files, part_tensors, read_config, whole
from fewstep.models.loading.pipeline import library_class, outline
from fewstep.models.loading.weights import check_finite, check_names
from fewstep.networks.fingerprint import fingerprint

NETWORK = "config.json"
AT_ONCE = 32  # pictures: of 250 Inception has 3 GB of activations, and takes longer, too
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Kind:
    """How one kind of network is opened and asked."""

    title: str
    name: str  # of its class
    embed: Callable[[Any, Tensor], Tensor]  # from pixels (B, 3, H, W) to (B, D)
    vision: Callable[[Any], Any]  # from its configuration to that of what sees
    preprocessing: Callable[[int], Preprocessing]  # as published, of a network for so many pixels
    any_size: bool = False  # takes pictures of other sizes than its configuration says


def _project(network: Any, pixels: Tensor) -> Tensor:
    found: Tensor = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)
    return found


def _class_token(network: Any, pixels: Tensor) -> Tensor:
    """Behind the last layer norm."""
    found: Tensor = network(pixel_values=pixels).last_hidden_state[:, 0]
    return found


def _clips(size: int) -> Preprocessing:
    return Preprocessing(size, (size, size), CLIP_MEAN, CLIP_STD)


def _dinos(size: int) -> Preprocessing:
    """Whatever the size: its embeddings of places were trained at 518 pixels and are interpolated to 224."""
    return Preprocessing(256, (224, 224), *IMAGENET)


KINDS = {  # by model_type
    "clip": Kind("CLIP", "CLIPModel", _project, lambda config: config.vision_config, _clips),
    "clip_vision_model": Kind("CLIP", "CLIPVisionModelWithProjection", _project, lambda config: config, _clips),
    "dinov2": Kind("DINOv2", "Dinov2Model", _class_token, lambda config: config, _dinos, any_size=True),
}


def _load(kind: Any, folder: Path) -> Any:
    """In float32, through the library: the names of DINOv2's tensors are other ones in files than in the network.

    Raises UserError, naming the tensor, unless the files have all of the configuration's in its sizes, and finite.
    """
    _, variant = part_tensors(folder)
    outline(kind, folder)  # which says more of a wrong configuration
    how = {"variant": variant, "torch_dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    with whole(folder):
        network, told = kind.from_pretrained(str(folder), output_loading_info=True, ignore_mismatched_sizes=True, **how)
    for name, found, needed in told["mismatched_keys"]:
        sizes = f"{name} is {list(found)} in the file, {list(needed)} by its configuration"
        raise UserError(f"{folder}: has other sizes than its configuration: {sizes}")
    check_names(folder, told["missing_keys"], told["unexpected_keys"])
    check_finite(folder, network.state_dict().items())
    return network


class Encoder:
    """A network of `KINDS` on `device`: uint8 (B, C, H, W) -> features (B, D); grey pictures are repeated to RGB.

    CLIP's are its projected embeddings, DINOv2's its class token behind the last layer norm. Resized "legacy", pictures
    are made ready as the folder's processor says, where it has one (`read_preprocessing`), else as published; resized
    "clean" they lose no border, as where Frechet distances of DINOv2 come from (arXiv 2306.04675). Weights are read
    from safetensors alone, and no code of the folder is run. Raises UserError for a folder of anything else, or a
    damaged one.
    """

    option, takes = "--features", tuple(KINDS)
    drops: tuple[str, ...] = ("text_model", "text_projection")  # parts of the network that see nothing

    def __init__(self, folder: Path, device: torch.device | str, resize: Resize = "legacy"):
        if not (folder / NETWORK).is_file():
            what = " or ".join(dict.fromkeys(KINDS[each].title for each in self.takes))
            told = f"no folder of a {what} model of transformers (it has no {NETWORK})"
            raise UserError(f"{self.option} {folder}: {told}")
        try:
            self.kind, self.network, preprocessing = self._open(folder)
        except UserError as error:
            raise UserError(f"{self.option} {error}") from error
        for part in self.drops:
            if hasattr(self.network, part):
                delattr(self.network, part)
        self.network.eval().to(device)
        self.device, self.preprocessing = device, replace(preprocessing, resize=resize)
        self.name = f"{folder.resolve().name}, resized {'clean' if resize == 'clean' else 'by its processor'}"

    def _open(self, folder: Path) -> tuple[Kind, Any, Preprocessing]:
        check_files(folder, [path.name for path in folder.iterdir()])
        name = read_config(folder / NETWORK).get("model_type")
        if name not in self.takes:
            told = name or "network without a model_type"
            raise UserError(f"{folder}: is a {told}; known are {', '.join(self.takes)}")
        kind = KINDS[str(name)]
        network = _load(library_class(kind.name), folder)
        config = kind.vision(network.config)
        size, patch, channels = config.image_size, config.patch_size, config.num_channels
        if type(size) is not int or type(patch) is not int or channels != 3:
            told = f"is for pictures of {size} pixels in {channels} channels, not square ones in RGB"
            raise UserError(f"{folder}: {told}")
        preprocessing = read_preprocessing(folder) or kind.preprocessing(size)
        given = preprocessing.given
        if given != (size, size) and not (kind.any_size and given and min(given) >= patch):
            what = f"gives pictures of {given or 'any size'}, its network takes those of {(size, size)}"
            raise UserError(f"{folder}: its processor {what}")
        return kind, network, preprocessing

    @cached_property
    def identity(self) -> str:
        return fingerprint([self.network], self.preprocessing)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, D) on the network's device."""
        parts = (self.preprocessing(part, self.device) for part in images.split(AT_ONCE))
        return torch.cat([self.kind.embed(self.network, part) for part in parts])
