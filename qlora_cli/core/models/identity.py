"""Identity of a base model: digests of its configuration and weights, and how it is quantized."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import read_fields
from qlora_cli.core.storage.safetensors_header import LENGTH_BYTES, read_header


@dataclass(frozen=True)
class BaseIdentity:
    """What the adapter was trained on: enough to refuse another base of the same shapes.

    `weights_sha256` covers each safetensors header and, of every tensor, 4 KiB at its start, middle and end: a
    fine-tuned sibling differs everywhere, and reading whole weights would cost minutes.
    """

    model: str
    revision: str | None  # commit hash of a hub model, None for a directory
    config_sha256: str
    weights_sha256: str
    quant_type: str
    double_quant: bool
    compute_dtype: str

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "BaseIdentity":
        """Reads what `asdict` gave; unknown keys are ignored.

        Raises:
            ValueError: A field is missing, or no such value.
        """
        return read_fields(cls, content)


def config_digest(directory: Path, left_out: tuple[str, ...] = ()) -> str:
    """SHA-256 of a config.json, without what changes from one save to the next and without `left_out`."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for volatile in ("_name_or_path", "transformers_version", "use_cache", *left_out):
        config.pop(volatile, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def weights_digest(directory: Path) -> str:
    """SHA-256 over the headers and sampled bytes of a checkpoint's safetensors files.

    Raises:
        ModelError: A file is truncated or not safetensors.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        descriptor, header = read_header(path)
        with os.fdopen(descriptor, "rb") as stream:
            digest.update(header.content[LENGTH_BYTES:])
            for entry in header.entries.values():
                start, end = entry.start, entry.start + entry.total_bytes
                for position in (start, (start + end) // 2, max(start, end - 4096)):
                    stream.seek(position)
                    digest.update(stream.read(min(4096, end - position)))
    return digest.hexdigest()
