"""What the floors above ask of an image model: a denoiser with what surrounds it."""

import copy
import json
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.errors import UserError
from fewstep.files import read_json
from fewstep.models.lora_files import LORA_WEIGHTS, write_diffusers_lora
from fewstep.networks.family import Family
from fewstep.networks.fingerprint import fingerprint
from fewstep.networks.lora import DOWN, UP, lora_in
from fewstep.networks.lora_layers import settings_of
from fewstep.seeding import Draws
from fewstep.stopping import temporary

DESCRIPTION = "fewstep.json"
WEIGHTS = "model.safetensors"
LORA = "lora"  # folder of low-rank weights beside their base, and what the description calls them
NUMBERS_PER_BATCH = 2**18
Asked = Sequence[str] | Sequence[int] | None
"""Prompts or class numbers, in turn."""


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """What fewstep needs to know of a model folder beside what diffusers keeps there."""
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read_description(folder: Path) -> dict[str, Any]:
    """What `write_description` wrote; a folder of diffusers has none. Raises UserError where it wrote no such thing."""
    path = folder / DESCRIPTION
    description = {"family": "latent"} | (read_json(path) if os.path.lexists(path) else {})
    timesteps, classes = description.get("timesteps"), description.get("class_names")
    falling = isinstance(timesteps, list) and all(type(t) in (int, float) and abs(t) < 1e6 for t in timesteps)
    if timesteps is not None and not (falling and timesteps and timesteps == sorted({*timesteps}, reverse=True)):
        raise UserError(f"{path}: is damaged (timesteps {str(timesteps)[:80]}: no falling numbers)")
    if not isinstance(classes, list | None) or not all(isinstance(name, str) and name for name in classes or ()):
        raise UserError(f"{path}: is damaged (class_names are no words)")
    if not isinstance(description["family"], str) or not isinstance(description.get("image_size"), int | None):
        raise UserError(f"{path}: is damaged (family {description['family']!r}, image_size or both)")
    return description


class ImageModel(ABC):
    """A teacher or a student of one family; what has a body here is the same for pixels and for latents."""

    kind: Literal["label", "text"]
    """What it is asked for: a class, or a prompt."""
    denoiser: Denoiser
    shape: tuple[int, ...]
    """Of one x0, without the batch."""
    on_pixels: bool = False
    """Whether x0 is the picture itself."""
    channels: int
    """Of its pictures."""
    num_classes: int = 0
    class_names: list[str] | None = None
    """Of its classes, by number, where the images that it was taught on named them."""
    timesteps: list[float] | None
    """Of a few-step student; None for a teacher."""
    family: Family
    image_size: int
    """Height and width of its pictures in pixels."""

    @property
    def part(self) -> str:
        """What the adapter and the folder call the diffusers network."""
        return self.family.part

    @property
    def network(self) -> Any:
        """The diffusers network in the denoiser's adapter."""
        return self.denoiser.network.get_submodule(self.part)

    @property
    def bottleneck(self) -> str:
        """Dotted name of the layer that the discriminator reads by default."""
        return self.family.feature_layer(self.network)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.denoiser.parameters()).device

    def class_name(self, number: int) -> str:
        """Its name, or the number where it has none."""
        return self.class_names[number] if self.class_names else str(number)

    def label(self, index: int, asked: Asked = None) -> str:
        """What image `index` is of, as `conditions` has it: a prompt, or a class by name or number; "" of no class."""
        subjects = (range(self.num_classes) if asked is None else asked) or [""]
        subject = subjects[index % len(subjects)]
        return self.class_name(subject) if isinstance(subject, int) else subject

    @property
    @abstractmethod
    def null_condition(self) -> Condition | None:
        """(1, ...) tensors for guidance, on the model's device; None where the model can't be guided."""

    @abstractmethod
    def conditions(self, indices: range, asked: Asked = None) -> Condition:
        """The conditions of images number `indices` of an evaluation or a grid, on the model's device.

        Image i is of `asked[i % len(asked)]`, prompts or class numbers; without them of every class in turn, or of "".
        """

    @abstractmethod
    def draw_condition(self, given: Condition, draws: Draws) -> Condition:
        """What fakes are drawn for: random classes, or the prompts or captions given."""

    @abstractmethod
    def encode_condition(self, batch: dict[str, Any]) -> Condition:
        """The condition of a batch of real data, on the model's device."""

    @abstractmethod
    def encode_x0(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """x0 of a batch of real data, on the model's device; an autoencoder that draws its latents uses `draws`."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) of x0: for consumers of images, never in a training step."""

    @abstractmethod
    def decode_pixels(self, x0: Tensor) -> Tensor:
        """Pixels (B, C, H, W) around [-1, 1] of x0, with gradient: for losses on pictures."""

    @property
    def latent_space(self) -> dict[str, Any] | None:
        """What latents on disk must agree in; None where x0 is the picture itself."""
        return None

    def to(self, device: torch.device) -> None:
        """Moves the denoiser to `device`; what surrounds it follows when it is used."""
        self.denoiser.to(device)

    def encode_in(self, dtype: torch.dtype) -> None:
        """Encodes and decodes text and images in `dtype` from now on, but saves them as loaded; call it before `to`."""
        return

    def release(self) -> None:
        """Sends what surrounds the denoiser back to the CPU, until it is used again."""
        return

    @property
    def fingerprint(self) -> str:
        """A hash of what its samples are a function of: network, schedule and parameterization."""
        denoiser = self.denoiser
        levels = denoiser.schedule.levels[::111]
        numbers = torch.stack([levels.double().cpu(), *(c.cpu() for c in denoiser.coefficients(levels))])
        rounded = [f"{number:.5g}" for number in numbers.flatten().tolist()]  # in which all machines agree
        return fingerprint([self.network], type(denoiser.schedule).__name__, rounded)

    @property
    def sampling_batch(self) -> int:
        """How many images are drawn at once: 16 of SD, 4 of SDXL, at most 250."""
        return min(250, max(1, NUMBERS_PER_BATCH // math.prod(self.shape)))

    def student(self, denoiser: Denoiser, timesteps: Sequence[float]) -> Self:
        """The same image model around a few-step student."""
        model = copy.copy(self)
        model.denoiser, model.timesteps = denoiser, [float(t) for t in timesteps]
        return model

    def save(self, folder: Path, frozen: Path | None = None, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes what `pretrained.load` reads, with the trained weights in `state`, by the denoiser's names, or its.

        What is not trained is written only once, into `frozen`, and linked from there.
        """
        if frozen is None:
            self.save_frozen(folder)
        elif not frozen.is_dir():
            with temporary(frozen.with_name(f".{frozen.name}.tmp")) as hidden:
                shutil.rmtree(hidden, ignore_errors=True)
                self.save_frozen(hidden)
                if hidden.is_dir():
                    os.replace(hidden, frozen)
        if frozen is not None and frozen.is_dir():
            shutil.copytree(frozen, folder, symlinks=True, copy_function=link_weights, dirs_exist_ok=True)
        self.save_trained(folder, state or dict(self.denoiser.named_parameters()))

    def save_frozen(self, folder: Path) -> None:
        """Writes everything but what is trained; a pixel model that is trained as a whole has nothing, and no folder.

        The base of low-rank weights is written as they were trained on it, in bfloat16 if it was.
        """
        if settings_of(self.denoiser):
            state = self.network.state_dict()
            self._save_network(folder, {name: state[name] for name in state if not name.endswith((DOWN, UP))})

    def save_trained(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Writes `fewstep.json`, and the network with the weights in `state`, by the denoiser's names, else its own.

        Of low-rank weights these alone, which `pretrained.load` merges into the base beside them.
        """
        prefix, own, description = f"network.{self.part}.", _state_of(self.network), self.description()
        given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if settings := settings_of(self.denoiser):
            (folder / LORA).mkdir(parents=True)
            write_diffusers_lora(folder / LORA / LORA_WEIGHTS, lora_in(own | given, settings.alpha), self.part)
            description[LORA] = settings.model_dump()
        else:
            self._save_network(folder, {name: given.get(name, value) for name, value in own.items()})
        write_description(folder, description)

    def _save_network(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """The network's folder, with this state."""
        carrier, weights = with_state(self.network, state)
        if hasattr(carrier, "save_pretrained"):
            carrier.save_pretrained(folder / self.part)
        else:  # of no library
            (folder / self.part).mkdir(parents=True, exist_ok=True)
            save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / self.part / WEIGHTS)

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What fewstep needs to know of the model beside what diffusers keeps in its folder."""


def _state_of(network: Any) -> dict[str, Tensor]:
    """As `state_dict` gives it, but without its hooks: training may be using what they would put away."""
    state = dict[str, Tensor](network.named_parameters(remove_duplicate=False))
    for path, module in network.named_modules():
        kept = [(name, x) for name, x in module._buffers.items() if name not in module._non_persistent_buffers_set]
        state |= {f"{path}.{name}".lstrip("."): buffer for name, buffer in kept if buffer is not None}
    return state


def with_state(network: Any, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A network that shares all with another but for what it calls its state, and this."""
    carrier, weights = copy.copy(network), {name: value.detach() for name, value in state.items()}
    carrier.state_dict = lambda: weights
    return carrier, weights


def link_weights(source: str, target: str) -> None:
    """A hard link for weights; a copy for small files, which people edit, and where a file system has no links."""
    if source.endswith(".safetensors"):
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
