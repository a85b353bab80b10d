"""What would take all memory or time is one line, at once: numbers, names, nests and texts beyond all measure."""

import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import fewstep, refused
from small_runs import bounded, make_place

BIG = 10**30
ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else '1'}]\n" for n in range(9))
SAMPLE = "sample student --out out.png"
TEACH = "teach t.yaml --out out"
NUMBERS = [
    (f"{SAMPLE} --num {10**12}", "--num"),
    (f"{SAMPLE} --num {BIG}", "--num"),
    (f"{SAMPLE} --seed {BIG}", "seed"),
    (f"{SAMPLE} --class {BIG}", "--class"),
    (f"{SAMPLE} --steps {10**9}", "--steps"),
    (f"sample teacher --out out.png --steps {10**9}", "--steps"),
    (f"sample teacher --out out.png --sampler heun:{10**9}", "at most 10000 steps"),
    (f"sample teacher --out out.png --sampler heun:{'9' * 5000}", "sampler"),
    (f"sample teacher --out out.png --guidance {'9' * 400}", "guidance"),
    ("sample teacher --out out.png --guidance nan", "guidance"),
    (f"evaluate student --out out --num-samples {10**12}", "--num-samples"),
    (f"evaluate student --out out --num-real {BIG}", "--num-real"),
    (f"evaluate student --out out --seed {BIG}", "seed"),
    (f"evaluate teacher --out out --sampler heun:{10**9}", "at most 10000 steps"),
    (f"sample student@{'9' * 5000} --out out.png", "student"),
    (f"data pairs --teacher teacher --num {10**15} --sampler heun:2 --out out", "--num"),
    (f"data pairs --teacher teacher --num 4 --sampler heun:{10**9} --out out", "at most 10000 steps"),
    *(
        (f"{TEACH} --set {key}={value}", key)
        for key, value in [
            ("seed", BIG),
            ("seed", -1),
            ("batch_size", 10**12),
            ("batch_size", BIG),
            ("num_steps", BIG),
            ("model.image_size", 2**40),
            ("model.block_out_channels", f"[{2**40},8]"),
            ("model.layers_per_block", 10**9),
            ("model.num_classes", BIG),
            ("checkpoint_every", BIG),
            ("optimizer.lr", "1e400"),
            ("evaluation.num_samples", BIG),
        ]
    ),
    (f"distill d.yaml --out out --set student.num_timesteps={BIG}", "student.num_timesteps"),
    (f"distill d.yaml --out out --set student.timesteps=[{'1' * 400}]", "student.timesteps"),
]
TEXTS = [
    (f"{TEACH} --set {shlex.quote('data.source=' + '[' * 3000)}", "[[["),
    (f"{TEACH} --set {shlex.quote('model.attention=' + '[' * 3000)}", "model.attention"),
    (f"{TEACH} --set {'a.' * 3000}b=1", "a"),
    (f"{TEACH} --set {'a' * 10**5}=1", "aaa"),
    ("teach nested.yaml --out out", "nested.yaml"),
    ("teach aliases.yaml --out out", "aliases.yaml"),
    ("teach long.yaml --out out", "long.yaml"),
    *((f"{verb} --out {'n' * 300}", "nnn") for verb in ("teach t.yaml", "evaluate student")),
    (f"sample student --out {'n' * 300}.png", "nnn"),
    (f"sample {'n' * 300}", "nnn"),
    (f"sample student --prompt {'n' * 10**5}", "--prompt: a text of 100,000 characters"),
    ("sample student --prompts long.txt", "long.txt: a text of 10,000,000 characters"),
    (f"export student {'n' * 300}", "nnn"),
    (f"export {'n' * 300} out", "nnn"),
    (f"{TEACH} --set data.source={'n' * 300}", "nnn"),
    (f"teach {'n' * 300}.yaml", "nnn"),
    (f"teach t.yaml --out {'n/' * 3000}", "n/n"),
]


@pytest.fixture(scope="module")
def place(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_place("label", folder)
        Path("nested.yaml").write_text("a: " + "[" * 3000)
        Path("aliases.yaml").write_text(ALIASES)
        Path("long.yaml").write_text("a: " + "b" * 10**7)
        Path("long.txt").write_text("b" * 10**7)
        yield folder


@pytest.mark.parametrize(("line", "fragment"), [*NUMBERS, *TEXTS], ids=lambda text: shortened(text))
def test_a_bomb_is_one_line_at_once(place: Path, line: str, fragment: str) -> None:
    before, start = sorted(os.listdir(place)), time.process_time()
    with bounded(10):
        code, _, error = fewstep(line)
    assert time.process_time() - start < 5
    refused((code, error), fragment)
    assert len(error) < 1000
    assert sorted(os.listdir(place)) == before


def shortened(text: str) -> str:
    return text if len(text) < 70 else f"{text[:50]}...{len(text)}"


@pytest.mark.slow
@pytest.mark.parametrize(("line", "fragment"), [*NUMBERS, *TEXTS], ids=lambda text: shortened(text))
def test_in_bounded_memory(place: Path, line: str, fragment: str) -> None:
    """Half a gigabyte beyond what the libraries take."""
    if len(line) > 90_000:
        pytest.skip("longer than the system lets an argument be")
    command = [sys.executable, "-m", "fewstep", *shlex.split(line)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=place, preexec_fn=limit, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
