"""`fewstep plan`: what a distillation takes, and which settings make it fit a card."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console
from rich.table import Table

from fewstep.commands.options import Plan as Order
from fewstep.commands.ranks import check_ranks
from fewstep.commands.teachers import find_outline
from fewstep.errors import UserError
from fewstep.models.outline import Outline
from fewstep.recipes.loading import load_recipe
from fewstep.recipes.schema import DistillRecipe
from fewstep.training.parallel import check_shard
from fewstep.training.planning import TURNS, Plan, picture_bytes
from fewstep.training.planning import plan as plan_of

GB, SPARE = 1e9, 10**9  # bytes that CUDA's context, workspaces and fragmentation take beside what is counted
ROLES = ("teacher", "student", "critic", "discriminator")
LESS = {  # settings that take less arithmetic -> what they change
    "critic.samples=cycle": "one rollout a cycle: fakes are up to a cycle old",
    "gan.features=frozen": "the GAN trains the critic's encoder on no reals",
    "gan.real_share=0.5": "half as many reals: the discriminator's term is noisier",
    "gan.independent_noise=false": "one noised sample for denoising and GAN",
}


def plan(recipe: DistillRecipe, asked: Order) -> None:
    """Prints it."""
    if recipe.kind != "distill":
        raise UserError(f"recipe {asked.recipe}: is of the kind {recipe.kind}; plans are of distillations")
    card = None if asked.memory is None else parse_memory(asked.memory)
    outline, told = find_outline(recipe, asked.recipe, asked.architecture)
    found, console, num = _plan(recipe, outline, asked), Console(), recipe.num_parts(asked.num_ranks)
    parts = "one part" if num == 1 else f"{num} parts"
    ranks = f", of which one of {asked.num_ranks} ranks has {found.rows}" if asked.num_ranks > 1 else ""
    print(f"{asked.recipe}: {told}, batches of {recipe.batch_size}{ranks} in {parts}, {recipe.precision}")
    console.print(_table(found))
    for line in _lines(found, recipe, outline, asked.tflops):
        print(line)
    if card:
        _advise(found, recipe, outline, asked, card)
    if asked.arithmetic:
        print("settings that take less arithmetic, each by itself:")
        for setting, what in LESS.items():
            with suppress(UserError):  # one that does not go with the others
                if load_recipe(asked.recipe, [*asked.set_, setting]) != recipe:
                    _try(found, outline, asked, [setting], f"{setting} ({what})")


def _plan(recipe: DistillRecipe, outline: Outline, asked: Order) -> Plan:
    """Of one of the ranks that are asked about; raises UserError where they can't run the recipe."""
    num, machines = asked.num_ranks, asked.machines
    if num % machines:
        raise UserError(f"--machines {machines}: don't divide {num} ranks equally; take other --ranks")
    check_ranks(recipe, num)
    if recipe.parallel.shard != "none":
        check_shard(recipe, num, here=num // machines)
    return plan_of(recipe, outline, num_ranks=num, machines=machines)


def parse_memory(text: str) -> int:
    """Bytes of a card that is sold as 24GB, which are GiB; raises UserError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:Gi?B?)?", text.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < 10**5:
        raise UserError(f"--memory {text!r}: write the size of a card, such as 24GB")
    return round(float(match[1]) * 2**30)


def _table(found: Plan) -> Table:
    """GB at the peak, by what they are of and by role."""
    unit, each = ("GB", GB) if found.peak >= GB else ("MB", 1e6)
    table = Table(f"{unit} at the peak", *ROLES, "other", "sum")
    rows: dict[str, dict[str, int]] = {}
    for kind, size in found.kinds.items():
        what, _, role = kind.partition(" of the ")
        row = rows.setdefault(what if role else "activations", {})
        row[role or "other"] = row.get(role or "other", 0) + size
    for what in ("weights", "gathered", "copies", "averages", "moments", "gradients", "activations"):
        row = rows.get(what, {})
        if not row and what in ("gathered", "copies"):
            continue
        numbers = [*(row.get(role, 0) for role in (*ROLES, "other")), sum(row.values())]
        table.add_row(what, *(f"{number / each:.2f}" if number else "" for number in numbers))
    return table


def _lines(found: Plan, recipe: DistillRecipe, outline: Outline, tflops: float) -> Iterator[str]:
    """What the table does not say."""
    trained = " + ".join(f"{num / 1e6:,.1f} M of the {role}" for role, num in found.trained.items())
    yield f"trained: {trained}; the teacher has {found.base / 1e6:,.1f} M"
    yield f"peak: {_size(found.peak)}, {found.where}; between steps {_size(found.resting)}"
    if found.main_memory:
        what = "the student's weights, gradients, moments and averages, for its update"
        yield f"in main memory, of each process: {_size(found.main_memory)}, {what}"
    yield f"to spare on the card: {SPARE / GB:.0f} GB for CUDA's context, workspaces and fragmentation (a guess)"
    if around := picture_bytes(recipe, outline):
        yield (
            "text encoders and autoencoder are off the card during steps, as latents and embeddings are taken to be on "
            f"disk; a grid of samples takes {_size(around)} "
            f"beside what stays, {_size(found.resting + around)} in all"
        )
    first, other = (found.operations[turn] / 1e12 for turn in TURNS)
    cycle = found.cycle / 1e12
    yield (
        f"arithmetic: {first:.4g} TFLOP in the student's turn, {other:.4g} in the critic's; a cycle of "
        f"{recipe.student_every} {cycle:.4g}, {cycle / found.rows:.4g} a sample of the batch, "
        f"{found.cycle / found.forward / found.rows:.1f} passes of the teacher's network"
    )
    yield (
        f"at {tflops:g} TFLOP/s: {cycle / tflops / recipe.student_every:.2g} s a step on average, "
        f"{cycle / tflops / recipe.student_every * recipe.num_steps / 3600:.2g} hours for {recipe.num_steps:,}; "
        "at small batches launching kernels takes longer than they do"
    )
    if found.sent:
        kinds = ", ".join(f"{num:.1f} {kind}" for kind, num in found.messages.items())
        yield f"a rank sends in a mean step {_size(found.sent)} in messages round a ring ({kinds}), and small ones"
    if recipe.regression_weight:
        yield "the losses on pairs (regression_weight) are not counted: neither their memory nor their arithmetic"
    yield f"a checkpoint: {_size(found.checkpoint)}; the newest two and the best are kept"


def _advise(found: Plan, recipe: DistillRecipe, outline: Outline, asked: Order, card: int) -> None:
    """Whether it fits the card, and how it would, cheapest first: a search that ends at the first that does."""
    room = card - SPARE
    has = f"{card / GB:.1f} GB, {room / GB:.1f} without what is to spare"
    print(f"a card of {asked.memory}, taken as {card / 2**30:g} GiB, has {has}")
    if _needs(found, recipe, outline) <= room:
        num = recipe.num_parts(asked.num_ranks)
        size, parallel = found.rows // num, recipe.parallel.model_copy(update={"max_rows_per_part": None})
        of_so_many = {"accumulate": num, "parallel": parallel}
        # Whose reals are a whole number, too.
        larger = recipe.model_copy(update={"batch_size": 2 * recipe.batch_size} | of_so_many)
        each = (_plan(larger, outline, asked).peak - found.peak) / size
        most = size + int((room - found.peak) // max(each, 1))
        print(f"it fits; a further sample in a part takes {_size(each)}, so that parts of about {most:,} fit, too")
        return
    print("it does not fit; cheapest first, each with those above it:")
    settings: list[str] = []
    for more, what in changes(recipe, asked.num_ranks):
        with suppress(UserError):  # a rank that is above a layer's, say
            needs = _try(found, outline, asked, [*settings, *more], f"{' '.join(more)} ({what})")
            settings += more
            if needs <= room:
                last = {each.partition("=")[0]: each for each in settings}  # of two the second holds
                print(f"so this fits: {shlex.join(word for each in last.values() for word in ('--set', each))}")
                return
    print("none of these fits; take a larger card or a smaller model")


def changes(recipe: DistillRecipe, num_ranks: int = 1) -> Iterator[tuple[list[str], str]]:
    """Settings that take less memory, and what they change: first those that change no number."""
    rows, shared = recipe.batch_size // num_ranks, recipe.parallel.shard != "none"
    if recipe.num_parts(num_ranks) < rows:
        by_rows = recipe.parallel.max_rows_per_part
        yield ["parallel.max_rows_per_part=1" if by_rows else f"accumulate={rows}"], "the same numbers"
    if num_ranks > 1 and not shared:
        yield ["parallel.shard=full"], "the same numbers, of weights that ranks share"
    if num_ranks > 1 and recipe.parallel.keep_gathered:
        yield ["parallel.keep_gathered=false"], "the same numbers, of weights that are gathered for each pass"
    if recipe.checkpointing == "none" and recipe.gan.student_weight:
        yield ["checkpointing=gan"], "the same numbers, computed again"
    offloaded = recipe.student.optimizer.kind == "adamw"  # then or now
    if offloaded and not recipe.parallel.offload_student_optimizer:
        yield ["parallel.offload_student_optimizer=true"], "the same numbers, updated in main memory"
    if recipe.checkpointing != "blocks":
        yield ["checkpointing=blocks"], "the same numbers, computed again"
    if recipe.critic.optimizer.kind == "adamw":
        yield ["critic.optimizer.kind=adamw8bit"], "moments rounded to 8 bits; pip install fewstep[8bit]"
    if recipe.precision == "float32":
        yield ["precision=bfloat16"], "passes in bfloat16"
    if recipe.student.ema_decay != 0 and not offloaded:
        yield ["student.ema_decay=0"], "the weights as trained, not their average"
    if recipe.lora is None:
        alone = ["parallel.shard=none"] if shared or num_ranks > 1 else []
        yield [*alone, "lora={rank: 64}"], "low-rank weights in place of all"
    if recipe.lora is None or recipe.lora.targets == "official":
        yield ["lora.targets=lean"], "attention and feed-forward layers alone"
    if recipe.lora is None or recipe.lora.rank > 16:
        yield ["lora.rank=16"], "a smaller rank"


def _needs(found: Plan, recipe: DistillRecipe, outline: Outline) -> int:
    """Bytes of the larger of a step and a grid of samples."""
    return max(found.peak, found.resting + picture_bytes(recipe, outline))


def _try(found: Plan, outline: Outline, asked: Order, settings: list[str], told: str) -> int:
    """The bytes that the recipe needs with these settings, too, which are printed as soon as they are known."""
    recipe = load_recipe(asked.recipe, [*asked.set_, *settings])
    tried = _plan(recipe, outline, asked)
    needs = _needs(tried, recipe, outline)
    print(f"  {_size(needs)}, {tried.cycle / found.cycle:.2f} times the arithmetic: {told}", flush=True)
    return needs


def _size(num: float) -> str:
    """Bytes, in a unit of their own."""
    return f"{num / GB:.2f} GB" if num >= GB / 10 else f"{num / 1e6:.2f} MB"
