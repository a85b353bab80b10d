"""The command line's door: what Ctrl-C means is settled before anything is imported, for that is when it comes."""

import _signal  # type: ignore[import-not-found]  # `signal` imports others itself, a hundredth of a second long
import os


def main() -> None:
    """Runs the command line of this process."""
    for each in (_signal.SIGINT, _signal.SIGTERM):
        if _signal.getsignal(each) != _signal.SIG_IGN:  # by a shell, of what it starts in the background
            _signal.signal(each, _end_at_once)
    from fewstep.stopping import end_on_signals

    end_on_signals()
    from fewstep.cli.verbs import run  # which takes a moment

    run()


def _end_at_once(number: int, frame: object) -> None:
    os.write(2, b"fewstep: stopped\n")
    os._exit(128 + number)
