"""Entry point of `python -m qlora_cli` and of the `qlora` script; torchrun and accelerate launch it too."""

import sys

from qlora_cli import interrupts

interrupts.install()  # before anything that takes time to import

from qlora_cli.home import settle_home  # noqa: E402

settle_home()

from qlora_cli.cli.waiting import FIRST_SIGN  # noqa: E402

FIRST_SIGN.show()

from qlora_cli.cli.app import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
