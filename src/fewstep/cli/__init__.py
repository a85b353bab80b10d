"""The command line's door: what Ctrl-C means is settled before anything heavy is imported."""

from fewstep.stopping import end_on_signals


def main() -> None:
    """Runs the command line of this process."""
    end_on_signals()
    from fewstep.cli.verbs import run  # which takes a moment

    run()
