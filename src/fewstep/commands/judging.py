"""Judging a run while it trains, as `fewstep evaluate` judges it afterwards."""

from functools import partial
from pathlib import Path

from fewstep.evaluation.judge import MAX_REAL, Means, make_judge
from fewstep.models.image_model import ImageModel
from fewstep.models.sampler import default_sampler, generate_batches
from fewstep.recipes.schema import StudentRecipe, TeachRecipe, TeachTextRecipe
from fewstep.training.loop import Evaluate
from fewstep.training.method import Method


def make_evaluation(
    recipe: TeachRecipe | TeachTextRecipe | StudentRecipe, model: ImageModel, run: Path
) -> Evaluate | None:
    """What the loop calls to judge the averaged weights; None where the recipe asks for no evaluation.

    The scores of further averages have their names in front: ema0.99995_fid.

    Image i has the noise and the class or prompt that it has in `fewstep evaluate`, which therefore finds the same
    numbers. Raises UserError if the images can't be judged in the recipe's features.
    """
    if not recipe.evaluation.every:
        return None
    asked, num = recipe.evaluation, recipe.evaluation.num_samples
    means = Means(asked.features, asked.resize, asked.clip, asked.clip_prefix, asked.lpips, asked.scorers)
    judge = make_judge(recipe.data, model, means, run.parent, num, MAX_REAL)

    def evaluate(method: Method, step: int) -> dict[str, float]:
        scores: dict[str, float] = {}
        for ema in (None, *method.ema.others):
            title, prefix = f"{run.name}{f' ema{ema}' if ema else ''}, step {step}", f"ema{ema}_" if ema else ""
            with method.averaged_model(ema) as averaged:
                sampler = default_sampler(averaged)
                draw = partial(generate_batches, averaged, sampler, name=title)
                row = judge.row(title, sampler, lambda part, asked: draw(part, asked=asked), num, intervals=False)  # noqa: B023
            scores |= {f"{prefix}{name}": value for name, value in row.values.items()}
        model.release()  # for a step has no need of autoencoder and text encoders
        return scores

    return evaluate
