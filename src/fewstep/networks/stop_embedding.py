"""Tells a critic at which of the student's timesteps a sample was taken."""

from torch import Tensor, nn

from fewstep.diffusion.denoiser import Condition


def condition_on_stop(network: nn.Module, layer: str, num_timesteps: int) -> None:
    """Adds a learned vector per stop, zero at first, to the output (B, E) of `layer`, the network's time embedding.

    The network then needs condition["stop"], (B,) int64 in 0 .. num_timesteps-1. Works on any network with a layer
    that embeds time, by hooks; its names and its other weights stay as they are.
    """
    embedding = nn.Embedding(num_timesteps, next(reversed(list(network.get_submodule(layer).parameters()))).shape[0])
    nn.init.zeros_(embedding.weight)  # the critic starts as the teacher
    network.stop_embedding = embedding.to(next(network.parameters()).device)
    stops: list[Tensor] = []

    def keep_stop(module: nn.Module, arguments: tuple[Tensor, Tensor, Condition]) -> None:
        stops[:] = [arguments[2]["stop"]]  # (B,); the layer below is not given the condition

    def add_embedding(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        embedded: Tensor = embedding(stops[0])
        return output + embedded.to(output.dtype)  # (B, E)

    network.register_forward_pre_hook(keep_stop)
    network.get_submodule(layer).register_forward_hook(add_embedding)
