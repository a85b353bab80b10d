"""A student that is updated and averaged in main memory is the one that is updated on the device, bit for bit."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parts import METHODS, NUM, batch
from test_replayed_steps import CPU, assert_equal, graphs_of, latents, run, slow_but
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.errors import UserError
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.settings import LoRASettings
from fewstep.recipes.loading import load_recipe
from fewstep.runtime import ema, main_memory
from fewstep.runtime.main_memory import beside
from fewstep.training import parallel
from fewstep.training.dmd2 import DMD2
from fewstep.training.parallel import offload
from replays import tensors
from steps import in_parts, same, weights

NAMES = [name for name in METHODS if name.startswith("dmd2")]


def pixels(name: str, model: PixelModel, moved: bool, state: Any = None, skipped: int = 1) -> DMD2:
    """Of which an update of the student is skipped."""
    method = METHODS[name](copy.deepcopy(model))
    if moved:
        offload(method)
    if state is not None:
        method.load_state_dict(copy.deepcopy(state))
    optimizer = method.student_optimizer
    step = optimizer.step
    optimizer.step = lambda finite: step(finite & (optimizer.progress != skipped))
    return method


def steps(method: DMD2, name: str, model: PixelModel, numbers: Iterable[int]) -> list[dict[str, Tensor]]:
    return [method.step(in_parts(batch(name, model, step), NUM, 2), step) for step in numbers]


@pytest.mark.parametrize("name", slow_but([], NAMES))
def test_they_are_the_same_steps_and_either_goes_on_from_the_other(tiny_model: PixelModel, name: str) -> None:
    straight = pixels(name, tiny_model, moved=False)
    lines = steps(straight, name, tiny_model, range(6))
    assert [line["skipped_student"].item() for line in lines[::2]] == [0, 1, 0]
    for moved in (True, False):
        first = pixels(name, tiny_model, moved)
        found = steps(first, name, tiny_model, range(3))
        second = pixels(name, tiny_model, not moved, first.state_dict())
        assert same(second.state_dict(), first.state_dict())
        assert_equal(found + steps(second, name, tiny_model, range(3, 6)), lines)
        assert same(second.state_dict(), straight.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRASettings(rank=2, alpha=2.0)], ids=["whole", "lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_also_in_bfloat16_with_several_averages_and_where_steps_are_replayed(
    tmp_path: Path, lora: LoRASettings | None, dtype: torch.dtype
) -> None:
    """Between steps averages change places with weights; a critic that follows the student's update is not replayed."""
    (plain, parts), (moved, _) = (latents(tmp_path / name, "sdxl", lora, dtype) for name in ("plain", "moved"))
    offload(moved)
    told: list[str] = []
    cpu = CPU()
    graphs = graphs_of(moved, cpu, told=told)
    for first in (0, 4):
        numbers = range(first, first + 4)
        assert_equal(run(moved, lambda step: parts, numbers, graphs), run(plain, lambda step: parts, numbers))
        before = weights(moved.student)
        for name in (None, "0.9"):
            with moved.averaged_model(name) as ours, plain.averaged_model(name) as theirs:
                assert same(ours.denoiser, theirs.denoiser)
                assert not same(weights(ours.denoiser), before)
            assert same(weights(moved.student), before)
    assert same(moved.state_dict(), plain.state_dict())
    assert cpu.replays >= 4 if lora is None else "an update in main memory" in told[0]


class Places(TorchDispatchMode):
    """Keeps what a device has apart from what is put into main memory; copies alone may bring them together."""

    def __init__(self, here: Iterable[Tensor]):
        super().__init__()
        self.kept, self.place, self.copied = [], dict[int, str](), 0
        self.put(here, "here")

    def put(self, those: Iterable[Tensor], place: str) -> None:
        for each in those:
            self.kept.append(each)  # so that no other takes its address
            self.place[each.untyped_storage().data_ptr()] = place

    def places(self, those: Iterable[Tensor]) -> set[str]:
        found = {self.place.get(each.untyped_storage().data_ptr()) for each in those}
        return {each for each in found if each}  # what is made of nothing is wherever it is needed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors((args, kwargs or {}))
        places = self.places(given)
        found = func(*args, **(kwargs or {}))
        if len(places) == 2:
            assert str(func) in ("aten.copy_.default", "aten._foreach_copy_.default"), func
            self.copied += 1
        elif len(places) == 1:
            self.put([*tensors(found), *given], *places)
        return found


def averages(method: DMD2) -> list[Tensor]:
    return [each for copies in method.ema.copies.values() for each in copies]


def test_nothing_but_copies_brings_main_memory_and_device_together(
    tiny_model: PixelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, method = (pixels("dmd2", tiny_model, moved=False) for _ in range(2))
    places = Places([*method.student.parameters(), *averages(method)])

    def put_beside(given: list[Tensor]) -> list[Tensor]:
        found = beside(given)
        places.put(found, "there")
        return found

    for module in (main_memory, ema):
        monkeypatch.setattr(module, "beside", put_beside)
    offload(method)
    with places:
        lines = steps(method, "dmd2", tiny_model, range(3))
        assert places.copied == 2 * (2 + 1)  # two updates: gradients and whether to skip, and weights
        moments = [each for state in method.student_optimizer.adamw.state.values() for each in state.values()]
        assert len(moments) == 3 * len(averages(method))
        for those, place in ((moments, "there"), (averages(method), "there"), (method.student.parameters(), "here")):
            assert places.places(those) == {place}
        state = copy.deepcopy(method.state_dict())
        method.ema.averaged = list(method.student.parameters())
        with pytest.raises(AssertionError, match="lerp"):
            method.ema.update()
    assert_equal(lines, steps(plain, "dmd2", tiny_model, range(3)))
    assert same(state, plain.state_dict())


def test_copies_in_blocks_are_what_they_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_memory, "BLOCK", 50)
    given = [torch.randn(2, 3), torch.randn(7, 8), torch.randn(()), torch.randn(2, 4, 3, 2), torch.randn(9)]
    given[3] = given[3].to(memory_format=torch.channels_last)
    found = beside(given)
    assert same(found, given)
    assert [each.stride() for each in found] == [each.stride() for each in given]
    blocks = [each.untyped_storage() for each in found]
    assert [block.nbytes() // 4 for block in blocks] == [50, 56, 50, 50, 9]
    for each in found:
        each.zero_()
    assert all(each.abs().sum() > 0 for each in given)


def test_what_can_not_be_offloaded_is_refused(tiny_model: PixelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = "parallel.offload_student_optimizer=true"
    with pytest.raises(UserError, match="offload_student_optimizer: is for a distillation"):
        load_recipe("digits-teacher", [setting])
    with pytest.raises(UserError, match="offload_student_optimizer: adamw8bit updates on a GPU alone"):
        load_recipe("digits-1step", [setting, "student.optimizer.kind=adamw8bit"])
    monkeypatch.setattr(parallel, "free_memory", lambda: 10**5)
    with pytest.raises(UserError, match=r"takes \d+ bytes of main memory, and 100000 bytes are free|takes .* MB"):
        offload(METHODS["dmd2"](tiny_model))
