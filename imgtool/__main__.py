"""The console script, and `python -m imgtool`: the command line, loaded where Ctrl-C is caught."""

import sys


def main() -> None:
    """Load the command line, which takes the first tenth of a second, and run it."""
    try:
        from imgtool import cli
    except KeyboardInterrupt:
        sys.stderr.write("imgtool: error: interrupted\n")
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
