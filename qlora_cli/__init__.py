"""QLoRA fine-tuning, from the command line and from Python: `from qlora_cli import TrainConfig, train`."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_CONFIGS = ("PrepareConfig", "TrainConfig", "MergeConfig", "GenerateConfig", "InspectConfig")
_COMMANDS = ("prepare", "train", "merge", "generate", "inspect")
_PLACES = dict.fromkeys(_CONFIGS, "config") | dict.fromkeys(_COMMANDS, "api") | {"QloraError": "errors"}

__all__ = [*_PLACES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Public names, imported when they are asked for: the command line starts without them."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
