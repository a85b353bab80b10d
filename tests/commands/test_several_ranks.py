"""`--ranks` and torchrun: one run by several processes, and what they do when one of them is gone."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command_line import fewstep, refused
from fewstep.runtime import launching
from fewstep.runtime.checkpoint import checkpoint_steps
from fewstep.runtime.launching import LOST, launch
from processes import wait_for
from steps import apart, curves, last_state

SMALL = "--set device=cpu --set model.block_out_channels=[8,8] --set model.norm_num_groups=4 --set batch_size=8"
OFTEN = "--set log_every=4 --set sample_every=6 --set checkpoint_every=4"
STUDENT = f"distill digits-4step --set teacher=t --set device=cpu --set batch_size=8 {OFTEN}"
Start = Callable[[str], subprocess.Popen]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command line as its own process."""
    started: list[subprocess.Popen] = []

    def run(line: str) -> subprocess.Popen:
        words, pipe = [sys.executable, "-m", "fewstep", *shlex.split(line)], subprocess.PIPE
        started.append(subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ranks_of(folder: str) -> dict[int, int]:
    """The processes of a run, by their ranks."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, told = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if folder.encode() in words and (number := re.search(rb"(?:^|\0)RANK=(\d+)", told)):
            found[int(number[1])] = int(process.name)
    return found


def test_what_the_command_lines_of_ranks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told its number, and the mistake of all of them is told before there are any."""
    seen: list[list[str]] = []
    monkeypatch.setattr("fewstep.cli.verbs.launch", lambda words, num: seen.append([*words, str(num)]) or 0)
    for given in ("teach digits-teacher --ranks 2 --out x", "teach --ranks=3 digits-teacher --out x"):
        assert fewstep(given)[0] == 0
    assert seen == [["teach", "digits-teacher", "--out", "x", num] for num in "23"]
    refused(fewstep("teach nothing --ranks 2"), "nothing")
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], flush=True)", 0, ""),
        ("import os, sys; sys.exit(2 * (os.environ['RANK'] == '1'))", 2, ""),
        ("import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)", 2, r"rank 1 was killed \(signal 9\)"),
        (f"import sys; sys.exit({LOST})", 2, "lost each other"),
        ("import os, sys, time; os.environ['RANK'] == '1' and sys.exit(2); time.sleep(60)", 2, ""),
    ],
    ids=["well", "a mistake", "killed", "lost", "one that hangs"],
)
def test_how_ranks_end(monkeypatch: pytest.MonkeyPatch, script: str, code: int, line: str) -> None:
    monkeypatch.setattr(launching, "COMMAND", [sys.executable, "-c", script])
    monkeypatch.setattr(launching, "GRACE", 0.5)
    began = time.monotonic()
    if line:
        with pytest.raises(launching.UserError, match=line):
            launch([], 2)
    else:
        assert launch([], 2) == code
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_two_ranks_train_what_one_does_and_either_goes_on(start: Start) -> None:
    assert fewstep(f"teach digits-teacher {SMALL} --set num_steps=8 --out t")[0] == 0
    same_rates = f"{STUDENT} --set student.optimizer.decay=constant --set critic.optimizer.decay=constant"
    whole, half = f"{same_rates} --set num_steps=12", f"{same_rates} --set num_steps=8"
    lines = [
        f"{whole} --out one",
        f"{whole} --out two --ranks 2",
        f"{half} --out half --ranks 2",
        f"{half} --out other",
    ]
    # Batches of 8, in parts of 2 rows: two of each rank, then four.
    few = "--set parallel.max_rows_per_part=2 --set parallel.offload_student_optimizer=true"
    lines += [f"{whole} --out rows --ranks 2 {few}", f"{half} --out rows-half --ranks 2 {few}"]
    lines += [f"{whole} --out half --resume {few}", f"{whole} --out other --resume --ranks 2"]
    lines += [f"{whole} --out rows-half --resume {few}"]
    for line in lines:
        _, errors = (process := start(line)).communicate(timeout=200)
        assert process.returncode == 0, errors
    assert checkpoint_steps(Path("two")) == checkpoint_steps(Path("one"))
    assert sorted(path.name for path in Path("two/samples").iterdir()) == ["00000006.png", "00000012.png"]
    for run in ("two", "half", "other", "rows", "rows-half"):
        for part in ("student", "critic", "discriminator", "ema"):
            ours, theirs = (last_state(Path(each))["method"][part] for each in (run, "one"))
            assert apart(ours, theirs) < 1e-5, (run, part)
        for ours, theirs in zip(curves(Path(run)), curves(Path("one")), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.slow
def test_ranks_that_share_weights_start_and_go_on_as_one_does(start: Start) -> None:
    """From another run's weights, with real images that the teacher's errors are told of, and through a stop."""
    same_rates = f"{STUDENT} --set student.optimizer.decay=constant --set critic.optimizer.decay=constant"
    whole, half = (f"{same_rates} --set init_from=first --set num_steps={num}" for num in (8, 4))
    for line in (
        f"teach digits-teacher {SMALL} --set num_steps=8 --out t",
        f"{STUDENT} --set init_from=null --set num_steps=4 --out first",
        f"{whole} --out one",
        f"{half} --out then",
    ):
        assert fewstep(line)[0] == 0
    shared = "--ranks 2 --set parallel.shard=full"
    lines = [f"{whole} --out two {shared}", f"{whole} --out then --resume {shared}"]
    lines += [f"{half} --out half {shared}", f"{whole} --out half --resume"]
    for line in lines:
        told, errors = (process := start(line)).communicate(timeout=300)
        assert process.returncode == 0, errors
        assert ("shard: each network in " in told) == ("shard" in line)
    for run in ("two", "then", "half"):
        for part in ("student", "critic", "discriminator", "ema"):
            ours, theirs = (last_state(Path(each))["method"][part] for each in (run, "one"))
            assert apart(ours, theirs) < 1e-5, (run, part)
        for ours, theirs in zip(curves(Path(run)), curves(Path("one")), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C", "frozen"])
def test_where_one_rank_is_gone_all_end_and_the_run_goes_on(start: Start, how: str) -> None:
    assert fewstep(f"teach digits-teacher {SMALL} --set num_steps=8 --out t")[0] == 0
    line = f"{STUDENT} --set num_steps=2000 --set parallel.stall_minutes=0.1 --out run-{how[0]}"
    process = start(f"{line} --ranks 2")
    run = Path(f"run-{how[0]}")
    wait_for(lambda: len(checkpoint_steps(run)) > 0)
    began = time.monotonic()
    if how == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(ranks_of(run.name)[1], signal.SIGKILL if how == "kill -9" else signal.SIGSTOP)
    _, errors = process.communicate(timeout=100)
    told = [text for text in errors.replace("\r", "\n").splitlines() if text.startswith("fewstep:")]
    assert len(told) == 1, errors
    expected = {"kill -9": "rank 1 was killed", "Ctrl-C": "stopped at step", "frozen": "lost each other"}
    assert expected[how] in told[0]
    assert "--resume" in told[0]
    assert process.returncode == (130 if how == "Ctrl-C" else 2)
    assert time.monotonic() - began < 60
    assert not ranks_of(run.name)
    newest = checkpoint_steps(run)[-1]
    last = start(f"{STUDENT} --set num_steps=2000 --out {run} --resume --ranks 2")
    wait_for(lambda: checkpoint_steps(run)[-1] > newest)
    last.send_signal(signal.SIGTERM)
    assert (last.communicate(timeout=60), last.returncode)[1] == 143


@pytest.mark.slow
def test_mistakes_of_ranks_are_one_line(start: Start) -> None:
    assert fewstep(f"teach digits-teacher {SMALL} --set num_steps=8 --out t")[0] == 0
    for more, line in (
        ("--out x --ranks 3", "3 ranks don't divide batch_size 8; take 6, or fewer ranks"),
        ("--out x --set gan.real_share=0.125 --ranks 2", "1 real images a step are too few for 2 ranks"),
        ("--out t --ranks 2", "exists already"),
        ("--out x --set teacher=nothing --ranks 2", "teacher: 'nothing'"),
    ):
        _, errors = (process := start(f"{STUDENT} {more}")).communicate(timeout=100)
        told = [text for text in errors.replace("\r", "\n").splitlines() if text.strip()]
        assert len(told) == 1, errors
        assert line in told[0]
        assert process.returncode == 2
        assert not Path("x").exists()
