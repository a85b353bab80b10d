"""Places with a label run or a text run, small enough for hundreds of commands, each of which is bounded in time."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from PIL import Image

from command_line import fewstep
from image_sets import write_captioned
from tiny_pipelines import TINY

SECONDS = 60  # for any verb on these tiny models; the machine may be busy
LOOP = {"num_steps": 4, "batch_size": 4, "checkpoint_every": 2, "student_every": 1}
STUDENT = {"kind": "distill", "teacher": "teacher", **LOOP}
MODEL = {"num_classes": 10, "null_class": True, "block_out_channels": [8, 8], "norm_num_groups": 4}
RECIPES = {
    "label": {"t": {"kind": "teach", "model": MODEL, "class_dropout": 0.1, "num_steps": 1, "batch_size": 4}}
    | {"d": STUDENT | {"data": {"source": "digits"}, "student": {"num_timesteps": 2}}},
    "text": {"d": STUDENT | {"data": {"source": "pictures"}, "student": {"num_timesteps": 1, "timesteps": [399]}}},
}
VERBS = {
    "sample": "sample student --num 2 --out out.png",
    "evaluate": "evaluate student --num-samples 100 --out out",
    "export": "export student out",
    "resume": "distill d.yaml --out student --resume",
}


class Hangs(Exception):
    """A verb that does not end."""


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Raises Hangs where the block takes longer."""

    def stop(*args: object) -> None:
        raise Hangs(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_place(kind: str, folder: Path) -> Path:
    """A teacher and the run of its student of two checkpoints, with what judging it leaves there."""
    for name, recipe in RECIPES[kind].items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    if kind == "text":
        TINY["sd"](folder / "scratch").save_pretrained(folder / "teacher")
        shutil.rmtree(folder / "scratch")
        pictures = [Image.new("RGB", (16, 16), (9 * index, 90, 200)) for index in range(20)]
        write_captioned(folder / "pictures", pictures, [f"a picture of {index}" for index in range(20)])
    else:
        assert fewstep("teach t.yaml --out teacher")[0] == 0
    assert fewstep("distill d.yaml --out student")[0] == 0
    return folder
