"""Local hub cache with small models and data sets under the names of real ones, for tests that run offline."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.conftest import write_model

COMMIT = "a" * 40
PROJECT = Path(__file__).resolve().parents[1]

QUOTES = [
    ("Be yourself; everyone else is already taken.", "Oscar Wilde", ["be-yourself", "honesty"]),
    ("A room without books is like a body without a soul.", "Marcus Tullius Cicero", ["books", "soul"]),
    ("You only live once, but if you do it right, once is enough.", "Mae West", ["humor", "life"]),
    ("In three words I can sum up everything I've learned about life: it goes on.", "Robert Frost", ["life"]),
]


def lay_snapshot(hub: Path, kind: str, name: str) -> Path:
    """An empty snapshot of `kind` (models, datasets) as huggingface_hub's cache keeps it; returns its directory."""
    folder = hub / f"{kind}--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def lay_model(hub: Path, name: str, architecture: str) -> None:
    """A random model of an architecture, in 16 bits as most on the hub are."""
    write_model(lay_snapshot(hub, "models", name), architecture, dtype="float16")


def lay_rows(hub: Path, name: str, file: str, rows: Iterable[dict[str, Any]]) -> None:
    """A data set of one JSON Lines file."""
    with (lay_snapshot(hub, "datasets", name) / file).open("w", encoding="utf-8") as stream:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), file=stream)


def lay_quotes(hub: Path) -> None:
    """`Abirate/english_quotes`: columns quote, author, tags."""
    rows = [{"quote": f"“{quote}”", "author": author, "tags": tags} for quote, author, tags in QUOTES * 8]
    lay_rows(hub, "Abirate/english_quotes", "quotes.jsonl", rows)
