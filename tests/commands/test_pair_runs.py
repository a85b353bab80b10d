"""From a teacher to its pairs, to a regressed student, to a distillation from it, through the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from command_line import Run, refused
from fewstep.commands import drawing as module
from fewstep.data.pairs import PairSet, load_pairs
from fewstep.models.latent_model import LatentModel
from fewstep.models.loading.pretrained import load
from fewstep.models.pixel_model import PixelModel
from fewstep.networks.families.edm import build_unet
from fewstep.networks.settings import PixelModelConfig
from fewstep.runtime.checkpoint import load_state
from fewstep.runtime.runs import find
from image_sets import write_captioned
from steps import dying, spy
from tiny_pipelines import BETAS, TINY

NUM = 6
TEXTS = ["a cat", "a red dog", "two birds"]
PAIRS = f"fewstep data pairs --teacher sdxl --num {NUM} --sampler euler:4@8 --prompts prompts.txt"
INIT = (
    "fewstep distill sdxl-1step-init --set teacher=sdxl --set regression.pairs=pairs "
    "--set regression.sampler=euler:4@8 --set regression.lpips=distance.pt --set regression.decoder=tiny "
    "--set num_steps=4 --set batch_size=4"
)
STUDENT = (
    "fewstep distill sdxl-1step --set teacher=sdxl --set data.source=pictures --set num_steps=2 --set batch_size=2"
)
PIXEL_INIT = """
kind: regress
teacher: pixels
regression: {pairs: heun, sampler: "heun:3"}
data: {source: digits}
num_steps: 4
batch_size: 4
student: {optimizer: {lr: 1e-3}, ema_decay: 0}
"""
PIXEL_STUDENT = """
kind: distill
teacher: pixels
init_from: runs/init
data: {source: digits}
num_steps: 2
batch_size: 4
student_every: 2
regression_weight: 0.25
regression: {pairs: heun, sampler: "heun:3"}
"""


class Distance(torch.nn.Module):
    """As LPIPS: two (B, 3, H, W) -> (B,)."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().mean(dim=[1, 2, 3])


def done(name: str, num: int) -> str:
    """What is told at the end."""
    return f"wrote {name}, {num} pairs\nnext: fewstep distill RECIPE --set regression.pairs={name}\n"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, a tiny decoder, a distance, prompts, captioned pictures and two recipes."""
    folder = tmp_path_factory.mktemp("workshop")
    TINY["sdxl"](folder / "scratch").save_pretrained(folder / "sdxl")
    torch.manual_seed(0)
    config = PixelModelConfig(num_classes=10, block_out_channels=[8, 8], norm_num_groups=4)
    PixelModel(config, build_unet(config)).save(folder / "pixels")
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(folder / "tiny")
    torch.jit.script(Distance()).save(folder / "distance.pt")
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    pictures = [Image.new("RGB", (16, 16), (60 * index, 90, 200)) for index in range(4)]
    write_captioned(folder / "pictures", pictures, [f"a picture of {index}" for index in range(4)])
    (folder / "init.yaml").write_text(PIXEL_INIT)
    (folder / "student.yaml").write_text(PIXEL_STUDENT)
    return folder


def opened(folder: str, model: PixelModel | LatentModel, sampler: str) -> PairSet:
    return load_pairs(Path(folder), model.fingerprint, sampler, model.shape)


def close_in_float16(stored: Tensor, ours: Tensor) -> bool:
    return (stored.float() - ours).abs().max().item() < 1e-3 * ours.abs().max().item()


# --- what the pairs are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "scheduler"), [("euler", EulerDiscreteScheduler), ("ddim", DDIMScheduler)])
def test_pairs_are_what_diffusers_makes_of_the_same_noise(run: Run, kind: str, scheduler: type) -> None:
    """The raw UNet and guidance by hand, in diffusers' own loop; a null embedding of zeros, as SDXL's pipeline has."""
    assert run(f"{PAIRS.replace('euler', kind)} --out pairs --seed 3 --batch-size 4") == (0, done("pairs", 6), "")
    model = load("sdxl")
    batch = opened("pairs", model, f"{kind}:4@8").batch(torch.arange(NUM))
    assert batch["caption"] == TEXTS * 2
    ddim = {"clip_sample": False, "set_alpha_to_one": True} if kind == "ddim" else {}
    steps = scheduler(**{**BETAS, **ddim}, timestep_spacing="trailing")
    steps.set_timesteps(4)
    x = batch["noise"].float() * steps.init_noise_sigma
    hidden, _, pooled, _ = model.pipeline.encode_prompt(TEXTS * 2, do_classifier_free_guidance=False)
    time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(NUM, 1)
    with torch.no_grad():
        for t in steps.timesteps:
            scaled, added = steps.scale_model_input(x, t), {"text_embeds": pooled, "time_ids": time_ids}
            null, told = (
                model.network(scaled, t, hidden * on, added_cond_kwargs={**added, "text_embeds": pooled * on}).sample
                for on in (0, 1)
            )
            x = steps.step(null + 8 * (told - null), t, x).prev_sample
    assert close_in_float16(batch["x0"], x)
    first = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)).half()
    assert not torch.equal(batch["noise"][:2], first)
    assert batch["noise"].float().std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("classes", ["turn", "uniform"])
def test_pairs_of_pixels_are_edms_heun(run: Run, classes: str) -> None:
    """Algorithm 1 of arXiv 2206.00364 around the raw network, in a loop of the test's own."""
    line = f"fewstep data pairs --teacher pixels --num 12 --sampler heun:3 --classes {classes} --out heun"
    assert run(line) == (0, done("heun", 12), "")
    model = load("pixels")
    batch = opened("heun", model, "heun:3").batch(torch.arange(12))
    in_turn = [*range(10), 0, 1]
    assert (batch["label"].tolist() == in_turn) == (classes == "turn")

    def denoise(x: Tensor, sigma: float) -> Tensor:
        variance = sigma**2 + 0.25
        time = torch.full((12,), sigma).log() / 4
        network = model.network(x / variance**0.5, time, class_labels=batch["label"]).sample
        return 0.25 / variance * x + sigma * 0.5 / variance**0.5 * network

    levels = [(80 ** (1 / 7) + k / 2 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(3)]
    with torch.no_grad():
        x = 80 * batch["noise"].float()
        for sigma, after in ((levels[0], levels[1]), (levels[1], levels[2])):
            slope = (x - denoise(x, sigma)) / sigma
            guess = x + (after - sigma) * slope
            x = x + (after - sigma) * (slope + (guess - denoise(guess, after)) / after) / 2
        x = denoise(x, levels[2])
    assert close_in_float16(batch["x0"], x)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_near_and_is_written_down(run: Run, precision: str) -> None:
    assert run(f"{PAIRS} --out exact")[0] == 0
    assert run(f"{PAIRS} --out pairs --precision {precision}")[0] == 0
    model = load("sdxl")
    exact, rounded = (opened(name, model, "euler:4@8").batch(torch.arange(NUM)) for name in ("exact", "pairs"))
    assert torch.equal(exact["noise"], rounded["noise"])
    error = (exact["x0"] - rounded["x0"]).float().norm() / exact["x0"].float().norm()
    assert 0 < error < (0.1 if precision == "bfloat16" else 0.02)
    refused(run(f"{PAIRS} --out exact --precision {precision}"), "precision: float32 -> ", "another --out")


def test_ranks_of_torchrun_share_the_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.data.pairs.FILE_BYTES", 2 * 1024)  # 2 pairs a file
    assert run(f"{PAIRS} --out one --batch-size 2")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        told.append(run(f"{PAIRS} --out many --batch-size 2"))
    assert told == [(0, "many: done; 2 files of other ranks are not there yet\n", ""), (0, done("many", 6), "")]
    one, many = ({path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("one", "many"))
    assert one == many
    assert len(one) == 4
    monkeypatch.setenv("RANK", "first")
    refused(run(f"{PAIRS} --out more"), "RANK=first: must be a number")


def test_ctrl_c_leaves_whole_files_and_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.data.pairs.FILE_BYTES", 2 * 1024)
    assert run(f"{PAIRS} --out whole --batch-size 2")[0] == 0
    with monkeypatch.context() as patch:
        spy(patch, module, "sample", dying(2, KeyboardInterrupt()))
        code, _, error = run(f"{PAIRS} --out parts --batch-size 2")
    assert (code, error) == (130, "fewstep: stopped; the same command goes on with parts\n")
    assert sorted(path.name for path in Path("parts").iterdir()) == ["00000.parquet", "00001.parquet", "pairs.json"]
    refused(run(INIT.replace("pairs=pairs", "pairs=parts")), "1 of 3 files are not there yet")
    assert run(f"{PAIRS} --out parts --batch-size 2")[0] == 0
    assert all(path.read_bytes() == Path("parts", path.name).read_bytes() for path in Path("whole").iterdir())


# --- what is made of them --------------------------------------------------------------------------------------------


def student_of(run_folder: str) -> dict[str, Tensor]:
    return load_state(find(Path(run_folder)).checkpoint)["method"]["student"]


def test_from_pairs_to_the_start_to_one_step_sdxl(run: Run) -> None:
    assert run(f"{PAIRS} --out pairs")[0] == 0
    assert run(f"{INIT} --set student.optimizer.lr=1e-2 --set checkpoint_every=2")[0] == 0
    teacher, start = load("sdxl"), load(find(Path("runs/sdxl-1step-init")).folder)
    assert start.timesteps == [399]
    still = "--set student.optimizer.lr=1e-12 --set critic.optimizer.lr=1e-12"
    none = "--set student.optimizer.weight_decay=0 --set critic.optimizer.weight_decay=0"
    assert run(f"{STUDENT} {still} {none}")[0] == 0
    state = load_state(find(Path("runs/sdxl-1step")).checkpoint)["method"]
    trained, base = student_of("runs/sdxl-1step-init"), teacher.denoiser.state_dict()
    assert max((trained[name] - base[name]).abs().max() for name in base) > 1e-2
    assert all((state["student"][name] - trained[name]).abs().max() < 1e-6 for name in base)
    assert all((state["critic"][name] - base[name]).abs().max() < 1e-6 for name in base)
    assert run("fewstep sample runs/sdxl-1step-init --prompt cat --num 2 --out cat.png")[0] == 0
    whole = student_of("runs/sdxl-1step-init")
    shutil.rmtree("runs/sdxl-1step-init/checkpoints/00000004")
    assert run(f"{INIT} --set student.optimizer.lr=1e-2 --set checkpoint_every=2 --resume")[0] == 0
    assert all(torch.equal(whole[name], value) for name, value in student_of("runs/sdxl-1step-init").items())


def test_kept_embeddings_give_the_losses_of_prompts(run: Run) -> None:
    """In float32; and the loss is the distance of the pictures, before the first update."""
    assert run(f"{PAIRS} --out pairs")[0] == 0
    line = f"{INIT} --set precision=float32 --set log_every=1 --set batch_size=6"
    assert run(f"{line} --out kept")[0] == 0
    assert run(f"{line} --out online --set embeddings.max_gb=0")[0] == 0
    kept, online = (
        [json.loads(line)["regression_loss"] for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        for name in ("kept", "online")
    )
    assert kept == pytest.approx(online, rel=1e-5)
    model, tiny = load("sdxl"), AutoencoderTiny.from_pretrained("tiny")
    batch = opened("pairs", model, "euler:4@8").batch(torch.arange(NUM))
    with torch.no_grad():
        condition = model.text_condition(batch["caption"])
        x0 = model.denoiser(batch["noise"].float(), torch.full((NUM,), 399), condition)
        pictures = [tiny.decode(x).sample for x in (x0, batch["x0"].float())]
    assert kept[0] == pytest.approx((pictures[0] - pictures[1]).abs().mean().item(), rel=1e-4)


def test_pixels_go_from_pairs_to_a_start_to_dmd_with_regression(run: Run) -> None:
    assert run("fewstep data pairs --teacher pixels --num 20 --sampler heun:3 --out heun")[0] == 0
    assert run("fewstep distill init.yaml")[0] == 0
    assert run("fewstep distill student.yaml --set log_every=1")[0] == 0
    lines = [json.loads(line) for line in Path("runs/student/metrics.jsonl").read_text().splitlines()]
    assert ["regression_loss" in line for line in lines] == [True, False]  # in the student's turn
    start = student_of("runs/init")
    assert load(find(Path("runs/init")).folder).timesteps == [80.0]
    assert any((start[name] - value).abs().max() > 1e-4 for name, value in load("pixels").denoiser.state_dict().items())
    assert run("fewstep sample runs/student --num 2 --out two.png")[0] == 0


def test_pairs_that_change_nothing_are_refused(run: Run) -> None:
    line = "fewstep distill student.yaml --set init_from=null --set regression_weight=0"
    refused(run(line), "regression changes nothing, for regression_weight is 0")


def test_recipes_of_the_kind_are_listed_shown_and_checked(run: Run) -> None:
    code, told, _ = run("fewstep recipes")
    assert (code, "sdxl-1step-init" in told, "regress" in told) == (0, True, True)
    assert "euler:50@8" in run("fewstep recipes show sdxl-1step-init")[1]
    assert run("fewstep recipes check init.yaml")[1] == "init.yaml: a valid regress recipe\n"
    refused(run("fewstep teach sdxl-1step-init"), "is for `fewstep distill", "not for `fewstep teach`")
    refused(run("fewstep recipes check init.yaml --set regression.pair=x"), "did you mean")


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ("--sampler rk4:5 --teacher pixels", ["sampler 'rk4:5'", "euler:STEPS"]),
        ("--sampler heun:3 --teacher sdxl", ["--prompts", "needs a file"]),
        ("--sampler heun:3 --teacher sdxl --prompts absent.txt", ["absent.txt", "can't be read"]),
        ("--sampler heun:3 --teacher pixels --prompts prompts.txt", ["--prompts", "takes no text"]),
        ("--sampler heun:3 --teacher pixels --classes all", ["--classes 'all'", "turn or uniform"]),
        ("--sampler heun:3@2 --teacher pixels", ["--sampler heun:3@2", "no null class"]),
        ("--sampler dpm++:3 --teacher pixels", ["--sampler dpm++:3", "text-to-image"]),
        ("--sampler lcm:4 --teacher pixels", ["--sampler lcm:4", "fresh noise at every step", "euler or ddim"]),
        ("--sampler heun:3 --teacher pixels --precision int8", ["--precision 'int8'", "float32, bfloat16, float16"]),
        ("--sampler heun:3 --teacher absent", ["absent"]),
        ("--sampler heun:3 --teacher pixels --out pictures", ["pictures: holds other files"]),
        ("--sampler heun:3 --teacher pixels --out prompts.txt", ["prompts.txt is not a folder"]),
    ],
)
def test_pairs_that_can_not_be_made_are_refused_before_anything_is_written(
    run: Run, place: Path, options: str, fragments: list[str]
) -> None:
    before = sorted(place.rglob("*"))
    out = "" if "--out" in options else "--out new"
    refused(run(f"fewstep data pairs --num 4 {out} {options}"), *fragments)
    assert sorted(place.rglob("*")) == before


def test_a_student_is_no_teacher_of_pairs(run: Run) -> None:
    assert run("fewstep data pairs --teacher pixels --num 4 --sampler heun:3 --out heun")[0] == 0
    assert run("fewstep distill init.yaml")[0] == 0
    answer = run("fewstep data pairs --teacher runs/init --num 4 --sampler heun:3 --out more")
    refused(answer, "runs/init", "few-step student")


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ("regression.pairs=absent", ["absent: holds no pairs", "fewstep data pairs"]),
        ("regression.pairs=other", ["other: pairs of another teacher"]),
        ("regression.sampler=heun:4", ["heun: pairs of another sampler (heun:3) than asked for (heun:4)"]),
        ("regression.sampler=rk4", ["sampler 'rk4'"]),
        ("regression.lpips=absent.pt", ["regression.lpips: absent.pt", "TorchScript"]),
        ("regression.decoder=tiny", ["for lpips"]),
        ("regression.decoder=tiny --set regression.lpips=distance.pt", ["regression.decoder", "no latents"]),
        ("student.timesteps=[2]", ["student.timesteps", "sigma_max"]),
        ("student.num_timesteps=4", ["trains one timestep"]),
    ],
)
def test_a_regression_that_can_not_run_is_refused_before_anything_is_written(
    run: Run, place: Path, settings: str, fragments: list[str]
) -> None:
    assert run("fewstep data pairs --teacher pixels --num 4 --sampler heun:3 --out heun")[0] == 0
    shutil.copytree("heun", "other")
    description = json.loads(Path("other/pairs.json").read_text())
    Path("other/pairs.json").write_text(json.dumps(description | {"teacher": "0123456789abcdef"}))
    for recipe in ("init.yaml", "student.yaml --set init_from=null"):
        if recipe == "init.yaml" or "student." not in settings:
            refused(run(f"fewstep distill {recipe} --set {settings}"), *fragments)
    assert not (place / "runs").exists()


def test_a_start_that_is_not_there_and_can_not_be_made_is_told(run: Run) -> None:
    refused(run(STUDENT), "init_from: sdxl-1step-init: data/pairs: holds no pairs", "fewstep data pairs")
    none = run(f"{STUDENT} --set init_from=sdxl-1step-init@2")
    refused(none, "init_from: ", "sdxl-1step-init: no such run; `fewstep distill sdxl-1step-init` makes it")
    assert not Path("runs").exists()


def test_pairs_of_text_are_not_drawn_first_but_counted(run: Run) -> None:
    line = f"{INIT} --set regression.num"
    told = "pairs of text need prompts; draw them with `fewstep data pairs --teacher sdxl --num 6 --sampler euler:4@8"
    refused(run(f"{line}=6"), f"regression.num: {told} --prompts FILE --out pairs`")
    assert run(f"{PAIRS} --out pairs")[0] == 0
    refused(run(f"{line}=7"), "pairs: pairs of another number (6) than asked for (7)")
    assert run(f"{line}=6")[0] == 0
