"""Which metric sees which damage, and which is blind?

Real images, as many others of the same source as a perfect generator would give, and these damaged in one way each:
every metric of the table with its noise floor, its value and its 95 % interval of the undamaged images, and its value
of the damaged ones, marked where it lies outside of that interval: `+` where it is worse, as it should be, `!` where
it is better. Without a mark the metric is blind to the damage, at this number of images.

    python benchmarks/metric_damage.py [FOLDER]

On the embedded shapes, in the features of a small CLIP that is trained on them first (a minute); with a FOLDER also on
its `fashion_mnist_test.parquet` in the features of its `inception_768.pt` (two minutes), and with its
`lpips_squeeze.pt`. Prints Markdown.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel

from fewstep.data.images import ImageSet, load_images
from fewstep.data.settings import DataSettings
from fewstep.embedded import shapes
from fewstep.embedded.settings import TextModelConfig
from fewstep.embedded.small_models import build_tokenizer
from fewstep.evaluation.clip import Clip
from fewstep.evaluation.extractors import TorchScriptExtractor, train_classifier
from fewstep.evaluation.gathering import CheckProbe, FeatureProbe, Gathered, Probe, gather
from fewstep.evaluation.judge import check_scenes
from fewstep.evaluation.lpips import pair_distance
from fewstep.evaluation.metrics import floor, measure
from fewstep.evaluation.probes import ClipProbe, ColourProbe, PatchProbe
from fewstep.metric_table import METRICS, cost
from fewstep.seeding import generator

TINT = (1.0, 0.9, 0.8)  # of red, green and blue
NOISE = 12  # of 255
PAIRS_OF, EACH = 16, 4  # subjects whose LPIPS is taken, and images of each
CLIP_STEPS, CLIP_BATCH, CLIP_WIDTH, TOKENS = 400, 128, 64, 24
Damage = Callable[["Case"], Tensor]


@dataclass(frozen=True)
class Case:
    """Real images, others in the order of their subjects in turn (classes or prompts), and what reads numbers off."""

    reals: Tensor  # uint8 (N, C, H, W), of the subjects in turn, too
    others: Tensor  # (M, C, H, W)
    kept: Sequence[bool]  # by subject: what is left where classes are dropped
    probes: Sequence[Probe]
    perceptual: Callable[[Tensor], Tensor] | None = None

    def gathered(self, images: Tensor) -> Gathered:
        num, pairs = len(self.kept), dict[str, Tensor]()
        if self.perceptual:
            pairs["lpips"] = torch.stack([self.perceptual(images[k::num][:EACH]) for k in range(min(PAIRS_OF, num))])
        found = gather([images], self.probes, len(images), "damaged", num_groups=10, prompts=[""] * num)
        return Gathered(found.count, found.groups, found.numbers, found.pictures, found.prompts, pairs)


def blur(case: Case) -> Tensor:
    once = avg_pool2d(case.others.float(), 3, 1, 1, count_include_pad=False)
    return avg_pool2d(once, 3, 1, 1, count_include_pad=False).round().byte()


def noise(case: Case) -> Tensor:
    added = NOISE * torch.randn(case.others.shape, generator=generator(0, "noise"))
    return (case.others + added).round().clamp(0, 255).byte()


def tint(case: Case) -> Tensor:
    return (case.others * torch.tensor(TINT[-case.others.shape[1] :])[:, None, None]).round().byte()


def dropped(case: Case) -> Tensor:
    """Half of the classes: theirs are images of the others."""
    num, left = len(case.kept), [subject for subject, kept in enumerate(case.kept) if kept]
    subject = [k if case.kept[k] else left[k % len(left)] for k in range(num)]
    rows = torch.tensor([index // num * num + subject[index % num] for index in range(len(case.others))])
    return case.others[rows.clamp(max=len(case.others) - 1)]


def duplicates(case: Case) -> Tensor:
    """Of every class or prompt the same image again and again."""
    return case.others[torch.arange(len(case.others)) % len(case.kept)]


def copies(case: Case) -> Tensor:
    """Real images."""
    return case.reals[: len(case.others)]


def shuffled(case: Case) -> Tensor:
    """Every prompt or class has the image of another."""
    return case.others.roll(7, 0)


DAMAGES: dict[str, Damage] = {
    each.__name__: each for each in (blur, noise, tint, dropped, duplicates, copies, shuffled)
}


def judged(case: Case) -> dict[str, dict[str, str]]:
    """By metric: floor, undamaged with its interval, and each damage with its mark."""
    real = case.gathered(case.reals)
    floors = floor(real, len(case.others))
    sound, intervals = measure(real, case.gathered(case.others))
    found = {name: {"floor": text(name, floors.get(name))} for name in sound}
    for name, value in sound.items():
        low, high = intervals[name]
        found[name]["undamaged"] = f"{text(name, value)} ({text(name, low)} … {text(name, high)})"
    for damage, make in DAMAGES.items():
        values, _ = measure(real, case.gathered(make(case)), intervals=False)
        for name, value in values.items():
            found[name][damage] = f"{text(name, value)} {mark(name, sound[name], intervals[name], value)}".rstrip()
    return found


def mark(name: str, sound: float, interval: tuple[float, float], value: float) -> str:
    low, high = interval
    if low <= value <= high:
        return ""
    return "+" if cost(name, value) > cost(name, sound) else "!"


def text(name: str, value: float | None) -> str:
    return "–" if value is None else METRICS[name].text(value)


def markdown(title: str, found: dict[str, dict[str, str]]) -> str:
    names = ["floor", "undamaged", *DAMAGES]
    lines = [["metric", *names], ["---"] * (1 + len(names))]
    lines += [[name.replace("_", " "), *(row[each] for each in names)] for name, row in found.items()]
    return "\n".join([f"\n{title}\n", *(f"| {' | '.join(line)} |" for line in lines)])


@dataclass
class Cached:
    """An extractor that looks at every image once."""

    of: Any
    name: str = "cached"
    identity: str = "cached"
    known: dict[bytes, Tensor] = field(default_factory=dict)

    def features(self, images: Tensor) -> Tensor:
        keys = [image.numpy().tobytes() for image in images]
        if new := {key: row for row, key in enumerate(keys) if key not in self.known}:
            self.known |= dict(zip(new, self.of.features(images[[*new.values()]]), strict=True))
        return torch.stack([self.known[key] for key in keys])


def small_clip(folder: Path, steps: int = CLIP_STEPS) -> Clip:
    """A `CLIPModel` of the embedded shapes, by its contrastive loss (arXiv 2103.00020, figure 3)."""
    settings = TextModelConfig(num_tokens=TOKENS)
    tokenizer = build_tokenizer(settings, [scene.caption for scene in shapes.one_object_scenes()])
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    both = {"hidden_size": CLIP_WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text_tower = {**both, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    vision_tower = {**both, "image_size": shapes.IMAGE_SIZE, "patch_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text_tower, vision_config=vision_tower, projection_dim=CLIP_WIDTH))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    clip = Clip(folder, "cpu")
    images, network = shapes.shapes(1, steps * CLIP_BATCH), clip.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        batch = images.batch(torch.arange(step * CLIP_BATCH, (step + 1) * CLIP_BATCH))
        tokens = clip.tokenizer(batch["caption"], padding="max_length", max_length=TOKENS, return_tensors="pt")
        seen = normalize(clip.kind.embed(network, clip.preprocessing(batch["image"], "cpu")), dim=1)
        told = normalize(network.text_projection(network.text_model(tokens.input_ids).pooler_output), dim=1)
        logits = network.logit_scale.exp() * seen @ told.T
        loss = (cross_entropy(logits, torch.arange(CLIP_BATCH)) + cross_entropy(logits.T, torch.arange(CLIP_BATCH))) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    return clip


def of_shapes(clip: Clip, perceptual: Callable[[Tensor], Tensor] | None, num_real: int = 1600, num: int = 640) -> Case:
    """80 prompts in turn, of one object and of two; dropped are those whose first object is of three of six colours."""
    scenes = [*shapes.one_object_scenes()[:60], *shapes.two_object_scenes(20)]
    prompts = [scene.caption for scene in scenes]
    draws = generator(0, "damage")
    reals, others = (shapes.render([scenes[k % 80] for k in range(count)], draws) for count in (num_real, num))
    kept = [scene.things[0].colour in ("red", "green", "blue") for scene in scenes]
    probes: list[Probe] = [FeatureProbe(clip), PatchProbe(clip, 16), ClipProbe(clip, prompts), ColourProbe()]
    return Case(reals, others, kept, [*probes, CheckProbe(check_scenes(prompts), "")], perceptual)


def in_turn(images: ImageSet, num_classes: int, first: int, num: int) -> Tensor:
    """`num` images of the classes in turn, after the `first` of each."""
    order = torch.randperm(images.length, generator=generator(0, "in turn"))
    labels: Any = images.labels
    of_class = [order[labels[order] == label] for label in range(num_classes)]
    return images.fetch(torch.stack([of_class[k % num_classes][first + k // num_classes] for k in range(num)]))


def of_classes(
    images: ImageSet, network: Any, perceptual: Callable[[Tensor], Tensor] | None, num_real: int, num: int, steps: int
) -> Case:
    """Of ten classes five are dropped; None as the network takes the features of the classifier of the classes."""
    reals, others = in_turn(images, 10, 0, num_real), in_turn(images, 10, num_real // 10 + 1, num)
    classifier = train_classifier(images, reals.shape[1], 10, steps)
    features: Any = Cached(network) if network else classifier
    probes: list[Probe] = [FeatureProbe(features), ColourProbe(), CheckProbe(classifier.check, "")]
    return Case(reals, others, [label < 5 for label in range(10)], probes, perceptual)


if __name__ == "__main__":
    folder, cpu, began = Path(sys.argv[1]) if len(sys.argv) > 1 else None, torch.device("cpu"), time.process_time()
    distance = (
        {size: pair_distance(str(folder / "lpips_squeeze.pt"), cpu, 3, size) for size in (28, 32)} if folder else {}
    )
    with tempfile.TemporaryDirectory() as place:
        trained = small_clip(Path(place))
    print(f"CLIP: {time.process_time() - began:.0f} s of CPU", file=sys.stderr)
    print(markdown("Embedded shapes, 640 against 1,600", judged(of_shapes(trained, distance.get(32)))), flush=True)
    if folder:
        fashion = load_images(DataSettings(source=str(folder / "fashion_mnist_test.parquet")), 28, 3, 10)
        inception = TorchScriptExtractor(folder / "inception_768.pt")
        case = of_classes(fashion, inception, distance[28], 400, 200, 300)
        print(markdown("Fashion-MNIST, 200 against 400", judged(case)))
    print(f"{time.process_time() - began:.0f} s of CPU", file=sys.stderr)
