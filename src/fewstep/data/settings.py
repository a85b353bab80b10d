"""What a recipe says of images, prompts and the embeddings that are kept."""

from typing import Annotated

from pydantic import AfterValidator, Field

from fewstep.errors import UserError
from fewstep.settings import Settings, UserPath


def _is_colour(text: str) -> str:
    from PIL import ImageColor

    ImageColor.getrgb(text)
    return text


Colour = Annotated[str, AfterValidator(_is_colour)]


class DataSettings(Settings):
    """Where the real images come from; size, grey or RGB, and the number of classes are the model's."""

    source: UserPath | None = "digits"
    """`digits` or, with captions, `shapes` (both embedded), a folder of images (with a folder per class, or captions in
    metadata.csv, metadata.jsonl or a .txt file beside each), a zip (or folder) of images with a dataset.json as EDM's
    dataset_tool writes them, a parquet file, a WebDataset tar, a folder of those, or of latents that `fewstep data
    latents` wrote; null for text-to-image with `prompts` alone, which leaves the recipe's GAN out."""
    split: str = "train"
    """The split to read, where the source has several: shards called train-0.parquet, or folders train/ and test/."""
    image_column: str | None = None
    """Column of the images; by default the first of image, png, jpg, jpeg, webp."""
    label_column: str | None = None
    """Column of the class indices, or of the names of classes; by default the first of label, labels, class, cls."""
    caption_column: str | None = None
    """Column of the captions, for text-to-image, or json.FIELD in a tar; by default the first of caption, text, txt,
    prompt."""
    background: Colour = "white"
    """The ground under what is transparent: a colour by its name, #rrggbb or rgb(r, g, b)."""

    @property
    def required(self) -> str:
        """The source; raises UserError if it is null."""
        if self.source is None:
            raise UserError(
                "data.source: null will do only for text-to-image with prompts.source, and without GAN; say either"
            )
        return self.source


class PromptSettings(Settings):
    """What the student draws fakes for, where that is not the captions of the real images."""

    source: UserPath
    """A .txt file with one prompt per line, or a .csv, .tsv or .parquet file."""
    column: str | None = None
    """Column of the prompts; by default the first of prompt, caption, text, in any capitals."""


class EmbeddingSettings(Settings):
    """Where the text encoders' results are kept, so that every caption and prompt is embedded once."""

    max_gb: float = Field(50.0, ge=0)
    """Limit for one list of texts in GB (SDXL: 0.64 MB per text in float32); beyond it, and with 0, texts are embedded
    at every step."""
    folder: UserPath | None = None
    """By default `embeddings` beside the run folder, so that runs share it."""
