"""Silence for libraries: their warnings, logs and progress bars are off while a command runs."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",  # worker processes start with fresh filters
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block no library writes to the terminal; what one prints to stdout goes to stderr.

    Has to be entered before the command's module is imported, since libraries read these variables once. A variable
    that the user has set stays as it is.
    """
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # one switch for every logger, bitsandbytes' missing-kernel notes included
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for name in added:
            os.environ.pop(name, None)
