"""Batches of text-to-image runs: real images or latents, captions, prompts, and their embeddings from the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.commands.runs import tell_found
from fewstep.data.embeddings import cached_embeddings
from fewstep.data.images import ImageSet, batch_indices
from fewstep.data.latents import LatentSet
from fewstep.data.prompts import load_prompts
from fewstep.data.settings import EmbeddingSettings
from fewstep.data.shards import Rows
from fewstep.embedded.sources import open_captioned
from fewstep.models.latent_model import LatentModel
from fewstep.networks.text import TextConditioner
from fewstep.recipes.schema import DistillRecipe, TeachTextRecipe
from fewstep.runtime.tracking import progress_bar
from fewstep.training.method import Batch

NUM_GRID_PROMPTS = 8  # that the sample grids show


@dataclass(frozen=True)
class Texts:
    """Texts by index; text i has the embeddings in row `row_of[i]` of `rows`, which is None where none are kept."""

    texts: list[str]
    row_of: Tensor
    rows: Rows | None

    def batch(self, indices: Tensor) -> dict[str, Any]:
        """What `encode_condition` takes: embeddings, or the texts themselves."""
        if self.rows is not None:
            return self.rows.fetch(self.row_of[indices])
        return {"caption": [self.texts[index] for index in indices.tolist()]}


def text_batches(
    recipe: DistillRecipe | TeachTextRecipe, model: LatentModel, runs: Path, images: ImageSet | LatentSet | None = None
) -> tuple[Callable[[int], Batch], list[str]]:
    """The batch of every step: real data where they are trained on, and what fakes are drawn for; prompts for grids.

    `images` are the recipe's, where they are open already. Embeddings are kept in the recipe's folder, by default in
    `runs`, where the runs there share them.

    If every embedding is kept, the text encoders are left on the CPU,
    where only grids need them.
    """
    folder = Path(recipe.embeddings.folder or runs / "embeddings")
    given, real = None, True  # a teacher trains on real data
    if isinstance(recipe, DistillRecipe):
        given, real = recipe.prompts, recipe.gan.student_weight > 0 or not recipe.student.backward_simulation
    wanted = load_prompts(given.source, given.column) if given else []
    if images is None and (real or not wanted):
        images = open_captioned(recipe.data, model, shrink=True)
        tell_found(images)
    told = list(images.captions or []) if images else []
    captions, prompts = (
        open_texts(texts, what, model.conditioner, recipe.embeddings, folder) if texts else None
        for texts, what in ((told, "captions"), (wanted, "prompts"))
    )
    if all(texts is None or texts.rows is not None for texts in (captions, prompts)):
        model.conditioner.to("cpu")

    def batch_at(step: int) -> Batch:
        batch: Batch = {}
        if images and captions:
            indices = batch_indices(images.length, recipe.batch_size, step, recipe.seed)
            batch = (images.batch(indices) if real else {}) | captions.batch(indices)
        if prompts:
            indices = batch_indices(len(wanted), recipe.batch_size, step, recipe.seed, purpose="prompts")
            batch["prompt"] = prompts.batch(indices)
        return batch

    return batch_at, (wanted or told)[:NUM_GRID_PROMPTS]


def open_texts(
    texts: list[str], what: str, conditioner: TextConditioner, settings: EmbeddingSettings, folder: Path
) -> Texts:
    """The texts, with their embeddings if those may be kept; prints how many are cut."""
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    row_of = torch.tensor([number[text] for text in texts])
    num_cut = int(conditioner.too_long(list(number))[row_of].sum())
    if num_cut:
        print(f"{num_cut:,} of {len(texts):,} {what} are longer than {conditioner.max_length} tokens and were cut")
    with progress_bar(f"embed {what}", len(number)) as show, torch.no_grad():
        rows = cached_embeddings(
            list(number),
            conditioner.embed,
            conditioner.fingerprint(),
            folder,
            settings.max_gb,
            lambda done: show(done, {}),
        )
    if rows is None and settings.max_gb:
        print(f"embeddings of {len(number):,} {what} exceed embeddings.max_gb={settings.max_gb:g}; made at every step")
    return Texts(texts, row_of, rows)
