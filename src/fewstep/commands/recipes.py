"""`fewstep recipes`: lists recipes, shows one with the meaning of every setting, checks one."""

from rich.console import Console
from rich.table import Table

from fewstep.commands.options import Recipes
from fewstep.errors import UserError
from fewstep.recipes.loading import documented, load_recipe, recipe_names
from fewstep.recipes.schema import AnyRecipe


def recipes(given: Recipes) -> None:
    """Prints a table of the recipes, a table of one's settings, or that one is valid."""
    actions = {"show": show, "check": check}
    if given.action == "list" and given.recipe is None:
        table = Table("recipe", "kind", "what it does")
        for name in recipe_names():
            recipe = load_recipe(name)
            table.add_row(name, recipe.kind, recipe.description)
        Console().print(table)
    elif given.action in actions and given.recipe is not None:
        actions[given.action](given.recipe, load_recipe(given.recipe, given.set_))
    else:
        raise UserError("write `fewstep recipes`, `fewstep recipes show NAME` or `fewstep recipes check NAME`")


def show(name: str, recipe: AnyRecipe) -> None:
    """Every setting, its value and what it means."""
    table = Table("setting", "value", "meaning", title=name)
    for key, value, text in documented(recipe):
        table.add_row(key, str(value), text)
    Console().print(table)


def check(name: str, recipe: AnyRecipe) -> None:
    """Loading it was the check."""
    Console().print(f"{name}: a valid {recipe.kind} recipe", highlight=False)
