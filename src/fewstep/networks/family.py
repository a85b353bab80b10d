"""A family of models is one row: the parts of its pipeline, and how each of them is used."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.diffusion.parameterizations import Parameterization
from fewstep.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class Family:
    """What is known of all models of one class of pipeline; nothing else in the package names the class.

    The functions that take a pipeline raise UserError for what its files say and the family does not know.
    """

    pipeline: str
    """Its class in diffusers."""
    part: str
    """What pipeline, folder and adapter call the trained network."""
    weights: Mapping[str, str]
    """The parts that have weights, and their classes."""
    others: tuple[str, ...]
    """The parts without: scheduler and tokenizers."""
    check: Callable[[Any], None]
    """Of a pipeline: refuses what the adapter could not tell the network."""
    adapter: Callable[[Any], nn.Module]
    """Of the network: from (x, native t, condition) to its call; has a `feature_map(output, x)`, too."""
    conditioner: Callable[[Any, int], Any]
    """Of (pipeline, image size)."""
    codec: Callable[[Any], Any]
    """Of the autoencoder."""
    schedule: Callable[[Any], tuple[NoiseSchedule, Parameterization]]
    """Of the scheduler's configuration."""
    image_size: Callable[[Any], int]
    """Of a pipeline, in pixels: its configuration's, or the family's own where that says nothing."""
    feature_layer: Callable[[Any], str]
    """Of the network: the dotted name in the adapter of the layer that the discriminator reads by default."""
    time_layer: str
    """The dotted name in the adapter of the layer that embeds native time."""
    no_guidance: Mapping[str, float]
    """The arguments of the pipeline's call that switch guidance off, for a student."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What is needed of a pipeline; its safety checker and its image encoder are not."""
        return (*self.weights, *self.others)


def unet_map(output: Tensor | tuple[Any, ...], x: Tensor) -> Tensor:
    """The picture in what a layer of a UNet gives, (B, C, H, W): a down block gives (hidden states, skips)."""
    return output if isinstance(output, Tensor) else output[0]
