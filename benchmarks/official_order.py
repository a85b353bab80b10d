"""CPU seconds of a cycle of DMD2 on a small SDXL: ours against the order of passes of the official system.

PYTHONPATH=src python benchmarks/official_order.py [ROUNDS] [BATCH]

A cycle is one update of the student and five of the critic, by the settings of `sdxl-4step` but for what a row names.
`official` below is the published order, pass by pass, out of the same parts; what it gives both optimizers is first
compared with what `gan.independent_noise`, which means the same, gives them. The rows take turns on the same networks
and optimizers, in one process, in another order each round; step k of round r stops at timestep (r + k) mod 4 in all of
them. FLOPs are torch's count.
"""

import random
import statistics
import sys
import time
from functools import partial
from itertools import chain

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.diffusion import losses
from fewstep.models.loading.outlines import AUTOENCODER, SCHEDULER, STANDARDS, of_parts
from fewstep.networks.families import FAMILIES
from fewstep.networks.features import features
from fewstep.recipes.loading import load_recipe
from fewstep.runtime.allocation import keep_freed_memory
from fewstep.seeding import Random
from fewstep.training.benchmarking import make_method, parts_of
from fewstep.training.dmd2 import DMD2
from fewstep.training.roles import Roles

SMALL = {  # SDXL's structure at 0.15 of its width, with 8 for 10 transformer blocks in the deepest stacks
    "block_out_channels": (48, 96, 192),
    "attention_head_dim": (3, 6, 12),
    "transformer_layers_per_block": (1, 2, 8),
    "cross_attention_dim": 128,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 160 + 6 * 32,
    "norm_num_groups": 8,
}
SHARED, CYCLE = "gan.independent_noise=false", "critic.samples=cycle"
OFFICIAL = "the official order"
ROWS = {
    OFFICIAL: [],
    "ours, noise shared": [SHARED],
    "ours, `critic.samples: cycle`": [SHARED, CYCLE],
    "ours, `cycle`, half the reals": [SHARED, CYCLE, "gan.real_share=0.5"],
}


def official(method, parts, step):
    """One iteration; left out is what costs next to nothing, as x0 for a log and a noised sample that nobody reads."""
    [(rows, batch)] = parts
    turn, settings = method.turn(step), method.settings
    draws = Random(method.seed, step, method.model.device).draws("dmd2", rows, method.batch_size)
    times, schedule = method.timesteps[:, None].expand(-1, len(rows)), method.schedule
    noise = draws.randn(*method.model.shape, before=(turn.stop + 1,))
    condition = method.model.draw_condition(method.model.encode_condition(batch), draws)
    x_t = schedule.pure_noise(noise[0])
    with torch.no_grad():
        for k in range(turn.stop):
            x0 = method.student(x_t, times[k], condition)
            x_t = schedule.add_noise(x0, noise[k + 1], times[k + 1])
    with torch.set_grad_enabled(turn.student):
        fake = method.student(x_t, times[turn.stop], condition)
    if turn.student:
        update_student(method, fake, condition, draws)
    fake, real = fake.detach(), method.model.encode_x0(batch, draws)
    x_t, t = method.noised(fake, method.critic_levels, draws)
    x0_hat = method.critic(x_t, t, condition)
    loss = losses.denoising_loss(x0_hat, fake, method.critic.coefficients(t)[1])
    # Three passes in a row, and then one backward pass for all of their graphs.
    gan = losses.gan_fake_loss(logits_of(method, fake, condition, draws))
    gan = gan + losses.gan_real_loss(logits_of(method, real, condition, draws))
    (loss + settings.gan.critic_weight * gan).mean().backward()
    method.critic_optimizer.step(torch.tensor(True))
    method.advance(turn)


def update_student(method, fake, condition, draws):
    """Its losses, of the frozen critic's pass, the teacher's and the GAN's own, and one backward pass through all."""
    x_t, t = method.noised(fake, method.student_levels, draws)
    with torch.no_grad():
        critic_x0, teacher_x0 = method.critic(x_t, t, condition), method.teacher(x_t, t, condition)
    loss = losses.dmd_loss(fake, teacher_x0, critic_x0)
    trained = [*chain(method.critic.parameters(), method.discriminator.parameters())]
    for parameter in trained:
        parameter.requires_grad_(False)
    gan = losses.gan_student_loss(logits_of(method, fake, condition, draws))
    for parameter in trained:
        parameter.requires_grad_(True)
    (loss + method.settings.gan.student_weight * gan).mean().backward()
    method.student_optimizer.step(torch.tensor(True))


def logits_of(method, x0, condition, draws):
    x_t, t = method.noised(x0, method.critic_levels, draws)
    return method.discriminator(features(method.critic, method.feature_layer, x_t, t, condition))


def make(overrides, batch, like=None):
    """A method, on the networks of another or new ones, and the parts of its batch, of latents of 32x32."""
    family, cpu = FAMILIES["StableDiffusionXLPipeline"], torch.device("cpu")
    recipe = load_recipe("sdxl-4step", [f"batch_size={batch}", "precision=float32", *overrides])
    with torch.device("meta"):
        network, vae = UNet2DConditionModel(**STANDARDS["sdxl"]["network"] | SMALL), AutoencoderKL(**AUTOENCODER)
    outline = of_parts(family, {"vae": vae, family.part: network}, SCHEDULER, size=256)
    if like:
        roles = Roles(like.teacher, like.student, like.critic, like.discriminator, like.feature_layer)
        method = DMD2(recipe, like.model, roles, recipe.num_steps, batch, recipe.seed)
        method.student_optimizer, method.critic_optimizer = like.student_optimizer, like.critic_optimizer
    else:
        method = make_method(recipe, outline, cpu)
    # step k of cycle r stops at r + k; with `cycle` the first step decides
    method.fakes.draw_stop = lambda step: sum(divmod(step, recipe.student_every)) % method.num_noises
    [(rows, given)] = parts_of(recipe, outline, cpu)
    draws = torch.Generator().manual_seed(0)
    return method, [(rows, {name: torch.randn(value.shape, generator=draws) for name, value in given.items()})]


def cycle(method, parts, number, step):
    every = method.settings.student_every
    for each in range(every * number, every * (number + 1)):
        step(method, parts, each)


def gradients(step, batch):
    """What a cycle gives the optimizers, one tensor an update."""
    method, parts = make([], batch)
    found = []
    for optimizer in (method.student_optimizer, method.critic_optimizer):
        optimizer.step = partial(noted, optimizer, optimizer.step, found)
    cycle(method, parts, 1, step)
    return found


def noted(optimizer, update, found, finite):
    found.append(torch.cat([p.grad.flatten() for p in optimizer.parameters]))
    return update(finite)


def flops(method, parts, step):
    """Of a mean cycle: calls in a rollout are 7 and 8 in these two, 7.5 in the mean of all stops."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # whose products are counted
        for number in (1, 2):
            cycle(method, parts, number, step)
    return counter.get_total_flops() / 2


def main(rounds=12, batch=2):
    torch.set_num_threads(1)
    keep_freed_memory()
    pairs = list(zip(gradients(official, batch), gradients(DMD2.step, batch), strict=True))
    apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    print(f"gradients of {len(pairs)} updates of a cycle: relative distance from ours at most {apart:.1e}")
    methods = {}
    for name, overrides in ROWS.items():
        if batch > 1 or "gan.real_share=0.5" not in overrides:
            like = methods[OFFICIAL][0] if methods else None
            methods[name] = (*make(overrides, batch, like), DMD2.step if methods else official)
    size = sum(p.numel() for p in methods[OFFICIAL][0].student.parameters()) / 1e6
    print(f"{size:.1f} M parameters, batch {batch}, torch {torch.__version__}", flush=True)
    counts = {name: flops(method, parts, step) for name, (method, parts, step) in methods.items()}  # which warms up
    seconds = {name: [] for name in methods}
    for number in range(rounds):
        for name in random.Random(number).sample(list(methods), len(methods)):
            method, parts, step = methods[name]
            start = time.process_time()
            cycle(method, parts, number, step)
            seconds[name].append(time.process_time() - start)
    print("| | TFLOP | of the official | CPU s, median | of the official in its round, median (min to max) |")
    print("|---|--:|--:|--:|--:|")
    for name, found in seconds.items():
        ratios = [each / theirs for each, theirs in zip(found, seconds[OFFICIAL], strict=True)]
        told = [f"{counts[name] / 1e12:.3f}", f"{counts[name] / counts[OFFICIAL]:.3f}"]
        told += [f"{statistics.median(found):.2f}"]
        told += [f"**{statistics.median(ratios):.3f}** ({min(ratios):.2f} to {max(ratios):.2f})"]
        print("|", " | ".join([name, *told]), "|")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
