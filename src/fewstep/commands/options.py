"""What every verb can be told, each option declared once: a class per verb, whose docstring is the verb's help.

Nothing heavy is imported, for --help is quick.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, dataclass_transform

from typer import Argument, Option

MOST = 10**6  # images of one command


def option(help: str, default: Any = None, *names: str, **more: Any) -> Any:
    """A field of that default which the command line knows by these names; `more` is typer's."""
    told = {"option": Option(*names, help=help, **more)}
    return field(default_factory=list, metadata=told) if default == [] else field(default=default, metadata=told)


Place = Annotated[str, "a place"]
PlaceIfAny = Annotated[str | None, "a place"]
Places = Annotated[list[str], "a place"]
"""Texts that may be paths, or hub ids, or names of recipes; typed `~` is the home folder in them as in any Path."""
Set = Annotated[list[str], Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Resume = Annotated[bool, Option("--resume", help="Continue the run in that folder.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what the last one wrote there.")]


def bounded(least: int, most: int) -> Callable[[str | int], int]:
    """A parser of whole numbers that tells the bounds in words of ours: typer would in every help, in a wide column."""

    def parse(typed: str | int) -> int:
        if str(typed).isdecimal() and least <= int(typed) <= most:
            return int(typed)
        raise ValueError(f"write a whole number from {least:,} to {most:,}")

    return parse


RANKS = bounded(1, 1024)
Ranks = Annotated[int | None, Option(metavar="N", parser=RANKS, show_default=False, help="Processes here.")]
Seed = Annotated[int, Option(metavar="N", parser=bounded(0, 2**63 - 1), help="Image i is a function of it and i.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
Family = Annotated[
    str | None, Option(metavar="MODULE:NAME", help="Of models of a family of your own, which it imports.")
]
Texts = Annotated[PlaceIfAny, Option(metavar="FILE", help="Prompts: .txt, .csv, .tsv or .parquet.", show_default=False)]


class Order:
    """What a verb is told."""

    @property
    def processes(self) -> int | None:
        """That do its work together, each of them the whole command line, if it is not this one alone."""
        return getattr(self, "ranks", None)

    def arguments(self) -> tuple[Any, ...]:
        """Of the function that does the work, found before what that needs is imported."""
        return (self,)


class Verb(NamedTuple):
    """What it is told, the function of `commands` that does the work, as module.name, and how it is called."""

    order: type[Order]
    work: str
    example: str


VERBS: dict[str, Verb] = {}
"""By name, that of its group before it; in the order of --help."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, field))
def verb(name: str, work: str, example: str) -> Callable[[type[Order]], Any]:
    """Makes a class what a new verb is told."""

    def add(order: type[Order]) -> type[Order]:
        VERBS[name] = Verb(dataclass(frozen=True, kw_only=True)(order), work, f"fewstep {name} {example}")
        return VERBS[name].order

    return add


@verb("demo", "demo.demo", "--text")
class Demo(Order):
    """Teach, distil and judge on an embedded set: the whole job on a CPU, digits in 6 minutes or --text in 25."""

    out: Path | None = option("Folder of the runs, the table and the page.", show_default="runs/demo[-text]")
    resume: Resume = False
    set_: Set = field(default_factory=list)
    num_samples: int | None = option(
        "Images per row of the table.", min=100, max=MOST, show_default="5000; 5120 for --text"
    )
    text: bool = option("Text to image, on drawn shapes, instead of digits.", False, "--text")


@verb("teach", "teach.teach", "digits-teacher --set num_steps=500")
class Teach(Order):
    """Train a teacher from scratch."""

    recipe: Annotated[Place, Argument(help="Recipe name or YAML file.")]
    out: Path | None = option("Run folder; by default runs/RECIPE.")
    resume: Resume = False
    set_: Set = field(default_factory=list)
    ranks: Ranks = None

    def arguments(self) -> tuple[Any, ...]:
        """Recipe, whose mistakes are told before torch is imported, run folder, and whether it goes on there."""
        from fewstep.recipes.loading import load_recipe

        recipe = load_recipe(self.recipe, self.set_, type(self).__name__.lower())
        return recipe, self.out or Path("runs") / Path(self.recipe).stem, self.resume


@verb("distill", "distill.distill", "digits-1step --set student_every=10")
class Distill(Teach):
    """Distil a teacher into a few-step student."""


@verb("plan", "plan.plan", "digits-4step --memory 8GB")
class Plan(Order):
    """Tell what a distillation takes: memory by role, arithmetic, disk. Needs neither weights nor a GPU.

    With --memory it says whether a card of that size will do, and if not which settings make it fit, cheapest first.
    """

    recipe: Annotated[Place, Argument(help="Recipe name or YAML file of a distillation.")]
    set_: Set = field(default_factory=list)
    memory: str | None = option("Of the card, as it is sold: 24GB are 24 GiB, 25.8e9 bytes.", metavar="SIZE")
    tflops: float = option(
        "Of the card, in 10^12 operations a second, as kernels reach them: 150 on an H200 in bfloat16.",
        150.0,
        metavar="N",
        min=0.001,
        max=1e6,
    )
    architecture: str | None = option(
        "Of a teacher that is not here: sdxl, sd15, sd21 or imagenet64.", metavar="NAME", show_default="by its name"
    )
    arithmetic: bool = option("Also what takes less arithmetic.", False, "--arithmetic")
    num_ranks: int = option("Processes of the run; told is what one takes.", 1, "--ranks", metavar="N", parser=RANKS)
    machines: int = option("Of the processes, for parallel.shard=hybrid.", 1, metavar="N", parser=RANKS)

    def arguments(self) -> tuple[Any, ...]:
        """The recipe, whose mistakes are told before torch is imported, and what is asked."""
        from fewstep.recipes.loading import load_recipe

        return load_recipe(self.recipe, self.set_), self


@verb("benchmark", "benchmark.benchmark", "sdxl-4step-lora --architecture sdxl")
class Benchmark(Order):
    """Measure how fast a distillation is on this machine.

    On random weights of the real shapes: nothing need be there but the recipe.

    Seconds of a cycle, samples per second, peak memory, and what share of the machine's arithmetic is used.
    """

    recipe: Annotated[Place, Argument(help="Recipe name or YAML file of a distillation.")]
    set_: Set = field(default_factory=list)
    architecture: str | None = option(
        "Of a teacher that is not here: sdxl, sd15, sd21 or imagenet64.", metavar="NAME", show_default="by its name"
    )
    ways: str | None = option(
        "That a step is run in: eager, graphs, compiled, compiled+graphs.",
        metavar="A,B",
        show_default="all on a GPU, eager on a CPU",
    )
    cycles: int = option("That are measured, at least, behind those that warm up.", 4, metavar="N", min=1, max=10_000)
    ranks: Ranks = None
    out: Path | None = option("Also writes the numbers.", metavar="JSON", show_default=False)
    overwrite: Overwrite = False

    def arguments(self) -> tuple[Any, ...]:
        """The recipe, whose mistakes are told before torch is imported, and what is asked."""
        from fewstep.recipes.loading import load_recipe

        return load_recipe(self.recipe, self.set_), self


@verb("recipes", "recipes.recipes", "show digits-4step")
class Recipes(Order):
    """List, show, check or write recipes: with the meaning of every setting, and new ones for your own images."""

    action: Annotated[str, Argument(help="list, show, check or new.")] = "list"
    recipe: Annotated[PlaceIfAny, Argument(help="Recipe name or YAML file; of new ones, a name.")] = None
    from_: str = option("Of new ones: the student's recipe that they are like.", "digits-1step", "--from")
    source: PlaceIfAny = option("Of new ones: your images, as `data.source` takes them.")
    size: int | None = option("Of new ones: pixels of the model.", metavar="N", show_default="the images', up to 64")
    teacher: PlaceIfAny = option("Of new ones, where it is not taught here: folder, file or hub id.")
    set_: Set = field(default_factory=list)


@verb("sample", "sample.sample", "runs/digits-1step --compare runs/digits-teacher")
class Sample(Order):
    """Draw images from a model, or from two on the same noise.

    Of two, --steps is for the first, --sampler and --guidance for teachers.
    """

    path: Annotated[Place, Argument(help="Run folder, model folder, .safetensors file or hub id.")]
    out: Path = option("Grid to write.", metavar="PNG", show_default="samples.png, or samples-2.png and so on")
    overwrite: Overwrite = False
    grid_only: bool = option("Without the folder of single images.", False, "--grid-only")
    num: int | None = option("Images.", metavar="N", min=1, max=MOST, show_default="40; of text 4, or one per prompt")
    seed: Seed = 0
    label: str | None = option("Class, by its name or number; by default all in turn.", None, "--class", "--label")
    prompt: list[str] = option("For text-to-image; repeatable.", [], metavar="TEXT", show_default=False)
    prompts: Texts = None
    steps: int | None = option(
        "Instead of the sampler's own, or of those of a student whose several steps are evenly spaced.",
        metavar="N",
        min=1,
        max=10_000,
    )
    sampler: str | None = option(
        "Of a teacher: heun, euler, ddim, dpm++, unipc; lcm with a few-step LoRA.",
        metavar="KIND:N",
        show_default="heun:18; ddim:50 for text",
    )
    guidance: float = option("Of a teacher, or with --lora; 1 is none.", 1.0, metavar="S", min=1, max=1000)
    lora: Places = option(
        "Put into the first model; repeatable. One of ours brings its timesteps.",
        [],
        metavar="FILE[:STRENGTH]",
        show_default=False,
    )
    compare: PlaceIfAny = option("A second model, on the same noise, in every other column.", metavar="OTHER")
    device: Device = "auto"
    config: PlaceIfAny = option("Of a file: diffusers folder of its family.", metavar="DIR")
    prediction_type: str | None = option("epsilon or v_prediction, if the model is wrong.", metavar="TYPE")
    family: Family = None

    @property
    def folder(self) -> Path:
        """Of the single images."""
        return self.out.with_suffix("")


@verb("evaluate", "evaluate.evaluate", "runs/digits-teacher runs/digits-1step")
class Evaluate(Order):
    """Judge models side by side: FID with its noise floor, precision, recall, accuracy, speed. Goes on after a stop."""

    runs: Annotated[Places, Argument(help="Runs, RUN@STEP, RUN@best-fid, all that `sample` opens, folders of images.")]
    data: PlaceIfAny = option("As data.source, or .npz.", metavar="REF", show_default="real images of the first run")
    out: Path = option("Folder for results.json and report.html.", show_default="evaluation, or evaluation-2 and so on")
    overwrite: Overwrite = False
    features: PlaceIfAny = option(
        "TorchScript, folder of CLIP or DINOv2, `classifier` (trained on the labels), `autoencoder` (the model's).",
        show_default="classifier; autoencoder for text-to-image",
    )
    resize: str = option("For the network: clean (antialiased, as clean-fid) or legacy (its own).", "legacy")
    size: int | None = option("Pixels that all images are brought to.", metavar="N", parser=bounded(1, 2**13))
    clip: PlaceIfAny = option("CLIPModel of transformers, for the CLIP score.", metavar="FOLDER")
    clip_prefix: str = option("Before every prompt: 'A photo depicts '.", "", metavar="TEXT", show_default=False)
    lpips: PlaceIfAny = option("TorchScript file, or `lpips`, for diversity as eyes judge it.", metavar="FILE")
    scorers: list[str] = option("Plug-in; repeatable.", [], "--scorer", metavar="MODULE:CLASS", show_default=False)
    prompts: Texts = None
    num_samples: int = option("Images per row.", 5000, metavar="N", parser=bounded(100, MOST))
    num_real: int = option("Real images to compare with, at most.", 50_000, metavar="N", parser=bounded(100, MOST))
    samplers: list[str] = option(
        "Of teachers, repeatable: heun:18, ddim:50@3 (guided), dpm++:4, unipc:4.",
        [],
        "--sampler",
        show_default="heun:18; ddim:50 for text-to-image",
    )
    stops: bool = option("Of students of several steps, also a row per earlier stop of theirs.", False, "--stops")
    batch_size: int | None = option(
        "Images drawn at once.", metavar="N", parser=bounded(1, 10_000), show_default="by size"
    )
    keep_images: bool = option("Leave all images in OUT/images.", False, "--keep-images")
    statistics: Path | None = option("Write mean and covariance of the reference's features.", metavar="NPZ")
    seed: Seed = 0
    ranks: Ranks = None
    device: Device = "auto"
    config: PlaceIfAny = option("Of a file: diffusers folder of its family.", metavar="DIR")
    family: Family = None


@verb("sweep", "sweep.sweep", "models/sdxl --lora my.safetensors --strength 0.7,1 --steps 4,8 --cfg 1,1.6 --prompt cat")
class Sweep(Order):
    """Compare strengths of a LoRA, steps and CFG scales: a grid, a table and the best of them.

    All cells have the same prompts and noise. The best is named by CLIP or, of the embedded sets, by what is right.
    """

    base: Annotated[Place, Argument(help="Run folder, model folder, .safetensors file or hub id.")]
    lora: Places = option(
        "The first is swept, others keep their strength; repeatable.", [], metavar="FILE[:STRENGTH]", show_default=False
    )
    strength: str | None = option("Of the first LoRA, parted by commas.", metavar="LIST", show_default="1")
    steps: str | None = option(
        "Parted by commas.", metavar="LIST", show_default="the student's own; 2,4,8 of a teacher"
    )
    guidance: str = option("CFG scales, parted by commas; 1 is none, and half the time.", "1", "--cfg", metavar="LIST")
    prompt: list[str] = option("For text-to-image; repeatable.", [], metavar="TEXT", show_default=False)
    prompts: Texts = None
    label: str | None = option("Class, by its name or number; by default all in turn.", None, "--class", "--label")
    num: int | None = option(
        "Images of a cell.", metavar="N", min=1, max=MOST, show_default="4 per prompt or class, 1 of more than 16"
    )
    clip: PlaceIfAny = option("CLIPModel of transformers, for the CLIP score.", metavar="FOLDER")
    best: str | None = option(
        "What names the best cell.",
        metavar="MEASURE",
        show_default="the first there is of clip, prompt_accuracy, accuracy",
    )
    out: Path = option("Folder for grid.png, table.md, results.json.", show_default="sweep, or sweep-2 and so on")
    overwrite: Overwrite = False
    seed: Seed = 0
    device: Device = "auto"
    config: PlaceIfAny = option("Of a file: diffusers folder of its family.", metavar="DIR")
    family: Family = None


@verb("ablate", "ablate.ablate", "update-ratio --seeds 0,1,2")
class Ablate(Order):
    """Repeat a study: recipes x seeds, side by side, to a table of means and deviations and a plot.

    Runs lie in OUT by what their recipes say: none is run twice, and the same command goes on after a stop.
    """

    study: Annotated[
        Place, Argument(help="Name of a study, or a YAML file; `list` tells those that come with fewstep.")
    ]
    out: Path = option(
        "Folder of the runs and, by study, of table.md, results.json and plot.png.", Path("runs/studies")
    )
    seeds: str | None = option("Parted by commas.", metavar="LIST", show_default="the study's")
    jobs: int | None = option(
        "Runs at a time, one thread for each of their ranks.",
        metavar="N",
        min=1,
        max=1000,
        show_default="the cores / ranks",
    )
    ranks: int = option("Processes of each run.", 1, metavar="N", parser=bounded(1, 1024))
    set_: Annotated[list[str], Option("--set", metavar="KEY=VALUE", help="Override in all rows; repeatable.")] = field(
        default_factory=list
    )
    num_samples: int | None = option(
        "Images that a run is judged by.", metavar="N", min=100, max=MOST, show_default="the study's"
    )

    @property
    def processes(self) -> None:
        """It starts those of its runs itself."""

    def arguments(self) -> tuple[Any, ...]:
        """What is asked, and the study, whose mistakes are told before torch is imported; None for `list`."""
        from fewstep.recipes.studies.loading import load_study

        listed = self.study == "list"
        return self, None if listed else load_study(self.study, self.set_, self.seeds, self.num_samples)


@verb("report", "report.report", "runs/digits-4step --watch")
class Report(Order):
    """Show whether runs converge, on one page: findings in words, curves, samples, what differs in settings.

    It needs no GPU, and reads runs that are still going on.
    """

    runs: Annotated[Places, Argument(help="Runs, of students or teachers, one over the other; RUN@STEP: up to it.")]
    out: Path | None = option("Page to write.", metavar="HTML", show_default="RUN/report.html; report.html for several")
    overwrite: Overwrite = False
    watch: bool = option("Write it again and again until the runs are finished; browsers follow.", False, "--watch")
    every: int = option("Seconds between two, with --watch.", 30, metavar="N", min=1, max=86_400)
