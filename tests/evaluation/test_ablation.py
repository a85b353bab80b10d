"""Tables of several runs a row: what stands in their cells, in their JSON and in their plot."""

import io
import statistics

import pytest
from PIL import Image

from fewstep.evaluation.ablation import Line, Run, as_json, markdown, missing, plot, stop_cells

FIDS = [0.21, 0.198, 0.233, 0.187]


def line(name: str, fids: list[float], lost: int = 0, **more: object) -> Line:
    runs = [Run(n, f"r-{n}", "0.1.0", 60.0 + n, {"fid": fid, "recall": 0.5}) for n, fid in enumerate(fids)]
    absent = [Run(len(fids) + n, f"l-{n}", missing="its process was killed (SIGKILL)") for n in range(lost)]
    return Line(name, [*runs, *absent], "digits-1step", **more)


TEACHER = Line("teacher, heun 18", [Run(None, "teacher", values={"fid": 0.136, "recall": 0.9})])


def cells(table: str, name: str) -> list[str]:
    (found,) = (row for row in table.splitlines() if row.startswith(f"| {name} |"))
    return [each.strip() for each in found.strip("|").split("|")]


def test_a_cell_is_the_mean_and_the_deviation_of_a_sample() -> None:
    table = markdown([TEACHER, line("one", FIDS)], "study", ["told"])
    mean, deviation = statistics.mean(FIDS), statistics.stdev(FIDS)
    assert cells(table, "row") == ["row", "fid", "recall", "seeds", "seconds a run"]
    assert cells(table, "one") == ["one", f"{mean:.3f} ± {deviation:.3f}", "0.500 ± 0.000", "4", "62"]
    assert cells(table, "teacher, heun 18") == ["teacher, heun 18", "0.136", "0.900", "", "–"]
    (_, found) = as_json([TEACHER, line("one", FIDS)])
    assert (found["mean"]["fid"], found["sd"]["fid"]) == (pytest.approx(mean), pytest.approx(deviation))
    assert [run["values"]["fid"] for run in found["runs"]] == FIDS


def test_of_one_seed_there_is_no_deviation() -> None:
    assert cells(markdown([line("one", FIDS[:1])], "study", []), "one")[1:4] == ["0.210", "0.500", "1"]
    assert as_json([line("one", FIDS[:1])])[0]["sd"] == {}


def test_what_is_missing_is_told_with_its_reason() -> None:
    lines = [line("one", FIDS[:2], lost=1), line("none", [], lost=1)]
    table = markdown(lines, "study", [])
    assert cells(table, "one")[3] == "2 of 3"
    assert cells(table, "none")[1:4] == ["–", "–", "0 of 1"]
    assert list(missing(lines)) == [f"{name}, seed {n} (l-0): its process was killed (SIGKILL)" for name, n in
                                    (("one", 2), ("none", 0))]  # fmt: skip
    assert table.endswith("- none, seed 0 (l-0): its process was killed (SIGKILL)\n")


def test_stops_are_means_over_seeds_of_fid_its_part_in_the_mean_and_what_is_right() -> None:
    stops = [[{"fid": 1.0 + n, "fid_mean": 0.25, "accuracy": 0.9}, {"fid": 0.5, "fid_mean": 0.1, "accuracy": 1.0}]
             for n in range(2)]  # fmt: skip
    two = Line("two", [Run(n, "r", values=each[-1], stops=each) for n, each in enumerate(stops)], "digits-4step")
    assert list(stop_cells([TEACHER, two])) == [("two", ["1.500 (0.25), 0.900", "0.500 (0.1), 1.000"])]
    assert cells(markdown([two], "study", []).partition("By stop")[2], "two")[1:] == [
        *("1.500 (0.25), 0.900", "0.500 (0.1), 1.000"),
    ]


@pytest.mark.parametrize("fids", [FIDS, FIDS[:1], [0.2, 30.0]])
def test_a_plot_is_a_png_that_grows_with_its_rows(fids: list[float]) -> None:
    sizes = [Image.open(io.BytesIO(plot([TEACHER, *rows], "a study"))).size for rows in
             ([line("one", fids)], [line("one", fids), line("two", fids), line("none", [], lost=2)])]  # fmt: skip
    assert sizes[0][0] == sizes[1][0] > 1000
    assert sizes[0][1] < sizes[1][1]
