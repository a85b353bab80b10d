"""`fewstep data pairs`: noise and what a teacher's ODE makes of it."""

from fewstep.commands.drawing import check_sampler, draw_pairs
from fewstep.commands.options_files import Pairs
from fewstep.commands.places import check_writable, tell_done
from fewstep.errors import UserError
from fewstep.models.loading.pretrained import open_model
from fewstep.models.sampler import parse_sampler
from fewstep.networks.families import use_family
from fewstep.networks.precision import INFERENCE_DTYPES
from fewstep.runtime.tracking import Report


def pairs(given: Pairs, report: Report | None = None) -> None:
    """Draws this rank's share of pairs into a folder, or goes on with it; prints what is there."""
    out = given.out
    check_writable(out)
    sampler = parse_sampler(given.sampler)
    if given.precision not in INFERENCE_DTYPES:
        raise UserError(f"--precision {given.precision!r}: write {', '.join(INFERENCE_DTYPES)}")
    use_family(given.family)
    model = open_model(given.teacher, given.teacher_config)
    if model.timesteps:
        raise UserError(f"--teacher {given.teacher}: is a few-step student; name its teacher")
    check_sampler(model, sampler)
    if missing := draw_pairs(model, given, sampler, report):
        print(f"{out}: done; {missing} files of other ranks are not there yet")
    else:
        tell_done(f"{out}, {given.num:,} pairs", f"distill RECIPE --set regression.pairs={out}")
