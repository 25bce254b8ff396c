import qlora_cli.core.bnb  # noqa: F401 - before peft, which imports bitsandbytes with the compiler
