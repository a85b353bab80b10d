"""The losses of the first 20 steps of every embedded recipe. Written by `python tests/training/test_golden.py`.

They change whenever the training mathematics, the order of random draws or a recipe changes; say why in the commit.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from fewstep.commands.distill import distill
from fewstep.commands.options_files import Pairs
from fewstep.commands.pairs import pairs
from fewstep.commands.teach import teach
from fewstep.recipes.loading import load_recipe, recipe_names

RECIPES = {name: load_recipe(name) for name in recipe_names()}
# Of low-rank weights the arithmetic is the same, and what is theirs has tests against whole weights.
EMBEDDED = [name for name, r in RECIPES.items() if r.data.source == "digits" and not getattr(r, "lora", None)]
GOLDEN = Path(__file__).parent.parent / "golden"
SHORT = ["num_steps=20", "log_every=1", "checkpoint_every=20", "sample_every=20", "device=cpu"]


def run_recipe(name: str, folder: Path) -> list[dict[str, float]]:
    """The metrics of 20 steps; a student starts from its teacher, two steps old, and so are its pairs."""
    recipe = load_recipe(name, SHORT)
    if recipe.kind != "teach":
        teach(load_recipe(recipe.teacher, [*SHORT, "num_steps=2"]), folder / "teacher", report=lambda *_: None)
        settings = [f"teacher={folder / 'teacher'}", *(["init_from=null"] if recipe.kind == "distill" else [])]
        if recipe.kind == "regress" or recipe.regression_weight:
            teacher, made, sampler = str(folder / "teacher"), folder / "pairs", recipe.regression.sampler
            pairs(Pairs(teacher=teacher, num=32, sampler=sampler, out=made), report=lambda *_: None)
            settings += [f"regression.pairs={made}", "regression.num=32"]
        recipe = load_recipe(name, [*SHORT, *settings])
    verb = teach if recipe.kind == "teach" else distill
    verb(recipe, folder / name, report=lambda *_: None)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


LIKE_OTHERS = ["digits-1step"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else []) for name in EMBEDDED]
)
def test_golden_losses(name: str, tmp_path: Path) -> None:
    expected = [json.loads(line) for line in (GOLDEN / f"{name}.jsonl").read_text().splitlines()]
    for ours, golden in zip(run_recipe(name, tmp_path), expected, strict=True):
        ours = {name: ours[name] for name in golden}  # without rates, and what is the machine's
        assert ours == pytest.approx(golden, rel=5e-3, abs=1e-6), f"step {golden['step']}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for recipe_name in EMBEDDED:
        with tempfile.TemporaryDirectory() as scratch:
            lines = run_recipe(recipe_name, Path(scratch))
        (GOLDEN / f"{recipe_name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
