"""The card: what it says is true, and its numbers are right. Its snippet runs in tests/commands/test_export.py."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from fewstep.errors import UserError
from fewstep.export.card import Card, Provenance, lora_settings, model_card, read_best, read_scores, read_table


def card(kind: str | list[str] = "StableDiffusionXLPipeline", dtype: torch.dtype = torch.float32, **changes) -> str:
    facts = {"teacher": "owner/model", "recipe": "kind: distill\nseed: 3\n", "timesteps": [999.0, 499.0]}
    facts |= {"guidance_scale": 8.0, "step": 7, "ema": "0.999", "base_model": "owner/model"} | changes
    return model_card(Card("my model", kind, dtype, False, 10, "samples.png"), Provenance(**facts))


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_what_the_hub_reads() -> None:
    matter = front(card(license="openrail++"))
    assert matter["license"] == "openrail++"
    assert matter["base_model"] == "owner/model"
    assert matter["library_name"] == "diffusers"
    assert matter["pipeline_tag"] == "text-to-image"
    assert "stable-diffusion-xl" in matter["tags"]
    matter = front(card(["pipeline", "FewstepPixelPipeline"], teacher="digits: a", base_model=None))
    assert matter["license"] == "other"
    assert matter["pipeline_tag"] == "unconditional-image-generation"
    assert "base_model" not in matter


@pytest.mark.parametrize(
    "fact",
    [
        "| teacher | `owner/model` |",
        "| timesteps | 999, 499 |",
        "| guidance (CFG) of the student | none: pass `guidance_scale=0` |",
        "| guidance (CFG) of the teacher, in training | 8 |",
        "step 7 (critic updates)",
        "averaged, EMA 0.999; float16",
        "```yaml\nkind: distill\nseed: 3\n```",
        'from_pretrained("my model", variant="fp16", dtype=torch.float16)',
        "num_inference_steps=2, guidance_scale=0",
        "![samples](samples.png)",
        "the licence of the teacher, `owner/model`, applies",
        "None were computed",
    ],
)
def test_it_says(fact: str) -> None:
    assert fact in card(dtype=torch.float16)


def test_metrics_have_their_intervals() -> None:
    scores = {"fid": (1.25, None), "precision": (0.5, (0.4, 0.6))}
    student = {
        "model": "run",
        "fid": 1.5,
        "nfe": 1,
        "attributes": {"a": {"b": 1.0}},
        "intervals": {"fid": [1.25, 1.75]},
    }
    rows = [{"model": "real", "fid": 0.25, "intervals": {}}, student]
    text = card(scores=scores, table=rows)
    assert "| fid ↓ | 1.25 | – |" in text
    assert "| precision ↑ | 0.5 | 0.4 to 0.6 |" in text
    assert "| model | fid ↓ | nfe |" in text
    assert "| real | 0.25 | – |" in text
    assert "| run | 1.5 (1.25 to 1.75) | 1 |" in text


def test_scores_are_those_of_the_step() -> None:
    lines = [{"step": 2, "fid": 3.0, "precision": 0.1}, {"step": 4, "fid": 2.0, "precision": 0.5}]
    assert read_scores(lines, 3) == {}
    assert read_scores(lines, 4) == {"fid": 2.0, "precision": 0.5}
    several = [{"step": 4, "fid": 2.0, "ema0.99_fid": 1.0}]
    assert (read_scores(several, 4), read_scores(several, 4, "0.99")) == ({"fid": 2.0}, {"fid": 1.0})


def test_rows_of_another_model_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('[{"model": "real", "fid": 1}, {"model": "a"}, {"model": "b"}]')
    assert [row["model"] for row in read_table(tmp_path, "b")] == ["real", "b"]
    with pytest.raises(UserError, match="no row 'c'; it has real, a, b"):
        read_table(tmp_path, "c")
    assert all(row["intervals"] == {} for row in read_table(tmp_path, "b"))


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", "{}", "null", "[" * 3000, '[{"fid": 1}]', '[{"model": "c", "intervals": [1]}]'),
        *('[{"model": "c", "intervals": {"fid": "ab"}}]', '[{"model": "c", "intervals": {"fid": [1]}}]'),
    ],
    ids=lambda content: content[:40],
)
def test_rows_that_are_none_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"not written by|has no row 'c'; it has $"):
        read_table(tmp_path, "c")


BEST = {"strength": 0.7, "steps": 4, "cfg": 1.6, "measure": "prompt_accuracy", "value": 0.9375}


def test_what_a_sweep_found_best_is_recommended(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"cells": [], "best": BEST}))
    best = read_best(tmp_path)
    wanted = "compared by `fewstep sweep`, strength 0.7, 4 steps, CFG 1.6 had the best prompt accuracy: 0.938."
    assert wanted in lora_settings(Path("a.safetensors"), [999, 499], "epsilon", best)
    assert "sweep" not in lora_settings(Path("a.safetensors"), [999, 499], "epsilon", {})
    assert "Set 2 steps, CFG 1" in lora_settings(Path("a.safetensors"), [999, 499], "epsilon", {})
    assert "Set 1 step, CFG 1" in lora_settings(Path("a.safetensors"), [999], "epsilon", BEST | {"steps": 1})
    assert "strength 0.7, 1 step, CFG 1.6 had" in lora_settings(Path("a"), [999], "epsilon", BEST | {"steps": 1})
    assert wanted in card(best=best)
    assert wanted.replace("strength 0.7, ", "") in card(best=BEST | {"strength": None})
    assert json.loads(Provenance("t", "", [999], 1, 1, "", best=best).metadata()["fewstep.recommended"]) == BEST


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"best": null}', '{"best": {"steps": "4"}}', '{"best": [1]}'])
def test_where_a_sweep_found_none_there_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    assert read_best(tmp_path) == read_best(tmp_path / "nowhere") == {}
