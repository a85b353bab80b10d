"""import: what brings models in."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import import_


@import_.command(epilog="Example: fewstep import edm edm-imagenet-64x64-cond-adm.pkl --out models/imagenet64")
def edm(
    file: Annotated[Path, typer.Argument(help="Checkpoint of NVIDIA's EDM (.pkl) with an ADM network.")],
    out: Annotated[Path, typer.Option(help="Model folder to write, for `teacher`, sample and evaluate.")],
) -> None:
    """Convert an EDM checkpoint, exactly; the code that is stored in it is not run."""
    from fewstep.commands.importing import import_edm

    import_edm(file, out)
