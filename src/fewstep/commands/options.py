"""What every verb can be told, each option declared once: a class per verb. Nothing heavy, for --help is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Set = Annotated[list[str], Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Resume = Annotated[bool, Option("--resume", help="Continue the run in that folder.")]
Seed = Annotated[int, Option(metavar="N", min=0, help="Image i is a function of it and i.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
Texts = Annotated[str | None, Option(metavar="FILE", help="Prompts: .txt, .csv, .tsv or .parquet.", show_default=False)]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Of `fewstep demo`."""

    out: Annotated[
        Path | None, Option(help="Folder of the runs, the table and the page.", show_default="runs/demo[-text]")
    ] = None
    resume: Resume = False
    set_: Set = field(default_factory=list)
    num_samples: Annotated[
        int | None, Option(min=100, help="Images per row of the table.", show_default="5000; 5120 for --text")
    ] = None
    text: Annotated[bool, Option("--text", help="Text to image, on drawn shapes, instead of digits.")] = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """Of `fewstep teach` and `fewstep distill`."""

    recipe: Annotated[str, Argument(help="Recipe name or YAML file.")]
    out: Annotated[Path | None, Option(help="Run folder; by default runs/RECIPE.", show_default=False)] = None
    resume: Resume = False
    set_: Set = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.out or Path("runs") / Path(self.recipe).stem


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Of `fewstep recipes`."""

    action: Annotated[str, Argument(help="list, show or check.")] = "list"
    recipe: Annotated[str | None, Argument(help="Recipe name or YAML file.", show_default=False)] = None
    set_: Set = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Of `fewstep sample`: what is to be drawn."""

    path: Annotated[str, Argument(help="Run folder, model folder, .safetensors file or hub id.")]
    out: Annotated[Path, Option(metavar="PNG", help="Grid to write.")] = Path("samples.png")
    grid_only: Annotated[bool, Option("--grid-only", help="Without the folder of single images.")] = False
    num: Annotated[
        int | None, Option(metavar="N", min=1, help="Images.", show_default="40; of text 4, or one per prompt")
    ] = None
    seed: Seed = 0
    label: Annotated[
        int | None,
        Option("--class", "--label", metavar="N", help="Class; by default all in turn.", show_default=False),
    ] = None
    prompt: Annotated[list[str], Option(metavar="TEXT", help="For text-to-image; repeatable.", show_default=False)] = (
        field(default_factory=list)
    )
    prompts: Texts = None
    steps: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            help="Instead of the sampler's own, or of those of a student whose several steps are evenly spaced.",
            show_default=False,
        ),
    ] = None
    sampler: Annotated[
        str | None,
        Option(
            metavar="KIND:N",
            help="Of a teacher: heun, euler, ddim, dpm++, unipc.",
            show_default="heun:18; ddim:50 for text",
        ),
    ] = None
    guidance: Annotated[float, Option(metavar="S", min=1, help="Of a teacher; 1 is none.")] = 1.0
    compare: Annotated[
        str | None,
        Option(metavar="OTHER", help="A second model, on the same noise, in every other column.", show_default=False),
    ] = None
    device: Device = "auto"
    config: Annotated[
        str | None, Option(metavar="DIR", help="Of a file: diffusers folder of its family.", show_default=False)
    ] = None
    prediction_type: Annotated[
        str | None,
        Option(metavar="TYPE", help="epsilon or v_prediction, if the model is wrong.", show_default=False),
    ] = None

    @property
    def folder(self) -> Path:
        """Of the single images."""
        return self.out.with_suffix("")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Of `fewstep evaluate`."""

    runs: Annotated[list[str], Argument(help="Runs, or RUN@STEP, RUN@best-fid; the first one's data is the reference.")]
    out: Annotated[Path, Option(help="Folder for results.json and report.html.")] = Path("evaluation")
    features: Annotated[
        str | None,
        Option(
            help="TorchScript file, `classifier` (a small one trained on the labels) or `autoencoder` (the model's).",
            show_default="classifier; autoencoder for text-to-image",
        ),
    ] = None
    num_samples: Annotated[int, Option(min=100, help="Images per row.")] = 5000
    num_real: Annotated[int, Option(min=100, help="Real images to compare with, at most.")] = 50_000
    samplers: Annotated[
        list[str],
        Option(
            "--sampler",
            help="Of teachers, repeatable: heun:18, ddim:50@3 (guided), dpm++:4, unipc:4.",
            show_default="heun:18; ddim:50 for text-to-image",
        ),
    ] = field(default_factory=list)
    seed: Seed = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Of `fewstep export`: what is exported, and how; None is the target's own default."""

    run: Annotated[str, Argument(help="RUN, RUN@STEP or RUN@best-METRIC.")]
    out: Annotated[Path, Argument(help="Folder, or .safetensors file, to write.")]
    to: Annotated[str, Option("--to", help="diffusers or single-file.")] = "diffusers"
    ema: Annotated[
        str | None, Option(help="Average to take, where a run keeps several: 0.9999.", show_default="the first")
    ] = None
    raw: Annotated[bool, Option("--raw", help="The weights as trained, not averaged.")] = False
    dtype: Annotated[
        str | None,
        Option(
            help="float32, float16 (in diffusers as variant fp16) or bfloat16.",
            show_default="float32; float16 for a single file",
        ),
    ] = None
    shard_size: Annotated[str | None, Option(help="Largest file of weights in a folder.", show_default="5GB")] = None
    license: Annotated[str, Option(help="For the card, as the hub names them; other: the teacher's applies.")] = "other"
    evaluation: Annotated[
        Path | None, Option(help="Folder of `fewstep evaluate` whose rows the card shows.", show_default="the run's")
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an export that is there, whole.")] = False


@dataclass(frozen=True, kw_only=True)
class ImportEdm:
    """Of `fewstep import edm`."""

    file: Annotated[Path, Argument(help="Checkpoint of NVIDIA's EDM (.pkl) with an ADM network.")]
    out: Annotated[Path, Option(help="Model folder to write, for `teacher`, sample and evaluate.")]


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Of `fewstep data latents`."""

    model: Annotated[Path, Option(help="Model folder with the autoencoder, or a run folder.")]
    source: Annotated[str, Option(help="Captioned images: a folder, a parquet file, a WebDataset tar.")]
    out: Annotated[Path, Option(help="Folder of the latents; the same command goes on after a stop.")]
    min_side: Annotated[int, Option(min=0, help="Smaller side of the stored image in pixels; paper: 1024.")] = 0
    unsafe_column: Annotated[
        str | None, Option(help="Drop what is true, UNSAFE, NSFW or above --max-unsafe here, or empty.")
    ] = None
    max_unsafe: Annotated[float, Option(help="Largest score in --unsafe-column.")] = 0.5
    aesthetic_column: Annotated[str | None, Option(help="Column of aesthetic scores.")] = None
    min_aesthetic: Annotated[
        float | None, Option(help="Smallest score there; paper: 5.5 for images, 6.25 for prompts.")
    ] = None
    image_column: Annotated[str | None, Option(help="By default image, png, jpg, jpeg or webp.")] = None
    caption_column: Annotated[str | None, Option(help="By default caption, text, txt or prompt.")] = None
    split: Annotated[str, Option(help="The split to read, where there are several.")] = "train"
    batch_size: Annotated[int, Option(min=1, help="Images per pass of the autoencoder.")] = 8
    seed: Seed = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Of `fewstep data pairs`."""

    teacher: Annotated[str, Option(help="Run folder, model folder, .safetensors file or hub id of the teacher.")]
    num: Annotated[int, Option(min=1, help="Pairs of noise and image; paper: 10000.")]
    sampler: Annotated[
        str, Option(help="heun:18 for EDM; euler:50@8 (paper), ddim, dpm++, unipc for text to image; @: CFG.")
    ]
    out: Annotated[Path, Option(help="Folder of the pairs; the same command goes on after a stop.")]
    prompts: Texts = None
    prompt_column: Annotated[str | None, Option(help="By default prompt, caption or text.")] = None
    classes: Annotated[str, Option(help="Of a teacher with classes: turn, or uniform at random.")] = "turn"
    seed: Seed = 0
    batch_size: Annotated[int | None, Option(min=1, help="Pairs drawn at once; by default by size.")] = None
    device: Device = "auto"
    precision: Annotated[str, Option(help="float32, bfloat16 or float16 (paper) of the teacher.")] = "float32"
    teacher_config: Annotated[str | None, Option(help="For a single file: a diffusers folder or hub id.")] = None
