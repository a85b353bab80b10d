"""Judging a run while it trains, as `fewstep evaluate` judges it afterwards."""

from pathlib import Path

import torch

from fewstep.commands.evaluate import MAX_REAL, Judge, classifier_path, make_judge
from fewstep.data.images import ImageSet
from fewstep.errors import UserError
from fewstep.evaluation.extractors import TorchScriptExtractor, extract
from fewstep.evaluation.generation import default_sampler, generate
from fewstep.networks.latent_model import LatentModel
from fewstep.networks.pixel_model import PixelModel
from fewstep.recipes.schema import DistillRecipe, TeachRecipe
from fewstep.training.loop import Evaluate
from fewstep.training.method import Method

SCORES = ("fid", "precision", "recall", "accuracy")
REAL_BATCH = 250  # pictures of 1024 pixels are 3 MB each


def make_evaluation(
    recipe: TeachRecipe | DistillRecipe, model: PixelModel | LatentModel, images: ImageSet, run: Path
) -> Evaluate | None:
    """What the loop calls to judge the averaged weights; None where the recipe asks for no evaluation.

    Image i has the noise and the class that it has in `fewstep evaluate`, which therefore finds the same numbers.
    Raises UserError if the images can't be judged in the recipe's features.
    """
    if not recipe.evaluation.every:
        return None
    judge, num = open_judge(recipe, model, images, run.parent), recipe.evaluation.num_samples
    labels = model.conditioner.labels(num) if isinstance(model, PixelModel) else torch.zeros(num)

    def evaluate(method: Method) -> dict[str, float]:
        with method.averaged_model() as averaged:
            if isinstance(averaged, LatentModel):  # a copy: the grids keep their prompts
                averaged.prompts = (images.captions or [""])[:num]
            sampler = default_sampler(averaged)
            fakes = generate(averaged, sampler, range(num))
        row = judge.row(run.name, sampler, fakes, labels, per_second=0)
        return {name: getattr(row, name) for name in SCORES if getattr(row, name) is not None}

    return evaluate


def open_judge(
    recipe: TeachRecipe | DistillRecipe, model: PixelModel | LatentModel, images: ImageSet, folder: Path
) -> Judge:
    """The judge in the recipe's features; a classifier is kept in `folder`, where `fewstep evaluate` looks for it."""
    features = recipe.evaluation.features
    if isinstance(model, PixelModel):
        return make_judge(images, model.config, features, classifier_path(recipe.data, folder))
    if features == "classifier":
        raise UserError("evaluation.features: captioned images have no classes to train a classifier on; give a file")
    extractor = TorchScriptExtractor(Path(features))
    parts = torch.arange(min(images.length, MAX_REAL)).split(REAL_BATCH)
    return Judge(extractor, None, torch.cat([extract(extractor, images.fetch(part)) for part in parts]))
