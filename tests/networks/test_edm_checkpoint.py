"""EDM checkpoints become pixel models that give the same output."""

import pytest
import torch

from edm_files import small_network, write_checkpoint
from fewstep.networks.edm_checkpoint import convert, read_network

SIGMAS = (0.01, 0.5, 5.0, 80.0)


def difference(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((given - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("settings", [{}, {"label_dim": 0, "attn_resolutions": [], "img_channels": 1}], ids=str)
def test_the_output_is_the_original_networks(settings, tmp_path) -> None:
    """Of the network itself, and of x0 around it: ours in float32, the original in float64."""
    network = small_network(**settings)
    model = convert(read_network(write_checkpoint(tmp_path / "edm.pkl", network)), lambda done, _: None)
    label = torch.tensor([0, 4, 2]) if network.label_dim else None
    condition = {} if label is None else {"label": label}
    noise = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(1))
    network.double()
    for sigma in SIGMAS:
        t = torch.full((3,), sigma)
        with torch.no_grad():
            inner = model.denoiser.network(noise, t, condition)
            assert difference(inner, network.model(noise.double(), t.double().log() / 4, label)) <= 1e-5
            x0 = model.denoiser(sigma * noise, t, condition)
            assert difference(x0, network((sigma * noise).double(), t.double(), label)) <= 1e-5
