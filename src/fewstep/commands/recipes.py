"""`fewstep recipes`: lists recipes, shows one with the meaning of every setting, checks one."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fewstep.recipes.loading import documented, load_recipe, recipe_names


def list_recipes() -> None:
    """A table of the recipes that come with fewstep."""
    table = Table("recipe", "kind", "what it does")
    for name in recipe_names():
        recipe = load_recipe(name)
        table.add_row(name, recipe.kind, recipe.description)
    Console().print(table)


def show_recipe(name: str, overrides: Sequence[str]) -> None:
    """Every setting of a recipe, its value and what it means."""
    table = Table("setting", "value", "meaning", title=name)
    for key, value, text in documented(load_recipe(name, overrides)):
        table.add_row(key, str(value), text)
    Console().print(table)


def check_recipe(name: str, overrides: Sequence[str]) -> None:
    """Loads a recipe; a mistake in it ends the command with one line."""
    recipe = load_recipe(name, overrides)
    Console().print(f"{name}: a valid {recipe.kind} recipe", highlight=False)
