"""What is found in recorded runs that were well or broken on purpose (benchmarks/made_to_fail.py), and in odd lines."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from fewstep.commands.places import tell_health
from fewstep.evaluation.findings import Finding, find
from fewstep.recipes.loading import parse
from fewstep.runtime.checkpoint import METRICS
from fewstep.runtime.tracking import read_metrics, to_line

RECORDS = Path(__file__).parent
HEALTHY = sorted(path.stem for name in ("digits", "shapes") for path in RECORDS.glob(f"{name}-*.jsonl"))
FIRST = {  # what the advice of the first finding must name: a setting, or the cause
    "critic-1to1-1step": "student_every",
    "critic-slow-1step": "raise critic.optimizer.lr",
    "critic-slow-4step": "raise critic.optimizer.lr",
    "gan-30-1step": "gan.student_weight",
    "rate-30-1step": "lower student.optimizer.lr",
    "no-dm-1step": "dm.weight",
    "sign-flipped-1step": "sign",
    "sign-flipped-4step": "sign",
    "zero-null": "null condition",
    "adapter-twice": "hold the LoRA already",
}


def recorded(name: str) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The recipe of a recorded run, and its lines."""
    recipe, *lines = (json.loads(line) for line in (RECORDS / f"{name}.jsonl").read_text().splitlines())
    return recipe, lines


def found(name: str) -> list[Finding]:
    recipe, lines = recorded(name)
    return find(lines, [], recipe)


@pytest.mark.parametrize("name", FIRST)
def test_the_first_finding_names_the_fault(name: str) -> None:
    first = found(name)[0]
    assert first.level == "ill"
    assert FIRST[name] in first.advice


def test_what_needs_no_time_is_told_at_the_first_line() -> None:
    for name, signal in (("zero-null", "null_error"), ("no-dm-1step", "dm_loss")):
        recipe, lines = recorded(name)
        first = find(lines[:1], [], recipe)[0]
        assert (first.level, first.signal) == ("ill", signal)


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_ill_at_any_moment_of_a_run_that_is_well(name: str) -> None:
    recipe, lines = recorded(name)
    for end in range(1, len(lines) + 1):
        assert "ill" not in {each.level for each in find(lines[:end], [], recipe)}, lines[end - 1]["step"]
    assert [each.level for each in find(lines, [], recipe)] == ["well"]


def test_half_a_fault_is_told_alike_or_watched() -> None:
    """One to one at a seventh of the critic's rate, GAN and rates tenfold, rates that move nothing, another null."""
    for name, level, words in (
        ("gan-10-1step", "ill", "gan.student_weight"),
        ("critic-1to1-4step", "watch", "student_every"),
        ("rate-10-1step", "watch", "lower student.optimizer.lr"),
        ("rate-low-1step", "watch", "raise student.optimizer.lr"),
        ("untrained-null", "ill", "null condition"),
    ):
        first = found(name)[0]
        assert first.level == level
        assert words in first.advice


@pytest.mark.parametrize("name", FIRST)
def test_what_is_missing_is_not_told_of(name: str) -> None:
    recipe, lines = recorded(name)
    for signal in {key for line in lines for key in line} - {"step", "dm_loss"}:  # no dm_loss is a finding itself
        less = find([{key: value for key, value in line.items() if key != signal} for line in lines], [], recipe)
        assert signal not in {each.signal for each in less}


def test_lines_that_hold_nothing_are_silent() -> None:
    recipe, lines = recorded("digits-1step-0")
    for odd in (
        [],
        [{"step": 1}],
        lines[:1],
        [dict.fromkeys(line, math.nan) | {"step": line["step"]} for line in lines],
    ):
        assert not {"ill"} & {each.level for each in find(odd, [], recipe)}
    assert [each.level for each in find([], [], {})] == ["well"]  # neither is a recipe needed


def test_one_line_is_too_early_for_a_verdict() -> None:
    recipe, lines = recorded("rate-30-1step")
    early = find(lines[:1], [], recipe)[0]
    assert (early.level, early.value, early.step) == ("watch", 4, 20)  # of the student's updates


def test_every_rule_tells_the_number_behind_it() -> None:
    for name in FIRST:
        for each in found(name):
            assert f"{each.value:.3g}" in each.why
            assert f"{each.limit:.3g}" in each.why
            assert each.step == 400
            assert each.value < each.limit or each.value > each.limit
            assert each.what.endswith(".")
            assert "\n" not in each.what + each.why + each.advice


def test_the_median_is_not_moved_by_a_spike() -> None:
    recipe, lines = recorded("digits-1step-0")
    lines[-2] = {key: 1e6 * value for key, value in lines[-2].items()} | {"step": lines[-2]["step"]}
    assert not [each for each in find(lines, [], recipe) if each.level == "ill"]


# --- evaluations on the way ------------------------------------------------------------------------------------------


def judged(**metrics: list[float]) -> list[Finding]:
    """What is found where a run that is well was judged every hundred steps."""
    recipe, lines = recorded("digits-1step-0")
    rows = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
    return find(lines, [{"step": 100.0 * (index + 1)} | row for index, row in enumerate(rows)], recipe)


def test_a_best_step_well_before_the_last() -> None:
    (told,) = judged(fid=[3.0, 1.0, 1.2, 2.0])
    assert (told.level, told.signal, told.value) == ("watch", "fid", pytest.approx(2))
    assert "step 200" in told.advice
    assert judged(fid=[1.17, 2.34])[0].value == pytest.approx(2)  # four steps on 300 emoji, after 160 and 320 (LOG.md)
    for fine in ([3, 1, 1.2, 1.4], [3, 2, 1, 2], [3, 2, 1.5, 1], [2], [math.nan, 1, 1.1, 1.0]):
        assert judged(fid=fine)[0].level == "well"


def test_recall_that_falls_while_precision_rises() -> None:
    (told,) = judged(recall=[0.5, 0.8, 0.7, 0.6], precision=[0.5, 0.8, 0.85, 0.9])
    assert (told.level, told.signal, told.value) == ("watch", "recall", pytest.approx(0.2))
    assert judged(recall=[0.5, 0.8, 0.7, 0.6], precision=[0.5, 0.8, 0.7, 0.6])[0].level == "well"  # both fall
    assert judged(recall=[0.5, 0.8, 0.78, 0.75], precision=[0.5, 0.8, 0.85, 0.9])[0].level == "well"


def test_colours_that_drift_are_told_of_latents_by_evaluations() -> None:
    recipe, lines = recorded("digits-4step-0")
    latents = [{key: value for key, value in line.items() if key not in ("brightness", "contrast")} for line in lines]
    for values, drift in (
        ([0.04, 0.05, 0.09], 0.05),
        ([0.04, 0.05, 0.06], None),
        ([0.2], None),
        ([0.0, math.nan], None),
    ):
        rows = [{"step": 100.0 * (index + 1), "saturation": value} for index, value in enumerate(values)]
        told = [each for each in find(latents, rows, recipe) if each.level != "well"]
        assert [(each.signal, each.value) for each in told] == ([("saturation", pytest.approx(drift))] if drift else [])


# --- the rest of the table -------------------------------------------------------------------------------------------


def test_skipped_updates_are_told_first() -> None:
    recipe, lines = recorded("gan-30-1step")
    skipping = [line | {"skipped_updates": 3.0} for line in lines]  # of 24 in 20 steps
    first = find(skipping, [], recipe)[0]
    assert (first.signal, first.value) == ("skipped_updates", pytest.approx(3 / 24))


def test_a_rate_in_warm_up() -> None:
    recipe, lines = recorded("digits-1step-0")
    recipe["student"]["optimizer"]["warmup_steps"] = 99
    assert [each.signal for each in find(lines, [], recipe)] == ["learning_rate"]  # 80 updates
    recipe["student"]["optimizer"]["warmup_steps"] = 79
    assert find(lines, [], recipe)[0].level == "well"


def test_what_was_looked_at_is_told() -> None:
    seen = ("gap", "critic_lag", "gan_to_dm", "gan_critic_loss", "logit_gap", "x0_std", "brightness", "contrast")
    assert all(name in found("digits-1step-0")[0].why for name in seen)


@pytest.mark.parametrize("name", ["no-dm-1step", "digits-1step-0"])
def test_a_run_that_is_done_says_what_is_ill_in_two_lines_at_most(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, lines = recorded(name)
    (tmp_path / METRICS).write_text("".join(map(to_line, lines)))
    tell_health(tmp_path, parse(recipe, name))
    told, ill = capsys.readouterr().out.splitlines(), [each for each in found(name) if each.level == "ill"]
    assert told == [f"health: {each.what} {each.why}; {each.advice}" for each in ill[:2]]


@pytest.mark.slow
def test_the_same_is_found_where_a_run_is_made_again(tmp_path: Path) -> None:
    """Two faults and a run that is well, from their teacher on: four CPU minutes."""
    harness = runpy.run_path(str(RECORDS.parent.parent / "benchmarks" / "made_to_fail.py"))
    for name in ("digits-1step-0", "gan-30-1step", "critic-slow-1step"):
        recipe, _ = recorded(name)
        again = find(read_metrics(harness["run"](name, tmp_path) / METRICS), [], recipe)
        assert [(each.level, each.signal) for each in again] == [(each.level, each.signal) for each in found(name)]
        assert FIRST.get(name, "nothing") in again[0].advice
