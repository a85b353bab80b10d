"""The verbs: each takes its class of options and imports what does the work when it is called."""

import errno
import inspect
import json
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

import fewstep
import fewstep.commands.options_files  # whose verbs stand behind the others
from fewstep.commands.options import VERBS, Verb
from fewstep.errors import LOST, Lost, UserError, brief, out_of_memory
from fewstep.runtime.ends import has_met, told_by_another
from fewstep.runtime.launching import LAUNCHED, first_to_tell, launch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a diffusion model into a one- to four-step generator (DMD2).",
    epilog="Example: fewstep demo",
)
DEBUG = "--debug"
USAGE: Any = typer.BadParameter.__base__  # of click, or of typer's own copy of it
LONGEST = 800  # letters of a line
GROUPS = {
    "import": typer.Typer(no_args_is_help=True, help="Bring in models from elsewhere."),
    "data": typer.Typer(no_args_is_help=True, help="Prepare data for runs."),
}


def run() -> None:
    """Runs the command line; what a user can mend is one line on standard error, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of terminals that are not UTF-8
    debug = DEBUG in sys.argv
    sys.argv = [word for word in sys.argv if word != DEBUG]  # wherever it stands
    if "WORLD_SIZE" in os.environ and not debug:  # else a rank that misses others tells it in a hundred lines
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = _told(error)
        if line is None and not isinstance(error, USAGE):
            raise
        if debug:
            traceback.print_exc()
        if line and not _told_elsewhere(error, line):
            _tell(_in_one_line(line))
        lost = isinstance(error, Lost) and LAUNCHED in os.environ
        sys.exit(LOST if lost else getattr(error, "exit_code", UserError.exit_code))
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # of `| head`; Python's own flush must not meet it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told_elsewhere(error: Exception, line: str) -> bool:
    """Whether another process tells it: of ranks the one that was first to, or theirs that started them."""
    if place := os.environ.get(LAUNCHED):
        return isinstance(error, Lost) or not first_to_tell(Path(place), line)
    return told_by_another(line, isinstance(error, Lost))


def _tell(line: str) -> None:
    """On standard error and in torchrun's report; of ranks that have met no other only the first in both."""
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            told = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(report).write_text(json.dumps({"message": told}))
    if not report or has_met() or os.environ.get("RANK") == "0":
        print(f"fewstep: {line}", file=sys.stderr)


def _told(error: Exception) -> str | None:
    """The line for an error that a user can mend; None of others."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _of_a_file(error)
    if isinstance(error, USAGE):
        help = type(error).__name__ == "NoArgsIsHelpError"  # which is the whole of it
        return error.show() if help else f"{' '.join(error.format_message().split()).rstrip('.')}; see --help"
    told = out_of_memory(error)
    return told and f"{told}; close other programs, ask for less at once, or take --device cpu"


def _in_one_line(text: str) -> str:
    """Without what would break or colour the line, and without the middle of what is too long to be read."""
    plain = text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST // 2]} ... {plain[-LONGEST // 2 :]}"


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"fewstep {fewstep.__version__}")
        raise typer.Exit


@app.callback()
def _of_all_verbs(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_tell_version)] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show where an error comes from; with every verb.")] = False,
) -> None: ...


def _of_a_file(error: OSError) -> str:
    """The file, where the error names it, and what the system said."""
    what = "written" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) else "read or written"
    return f"{error.filename or 'a file'}: can't be {what} ({error.strerror or brief(error)})"


def add(group: typer.Typer, name: str, verb: Verb) -> None:
    """Adds a verb to a group: its options are the fields of its class, its help is the docstring of it."""

    def call(**typed: Any) -> None:
        given = {key: at_home(value) if is_place(hints[key]) else value for key, value in typed.items()}
        order, (module, work) = verb.order(**given), verb.work.split(".")
        arguments = order.arguments()
        if num := order.processes:
            _check_alone(num)
            raise typer.Exit(launch(_without_ranks(sys.argv[1:]), num))
        getattr(import_module(f"fewstep.commands.{module}"), work)(*arguments)

    hints = get_type_hints(verb.order, include_extras=True)
    parameters = [parameter(each, hints[each.name]) for each in fields(verb.order)]  # type: ignore[arg-type]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    text = verb.order.__doc__ or ""
    group.command(name, help=text, short_help=text.split(": ")[0], epilog=f"Example: {verb.example}")(call)


def _check_alone(num: int) -> None:
    """Raises UserError where this process is one of several already, each of which would start so many."""
    if (there := os.environ.get("WORLD_SIZE", "1")) != "1":
        told = f"torchrun has started {there} ranks already (WORLD_SIZE), of which each would start {num}"
        raise UserError(f"--ranks {num}: {told}; leave it out")


def _without_ranks(words: list[str]) -> list[str]:
    """A command line as each of the ranks is given it."""
    at = [index for index, word in enumerate(words) if word == "--ranks"]
    left = [word for index, word in enumerate(words) if index not in {*at, *(i + 1 for i in at)}]
    return [word for word in left if not word.startswith("--ranks=")]


def is_place(hint: Any) -> bool:
    """Whether an option of this type is a path, or a text that is marked as one."""
    return hint in (Path, "a place") or any(is_place(each) for each in get_args(hint))


def at_home(value: Any) -> Any:
    """With the home folder in the place of `~`, which no shell expands behind `--out=`."""
    if isinstance(value, list):
        return [at_home(each) for each in value]
    return value if value is None else type(value)(os.path.expanduser(value))


def parameter(of: Field[Any], hint: Any) -> inspect.Parameter:
    """What typer makes an option or an argument of."""
    default = of.default if of.default_factory is MISSING else of.default_factory()
    default = inspect.Parameter.empty if default is MISSING else default
    annotation = Annotated[hint, of.metadata["option"]] if of.metadata else hint
    return inspect.Parameter(of.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


for words, verb in VERBS.items():
    *above, name = words.split()
    add(GROUPS[above[0]] if above else app, name, verb)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
