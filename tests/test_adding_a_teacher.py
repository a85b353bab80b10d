"""The page's own teacher, as it is shown, in fewer steps; and what is said where a family is not known."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from command_line import fewstep, refused
from fewstep.models.loading.pretrained import load
from fewstep.networks import families
from test_readme import blocks

PAGE = (Path(__file__).parent.parent / "docs" / "adding-a-teacher.md").read_text()
FEWER = {"range(1500)": "range(2)", "num_steps=600": "num_steps=4", "batch_size=64": "batch_size=4"}
NAMED = "--family flow_digits:FAMILY"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's program ran."""
    folder = tmp_path_factory.mktemp("page")
    module, program = blocks("python", PAGE)
    (folder / "flow_digits.py").write_text(module)
    for more, fewer in FEWER.items():
        assert more in program
        program = program.replace(more, fewer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(families, "FAMILIES", dict(families.FAMILIES))
        patch.syspath_prepend(folder)
        exec(program, {})
    sys.modules.pop("flow_digits")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There, in a program that does not know the family yet."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.delitem(sys.modules, "flow_digits", raising=False)
    return place


SAMPLE, EVALUATE = "\n".join(blocks("console", PAGE)).splitlines()


@pytest.mark.parametrize(
    "line", [f"{SAMPLE} --num 2", pytest.param(f"{EVALUATE} --num-samples 100", marks=pytest.mark.slow)]
)
def test_the_commands_open_what_the_program_made(here: Path, line: str) -> None:
    code, _, errors = fewstep(line.removeprefix("$ "))
    assert code == 0, errors
    assert (here / ("samples.png" if "sample " in line else "evaluation/report.html")).is_file()


def test_a_recipe_names_it_and_a_discriminator_reads_its_middle_block(here: Path) -> None:
    told = "--set teacher=flow-teacher --set teacher_family=flow_digits:FAMILY --set guidance_scale=2"
    told += " --set num_steps=2 --set batch_size=4 --set critic.condition_on_stop=true --set student.num_timesteps=2"
    (here / "mine.yaml").write_text("kind: distill\ndata: {source: digits}\n")
    code, _, errors = fewstep(f"distill mine.yaml --out again {told}")
    assert code == 0, errors
    student, teacher = (
        load(here / name) for name in (next(Path("again").rglob("fewstep.json")).parent, "flow-teacher")
    )
    assert teacher.bottleneck == "transformer.blocks.1"
    assert student.timesteps == [1.0, 0.5]
    assert not torch.equal(student.network.take.weight, teacher.network.take.weight)
    assert student.decode(torch.zeros(1, *student.shape)).shape == (1, 1, 8, 8)


def test_a_model_folder_never_names_what_is_imported(here: Path) -> None:
    refused(fewstep("sample flow-teacher"), "flow-teacher", "'flow-digits'", "--family MODULE:NAME")
    assert "flow_digits" not in sys.modules
    text = (here / "flow-teacher" / "fewstep.json").read_text()
    (here / "other").mkdir()
    (here / "other" / "fewstep.json").write_text(text.replace("flow-digits", "flow_digits:FAMILY"))
    refused(fewstep("sample other"), "'flow_digits:FAMILY'", "not known")
    assert "flow_digits" not in sys.modules


def test_an_installed_package_makes_its_family_known(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    entry = EntryPoint("flow-digits", "flow_digits:FAMILY", families.GROUP)
    monkeypatch.setattr(families, "entry_points", lambda group, name: [entry] if name == entry.name else [])
    assert load(here / "flow-teacher").family.name == "flow-digits"


@pytest.mark.parametrize(
    ("reference", "told"),
    [("absent:FAMILY", "ModuleNotFoundError"), ("flow_digits", "MODULE:NAME"), ("flow_digits:Adapter", "not a Family")],
)
def test_what_is_no_family_is_told_in_one_line(here: Path, reference: str, told: str) -> None:
    refused(fewstep(f"sample flow-teacher --family {reference}"), reference, told)
    assert str(here) not in sys.path
    modules = {name for name in sys.modules if name.startswith("absent")}
    assert not modules


def test_it_is_not_exported(here: Path) -> None:
    refused(fewstep("export runs/flow-digits exported"), "flow-digits", "export")
    assert not (here / "exported").exists()
