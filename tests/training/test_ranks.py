"""Several ranks take the step that one takes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parts import METHODS, NUM, batch
from test_replayed_steps import graphs_of, latents, on_a_gpu, run
from torch import Tensor

from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import LoRASettings, PixelModelConfig
from fewstep.runtime.distributed import num_ranks, rank
from fewstep.training.method import Method
from fewstep.training.parallel import offload
from ranks import in_ranks
from replays import CPU
from steps import apart, in_parts, same

STEPS = 6
LATENTS = {
    "sd": ("sd", None, {}),
    "sdxl": ("sdxl", None, {"checkpointing": "gan"}),
    "sdxl, lora": ("sdxl", LoRASettings(rank=2, alpha=2.0), {"checkpointing": "blocks"}),
}


def pixels() -> PixelModel:
    torch.manual_seed(0)
    config = PixelModelConfig(num_classes=3, null_class=True, block_out_channels=[8, 8], norm_num_groups=4)
    return PixelModel(config, build_unet(config))


def train(method: Method, whole: Any, steps: range, parts: int = 1) -> list[dict[str, Tensor]]:
    """The steps on this rank's rows of a batch (step -> batch, its number of rows)."""
    lines = []
    for step in steps:
        given, num = whole(step)
        split = in_parts(given, num, num_ranks() * parts)
        lines.append(method.step(split[rank() * parts : (rank() + 1) * parts], step))
    return lines


def result(method: Method, lines: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {"metrics": lines, "state": copy.deepcopy(method.state_dict())}


def of_pixels(names: list[str], parts: int, moved: bool = False) -> dict[str, Any]:
    found = {}
    for name in names:
        method = METHODS[name](copy.deepcopy(pixels()))
        if moved:
            offload(method)
        lines = train(method, lambda step, name=name: (batch(name, pixels(), step), NUM), range(STEPS), parts)
        found[name] = result(method, lines)
    return found


def of_latents(names: list[str], folder: Path) -> dict[str, Any]:
    found = {}
    for name in names:
        family, lora, settings = LATENTS[name]
        method, ((_, given),) = latents(
            folder / f"{name}-{rank()}-{num_ranks()}", family, lora, torch.float32, **settings
        )
        found[name] = result(method, train(method, lambda step, given=given: (given, 2), range(STEPS)))
    return found


NETWORKS = ("student", "critic", "discriminator", "ema", "denoiser", "vae", "variance", "pool", "ratios")


def assert_the_same(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for name, one in alone.items():
        first, *others = (each[name] for each in ranks)
        for other in others:  # bit for bit: each takes the step by itself
            assert apart(other, first) == 0, name
        for part in NETWORKS:
            if part in one["state"]:
                assert apart(first["state"][part], one["state"][part]) < 1e-5, (name, part)
        for step, (ours, theirs) in enumerate(zip(first["metrics"], one["metrics"], strict=True)):
            assert list(ours) == list(theirs)
            for key, value in ours.items():
                assert value.item() == pytest.approx(theirs[key].item(), rel=1e-4, abs=1e-5, nan_ok=True), (
                    name,
                    step,
                    key,
                )


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["dmd2, cycle and a third of the reals"], 1),
        pytest.param(list(METHODS), 1, marks=pytest.mark.slow),
        pytest.param([name for name in METHODS if "third" not in name], 3, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_take_the_steps_of_one(tmp_path: Path, names: list[str], parts: int) -> None:
    assert_the_same(in_ranks(2, tmp_path, of_pixels, names, parts), of_pixels(names, 1))


@pytest.mark.slow
def test_two_ranks_that_update_the_student_in_main_memory(tmp_path: Path) -> None:
    names = [name for name in METHODS if name.startswith("dmd2")]
    assert_the_same(in_ranks(2, tmp_path, of_pixels, names, 1, True), of_pixels(names, 1))


@pytest.mark.slow
def test_two_ranks_on_latents(tmp_path: Path) -> None:
    names = list(LATENTS)
    assert_the_same(in_ranks(2, tmp_path, of_latents, names, tmp_path), of_latents(names, tmp_path))


def recorded(names: list[str], folder: Path, moved: bool) -> dict[str, Any]:
    """How often a rank replayed steps, and how its state and metrics differ from those of steps that were not."""
    found = {}
    for name in names:
        states, lines, cpu = [], [], CPU()
        for way in ("eager", "graphs"):
            if name in LATENTS:
                family, lora, settings = LATENTS[name]
                place = folder / f"{name}-{rank()}-{way}"
                method, ((_, given),) = latents(place, family, lora, torch.bfloat16, **settings)
                parts = lambda step, given=given: in_parts(given, 2, 2)[rank() :][:1]  # noqa: E731
            else:
                method = on_a_gpu(METHODS[name](copy.deepcopy(pixels())))
                parts = lambda step, name=name: in_parts(batch(name, pixels(), step), NUM, 2)[rank() :][:1]  # noqa: E731
            if moved and way == "graphs":
                offload(method)
            lines.append(run(method, parts, range(8), graphs_of(method, cpu) if way == "graphs" else None))
            states.append(method.state_dict())
        found[name] = {"replays": cpu.replays, "same": same(*states) and same(*lines), "state": states[1]}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "moved"),
    [([*METHODS, *LATENTS], False), (["dmd2", "dmd2, cycle and a third of the reals", "sdxl"], True)],
)
def test_what_ranks_tell_each_other_is_between_recordings(tmp_path: Path, names: list[str], moved: bool) -> None:
    """Pieces of steps are replayed, and sums over ranks are made anew between them: the same, bit for bit.

    So is what main memory takes, where the student is updated there.
    """
    ranks = in_ranks(2, tmp_path, recorded, names, tmp_path, moved)
    for name in names:
        for each in ranks:
            assert each[name]["same"], name
            assert each[name]["replays"] >= 4, name
        assert apart(ranks[0][name]["state"], ranks[1][name]["state"]) == 0
