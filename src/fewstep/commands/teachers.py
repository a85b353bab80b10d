"""What a recipe's teacher is like, where its weights may not be: for plans and benchmarks."""

from pathlib import Path
from typing import Any

import torch

from fewstep.embedded.small_models import SCHEDULE, build_autoencoder, build_unet
from fewstep.errors import UserError
from fewstep.models.loading.outlines import guess, of_parts, of_settings, outline_of, standard
from fewstep.models.outline import Outline
from fewstep.networks.families import FAMILIES, use_family
from fewstep.recipes.loading import load_recipe, read_run_recipe, recipe_names
from fewstep.recipes.schema import DistillRecipe
from fewstep.runtime.checkpoint import RECIPE
from fewstep.runtime.runs import find, is_run

RUNS = Path("runs")


def find_outline(recipe: DistillRecipe, name_of_recipe: str, architecture: str | None) -> tuple[Outline, str]:
    """The teacher without its weights, and where its shapes are from; raises UserError if nothing tells them."""
    use_family(recipe.teacher_family)
    if architecture:
        return standard(architecture), f"a teacher of the shapes of {architecture}"
    name = recipe.teacher
    for place in (name, str(RUNS / name)):
        folder = find(place).folder if is_run(place) else Path(place)
        if outline := outline_of(folder, recipe.teacher_config):
            return outline, f"the teacher in {folder}"
    if name in recipe_names() or Path(f"{name}.yaml").is_file():
        taught = load_recipe(name if name in recipe_names() else f"{name}.yaml", verb="teach")
        return of_recipe(taught), f"the teacher of {name}"
    if known := guess(name, str(recipe.teacher_config), name_of_recipe):
        return standard(known), f"a teacher of the shapes of {known}, by its name (--architecture takes others)"
    raise UserError(f"teacher: {name} is not here; say what it is like with --architecture sdxl, sd15 or sd21")


def of_recipe(recipe: Any) -> Outline:
    """The outline of the teacher that a `teach` recipe trains."""
    if recipe.kind == "teach":
        return of_settings(FAMILIES["pixel"], recipe.model)
    config, name = recipe.model, recipe.model.autoencoder
    run = next((each for each in (Path(name), RUNS / name) if is_run(each)), None)
    encoded: Any = read_run_recipe(run / RECIPE) if run else load_recipe(name)
    with torch.device("meta"):
        vae = build_autoencoder(encoded.model)
        network = build_unet(config, vae)
    family = FAMILIES["StableDiffusionXLPipeline" if config.architecture == "sdxl" else "StableDiffusionPipeline"]
    scheduler = SCHEDULE | {"prediction_type": config.prediction_type}
    return of_parts(family, {"vae": vae, family.part: network}, scheduler, tokens=config.num_tokens)
