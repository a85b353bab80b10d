"""`--ranks` and torchrun: one run by several processes, and what they do when one of them is gone."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from command_line import fewstep, refused
from fewstep.commands.ranks import compare
from fewstep.errors import UserError
from fewstep.files import folder_lock
from fewstep.recipes.loading import dump, load_recipe
from fewstep.runtime import launching
from fewstep.runtime.checkpoint import checkpoint_steps
from fewstep.runtime.launching import LOST, launch
from processes import wait_for
from steps import apart, curves, last_state

SMALL = "--set device=cpu --set model.block_out_channels=[8,8] --set model.norm_num_groups=4 --set batch_size=8"
OFTEN = "--set log_every=4 --set sample_every=6 --set checkpoint_every=4"
STUDENT = f"distill digits-4step --set teacher=t --set device=cpu --set batch_size=8 {OFTEN}"
Start = Callable[..., subprocess.Popen]
NOTED = """import os, sys, time; number = os.environ['RANK']
open(os.environ['FEWSTEP_LAUNCHED'] + '/' + number, 'w').write('12\\nx')"""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command line as its own process, which is told more in its environment."""
    started: list[subprocess.Popen] = []

    def run(line: str, told: dict[str, str] | None = None, folder: str = ".") -> subprocess.Popen:
        words, pipe = [sys.executable, "-m", "fewstep", *shlex.split(line)], subprocess.PIPE
        how: Any = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True, "cwd": folder}
        started.append(subprocess.Popen(words, env=os.environ | (told or {}), **how))
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


def assert_like_one(*runs: str) -> None:
    """That they end where the run `one` does, by the way that it took."""
    for run in runs:
        for part in ("student", "critic", "discriminator", "ema"):
            ours, theirs = (last_state(Path(each))["method"][part] for each in (run, "one"))
            assert apart(ours, theirs) < 1e-5, (run, part)
        for ours, theirs in zip(curves(Path(run)), curves(Path("one")), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True)


def test_what_the_command_lines_of_ranks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told its number, and the mistake of all of them is told before there are any."""
    seen: list[list[str]] = []
    monkeypatch.setattr("fewstep.cli.verbs.launch", lambda words, num: seen.append([*words, str(num)]) or 0)
    for given in ("teach digits-teacher --ranks 2 --out x", "teach --ranks=3 digits-teacher --out x"):
        assert fewstep(given)[0] == 0
    assert seen == [["teach", "digits-teacher", "--out", "x", num] for num in "23"]
    refused(fewstep("teach nothing --ranks 2"), "nothing")
    assert len(seen) == 2


def test_ranks_of_torchrun_start_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    told = "--ranks 2: torchrun has started 4 ranks already (WORLD_SIZE), of which each would start 2; leave it out"
    refused(fewstep("teach digits-teacher --ranks 2"), told)


@pytest.mark.parametrize("number", [0, 1])
def test_torchrun_is_told_the_line_and_the_first_rank_prints_it(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": 2, "RANK": number, "TORCHELASTIC_ERROR_FILE": "error.json"}.items():
        monkeypatch.setenv(name, str(value))
    code, _, errors = fewstep("teach nothing")
    line = json.loads(Path("error.json").read_text())["message"]["message"]
    assert "nothing" in line
    assert (code, errors) == (2, "" if number else f"fewstep: {line}\n")


def test_a_line_of_all_ranks_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(launching.LAUNCHED, str(tmp_path))
    answers = [fewstep(f"teach {name}") for name in ("nothing", "nothing", "nowhere")]
    assert [code for code, *_ in answers] == [2, 2, 2]
    assert [errors.count("\n") for *_, errors in answers] == [1, 0, 1]


@pytest.mark.parametrize(
    ("others", "line"),
    [
        ({}, ""),
        ({"version": "0.0.9"}, "rank 1: runs fewstep 0.0.9, and the first 1; install one version everywhere"),
        (
            {"recipe": "teach"},
            "rank 1: has another recipe than the first (num_steps: 2 -> 3); start all with one command",
        ),
        ({"lock": None}, "rank 1: does not see the first one's x; take an --out that is one folder on all machines"),
        ({"gpu": "a"}, "rank 1: has the GPU of rank 0; start as many ranks as a machine has GPUs, or set device=cpu"),
    ],
)
def test_what_ranks_have_alike(others: dict, line: str) -> None:
    recipes = {num: dump(load_recipe("digits-teacher", [f"num_steps={num}"])) for num in (2, 3)}
    first = {"version": "1", "recipe": recipes[2], "lock": "17", "gpu": "a"}
    other = {**first, "gpu": "b", **others} | ({"recipe": recipes[3]} if "recipe" in others else {})
    with pytest.raises(UserError, match=re.escape(line)) if line else nullcontext():
        compare([first, other], Path("x"))


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], flush=True)", 0, ""),
        ("import os, sys; sys.exit(2 * (os.environ['RANK'] == '1'))", 2, ""),
        ("import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)", 2, r"rank 1 was killed \(signal 9\)"),
        (f"import sys; sys.exit({LOST})", 2, "lost each other"),
        ("import os, sys, time; os.environ['RANK'] == '1' and sys.exit(2); time.sleep(60)", 2, ""),
        (f"{NOTED}; number == '1' and os.kill(os.getpid(), 9)", 2, r"rank 1 was killed in step 12 \(signal 9\)"),
        (f"{NOTED}; number == '1' and sys.exit({LOST}); time.sleep(60)", 2, "rank 0 was silent in step 12"),
    ],
    ids=["well", "a mistake", "killed", "lost", "one that hangs", "killed in a step", "silent"],
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
    assert_like_one("two", "half", "other", "rows", "rows-half")


@pytest.mark.slow
def test_ranks_that_share_weights_start_and_go_on_as_one_does(start: Start) -> None:
    """From another run's weights, with real images that the teacher's errors are told of, and through a stop."""
    same_rates = f"{STUDENT} --set student.optimizer.decay=constant --set critic.optimizer.decay=constant"
    whole, half = (f"{same_rates} --set init_from=first --set num_steps={num}" for num in (8, 4))
    for line in (
        f"teach digits-teacher {SMALL} --set num_steps=8 --out t",
        f"{STUDENT} --set init_from=null --set num_steps=4 --out first",
    ):
        assert fewstep(line)[0] == 0
    shared = "--ranks 2 --set parallel.shard=full"
    lines = [f"{whole} --out one", f"{half} --out then"]
    lines += [f"{whole} --out two {shared}", f"{whole} --out then --resume {shared}"]
    lines += [f"{half} --out half {shared}", f"{whole} --out half --resume"]
    for line in lines:
        told, errors = (process := start(line)).communicate(timeout=300)
        assert process.returncode == 0, errors
        assert ("shard: each network in " in told) == ("shard" in line)
    assert_like_one("two", "then", "half")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C", "frozen", "Frozen first"])
def test_where_one_rank_is_gone_all_end_and_the_run_goes_on(start: Start, how: str) -> None:
    assert fewstep(f"teach digits-teacher {SMALL} --set num_steps=8 --out t")[0] == 0
    line = f"{STUDENT} --set num_steps=2000 --set parallel.stall_minutes=0.2 --out run-{how[0]}"
    process = start(f"{line} --ranks 2")
    run = Path(f"run-{how[0]}")
    wait_for(lambda: len(checkpoint_steps(run)) > 0 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    began = time.monotonic()
    if how == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(ranks_of(run.name)[how != "Frozen first"], signal.SIGKILL if how == "kill -9" else signal.SIGSTOP)
    _, errors = process.communicate(timeout=100)
    told = [text for text in errors.replace("\r", "\n").splitlines() if text.startswith("fewstep:")]
    assert len(told) == 1, errors
    expected = {
        "kill -9": r"rank 1 was killed in step \d+ \(signal 9\)",
        "Ctrl-C": r"stopped at step \d+",
        "frozen": r"rank 1 was silent in step \d+",
        "Frozen first": r"rank 0 was silent in step \d+",
    }
    assert re.search(expected[how], told[0])
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
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_silent_rank_of_torchrun_is_named_by_the_others(start: Start, frozen: int) -> None:
    assert fewstep(f"teach digits-teacher {SMALL} --set num_steps=8 --out t")[0] == 0
    place = {"WORLD_SIZE": "3", **launching.meeting_place()}
    line = f"{STUDENT} --set batch_size=6 --set num_steps=2000 --set parallel.stall_minutes=0.2 --out silent"
    ranks = [start(line, {**place, "RANK": str(number)}) for number in range(3)]
    wait_for(lambda: len(checkpoint_steps(Path("silent"))) > 0 or any(each.poll() is not None for each in ranks))
    began = time.monotonic()
    ranks[frozen].send_signal(signal.SIGSTOP)
    told = [each for each in refusals(*(each for each in ranks if each is not ranks[frozen])) if "fewstep:" in each]
    who = f"rank {frozen} was silent|another rank ended, or was silent,"  # that where a checkpoint waits for it
    assert all(re.search(rf"fewstep: ({who}) behind step \d+; --resume", each) for each in told), told
    assert len(told) == 1 + (frozen == 0)  # which has the store by which others tell each other that they tell
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_the_first_rank_draws_all_pairs_that_a_run_needs(start: Start) -> None:
    assert fewstep(f"teach digits-teacher {SMALL} --set num_steps=8 --out t")[0] == 0
    few = "--set num_steps=2 --set batch_size=4 --set regression.num=1100 --set regression.sampler=heun:2"  # two files
    process = start(f"distill digits-1step-init --set teacher=t --set device=cpu {few} --out x --ranks 2")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert checkpoint_steps(Path("x")) == [2]


def refusals(*ranks: subprocess.Popen) -> list[str]:
    """The lines on standard error of processes that end with a mistake."""
    lines = []
    for each in ranks:
        _, errors = each.communicate(timeout=100)
        assert each.returncode == 2, errors
        lines += [text for text in errors.replace("\r", "\n").splitlines() if text.strip()]
    return lines


@pytest.mark.slow
def test_mistakes_of_ranks_that_were_started_by_hand_are_one_line(start: Start) -> None:
    assert fewstep(f"teach digits-teacher {SMALL} --set num_steps=8 --out t")[0] == 0
    Path("elsewhere").mkdir()
    for first, second, folder, line in (
        (
            "--set num_steps=4",
            "--set num_steps=5",
            ".",
            "rank 1: has another recipe than the first (num_steps: 4 -> 5)",
        ),
        ("", f"--out {Path('y').absolute()}", ".", "rank 1: does not see the first one's "),
        ("--set batch_size=9", "--set batch_size=9", ".", "2 ranks don't divide batch_size 9; take 8"),
        ("--set teacher=u", "--set teacher=u", ".", "teacher: 'u' is neither"),  # of which the first alone knows
        ("", "", "elsewhere", "teacher: 't' is neither"),  # of which the second alone knows
        ("--out locked", "--out locked", ".", f"locked: process {os.getpid()} writes there; wait for its end"),
    ):
        place = {"WORLD_SIZE": "2", **launching.meeting_place()}
        common = f"{STUDENT} --set num_steps=4 --out {Path('x').absolute()}"
        with folder_lock(Path("locked")):
            ranks = [
                start(f"{common} {more}", {**place, "RANK": str(number)}, where)
                for number, (more, where) in enumerate(((first, "."), (second, folder)))
            ]
            (told,) = refusals(*ranks)
        assert line in told
        assert not Path("x").exists()


@pytest.mark.slow
def test_ranks_that_do_not_find_each_other_end_with_one_line(start: Start) -> None:
    place = {"WORLD_SIZE": "2", **launching.meeting_place()}
    line = f"{STUDENT} --set parallel.stall_minutes=0.05 --out x"
    with socket.create_server(("127.0.0.1", 0)) as other:  # which listens, and never answers
        taken = {**place, "MASTER_PORT": str(other.getsockname()[1])}
        told = [refusals(start(line, {**taken, "RANK": number})) for number in "01"]
    assert told[0] == [f"fewstep: MASTER_PORT={taken['MASTER_PORT']}: is in use here; take one that is free"]
    missing = [refusals(start(line, {**place, "RANK": number})) for number in "01"]
    for number, each in ((1, told[1]), (0, missing[0]), (1, missing[1])):
        assert len(each) == 1
        assert f"rank {number} of 2 did not find the others at 127.0.0.1:" in each[0]
    assert refusals(start(line, {"WORLD_SIZE": "2", "RANK": "1"})) == [
        "fewstep: WORLD_SIZE=2, and no MASTER_ADDR, MASTER_PORT: torchrun sets all of them; "
        "start the ranks with it, or with --ranks 2"
    ]
    assert not Path("x").exists()


@pytest.mark.slow
def test_mistakes_of_ranks_are_one_line(start: Start) -> None:
    assert fewstep(f"teach digits-teacher {SMALL} --set num_steps=8 --out t")[0] == 0
    for more, line in (
        ("--out x --ranks 3", "3 ranks don't divide batch_size 8; take 6, or fewer ranks"),
        ("--out x --set gan.real_share=0.125 --ranks 2", "1 real images a step are too few for 2 ranks"),
        ("--out t --ranks 2", "exists already"),
        ("--out x --set teacher=nothing --ranks 2", "teacher: 'nothing'"),
    ):
        (told,) = refusals(start(f"{STUDENT} {more}"))
        assert line in told
        assert not Path("x").exists()
