"""Steps on a GPU: nothing in them waits for it, and replayed they are what they are without graphs."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.models.image_model import ImageModel
from fewstep.models.latent_model import LatentModel
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.settings import LoRASettings
from fewstep.runtime.graphs import CUDA, Graphs
from fewstep.training.dmd2 import DMD2
from fewstep.training.dmd2_settings import DMD2Settings
from fewstep.training.roles import make_roles
from steps import GAN
from tiny_pipelines import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
LR = {"optimizer": {"lr": 1e-4}}
LORA = LoRASettings(rank=2, alpha=2.0)


@contextmanager
def no_wait() -> Iterator[None]:
    """What the host would wait for is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(model: ImageModel, dtype: torch.dtype, lora: LoRASettings | None, **settings: object) -> DMD2:
    told = DMD2Settings(
        **{
            "student_every": 2,
            "student": {"num_timesteps": 2, **LR},
            "critic": LR | {"condition_on_stop": True},
            "gan": GAN,
            **settings,
        }
    )
    torch.manual_seed(1)
    roles = make_roles(model, 2.0, None, 2 * told.critic.condition_on_stop, dtype, told.checkpointing, lora)
    return DMD2(told, model, roles, 40, 2, seed=0)


def pair(tmp_path: Path, tiny_model: PixelModel, name: str) -> tuple[list[DMD2], list]:
    """Two methods that are the same, and a batch."""
    family, dtype, lora, settings = CASES[name]
    device, methods = torch.device("cuda"), []
    for place in ("eager", "graphs"):
        torch.manual_seed(0)
        if family == "pixel":
            model: ImageModel = copy.deepcopy(tiny_model)
            batch = {"image": torch.randint(256, (2, *model.shape)).byte(), "label": torch.arange(2)}
        else:
            model = LatentModel(TINY[family](tmp_path / place))
            model.encode_in(dtype)
            kept = {key: x for key, x in model.text_condition(["a", "b"]).items() if key != "time_ids"}
            batch = kept | {"latent": torch.randn(2, *model.shape)}
        model.to(device)
        methods.append(make(model, dtype, lora, **settings))
        model.release()
    return methods, [(range(2), {key: x.to(device) for key, x in batch.items()})]


def apart(first: object, second: object) -> float:
    """The largest distance of tensors over their size."""
    if isinstance(first, Tensor):
        a, b = first.double(), second.double()
        return ((a - b).norm() / b.norm().clamp_min(1e-12)).item() if a.isfinite().all() else float("inf")
    values = [each.values() if isinstance(each, dict) else each for each in (first, second)]
    nested = [each for each in zip(*values, strict=True) if isinstance(each[0], Tensor | dict | list)]
    return max((apart(*each) for each in nested), default=0.0)


CASES = {
    "pixel": ("pixel", torch.float32, None, {}),
    "pixel, a cycle": ("pixel", torch.float32, None, {"critic": LR | {"samples": "cycle"}}),
    "whole": ("sdxl", torch.bfloat16, None, {}),
    "whole, gan": ("sdxl", torch.bfloat16, None, {"checkpointing": "gan"}),
    "whole, blocks": ("sd", torch.bfloat16, None, {"checkpointing": "blocks"}),
    "lora": ("sdxl", torch.bfloat16, LORA, {}),
    "lora, blocks": ("sdxl", torch.bfloat16, LORA, {"checkpointing": "blocks"}),
    "lora, its student followed": ("sd", torch.bfloat16, LORA, {"critic": LR | {"student_share": 0.1}}),
}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_by_graphs_are_those_without(tmp_path: Path, tiny_model: PixelModel, name: str) -> None:
    """Averages change places with weights in between; what is saved goes on without graphs."""
    torch.backends.cudnn.deterministic = True
    (eager, replayed), parts = pair(tmp_path, tiny_model, name)
    told: list[str] = []
    graphs = Graphs(replayed.compute, CUDA(torch.device("cuda")), replayed.settle, 4, told.append)
    lines: list[list[dict[str, Tensor]]] = [[], []]
    for step in range(20):
        known = step > 14  # all kinds of steps are recorded by then
        with no_wait() if step > 3 else nullcontext():
            lines[0].append(eager.step(parts, step))
        with no_wait() if known else nullcontext():
            lines[1].append(replayed.step(parts, step, run=graphs))
        if step == 10:
            for method in (eager, replayed):
                with method.averaged_model(), torch.no_grad():
                    pass
    assert graphs.on, told
    replays = sum(kind.replay is not None for kind in graphs.kinds.values())
    losses = max(apart(b, a) for a, b in zip(*lines, strict=True))
    weights = apart(replayed.state_dict(), eager.state_dict())
    print(f"{name}: {replays} graphs, losses {losses:.1e}, weights {weights:.1e}; {told}", file=sys.stderr)
    assert losses < 1e-3
    assert weights < 1e-3
    other = pair(tmp_path / "other", tiny_model, name)[0][0]
    other.load_state_dict(copy.deepcopy(replayed.state_dict()))
    assert apart(other.step(parts, 20), replayed.step(parts, 20, run=graphs)) < 1e-3
