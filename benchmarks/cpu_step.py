"""CPU seconds of a cycle of DMD2 with this source tree against those of another, and the operations in one.

PYTHONPATH=src python benchmarks/cpu_step.py OTHER/src src [ROUNDS] [SYSTEM ...]

One process a tree, one thread, float32; they take turns, and their order changes every round. A cycle is the student's
update and the critic's up to the next, with what the training loop does around a step; every round has the next stop,
the same for all. Told are medians of CPU time, of the ratio to the first tree within a round, the operations of cycles
of all stops, and a hash of student and critic behind the same cycles: equal hashes are equal numbers, bit for bit.
"""

import hashlib
import random
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

TREES = sys.argv[1:3]
SYSTEMS = ("digits-1step", "digits-4step", "sdxl", "sdxl-lora")


def digits(name):
    """The recipe's method around a network that nobody has trained, and the step's batch."""
    from fewstep.embedded.sources import digits as images
    from fewstep.models.pixel_model import PixelModel
    from fewstep.networks.families.edm import build_unet
    from fewstep.recipes.loading import load_recipe
    from fewstep.training.batches import image_batches
    from fewstep.training.dmd2 import DMD2
    from fewstep.training.roles import make_roles

    recipe, config = load_recipe(name), load_recipe("digits-teacher").model
    model = PixelModel(config, build_unet(config))
    roles = make_roles(model, num_stops=recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0)
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, seed=0)
    return method, image_batches(images(), recipe), recipe.batch_size


def sdxl(name):
    """A small SDXL of 54 M parameters, latents of 32x32, batch 1."""
    from diffusers import AutoencoderKL

    from fewstep.embedded.settings import TextModelConfig
    from fewstep.embedded.small_models import build_pipeline
    from fewstep.models.latent_model import LatentModel
    from fewstep.networks.settings import LoRASettings
    from fewstep.training.dmd2 import DMD2
    from fewstep.training.dmd2_settings import DMD2Settings
    from fewstep.training.roles import make_roles

    small = {"block_out_channels": [96, 192, 384], "layers_per_block": 2, "transformer_layers": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 64}
    config = TextModelConfig(**small, text_width=64, num_tokens=77)
    model = LatentModel(build_pipeline(config, AutoencoderKL(**kinds, **sizes), ["a cat"]))
    lora = LoRASettings(rank=16, alpha=16, targets="lean") if name.endswith("lora") else None
    student = {"num_timesteps": 4, "timesteps": [999, 749, 499, 249], "ema_decay": 0.99}
    gan = {"student_weight": 5e-3, "critic_weight": 1e-2}
    settings = DMD2Settings(student_every=5, student=student, critic={"condition_on_stop": True}, gan=gan)
    method = DMD2(settings, model, make_roles(model, 8.0, num_stops=4, lora=lora), 1000, 1, seed=0)
    batch = {"latent": torch.randn(1, *model.shape), **model.text_condition(["a cat"])}
    return method, lambda step, rows: batch, 1


def work(names):
    """Answers a line with the name of a system by the CPU seconds of its next cycle, "hash" and "count" by those."""
    from fewstep.runtime.tracking import Metrics
    from fewstep.training.benchmarking import _Counter
    from fewstep.training.guard import Guard

    torch.set_num_threads(1)
    with suppress(ImportError):  # of trees from before
        from fewstep.runtime.allocation import keep_freed_memory

        keep_freed_memory()
    systems = {}
    for name in names:
        torch.manual_seed(0)
        systems[name] = (*(digits if "digits" in name else sdxl)(name), Guard(10), Metrics(Path("unused")), [0])

    def cycle(name):
        method, batch_at, size, guard, metrics, (done,) = systems[name]
        start, stop, every = time.process_time(), done % method.num_noises, method.settings.student_every
        method.draw_stop = method.fakes.draw_stop = lambda step: stop  # this tree's and those of before
        for step in range(done * every, done * every + every):
            metrics.add(guard.add(method.step([(range(size), batch_at(step, range(size)))], step)))
        systems[name][-1][0] += 1
        return time.process_time() - start

    for line in sys.stdin:
        name, what = line.split()
        method = systems[name][0]
        if what == "hash":
            state = [*method.student.state_dict().values(), *method.critic.state_dict().values()]
            answer = hashlib.sha256(b"".join(x.numpy().tobytes() for x in state)).hexdigest()[:12]
        elif what == "count":
            with _Counter() as counter:
                for _ in range(method.num_noises):
                    cycle(name)
            answer = counter.num / method.num_noises
        else:
            answer = cycle(name)
        print(answer, flush=True)


class Tree:
    """A process that works with one source tree."""

    def __init__(self, source, names):
        environment = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
        command = [sys.executable, __file__, "--work", *names]
        self.process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True)

    def ask(self, name, what):
        self.process.stdin.write(f"{name} {what}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def main(rounds, names):
    trees = {source: Tree(source, names) for source in TREES}
    print("| system | before, CPU s | after, CPU s | of before | min to max | operations | same numbers |")
    print("|---|--:|--:|--:|--:|--:|---|", flush=True)
    for name in names:
        seconds = {source: [] for source in TREES}
        for each in range(rounds + 1):  # the first warms up
            for source in random.Random(each).sample(TREES, len(TREES)):
                seconds[source].append(float(trees[source].ask(name, "cycle")))
        before, after = (found[1:] for found in seconds.values())
        ratios = [a / b for b, a in zip(before, after, strict=True)]
        same = len({tree.ask(name, "hash") for tree in trees.values()}) == 1
        operations = " to ".join(f"{float(tree.ask(name, 'count')):,.0f}" for tree in trees.values())
        told = [f"{statistics.median(found):.4f}" for found in (before, after)]
        told += [f"{statistics.median(ratios):.3f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        print("|", " | ".join([name, *told, operations, str(same).lower()]), "|", flush=True)


if __name__ == "__main__":
    if TREES[:1] == ["--work"]:
        work(sys.argv[2:])
    else:
        main(int([*sys.argv, 24][3]), sys.argv[4:] or SYSTEMS)
