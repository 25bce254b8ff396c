"""Images, videos and sounds in rows: columns that hold them, by their name or by what is in them."""

import re
from typing import Any

from qlora_cli.core.records.record import Record

KINDS = {
    "an image": r"images?|imgs?|pictures?|photos?|pixel_?values",
    "a video": r"videos?",
    "a sound": r"audios?|waveforms?",
}
# What may stand behind such a word in a name: `image_path`, `audioUrl`, `images_b64`. A caption is text.
PLACE = r"(_?(path|file|file_?name|url|uri|bytes|data|b64|base64)s?)?_?\d*"
ENDS = {
    "an image": ("jpg", "jpeg", "png", "gif", "bmp", "webp", "tif", "tiff", "heic", "avif"),
    "a video": ("mp4", "mkv", "webm", "mov", "avi"),
    "a sound": ("wav", "mp3", "flac", "ogg", "opus", "m4a"),
}
_NAMES = {kind: re.compile(f"({words}){PLACE}", re.IGNORECASE) for kind, words in KINDS.items()}
_ENDS = {end: kind for kind, ends in ENDS.items() for end in ends}
BEGINNINGS = {b"\x89PNG": "an image", b"\xff\xd8\xff": "an image", b"GIF8": "an image"}
BEGINNINGS |= {b"RIFF": "a sound", b"ID3": "a sound", b"fLaC": "a sound", b"OggS": "a sound"}
LONGEST_NAME = 1000  # letters of a text that may be the name of a file


def named_like(column: str) -> str | None:
    """What a column is named after: "an image", "a video" or "a sound"; None for none of them."""
    return next((kind for kind, pattern in _NAMES.items() if pattern.fullmatch(column)), None)


def kind_of(value: Any) -> str | None:
    """What a value beyond doubt is, or each item of a list: bytes with a path as `datasets` stores images and sounds, a
    sound's numbers, a data URL, or the name of such a file alone."""
    if isinstance(value, list):
        kinds = {kind_of(item) for item in value}
        return kinds.pop() if len(kinds) == 1 else None
    if isinstance(value, dict):
        if {"array", "sampling_rate"} <= value.keys():
            return "a sound"
        if value and value.keys() <= {"bytes", "path"}:  # of nulls, Parquet leaves the key out
            return (
                kind_of(value.get("path")) or kind_of(value.get("bytes")) or ("an image" if "bytes" in value else None)
            )
        return None
    if isinstance(value, bytes):
        return next((kind for begins, kind in BEGINNINGS.items() if value.startswith(begins)), None)
    if not isinstance(value, str) or (len(value) > LONGEST_NAME and not value.startswith("data:")):
        return None
    if found := re.match(r"data:(image|video|audio)/", value):
        return {"image": "an image", "video": "a video", "audio": "a sound"}[found[1]]
    return None if re.search(r"\s", value) else _ENDS.get(value.split("?")[0].rpartition(".")[2].lower())


def holds_some(value: Any) -> bool:
    """Whether a value of a column named after images holds any: not nothing, a number, or yes or no."""
    if isinstance(value, list):
        return any(isinstance(item, int | float) or holds_some(item) for item in value)  # pixels are numbers
    return bool(value) and not isinstance(value, int | float)


def find_media(record: Record) -> tuple[str, str] | None:
    """The first field that is an image, a video or a sound beyond doubt, and which of them."""
    return next(((name, kind) for name, value in record.items() if (kind := kind_of(value))), None)
