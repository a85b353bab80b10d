"""What the verbs can be told that take models and data in and out of files; they stand behind the others in --help."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from fewstep.commands.options import (
    MOST,
    Device,
    Family,
    Order,
    Overwrite,
    Place,
    PlaceIfAny,
    Ranks,
    Seed,
    Texts,
    bounded,
    option,
    verb,
)


@verb("export", "exporting.export", "runs/sdxl-4step sdxl-4step.safetensors")
class Export(Order):
    """Write a student for diffusers, ComfyUI and A1111: as a folder, as one file, or as a LoRA."""

    # None is the target's own default
    run: Annotated[Place, Argument(help="RUN, RUN@STEP or RUN@best-METRIC.")]
    out: Annotated[Path, Argument(help="Folder, or .safetensors file, to write.")]
    to: str | None = option("diffusers, single-file or lora.", show_default="single-file if OUT ends in .safetensors")
    format: str | None = option("Of a LoRA: kohya, for all UIs, or diffusers.", show_default="kohya, if it can")
    ema: str | None = option("Average to take, where a run keeps several: 0.9999.", show_default="the first")
    raw: bool = option("The weights as trained, not averaged.", False, "--raw")
    dtype: str | None = option(
        "float32, float16 (in diffusers as variant fp16) or bfloat16.",
        show_default="float32; float16 for a single file or a LoRA",
    )
    shard_size: str | None = option("Largest file of weights in a folder.", show_default="5GB")
    license: str = option("For the card, as the hub names them; other: the teacher's applies.", "other")
    evaluation: Path | None = option(
        "Folder of `fewstep evaluate`, or of `sweep`, that the card tells of.", show_default="the run's"
    )
    overwrite: bool = option("Replace an export that is there, whole.", False, "--overwrite")


@verb("extract", "extract.extract_lora", "models/sdxl runs/sdxl-4step sdxl-4step-lora.safetensors")
class Extract(Order):
    """Make a LoRA of a student that was trained whole: the best of a rank, in kohya's layout, and what it leaves out.

    Layer by layer by SVD; with --data weighted by what the layers are given when it draws, where that is better.
    """

    base: Annotated[Place, Argument(help="Its teacher, or what it was tuned from: all that `sample` opens.")]
    student: Annotated[Place, Argument(help="The few-step student, likewise.")]
    file: Annotated[Path, Argument(help=".safetensors file to write.")]
    rank: int = option("Of every layer; small layers have what they can.", 64, metavar="N", min=1, max=MOST)
    targets: str = option(
        "all (with the first and the last layer), official, lean, or ends of names, parted by commas.",
        "all",
        metavar="NAMES",
    )
    data: PlaceIfAny = option(
        "Prompts (.txt, .csv, .tsv, .parquet) that images are drawn for, or `classes`.",
        metavar="FILE",
        show_default="plain SVD",
    )
    num: int = option("Images drawn with --data.", 32, metavar="N", min=1, max=MOST)
    dtype: str = option("float32, float16 or bfloat16.", "float16")
    overwrite: Overwrite = False
    seed: Seed = 0
    device: Device = "auto"
    config: PlaceIfAny = option("Of a file: diffusers folder of its family.", metavar="DIR")
    family: Family = None


@verb("import edm", "importing.import_edm", "edm-imagenet-64x64-cond-adm.pkl --out models/imagenet64")
class ImportEdm(Order):
    """Convert an EDM checkpoint, exactly; the code that is stored in it is not run."""

    file: Annotated[Path, Argument(help="Checkpoint of NVIDIA's EDM (.pkl) with an ADM network.")]
    out: Annotated[Path, Option(help="Model folder to write, for `teacher`, sample and evaluate.")]

    def arguments(self) -> tuple[Any, ...]:
        """File and folder."""
        return self.file, self.out


@verb("data latents", "data.latents", "--model models/sdxl --source laion.tar --out latents --min-side 1024")
class Latents(Order):
    """Encode captioned images once, as latents that `data.source` takes."""

    model: Annotated[Path, Option(help="Model folder with the autoencoder, .safetensors file, or a run folder.")]
    source: Annotated[Place, Option(help="Captioned images: a folder, a parquet file, a WebDataset tar.")]
    out: Annotated[Path, Option(help="Folder of the latents; the same command goes on after a stop.")]
    min_side: int = option("Smaller side of a stored image in pixels; paper: 1024.", 0, metavar="N", min=0)
    unsafe_column: str | None = option("Drop what is true, UNSAFE, NSFW or above --max-unsafe here, or empty.")
    max_unsafe: float = option("Largest score in --unsafe-column.", 0.5)
    aesthetic_column: str | None = option("Column of aesthetic scores.")
    min_aesthetic: float | None = option("Smallest score there; paper: 5.5 for images, 6.25 for prompts.")
    image_column: str | None = option("By default image, png, jpg, jpeg or webp.")
    caption_column: str | None = option("By default caption, text, txt or prompt.")
    split: str = option("Where there are several.", "train")
    background: str = option("Under what is transparent.", "white", metavar="COLOUR")
    batch_size: int = option("Images per pass.", 8, metavar="N", parser=bounded(1, MOST))
    config: PlaceIfAny = option("Of a file: diffusers folder of its family.", metavar="DIR")
    seed: Seed = 0
    ranks: Ranks = None
    device: Device = "auto"


@verb("data pairs", "pairs.pairs", "--teacher sdxl --num 10000 --sampler euler:50@8 --prompts p.txt --out pairs")
class Pairs(Order):
    """Draw pairs of noise and image by a teacher's sampler; under torchrun every rank makes its share."""

    teacher: Annotated[Place, Option(help="Run folder, model folder, .safetensors file or hub id of the teacher.")]
    num: Annotated[int, Option(min=1, max=10**9, help="Pairs of noise and image; paper: 10000.")]
    sampler: Annotated[
        str, Option(help="heun:18 for EDM; euler:50@8 (paper), ddim, dpm++, unipc for text to image; @: CFG.")
    ]
    out: Annotated[Path, Option(help="Folder of the pairs; the same command goes on after a stop.")]
    prompts: Texts = None
    prompt_column: str | None = option("By default prompt, caption or text.")
    classes: str = option("Of a teacher with classes: turn, or uniform at random.", "turn")
    seed: Seed = 0
    batch_size: int | None = option("Pairs drawn at once; by default by size.", min=1, max=MOST)
    ranks: Ranks = None
    device: Device = "auto"
    family: Family = None
    precision: str = option("float32, bfloat16 or float16 (paper) of the teacher.", "float32")
    teacher_config: PlaceIfAny = option("For a single file: a diffusers folder or hub id.")
