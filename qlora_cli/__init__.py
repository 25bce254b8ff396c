"""QLoRA fine-tuning from the command line: the package version and nothing else."""

__version__ = "0.1.0"
