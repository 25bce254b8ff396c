"""Entry point of `python -m qlora_cli` and of the `qlora` script; torchrun and accelerate launch it too."""

import sys

from qlora_cli.cli import app as commands


def main() -> None:
    """Runs the command line of this process and exits with its code."""
    sys.exit(commands.main())


if __name__ == "__main__":
    main()
