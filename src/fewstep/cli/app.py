"""The application that the verbs are added to, and the options that they share."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a diffusion model into a one- to four-step generator (DMD2).",
    epilog="Example: fewstep demo",
)
data = typer.Typer(no_args_is_help=True, help="Prepare data for runs.")
app.add_typer(data, name="data")
import_ = typer.Typer(no_args_is_help=True, help="Bring in models from elsewhere.")
app.add_typer(import_, name="import")
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Out = Annotated[Path | None, typer.Option(help="Run folder; by default runs/RECIPE.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")]
Seed = Annotated[int, typer.Option(min=0, help="Noise of image i is a function of seed and i.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
