"""`python -m qlora_cli` and the `qlora` script in, an exit code out; also what torchrun and accelerate launch."""

import sys

from qlora_cli.cli import app as commands


def main() -> None:
    """Runs the command line of this process and exits with its code."""
    sys.exit(commands.main())


if __name__ == "__main__":
    main()
