"""What the README shows works: its commands (with fewer steps), its Python, its make targets, its links."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from fewstep.cli import app, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = {
    "teach": "--set num_steps=2 --set batch_size=4",
    "distill": "--set num_steps=2 --set batch_size=4 --set teacher=runs/digits-teacher",
    "evaluate": "--num-samples 100",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_commands_run_in_the_order_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line.removeprefix("$ ") for line in "\n".join(blocks("console")).splitlines()]
    assert len(lines) >= 6
    for line in lines:
        verb = line.split()[1]
        monkeypatch.setattr("sys.argv", shlex.split(f"{line} {SMALL.get(verb, '')}"))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, f"{line}\n{capsys.readouterr().err}"
    for made in (
        "threes.png",
        "threes/00000.png",
        "both/00000-2.png",
        "digits-1step/README.md",
        "evaluation/report.html",
        "evaluation/results.json",
        "runs/digits-1step/recipe.yaml",
    ):
        assert (tmp_path / made).stat().st_size > 0


def test_the_python_runs() -> None:
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    assert names["timesteps"].tolist() == [999, 749, 499, 249]
    assert names["x0"].shape == (2, 4, 64, 64)
    assert torch.isfinite(names["x0"]).all()


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z-]+)", README)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_verbs_named_exist() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"`?fewstep (demo|teach|distill|sample|evaluate|export|recipes)", README)) == verbs
