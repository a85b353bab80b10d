"""`fewstep recipes`: lists recipes, shows one with the meaning of every setting, checks one, or makes one's own."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fewstep.commands.options import Recipes
from fewstep.errors import UserError
from fewstep.files import write_text
from fewstep.recipes.loading import explained, load_recipe, recipe_names

TAUGHT_HERE = "digits-teacher"  # the recipe of a teacher on pixels, which `new` writes for other images


def recipes(given: Recipes) -> None:
    """Prints a table of the recipes, one as a file would hold it, or that it is valid; or writes files."""
    if given.action != "new" and (given.source or given.size or given.teacher):
        raise UserError("--source, --size and --teacher: are for `fewstep recipes new NAME`")
    if given.action == "list" and given.recipe is None:
        table = Table("recipe", "kind", "what it does")
        for name in recipe_names():
            recipe = load_recipe(name)
            table.add_row(name, recipe.kind, recipe.description)
        Console().print(table)
    elif given.action not in ("show", "check", "new") or given.recipe is None:
        ways = ", ".join(f"`fewstep recipes {action} NAME`" for action in ("show", "check", "new"))
        raise UserError(f"write `fewstep recipes`, or one of {ways}")
    elif given.action == "new":
        _new(given, given.recipe)
    else:
        recipe = load_recipe(given.recipe, given.set_)  # which is the check
        if given.action == "show":
            head = f"# {given.recipe}, whole: saved as a .yaml file it is a recipe of your own."
            print(head, *explained(recipe), sep="\n")
        else:
            print(f"{given.recipe}: a valid {recipe.kind} recipe")


def _new(given: Recipes, name: str) -> None:
    """Writes NAME-teacher.yaml and its students' recipes here, or the one of a teacher that is brought along."""
    from fewstep.commands.places import tell_done
    from fewstep.commands.runs import pick_device
    from fewstep.recipes import new

    if name != Path(name).name or name.startswith((".", "-")) or len(name) > 100:
        raise UserError(f"{name!r}: is the beginning of file names, such as cats")
    if given.set_:
        raise UserError("--set: is for show and check; change the files that new writes")
    base = load_recipe(given.from_, verb="distill")
    device, taught_here = pick_device(base.device), base.teacher == TAUGHT_HERE
    if taught_here and (given.teacher or not given.source):
        raise UserError(f"--from {given.from_}: takes your images as --source photos, and teaches the teacher itself")
    if given.size and not taught_here:
        raise UserError(f"--size: is the teacher's, which {given.from_} does not teach")
    if given.source and not given.teacher and not taught_here and base.teacher in recipe_names():
        raise UserError(f"--teacher: {base.teacher} is trained on other images; name the run of one that is on these")
    if taught_here:
        recipes, notes, found = new.suggest(name, str(given.source), given.size, device.type)
    else:
        recipes, notes, found = new.like(given.from_, name, given.source, given.teacher)
    files = {end: Path(f"{name}-{end}.yaml") for end in recipes}
    for file in files.values():
        if file.exists():
            raise UserError(f"{file}: exists already; choose another NAME, or remove it")
    print(found or "", end="\n" if found else "")
    for end, recipe in recipes.items():
        if taught_here:
            minutes = new.seconds_per_step(recipe, recipes["teacher"].model, device) * recipe.num_steps / 60
            print(f"{files[end]}: {recipe.num_steps:,} steps, about {_duration(minutes)} here ({device.type})")
        head = f"Made by `fewstep recipes new {name} --from {given.from_}`; `fewstep recipes check` tells mistakes."
        write_text(files[end], new.text(recipe, notes, head))
    verbs = {end: "teach" if recipe.kind == "teach" else "distill" for end, recipe in recipes.items()}
    tell_done(", ".join(map(str, files.values())), *(f"{verbs[end]} {file}" for end, file in files.items()))


def _duration(minutes: float) -> str:
    return f"{max(minutes, 1):.0f} minutes" if minutes < 100 else f"{minutes / 60:.0f} hours"
