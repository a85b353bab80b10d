"""A family of models is one row: what it is made of, and how each of its parts is used."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from fewstep.diffusion.parameterizations import Parameterization
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.networks.codec import Codec
from fewstep.networks.text import TextConditioner


def _nothing(given: Any, *more: Any) -> Any:
    """Of a family that has no such part."""
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known of all models of one kind; nothing else in the package names the kind.

    It is either of pipelines of diffusers, asked for text, or of networks on pixels, asked for a class. The functions
    that take a pipeline raise UserError for what its files say and the family does not know.
    """

    name: str
    """The pipeline's class in diffusers; on pixels what `fewstep.json` in a model folder says."""
    part: str
    """What pipeline, folder and adapter call the trained network."""
    adapter: Callable[[Any], nn.Module]
    """Of the network: from (x, native t, condition) to its call; has a `feature_map(output, x)`, too."""
    schedule: Callable[[Any], tuple[NoiseSchedule, Parameterization]]
    """Of the scheduler's configuration, or of the settings."""
    feature_layer: Callable[[Any], str]
    """Of the network: the dotted name in the adapter of the layer that the discriminator reads by default."""
    time_layer: str
    """The dotted name in the adapter of the layer that embeds native time."""

    # on pixels
    settings: type[Any] | None = None
    """All that a network is made by, a `PixelSettings`; None of pipelines."""
    network: Callable[[Any], nn.Module] = _nothing
    """Of the settings, randomly initialised."""

    # of pipelines
    weights: Mapping[str, str] = field(default_factory=dict)
    """The parts that have weights, and their classes in diffusers or transformers."""
    others: tuple[str, ...] = ()
    """The parts without: scheduler and tokenizers."""
    check: Callable[[Any], None] = _nothing
    """Of a pipeline: refuses what the adapter could not tell the network."""
    conditioner: Callable[[Any, int], TextConditioner] = _nothing
    """Of (pipeline, image size)."""
    keeps: tuple[str, ...] = ()
    """What the null condition has of a condition; all else of it is the condition's own."""
    example: Callable[[Any, int], dict[str, Tensor] | None] = _nothing
    """Of (network, tokens): a condition (1, ...) of zeros, which plans know without text encoders."""
    codec: Callable[[Any], Codec] = _nothing
    """Of the autoencoder."""
    image_size: Callable[[Any], int] = _nothing
    """Of a pipeline, in pixels: its configuration's, or the family's own where that says nothing."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What is needed of a pipeline; its safety checker and its image encoder are not."""
        return (*self.weights, *self.others)


class UNetAdapter(nn.Module):
    """What the adapters of diffusers' UNets have in common."""

    def __init__(self, unet: Any):
        super().__init__()
        kind: Any = type(unet)
        if isinstance(getattr(kind, "dtype", None), property):
            unet.__class__ = _with_quick_dtype(kind)
        self.unet = unet

    def feature_map(self, output: Tensor | tuple[Any, ...], x: Tensor) -> Tensor:
        """The picture in what a layer of a UNet gives, (B, C, H, W): a down block gives (hidden states, skips)."""
        return output if isinstance(output, Tensor) else output[0]


@cache
def _with_quick_dtype(kind: type[Any]) -> type[Any]:
    """The class with a `dtype` that is its first weight's; diffusers' own walks through all modules in every pass."""
    quick = property(lambda network: next(network.parameters()).dtype)
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, "dtype": quick})
