"""A home directory for a user who has none or may not write there, as in containers that run under any number for a user."""

import os
from contextlib import suppress
from pathlib import Path

CONTAINERS_HOME = "/"  # what docker sets for a user without an entry in /etc/passwd
TRITON = ("TRITON_CACHE_DIR", "TRITON_HOME")


def settle_home() -> None:
    """Names a home where the system knows none, and a directory for Triton's compiled kernels where `~/.triton` cannot be
    written, before the libraries look; torch's own go to the temporary directory at all times."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.environ.setdefault("HOME", CONTAINERS_HOME))
    if any(map(os.environ.get, TRITON)) or may_write(home / ".triton" / "cache"):
        return
    import tempfile

    with suppress(OSError):  # where nothing can be written, what needs it says so
        place = Path(tempfile.gettempdir(), f"triton-{os.getuid()}")
        place.mkdir(mode=0o700, exist_ok=True)
        if place.stat().st_uid != os.getuid():  # what is compiled is run: from nobody else's directory
            place = Path(tempfile.mkdtemp(prefix="triton-"))
        os.environ[TRITON[0]] = str(place)


def may_write(path: Path) -> bool:
    """Whether this user may write in a directory, or make it where it is not there yet."""
    for place in (path, *path.parents):
        with suppress(OSError):  # not there, or in a directory that is closed to this user
            place.stat()
            return os.access(place, os.W_OK | os.X_OK)
    return False
