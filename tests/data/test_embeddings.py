"""Embeddings on disk: each text once, never half a file, nothing beyond the limit or the room."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.data.latents import cached_embeddings
from fewstep.data.shards import Rows
from fewstep.errors import UserError

TEXTS = [f"text {index}" for index in range(11)]
BYTES = (3 * 2 + 5) * 4


class Embed:
    """Embeds a text by its characters, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        self.asked += [text for text in texts if text]
        return {name: torch.stack([self.of(text, name) for text in texts]) for name in ("text", "pooled")}

    @staticmethod
    def of(text: str, name: str) -> Tensor:
        draws = torch.Generator().manual_seed(sum(map(ord, text)))
        return torch.randn((3, 2) if name == "text" else (5,), generator=draws)


def keep(folder: Path, embed: Embed, texts: list[str] = TEXTS, fingerprint: str = "f", max_gb: float = 1.0) -> Rows:
    rows = cached_embeddings(texts, embed, fingerprint, folder, max_gb)
    assert rows is not None
    return rows


def test_every_text_is_embedded_once_and_its_row_is_its_embedding(tmp_path: Path) -> None:
    first, second = Embed(), Embed()
    for rows in (keep(tmp_path, first), keep(tmp_path, second)):
        for name, tensor in rows.fetch(torch.tensor([10, 3, 4, 3])).items():
            assert torch.equal(tensor, torch.stack([Embed.of(TEXTS[index], name) for index in (10, 3, 4, 3)]))
    assert (first.asked, second.asked) == (TEXTS, [])


@pytest.mark.parametrize("other", [{"texts": [*TEXTS, "more"]}, {"texts": TEXTS[::-1]}, {"fingerprint": "g"}])
def test_other_texts_or_encoders_have_files_of_their_own(other: dict, tmp_path: Path) -> None:
    keep(tmp_path, Embed())
    embed = Embed()
    keep(tmp_path, embed, **other)
    assert embed.asked == other.get("texts", TEXTS)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_limit_is_on_the_whole_list_and_leaves_nothing(tmp_path: Path) -> None:
    embed = Embed()
    assert cached_embeddings(TEXTS, embed, "f", tmp_path / "new", max_gb=(11 * BYTES - 1) / 1e9) is None
    assert cached_embeddings(TEXTS, embed, "f", tmp_path / "new", max_gb=0) is None
    assert embed.asked == []
    assert not (tmp_path / "new").exists()
    assert keep(tmp_path / "new", embed, max_gb=11 * BYTES / 1e9).length == 11


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="can't be written"):
        keep(tmp_path / "file", Embed())
