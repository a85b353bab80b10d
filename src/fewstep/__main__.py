"""`python -m fewstep` is the command `fewstep`."""

from fewstep.cli import main

if __name__ == "__main__":  # which the demo's workers import, too
    main()
