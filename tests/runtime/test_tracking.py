"""metrics.jsonl holds means and can be rewound; a progress bar stays out of pipes; Ctrl-C waits for the step's end."""

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.runtime.tracking import Metrics, progress_bar, read_metrics, rewind, write_line
from fewstep.stopping import stop_request


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return Metrics(tmp_path / "metrics.jsonl")


def add(metrics: Metrics, **values: float) -> None:
    metrics.add({name: torch.tensor(value) for name, value in values.items()})


def test_a_line_holds_the_means_since_the_line_before_of_those_steps_that_have_the_metric(metrics: Metrics) -> None:
    for step in range(4):
        add(metrics, critic=float(step), **({"student": 10.0 + step} if step % 2 else {}))
    assert metrics.write(4) == {"critic": 1.5, "student": 12.0}
    add(metrics, critic=2.0)
    assert metrics.write(5) == {"critic": 2.0}
    assert read_metrics(metrics.path) == [{"step": 4, "critic": 1.5, "student": 12.0}, {"step": 5, "critic": 2.0}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_of_the_means_and_counts_are_sums_if_there_are_any(
    metrics: Metrics, value: float
) -> None:
    add(metrics, fine=1.0, gan_loss=value, dm_loss=value, skipped_updates=1.0, not_finite_data=0.0)
    add(metrics, fine=3.0, gan_loss=4.0, dm_loss=value, skipped_updates=2.0, not_finite_data=0.0)
    assert metrics.write(8) == {"fine": 2.0, "gan_loss": 4.0, "skipped_updates": 3.0}
    assert read_metrics(metrics.path) == [{"step": 8, "fine": 2.0, "gan_loss": 4.0, "skipped_updates": 3.0}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stands_in_a_file_as_null(metrics: Metrics, value: float) -> None:
    write_line(metrics.path, 8, {"fine": 1.0, "gan_loss": value})
    line = '{"step": 8, "fine": 1.0, "gan_loss": null}\n'
    assert metrics.path.read_text() == line
    assert math.isnan(read_metrics(metrics.path)[0]["gan_loss"])
    metrics.path.write_text(line.replace("null", "NaN"))  # of an earlier version
    rewind(metrics.path, 8)
    assert metrics.path.read_text() == line


def test_rewinding_drops_what_is_behind_the_step_and_a_torn_last_line(metrics: Metrics) -> None:
    rewind(metrics.path, 0)
    assert metrics.path.read_text() == ""
    for step in (10, 20, 30):
        add(metrics, loss=0.1 * step, norm=1e-30)
        metrics.write(step)
    before = metrics.path.read_text().splitlines()
    rewind(metrics.path, 20)
    assert metrics.path.read_text().splitlines() == before[:2]  # digit by digit
    with metrics.path.open("a") as file:
        file.write('{"step": 12, "lo')
    rewind(metrics.path, 15)
    assert metrics.path.read_text().splitlines() == before[:1]


def test_a_file_that_is_no_metrics_is_named(metrics: Metrics) -> None:
    metrics.path.write_text("garbage}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: can't be read; remove it"):
        read_metrics(metrics.path)


def test_half_a_line_of_sums_is_resumed(metrics: Metrics, tmp_path: Path) -> None:
    add(metrics, loss=1.0)
    resumed = Metrics(tmp_path / "metrics.jsonl")
    resumed.load_state_dict(metrics.state_dict(), torch.device("cpu"))
    add(metrics, loss=4.0)
    add(resumed, loss=4.0)
    assert metrics.write(2) == resumed.write(2) == {"loss": 2.5}


def test_a_progress_bar_prints_nothing_into_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("work", 10) as report:
        report(5, {"loss": 1.0})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_only_sets_the_flag(number: signal.Signals) -> None:
    with stop_request() as requested:
        assert not requested()
        signal.raise_signal(number)
        assert requested()


def test_a_second_ctrl_c_acts_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore in the background
    try:
        with stop_request():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_between_the_two_handlers_is_only_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    install, numbers = signal.signal, []

    def install_slowly(number: int, handler: Any) -> Any:
        previous = install(number, handler)
        numbers.append(number)
        if len(numbers) == 1:
            signal.raise_signal(number)
        return previous

    monkeypatch.setattr(signal, "signal", install_slowly)
    with stop_request() as requested:
        assert requested()


def fail(stopped: bool) -> None:
    with stop_request():
        if stopped:
            signal.raise_signal(signal.SIGTERM)
        raise ValueError("inside")


@pytest.mark.parametrize("stopped", [False, True])
def test_the_handlers_are_put_back(stopped: bool) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="inside"):
        fail(stopped)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
