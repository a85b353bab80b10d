"""The command line. Heavy imports wait inside the verbs, so that --help is quick."""

import sys

from fewstep.cli import runs, images, exporting, importing, data  # the order of their verbs in --help
from fewstep.cli.app import app
from fewstep.errors import UserError

__all__ = ["app", "main"]


def main() -> None:
    """Runs the command line; what a user can mend is one line on standard error, without a traceback."""
    try:
        app()
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
