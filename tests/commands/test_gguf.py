"""The way to GGUF: llama.cpp's own converter reads a merged model, and every number arrives.

Runs where LLAMA_CPP names a checkout of llama.cpp (its `convert_hf_to_gguf.py` needs the package sentencepiece):

    LLAMA_CPP=~/llama.cpp python -m pytest tests/commands/test_gguf.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.commands.merge_case import make_case
from tests.conftest import SHARED_DATA, write_model

CONVERTER = Path(os.environ.get("LLAMA_CPP", "llama.cpp")) / "convert_hf_to_gguf.py"
HEADS = 4


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Rows of queries and keys in llama.cpp's order: the two halves of each head's rotation side by side."""
    rows, columns = weight.shape
    return weight.view(HEADS, 2, rows // HEADS // 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.mark.skipif(not CONVERTER.is_file(), reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("tied", [False, True])
def test_the_converter_of_llama_cpp_reads_a_merged_model_bit_for_bit(tmp_path, tied) -> None:
    if not (SHARED_DATA / "gpt-neox-tokenizer.json").is_file():
        pytest.skip("a tokenizer that llama.cpp knows is not on this machine")
    base = write_model(tmp_path / "base", "llama", vocab_size=50304, tie_word_embeddings=tied)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED_DATA / "gpt-neox-tokenizer.json"), eos_token=end, bos_token=end, unk_token=end
    )
    tokenizer.save_pretrained(base)
    case = make_case(base, tmp_path)
    case.merge(dtype="float16")
    target = tmp_path / "model.gguf"
    command = [sys.executable, str(CONVERTER), str(case.output), "--outfile", str(target), "--outtype", "f16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(CONVERTER.parent / "gguf-py"))
    import gguf

    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(target).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    weights = load_file(case.output / "model.safetensors")
    assert ("lm_head.weight" in weights) != tied
    for name, weight in weights.items():
        place = names.get_name(name, try_suffixes=(".weight",))
        expected = interleaved(weight) if "q_proj" in name or "k_proj" in name else weight
        assert torch.equal(tensors.pop(place).float(), expected.float()), name
    assert not [name for name in tensors if "rope" not in name]
