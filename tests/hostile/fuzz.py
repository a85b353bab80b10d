"""Whole inputs on the disk, changed at random and given to verbs: what ends neither well nor in one line is reported.

python tests/hostile/fuzz.py [--first SEED] [--num 500]

An input is a recipe, a list of prompts, a folder of images, an archive, a model folder or a run folder; its seed makes
one to three changes to one of its files. Each runs in a process of its own, which is stopped after a minute.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import torch
import yaml
from PIL import Image

from command_line import fewstep
from fewstep.evaluation.extractors import train_classifier
from image_sets import encoded, picture, write_edm_zip, write_tar
from small_runs import make_place

SECONDS = 60
WORDS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"[]",
    b"{}",
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"[" * 5000,
    b"..",
    b"/etc/passwd",
]
WORDS += [
    b"\n",
    b",",
    b'"',
    b"'",
    b": ",
    b"&a ",
    b"*a",
    b"!!python/object",
    "ä\u2028".encode(),
    b"\x1b[31m",
    b"~",
    b"true",
]
TEACH = "teach {}t.yaml --out new/out --set num_steps=1 "
COLOURS = "--set model.channels=3 --set model.image_size=16 --set model.num_classes={}"
Case = tuple[str, list[str]]
"""The file or folder to be changed, and the command lines that take it."""
CASES: dict[str, Case] = {
    "recipe": ("t.yaml", [TEACH.format(""), "recipes check t.yaml"]),
    "extending recipe": ("own.yaml", ["recipes check own.yaml"]),
    "prompts": ("prompts", ["sample text/student --prompts prompts/p.{} --num 1 --grid-only --out new/out.png"]),
    "images": ("images", [TEACH.format("") + "--set data.source=images " + COLOURS.format(2)]),
    "captions": ("text/pictures", ["data latents --model text/teacher --source text/pictures --out new/out"]),
    "archive": ("archives", ["data latents --model text/teacher --source archives/a.{} --out new/out"]),
    "edm zip": ("a.zip", [TEACH.format("") + "--set data.source=a.zip " + COLOURS.format(10)]),
    "model": ("teacher/checkpoints/00000001/model", ["sample teacher --sampler heun:2 --num 2 --out new/out.png"]),
    "pipeline": ("text/teacher", ["sample text/teacher --sampler ddim:2 --prompt a --num 1 --out new/out.png"]),
    "run": ("student", ["sample student --num 2 --out new/out.png", "export student new/out"]),
    "judged run": ("student", ["evaluate student --num-samples 100 --out new/out"]),
    "resumed run": ("student", ["distill d.yaml --out student --resume"]),
    "text run": (
        "text/student",
        ["export text/student new/out", "sample text/student --prompt a --num 1 --out new/out.png"],
    ),
}
ENDS = {"prompts": ("txt", "csv", "tsv", "parquet"), "archive": ("tar", "parquet")}


def make_everything(place: Path) -> None:
    """All inputs, undamaged."""
    os.chdir(place)
    make_place("label", place)
    fewstep("evaluate student --num-samples 100 --out judged")
    (place / "text").mkdir()
    os.chdir(place / "text")
    make_place("text", place / "text")
    os.chdir(place)
    (place / "own.yaml").write_text(
        yaml.safe_dump({"extends": "digits-1step", "num_steps": 5, "student": {"ema_decay": 0.5}})
    )
    for name in ("prompts", "archives", "images/a", "images/b"):
        (place / name).mkdir(parents=True)
    for end, comma in (("txt", ""), ("csv", ","), ("tsv", "\t")):
        (place / f"prompts/p.{end}").write_text(f"prompt{comma}\na cat{comma}\na mat{comma}\n")
    datasets.Dataset.from_dict({"prompt": ["a cat", "a mat"]}).to_parquet(place / "prompts/p.parquet")
    pictures = [picture(index, 16, 16) for index in range(10)]
    for index, image in enumerate(pictures):
        image.save(place / f"images/{'ab'[index % 2]}/{index}.{['png', 'jpg', 'webp', 'gif', 'tiff'][index % 5]}")
    members = {
        f"{index}.{end}": content
        for index, each in enumerate(pictures)
        for end, content in (("png", encoded(each)), ("txt", b"a cat"))
    }
    write_tar(place / "archives/a.tar", members)
    rows = {"image": [{"bytes": encoded(each), "path": None} for each in pictures], "text": ["a cat"] * 10}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(place / "archives/a.parquet")
    write_edm_zip(
        place / "a.zip",
        {f"{index}.png": encoded(each) for index, each in enumerate(pictures)},
        [[f"{index}.png", index] for index in range(10)],
    )


def change(path: Path, chance: random.Random) -> str:
    """One change to a file, or to what stands in its place; what it was."""
    kinds: dict[str, Callable[[], object]] = {
        "cut": lambda: os.truncate(path, chance.randrange(path.stat().st_size + 1)),
        "bytes": partial(
            edit, path, chance, lambda old: bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
        ),
        "word": partial(edit, path, chance, lambda old: chance.choice(WORDS)),
        "again": partial(edit, path, chance, lambda old: old * 2),
        "number": lambda: path.write_bytes(renumbered(path.read_bytes(), chance)),
        "empty": lambda: path.write_bytes(b""),
        "gone": path.unlink,
        "folder": lambda: (path.unlink(), path.mkdir()),
        "fifo": lambda: (path.unlink(), os.mkfifo(path)),
        "loop": lambda: (path.unlink(), path.symlink_to(path.name)),
        "outside": lambda: (path.unlink(), path.symlink_to("/etc/hostname")),
        "picture": lambda: path.write_bytes(encoded(Image.new("L", (8, 8)))),
        "swapped": lambda: (
            shutil.copyfile(
                chance.choice([each for each in path.parent.iterdir() if each.is_file()]), path.with_name("swap")
            )
            and path.with_name("swap").rename(path)
        ),
    }
    weights = [3, 4, 6, 2, 6, 1, 1, 1, 1, 1, 1, 1, 2]
    (name,) = chance.choices(list(kinds), weights)
    kinds[name]()
    return f"{name} {path}"


def edit(path: Path, chance: random.Random, new: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    start = chance.randrange(len(content) + 1)
    stop = start + chance.choice([0, 1, 1, 4, 30])
    path.write_bytes(content[:start] + new(content[start:stop]) + content[stop:])


def renumbered(content: bytes, chance: random.Random) -> bytes:
    """One digit is another number; of text, that is mostly still text."""
    places = [index for index, each in enumerate(content[:100_000]) if chr(each).isdigit()]
    if not places:
        return content + b"7"
    at = chance.choice(places)
    return (
        content[:at] + chance.choice([b"0", b"-1", b"99999999999", b"0.5", b'"a"', b"null", b"[]"]) + content[at + 1 :]
    )


def run(seed: int, place: Path, most: int = 3) -> str:
    """`told`, `done`, or what is wrong, of one input; in this process."""
    chance = random.Random(seed)
    name = list(CASES)[seed % len(CASES)]
    target, lines = CASES[name]
    os.chdir(place)
    files = (
        [place / target]
        if Path(target).is_file()
        else sorted(path for path in Path(target).rglob("*") if path.is_file())
    )
    wanted = chance.choice(ENDS.get(name, ("",)))
    files = [path for path in files if path.name.endswith(wanted)]
    changes = []
    for _ in range(min(most, chance.randint(1, 3))):
        path = chance.choice(files)
        if path.is_file() and not path.is_symlink():
            changes.append(change(path, chance))
    ends = []
    for line in lines:
        shutil.rmtree("new", ignore_errors=True)
        try:
            code, _, error = fewstep(line.format(wanted))
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = (f"{each.filename}:{each.lineno}" for each in reversed(frames) if "/fewstep/" in each.filename)
            where = next(ours, "").rpartition("/")[2]
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return f"TRACEBACK {what} at {where} | {line} | {changes}"
        last = error.splitlines()[-1:] or [""]
        if code == 0:
            ends.append("done")
        elif code == 2 and last[0].startswith("fewstep: ") and "Traceback" not in error:
            ends.append("told")
        else:
            return f"ODD exit {code}: {error[-300:]} | {line} | {changes}"
    return f"{name}: {'+'.join(ends)}"


def watched(seed: int, whole: Path, place: Path, most: int = 3) -> str:
    """In a process and a place of its own."""
    shutil.rmtree(place, ignore_errors=True)
    os.system(f"cp -a {whole} {place}")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, run(seed, place, most).encode(errors="replace")[:4000])
        os._exit(0)
    os.close(writer)
    start = time.monotonic()
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() - start > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            return f"HANG {list(CASES)[seed % len(CASES)]}"
        time.sleep(0.01)
    with open(reader, "rb") as file:
        return file.read().decode() or f"CRASH {list(CASES)[seed % len(CASES)]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--num", type=int, default=500)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    import fewstep.commands.evaluate
    import fewstep.evaluation.extractors

    fewstep.evaluation.extractors.train_classifier = partial(train_classifier, num_steps=10)
    fewstep.commands.evaluate.images_per_second = lambda *args: 1.0
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole, place = Path(folder, "whole"), Path(folder, "place")
        whole.mkdir()
        datasets.config.HF_DATASETS_CACHE = str(Path(folder, "cache"))
        make_everything(whole)
        for seed in range(len(CASES)):  # which all work as they are
            os.chdir(folder)
            end = watched(seed, whole, place, 0)
            assert "told" not in end, end
        for seed in range(asked.first, asked.first + asked.num):
            os.chdir(folder)
            end = watched(seed, whole, place)
            counts[end.split()[0] if end[0].isupper() else end] += 1
            if end[0].isupper():
                print(f"seed {seed}: {end}", flush=True)
    for end, number in sorted(counts.items()):
        print(f"{number:5} {end}")
    sys.exit(any(end.isupper() for end in counts))


if __name__ == "__main__":
    main()
