"""The command line's door: what Ctrl-C means is settled before anything is imported, for that is when it comes."""

import os
import signal


def main() -> None:
    """Runs the command line of this process."""
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) != signal.SIG_IGN:  # by a shell, of what it starts in the background
            signal.signal(each, _end_at_once)
    from fewstep.stopping import end_on_signals

    end_on_signals()
    from fewstep.cli.verbs import run  # which takes a moment

    run()


def _end_at_once(number: int, frame: object) -> None:
    os.write(2, b"fewstep: stopped\n")
    os._exit(128 + number)
