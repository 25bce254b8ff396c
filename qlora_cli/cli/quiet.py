"""Silence for libraries: their warnings, logs and progress bars are off while a command runs."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

VERBOSITY = {  # of a library, the variable that says what it logs
    "datasets": "DATASETS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "transformers": "TRANSFORMERS_VERBOSITY",
}
LIBRARIES = (*VERBOSITY, "accelerate", "bitsandbytes", "peft", "torch")
ENVIRONMENT = {
    **dict.fromkeys(VERBOSITY.values(), "error"),
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",  # worker processes start with fresh filters
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block no library writes to the terminal; what one prints to stdout goes to stderr.

    Has to be entered before the command's module is imported, since libraries read these variables once. A variable
    that the user has set stays as it is.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # one switch for every logger, bitsandbytes' missing-kernel notes included
    try:
        with _variables(ENVIRONMENT), warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def quiet_call() -> Iterator[None]:
    """As `quiet_libraries`, in a process that is somebody else's: what others log, warn of and print goes on, and the
    libraries speak again afterwards."""
    loggers = [logging.getLogger(name) for name in LIBRARIES if VERBOSITY.get(name, "") not in os.environ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with _variables(dict.fromkeys(VERBOSITY.values(), "error")), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)}|qlora_cli)(\.|$)")
            from transformers.utils import logging as bars  # those of the hub, too

            shown = bars.is_progress_bar_enabled()
            bars.disable_progress_bar()
            try:
                yield
            finally:
                if shown:
                    bars.enable_progress_bar()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Inside the block these stand in the environment, but for those that the user has set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
