"""The demo: quickly, that it runs; slowly, that it reaches its figures."""

import json
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from command_line import OF_EVERY_RUN, fewstep, refused
from fewstep.commands import demo as module
from fewstep.evaluation import extractors
from fewstep.metric_table import metrics_of
from fewstep.models.sampler import images_per_second
from fewstep.runtime.checkpoint import newest_whole
from steps import quiet

TEACHERS = [("heun 18", 35), ("ddim 1", 1), ("ddim 2", 2), ("ddim 4", 4), ("ddim 8", 8)]
ROWS = {
    "": [
        *(("digits-teacher", *row) for row in TEACHERS),
        ("digits-1step", "student", 1),
        ("digits-4step", "student", 4),
    ],
    "--text": [
        *(("shapes-teacher", "ddim 2 @1.5", 4), ("shapes-teacher", "unipc 2", 2)),
        *(("shapes-1step", "student", 1), ("shapes-4step", "student", 4)),
    ],
}
START = " --set init_from=digits-1step-init --set regression.num=8 --set regression.sampler=heun:2"
KEYS = {
    "": [*metrics_of("features", "classes", "colours", "prompts"), "images_per_second"],
    "--text": [*metrics_of("features", "scenes", "colours", "prompts"), "images_per_second", "attributes"],
}


def piped(value: object) -> Any:
    return pickle.loads(pickle.dumps(value))


@contextmanager
def run_here() -> Iterator[Callable]:
    """In place of the workers, which slow tests and those of `runtime` have."""

    yield lambda tasks: piped([task.function(*task.arguments, quiet) for task in piped(tasks)])


@pytest.mark.parametrize("option", ["", pytest.param("--text", marks=pytest.mark.slow)])
def test_a_demo_runs_writes_what_it_says_and_overwrites_nothing(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = module.SHAPES._replace(num_latents=64, samplers=("ddim:2@1.5", "unipc:2"), speed_batch=2)
    monkeypatch.setattr(module, "SHAPES", job)
    monkeypatch.setattr(module, "DIGITS", module.DIGITS._replace(speed_batch=2))
    monkeypatch.setattr(module, "images_per_second", partial(images_per_second, min_seconds=0))
    monkeypatch.setattr(module, "NUM_PROCESSES", 1)  # threads of a training
    monkeypatch.setattr(extractors, "train_classifier", partial(extractors.train_classifier, num_steps=20))
    monkeypatch.setattr(module, "task_runner", run_here)
    small = "--set num_steps=2 --set batch_size=4 --set model.block_out_channels=[16,32] --num-samples 100"
    line = f"demo {option} --out {tmp_path}/demo {small}{'' if option else START}"
    code, output, _ = fewstep(line)
    assert (code, output.count("wrote "), output.count("plan:")) == (0, 1, 0)
    assert (tmp_path / "demo" / "digits-pairs" / "00000.parquet").exists() == (not option)
    sampling, exporting = re.findall("next: fewstep (.+)", output)
    assert sampling.startswith(f"sample {tmp_path}/demo/{ROWS[option][-2][0]}")
    assert ("--prompt" in sampling) == (option == "--text")  # without which a model of text draws nothing
    assert exporting.startswith("export ")
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())
    names = ["model", "sampler", "nfe", *KEYS[option], "intervals", "interval_kinds"]
    assert [list(row) for row in rows] == [names] * (1 + len(ROWS[option]))
    assert all(row["intervals"]["fid"][0] < row["fid"] < row["intervals"]["fid"][1] for row in rows[1:])
    assert [(row["model"], row["sampler"], row["nfe"]) for row in rows] == [("real", None, None), *ROWS[option]]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(rows)  # a grid per row
    assert page.count("<svg") == 4  # curves
    assert all(f"{model}, {sampler} (nfe {nfe})" in page for model, sampler, nfe in ROWS[option])
    refused(fewstep(line), "continue it with --resume")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_demo_stops_its_workers_too_and_can_be_resumed(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", "from fewstep.cli import main; main()", "demo", "--out", str(tmp_path)]
    command += ["--set", "num_steps=100000", "--set", "batch_size=4"]
    run = tmp_path / "digits-teacher"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
            assert running.poll() is None
            time.sleep(0.1)
        running.send_signal(number)  # to the first process alone, as `kill` and containers do
        _, errors = running.communicate(timeout=60)  # which the workers hold open
    assert running.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert OF_EVERY_RUN.sub("", errors) == "fewstep: stopped; continue with --resume\n"
    assert "Traceback" not in errors
    assert not (run / ".lock").exists()
    assert newest_whole(run)


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path: Path) -> None:
    assert fewstep(f"demo --out {tmp_path}/demo")[0] == 0
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())
    by_sampler = {(row["model"], row["nfe"]): row for row in rows}
    teacher, one, four = (by_sampler[key] for key in (("digits-teacher", 35), ("digits-1step", 1), ("digits-4step", 4)))
    assert one["fid"] <= 3 * teacher["fid"]
    assert four["fid"] <= 1.5 * teacher["fid"]
    few = min(row["fid"] for (model, nfe), row in by_sampler.items() if model == "digits-teacher" and nfe <= 8)
    assert max(one["fid"], four["fid"]) < few / 2
    assert min(one["accuracy"], four["accuracy"]) >= 0.98
    assert one["images_per_second"] >= 30 * teacher["images_per_second"]


@pytest.mark.slow
def test_the_text_demo_reaches_its_figures(tmp_path: Path) -> None:
    assert fewstep(f"demo --text --out {tmp_path}/demo")[0] == 0
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())
    by_sampler = {(row["model"], row["sampler"]): row for row in rows}
    teacher = by_sampler["shapes-teacher", "ddim 50 @1.5"]
    one, four = (by_sampler[name, "student"] for name in ("shapes-1step", "shapes-4step"))
    assert teacher["prompt_accuracy"] >= 0.95
    assert four["prompt_accuracy"] >= teacher["prompt_accuracy"] - 0.03
    assert one["prompt_accuracy"] >= teacher["prompt_accuracy"] - 0.10
    few = min(row["fid"] for row in rows if row["model"] == "shapes-teacher" and row["nfe"] <= 4)
    assert max(one["fid"], four["fid"]) < few
