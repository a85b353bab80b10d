"""What a run is trained on: rows of the batch of every step, as a function of the step alone, made a little ahead."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.images import ImageSet, batch_indices
from fewstep.data.latents import LatentSet, cached_embeddings
from fewstep.data.pairs import PairSet
from fewstep.data.settings import EmbeddingSettings
from fewstep.data.shards import Rows
from fewstep.models.latent_model import LatentModel
from fewstep.networks.text import TextConditioner
from fewstep.runtime.distributed import num_ranks, rank
from fewstep.runtime.tracking import progress_bar
from fewstep.training.method import Batch, Part
from fewstep.training.settings import LoopSettings

NUM_GRID_PROMPTS = 8  # that the sample grids show
NUM_AHEAD = 2  # batches that are made while a step is computed
BatchAt = Callable[[int, range], Batch]
"""The rows of a step's batch; a pure function, so that a run goes on where it was."""


def rows_of_rank(settings: LoopSettings) -> list[range]:
    """The rows of a batch that this rank computes, part by part."""
    mine = settings.batch_size // num_ranks()  # that they divide is checked at the door
    size = mine // settings.num_parts(num_ranks())
    return [range(first, first + size) for first in range(rank() * mine, (rank() + 1) * mine, size)]


@contextmanager
def parts_ahead(
    batch_at: BatchAt, settings: LoopSettings, start: int, device: torch.device
) -> Iterator[Iterator[list[Part]]]:
    """The parts of this rank in every step's batch from `start` on, made by a thread and on their way to the device.

    An error in making a batch is raised where it is asked for; the thread ends with the context.
    """
    rows = rows_of_rank(settings)
    way = torch.cuda.Stream(device) if device.type == "cuda" else None  # beside the one that computes

    def make(step: int) -> list[Part]:
        return [(each, _sent(batch_at(step, each), device, way)) for each in rows]

    def parts() -> Iterator[list[Part]]:
        steps = iter(range(start, settings.num_steps))
        waiting = deque(thread.submit(make, step) for step in islice(steps, NUM_AHEAD))
        while waiting:
            ready = waiting.popleft().result()  # raises what the thread raised
            # Asked for before this step is computed, not behind it.
            waiting.extend(thread.submit(make, step) for step in islice(steps, 1))
            if way:
                torch.cuda.current_stream(device).wait_stream(way)
                _arrived(ready, torch.cuda.current_stream(device))
            yield ready

    with ThreadPoolExecutor(1, "batches") as thread:
        try:
            yield parts()
        finally:
            thread.shutdown(cancel_futures=True)  # waits for the one that is being made


def _sent(batch: Any, device: torch.device, way: torch.cuda.Stream | None) -> Any:
    """The batch with its tensors on a GPU, copied while it computes; on the CPU as it is."""
    if isinstance(batch, Tensor) and way:
        with torch.cuda.stream(way):
            return batch.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait for it
    return {name: _sent(value, device, way) for name, value in batch.items()} if isinstance(batch, dict) else batch


def _arrived(batch: Any, stream: torch.cuda.Stream) -> None:
    """Tells the allocator that tensors made for one stream are read on another."""
    if isinstance(batch, Tensor):
        batch.record_stream(stream)
    elif isinstance(batch, dict | list | tuple):
        for each in batch.values() if isinstance(batch, dict) else batch:
            _arrived(each, stream)


def _indices(length: int, settings: LoopSettings, step: int, rows: range, purpose: str = "epoch") -> Tensor:
    # Of the whole batch, as its random numbers are: rows do not depend on how it is divided.
    whole = batch_indices(length, settings.batch_size, step, settings.seed, purpose=purpose)
    return whole[rows.start : rows.stop]


def image_batches(images: ImageSet, settings: LoopSettings) -> BatchAt:
    """Real images with their labels."""
    return lambda step, rows: images.batch(_indices(images.length, settings, step, rows))


@dataclass(frozen=True)
class Texts:
    """Texts by index; text i has the embeddings in row `row_of[i]` of `rows`, which is None where none are kept."""

    texts: list[str]
    row_of: Tensor
    rows: Rows | None

    def batch(self, indices: Tensor) -> Batch:
        """What `encode_condition` takes: embeddings, or the texts themselves."""
        if self.rows is not None:
            return self.rows.fetch(self.row_of[indices])
        return {"caption": [self.texts[index] for index in indices.tolist()]}


def text_batches(
    model: LatentModel,
    images: ImageSet | LatentSet | None,
    wanted: list[str],
    real: bool,
    settings: LoopSettings,
    embeddings: EmbeddingSettings,
    runs: Path,
) -> tuple[BatchAt, list[str]]:
    """Captions of the images, with `real` the images, too, and the `wanted` prompts; and those that grids show.

    If every text's embeddings are kept, the text encoders are left on the CPU, where only grids need them.
    """
    told = list(images.captions or []) if images else []
    keep = partial(open_texts, conditioner=model.conditioner, settings=embeddings, runs=runs)
    captions, prompts = told and keep(told, "captions"), wanted and keep(wanted, "prompts")
    if all(not texts or texts.rows is not None for texts in (captions, prompts)):
        model.conditioner.to("cpu")  # gigabytes of a GPU that nothing in a step uses

    def batch_at(step: int, rows: range) -> Batch:
        batch: Batch = {}
        if images and captions:
            indices = _indices(images.length, settings, step, rows)
            batch = (images.batch(indices) if real else {}) | captions.batch(indices)  # without a GAN captions will do
        if prompts:
            batch["prompt"] = prompts.batch(_indices(len(wanted), settings, step, rows, "prompts"))
        return batch

    return batch_at, (wanted or told)[:NUM_GRID_PROMPTS]


def pair_batches(
    model: LatentModel, pairs: PairSet, settings: LoopSettings, embeddings: EmbeddingSettings, runs: Path
) -> tuple[BatchAt, list[str] | None]:
    """Pairs with the embeddings of their prompts; and the prompts that grids show."""
    prompts = pairs.given.get("prompt")
    texts = open_texts(prompts, "prompts of pairs", model.conditioner, embeddings, runs) if prompts else None

    def batch_at(step: int, rows: range) -> Batch:
        indices = _indices(pairs.length, settings, step, rows, "pairs")
        return pairs.batch(indices) | (texts.batch(indices) if texts else {})

    return batch_at, prompts and prompts[:NUM_GRID_PROMPTS]


def open_texts(
    texts: list[str], what: str, conditioner: TextConditioner, settings: EmbeddingSettings, runs: Path
) -> Texts:
    """The texts, with embeddings if those may be kept, by default beside the `runs`; prints how many are cut."""
    folder = Path(settings.folder or runs / "embeddings")
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}  # each text is embedded once
    row_of = torch.tensor([number[text] for text in texts])
    num_cut = int(conditioner.too_long(list(number))[row_of].sum())
    if num_cut:
        print(f"{num_cut:,} of {len(texts):,} {what} are longer than {conditioner.max_length} tokens and were cut")
    with progress_bar(f"embed {what}", len(number)) as show, torch.no_grad():
        key, tell = conditioner.fingerprint(), lambda done: show(done, {})
        rows = cached_embeddings(list(number), conditioner.embed, key, folder, settings.max_gb, tell)
    if rows is None and settings.max_gb:
        print(f"embeddings of {len(number):,} {what} exceed embeddings.max_gb={settings.max_gb:g}; made at every step")
    return Texts(texts, row_of, rows)
