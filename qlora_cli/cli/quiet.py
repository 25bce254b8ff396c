"""Silence for libraries: their warnings, logs and progress bars are off while a command runs."""

import contextlib
import logging
import os
import sys
import threading
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
    libraries speak again afterwards, once the last of several calls in threads has ended."""
    with _CALLS.lock:
        if not _CALLS.running:
            _CALLS.silence.enter_context(_silence())
        _CALLS.running += 1
    try:
        yield
    finally:
        with _CALLS.lock:
            _CALLS.running -= 1
            if not _CALLS.running:
                _CALLS.silence.close()


class _Calls:
    """Those that run now; the first begins the silence, and the last ends it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.silence = contextlib.ExitStack()


_CALLS = _Calls()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    names = [name for name in LIBRARIES if VERBOSITY.get(name, "") not in os.environ]
    # What a library that is imported inside has by itself: those with a variable warn, the others ask the root.
    levels = {name: logging.getLogger(name).level or logging.WARNING * (name in VERBOSITY) for name in names}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(max(level, logging.ERROR))
    try:
        with _variables(dict.fromkeys(VERBOSITY.values(), "error")), warnings.catch_warnings(), _no_bars():
            warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)}|qlora_cli)(\.|$)")
            yield
    finally:
        for name, level in levels.items():
            logger = logging.getLogger(name)
            if logger.level == logging.ERROR:  # torch sets its own as it is imported
                logger.setLevel(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers and the hub inside the block, if they are imported: it takes a second, and a look
    at a run needs neither."""
    if "transformers" not in sys.modules:
        yield
        return
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers

    shown, of_hub = transformers.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    transformers.disable_progress_bar()  # and those of the hub
    try:
        yield
    finally:
        if shown:
            transformers.enable_progress_bar()
        (hub.enable_progress_bars if of_hub else hub.disable_progress_bars)()


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
