"""Errors a user can mend: one sentence, the next thing to type, and the exit code of each kind."""

import re


class QloraError(Exception):
    """A failure reported to the user in one sentence, without a traceback.

    Args:
        message: What was wrong and what was found, as one sentence.
        hint: What to type or change next.
    """

    exit_code = 1
    reported = False  # by another of several ranks, so that only one shows it

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QloraError):
    """The command line or the configuration file cannot be understood."""

    exit_code = 2


class DataError(QloraError):
    """A data source is missing, unreadable, or holds a row that cannot be trained on."""


class ModelError(QloraError):
    """A base model or tokenizer cannot be found, downloaded, read or quantised."""


class AdapterError(QloraError):
    """An adapter cannot be attached, read, or does not belong to this base."""


class RunError(QloraError):
    """A run, prepared or merged directory is not what the command needs it to be."""


class CheckpointError(QloraError):
    """No checkpoint verifies, or a checkpoint belongs to other settings."""


class TrainingError(QloraError):
    """Training cannot go on: non-finite numbers, no memory left to give."""


class RankLost(QloraError):
    """One of the processes that share a run has ended; the others end too."""


class MergeError(QloraError):
    """The merged model is not the trained one, or could not be written."""


class DoesNotFit(QloraError):
    """The predicted memory exceeds what there is."""

    exit_code = 3


class DiskFull(QloraError):
    """The disk cannot take what has to be written (EX_IOERR of sysexits.h)."""

    exit_code = 74


class Interrupted(QloraError):
    """Stopped by a signal after saving: exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error's message without the system's number of it, 200 characters at most; the name of its
    class where it has none."""
    text = re.sub(r"\[Errno -?\d+\] ", "", str(error))
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
