"""The design's floors: imports go down only, never sideways; files and functions stay short."""

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fewstep"
FLOORS = [
    {"errors", "settings", "metric_table"},
    {"stopping"},
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
    {"__main__"},
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


def functions() -> Iterator[int]:
    """The lengths of all functions."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield node.end_lineno - node.lineno + 1


def test_most_functions_are_near_eight_lines() -> None:
    lengths = sorted(functions())
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[len(lengths) * 9 // 10] <= 25


def test_there_is_at_most_one_tiny_module_in_a_folder() -> None:
    rooms = [path for path in FILES if path.parent != SOURCE and path.name != "__init__.py"]
    tiny = [path.parent for path in rooms if path.read_text().count("\n") < 25]
    assert len(tiny) == len(set(tiny)), tiny


def test_no_verb_imports_a_verb_but_those_that_are_made_of_others() -> None:
    shared = {"options", "options_files", "places", "ranks", "runs", "judging", "drawing", "teachers", "demo", "ablate"}
    verbs = {path.stem: path for path in (SOURCE / "commands").glob("[a-z]*.py") if path.stem not in shared}
    for name, path in verbs.items():
        used = {
            each.split(".")[2] for each in imports(ast.parse(path.read_text())) if each.startswith("fewstep.commands.")
        }
        assert not used & verbs.keys() - {name}, path


def test_nobody_above_asks_for_the_class_of_a_model_a_schedule_or_a_family() -> None:
    classes = {"ImageModel", "PixelModel", "LatentModel", "NoiseSchedule", "EDM", "VP", "Flow", "Family"}
    for path in FILES:
        if FLOOR[folder_of(path)] <= FLOOR["models"]:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                asked = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
                assert not asked & classes, f"{path}: {ast.unparse(node)}"


def test_reasons_stand_at_the_lines_where_a_reader_would_ask() -> None:
    """8 to 15 comments per 100 lines of code in the core."""
    for folder in ("diffusion", "networks", "training"):
        comments = code = 0
        for path in (SOURCE / folder).rglob("*.py"):
            with path.open("rb") as file:
                tokens = list(tokenize.tokenize(file.readline))
            comments += sum(token.type == tokenize.COMMENT for token in tokens)
            docstrings = {
                line
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
                for line in range(node.lineno, node.end_lineno + 1)
            }
            skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.ENDMARKER)
            code += len({token.start[0] for token in tokens if token.type not in skipped} - docstrings)
        assert 0.08 <= comments / code <= 0.15, f"{folder}: {comments} comments on {code} lines"


def test_one_module_knows_of_graphs() -> None:
    """Networks, losses and methods are the same with and without."""
    known = {"runtime/graphs.py"}
    users = {"models/latent_model.py", "models/sampler.py", "training/loop.py", "training/benchmarking.py"}
    users |= {"runtime/main_memory.py"}
    for path in FILES:
        here, text = str(path.relative_to(SOURCE)), path.read_text()
        assert here in known or "CUDAGraph" not in text, path
        used = {name for name in imports(ast.parse(text)) if name.startswith("fewstep.runtime.graphs")}
        assert not used or here in users, path


def test_vocabulary() -> None:
    """One word per thing: the other names of the field stand nowhere as identifiers."""
    banned = {"real_score", "fake_unet", "feedforward_model", "noisy_latents", "gen_data", "t_list", "cfg", "real_unet"}
    for path in FILES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & banned, path
    assert not {"utils", "helpers", "common", "manager", "base"} & {path.stem for path in FILES}
