"""`fewstep recipes`: lists recipes, shows one with the meaning of every setting, checks one."""

from rich.console import Console
from rich.table import Table

from fewstep.commands.options import Recipes
from fewstep.errors import UserError
from fewstep.recipes.loading import documented, load_recipe, recipe_names


def recipes(given: Recipes) -> None:
    """Prints a table of the recipes, a table of one's settings, or that one is valid."""
    if given.action == "list" and given.recipe is None:
        table = Table("recipe", "kind", "what it does")
        for name in recipe_names():
            recipe = load_recipe(name)
            table.add_row(name, recipe.kind, recipe.description)
        Console().print(table)
    elif given.action not in ("show", "check") or given.recipe is None:
        raise UserError("write `fewstep recipes`, `fewstep recipes show NAME` or `fewstep recipes check NAME`")
    else:
        recipe = load_recipe(given.recipe, given.set_)  # which is the check
        table = Table("setting", "value", "meaning", title=given.recipe)
        for key, value, text in documented(recipe):
            table.add_row(key, str(value), text)
        valid = f"{given.recipe}: a valid {recipe.kind} recipe"
        Console().print(table if given.action == "show" else valid, highlight=False)
