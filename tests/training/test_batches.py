"""Batches are made ahead by a thread: the same ones, in order, and errors, ends and restarts as without it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError
from fewstep.runtime.checkpoint import checkpoints
from fewstep.runtime.tracking import StepClock
from fewstep.training import batches
from fewstep.training.batches import NUM_AHEAD, parts_ahead
from fewstep.training.loop import train
from fewstep.training.settings import LoopSettings
from steps import curves

CPU = torch.device("cpu")


def settings(**given: int) -> LoopSettings:
    return LoopSettings(**{"num_steps": 7, "batch_size": 6, "sample_every": 100, "grid_images": 1, **given})


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("batches")}


@pytest.mark.parametrize(("start", "accumulate"), [(0, 1), (5, 1), (6, 3), (7, 2)])
def test_every_step_has_its_own_parts_in_order(start: int, accumulate: int) -> None:
    asked: list[tuple[int, range]] = []

    def batch_at(step: int, rows: range) -> dict:
        asked.append((step, rows))
        return {"x": torch.tensor([10 * step + row for row in rows]), "deep": {"text": ["a"] * len(rows)}}

    with parts_ahead(batch_at, settings(accumulate=accumulate), start, CPU) as parts:
        found = list(parts)
    assert len(found) == 7 - start
    for step, each in enumerate(found, start):
        assert torch.cat([batch["x"] for _, batch in each]).tolist() == [10 * step + row for row in range(6)]
        assert [len(rows) for rows, _ in each] == [6 // accumulate] * accumulate
        assert all(len(batch["deep"]["text"]) == len(rows) for rows, batch in each)
    assert asked == sorted(asked, key=lambda each: (each[0], each[1].start))
    assert not threads()


@pytest.mark.parametrize(
    ("batch_size", "most", "ranks", "parts"),
    [(280, 40, 1, 7), (280, 40, 7, 1), (280, 40, 2, 4), (280, 39, 1, 8), (280, 280, 1, 1), (7, 2, 1, 7), (8, 3, 2, 2)],
)
def test_parts_have_at_most_so_many_rows_however_many_ranks_there_are(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, most: int, ranks: int, parts: int
) -> None:
    given = settings(num_steps=1, batch_size=batch_size, parallel={"max_rows_per_part": most})
    monkeypatch.setattr(batches, "num_ranks", lambda: ranks)
    found: list[list[range]] = []
    for number in range(ranks):
        monkeypatch.setattr(batches, "rank", lambda number=number: number)
        with parts_ahead(lambda step, rows: {}, given, 0, CPU) as steps:
            found += [[rows for rows, _ in each] for each in steps]
    assert [len(each) for each in found] == [parts] * ranks
    assert [row for each in found for rows in each for row in rows] == list(range(batch_size))
    assert len({len(rows) for each in found for rows in each}) == 1  # losses are means over parts
    # No fewer parts would do.
    mine = batch_size // ranks
    assert parts == min(num for num in range(1, mine + 1) if mine % num == 0 and mine // num <= most)


def test_they_are_made_while_a_step_is_computed_and_not_many_more() -> None:
    made: list[int] = []
    with parts_ahead(lambda step, rows: made.append(step) or {}, settings(num_steps=50), 0, CPU) as parts:
        next(parts)
        deadline = time.monotonic() + 10
        while len(made) <= NUM_AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == list(range(NUM_AHEAD + 1))
        assert threads()
    assert not threads()


def test_the_wait_for_batches_is_told_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    def batches() -> Iterator[int]:
        for number in range(6):
            later(0.25 * (number % 2))
            yield number

    monkeypatch.setattr("fewstep.runtime.tracking.time.perf_counter", lambda: now)
    clock, told = StepClock(CPU), []
    for number in clock.each(batches()):
        later(1.0)  # the step
        clock.steps += 1
        with clock.aside():
            later(7.0)
        if number % 3 == 2:
            told.append(clock.read())
    assert [each["data_wait"] for each in told] == pytest.approx([0.25 / 3, 0.5 / 3], abs=1e-6)
    assert [each["seconds_per_step"] for each in told] == pytest.approx([1 + 0.25 / 3, 1 + 0.5 / 3], abs=1e-6)


class Counting:
    """A method that only counts."""

    num_noises, learning_rates, sharded = 1, {}, False

    class model:  # noqa: N801
        shape, device, sampling_batch, release = (1, 4, 4), CPU, 1, staticmethod(lambda: None)

    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, parts: list, step: int, **named: object) -> dict:
        self.seen.append(sum(batch["x"].sum().item() for _, batch in parts))
        return {"loss": torch.tensor(self.seen[-1]), "skipped_network": torch.zeros(())}

    def sample(self, noise, first=0, asked=None) -> torch.Tensor:
        return torch.zeros(noise.shape[1], 1, 4, 4, dtype=torch.uint8)

    def label(self, index, asked=None) -> str:
        return ""

    def panel(self, noise, asked=None) -> None:
        return None

    def save_model(self, folder: Path, state: dict, frozen: Path | None = None) -> None:
        (folder / "weights").touch()

    def state_dict(self) -> dict:
        return {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"].tolist()


def test_an_error_in_the_thread_is_the_runs_own_and_resuming_makes_what_was_missed(tmp_path: Path) -> None:
    broken = True

    def batch_at(step: int, rows: range) -> dict:
        if broken and step == 4:
            raise UserError("photo.png, row 4: not a readable 8-bit image; replace or remove it")
        return {"x": torch.full((len(rows),), float(step))}

    whole, parts = Counting(), Counting()
    [(tmp_path / name).mkdir() for name in ("whole", "parts")]
    given = settings(log_every=1, checkpoint_every=3, accumulate=2)
    with pytest.raises(UserError, match=r"^photo.png, row 4: not a readable"):
        train(parts, batch_at, tmp_path / "parts", given, lambda *_: None)
    assert parts.seen == [0, 6, 12, 18]  # every step before it was done
    assert not threads()
    broken = False
    train(parts, batch_at, tmp_path / "parts", given, lambda *_: None)
    train(whole, batch_at, tmp_path / "whole", given, lambda *_: None)
    assert parts.seen == whole.seen == [6.0 * step for step in range(7)]
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")


def test_two_interrupts_end_a_run_that_waits_for_its_batch(tmp_path: Path) -> None:
    """The first asks for the end of the step, which does not come; the second acts at once."""

    def slow(step: int, rows: range) -> dict:
        if step == 2:
            time.sleep(1.0)
        return {"x": torch.zeros(len(rows))}

    def interrupt() -> None:
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    def report(step: int, metrics: dict) -> None:
        if step == 2:
            threading.Thread(target=interrupt).start()

    (tmp_path / "run").mkdir()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Counting(), slow, tmp_path / "run", settings(checkpoint_every=2), report)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not threads()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["00000002"]
