"""Imports bitsandbytes as `core/bnb.py` does; to be imported before peft, which imports it with torch's compiler."""

from qlora_cli.core.bnb import load

load()
