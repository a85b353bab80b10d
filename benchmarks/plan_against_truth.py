"""What plans predict for whole recipes on the CPU, against what PyTorch's allocator gave out; at their own batch.

python benchmarks/plan_against_truth.py
"""

from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from fewstep.commands.teachers import of_recipe
from fewstep.models.outline import Outline
from fewstep.networks.precision import DTYPES
from fewstep.recipes.loading import load_recipe
from fewstep.training.dmd2 import DMD2
from fewstep.training.planning import plan
from fewstep.training.roles import make_roles

RECIPES = {
    "digits-4step": [],
    "shapes-4step": [],
    "shapes-4step-lora": [],
    "shapes-4step-lora, blocks": ["checkpointing=blocks"],
}


class Real(Outline):
    """The same with weights, which are zeros."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def run(recipe: object, outline: Outline) -> None:
    """Two steps in the student's turn: the moments are made at the end of the first."""
    model = outline.fresh()
    model.denoiser = model.denoiser.to_empty(device="cpu")
    for tensor in model.denoiser.parameters():
        tensor.data.zero_()
    num_stops = recipe.student.num_timesteps if recipe.critic.condition_on_stop else 0
    dtype = DTYPES[recipe.precision]
    roles = make_roles(model, recipe.guidance_scale, None, num_stops, dtype, recipe.checkpointing, recipe.lora)
    method = DMD2(recipe, model, roles, recipe.num_steps, recipe.batch_size, recipe.seed)
    method.draw_stop = lambda step: 0
    for step in (0, recipe.student_every):
        method.step([(range(recipe.batch_size), model.batch(recipe.batch_size))], step)


def main() -> None:
    for name, overrides in RECIPES.items():
        recipe = load_recipe(name.partition(",")[0], overrides)
        outline = of_recipe(load_recipe(recipe.teacher))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            run(recipe, outline)
        events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
        measured = max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))
        predicted = plan(recipe, outline, granule=1).peak
        print(f"| {name} | {predicted / 1e6:.1f} | {measured / 1e6:.1f} | {predicted / measured:.3f} |", flush=True)


if __name__ == "__main__":
    main()
