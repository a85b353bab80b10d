"""The design's floors: imports go down only, never sideways; files and functions stay short."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fewstep"
FLOORS = [
    {"errors", "settings", "metric_table"},
    {"seeding", "files"},
    {"pictures"},
    {"diffusion"},
    {"networks", "runtime", "data"},
    {"models"},
    {"embedded"},
    {"training", "evaluation", "export"},
    {"recipes"},
    {"commands"},
    {"cli"},
]
FLOOR = {folder: height for height, folders in enumerate(FLOORS) for folder in folders}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def folder_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> set[str]:
    """Every dotted name that is imported, anywhere in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_floors(path: Path) -> None:
    here = folder_of(path)
    for name in imports(ast.parse(path.read_text())):
        if name.startswith("fewstep."):
            there = name.split(".")[1]
            assert there == here or FLOOR[there] < FLOOR[here], f"{here} must not import {name}"


def test_the_mathematics_imports_nothing_but_torch() -> None:
    allowed = {"torch", "fewstep", "abc", "collections", "itertools", "math"}
    for path in (SOURCE / "diffusion").glob("*.py"):
        assert {name.split(".")[0] for name in imports(ast.parse(path.read_text()))} <= allowed, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_lengths(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 < 60, node.name


def test_most_functions_are_near_ten_lines() -> None:
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert sorted(lengths)[len(lengths) // 2] <= 12


def test_vocabulary() -> None:
    """One word per thing: the other names of the field stand nowhere as identifiers."""
    banned = {"real_score", "fake_unet", "feedforward_model", "noisy_latents", "gen_data", "t_list", "cfg", "real_unet"}
    for path in FILES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & banned, path
    assert not {"utils", "helpers", "common", "manager", "base"} & {path.stem for path in FILES}
