"""How good are text-to-image students on real captioned pictures, at a size that a CPU trains?

The same job as `fewstep demo --text`, autoencoder, teacher, one- and four-step student, table and page, on a WebDataset
tar, a parquet file or a folder of captioned pictures instead of drawn shapes.

    python benchmarks/captioned_tiles.py SOURCE FOLDER [KEY=VALUE ...]

KEY=VALUE overrides settings of all recipes, as `--set` does; the same command goes on with a run that was stopped.
"""

import sys
from pathlib import Path

from fewstep.commands.demo import SHAPES, demo
from fewstep.data.settings import DataSettings

SAMPLERS = ("ddim:25@1.5", "ddim:1", "ddim:2@1.5", "unipc:2@1.5", "ddim:4", "dpm++:4", "unipc:4")

if __name__ == "__main__":
    source, out, *overrides = sys.argv[1:]
    job = SHAPES._replace(
        title=f"captioned pictures: {Path(source).name}", samplers=SAMPLERS, data=DataSettings(source=source)
    )
    demo(job, Path(out), True, ["model.num_tokens=32", *overrides], num_samples=5000)
