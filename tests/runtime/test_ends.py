"""What ranks tell each other by a store: here all of them are this process, one after the other."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fewstep.errors import Lost
from fewstep.runtime import ends
from fewstep.runtime.distributed import _of_another, apart, place

SOON = timedelta(milliseconds=50)


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    store.set_timeout(SOON)
    monkeypatch.setattr(ends, "_store", store)
    monkeypatch.setattr(ends, "_turns", [0])
    monkeypatch.setattr(ends, "PATIENCE", SOON)


def wait_as(first: bool, turn: int) -> None:
    ends._turns[0] = turn
    ends.wait_for_first(first)


def test_nobody_goes_on_before_all_have_met() -> None:
    store = dist.HashStore()
    with pytest.raises(dist.DistError):
        ends.meet(store, 2, SOON)
    ends.meet(store, 2, SOON)
    assert ends.has_met()


def test_others_wait_for_the_first_and_end_with_it() -> None:
    with pytest.raises(dist.DistError):
        wait_as(False, 0)
    wait_as(True, 0)
    wait_as(False, 0)
    ends.fail(first=True)  # in what would be its second turn
    with pytest.raises(Lost):
        wait_as(False, 1)


def test_a_lost_rank_is_silent_where_another_tells_why() -> None:
    assert not ends.told_by_another("gone at step 3", lost=True)
    assert ends.told_by_another("gone at step 3", lost=True)
    assert not ends.told_by_another("gone at step 4", lost=True)
    ends.fail(first=False)
    assert ends.told_by_another("gone at step 5", lost=True)
    assert not ends.told_by_another("a mistake")
    assert ends.told_by_another("a mistake")


def test_texts_come_in_the_order_of_ranks() -> None:
    for number in (2, 1):
        assert ends.told_to_first(f"of {number}", number, 3) == []
    assert ends.told_to_first("of 0", 0, 3) == ["of 0", "of 1", "of 2"]


def test_the_first_leaves_behind_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "GOODBYE", 0.1)
    began = time.monotonic()
    ends.leave(0, 3, failed=False)
    assert time.monotonic() - began > 0.1  # nobody else came
    ends.leave(1, 3, failed=False)
    ends.leave(2, 3, failed=True)
    began = time.monotonic()
    ends.leave(0, 3, failed=False)
    assert time.monotonic() - began < 0.1


def test_others_leave_when_the_first_has_written_what_it_still_writes() -> None:
    def seconds(failed: bool) -> float:
        began = time.monotonic()
        ends.leave(1, 2, failed)
        return time.monotonic() - began

    assert seconds(failed=False) > 0.05
    assert seconds(failed=True) < 0.05
    ends._store.set(ends.ENDED, "")
    assert seconds(failed=False) < 0.05


def test_what_waits_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    monkeypatch.setattr(ends.os, "_exit", codes.append)
    with ends.giving_up(0.02, "nobody came"):
        time.sleep(0.1)
    with ends.giving_up(0.02, "somebody did"):
        pass
    time.sleep(0.05)
    assert (codes, capsys.readouterr().err) == ([2], "fewstep: nobody came\n")


def raised(work: Callable[..., Any], *given: object) -> BaseException:
    try:
        work(*given)
    except Exception as error:
        return error
    raise AssertionError("it raises nothing")


def wrong() -> None:
    raise RuntimeError("the store of gloo and NCCL: Connection to a peer timed out")


def test_a_mistake_is_not_taken_for_a_lost_rank() -> None:
    """Of torch.distributed's errors those of its classes are a peer's, and gloo's words where it was called alone."""
    assert _of_another(raised(ends._store.get, "nothing"))
    assert not _of_another(raised(wrong))
    assert not _of_another(raised(dist.all_reduce, None))  # raised inside of it, and nobody is lost
    inside = raised(dist.all_reduce, None)
    assert _of_another(
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed").with_traceback(inside.__traceback__)
    )


def test_a_rank_that_works_apart_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert place() == (1, 2)
    with apart():
        assert place() == (0, 1)  # so that it draws all pairs that a run needs, not its share of them
